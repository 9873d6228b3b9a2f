"""A run as a small file, and the model of base and file."""

import dataclasses
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import (
  build,
  defaults,
  fine_tune,
  models,
  replayer,
  run_log,
  seeds_file,
)
from experiments.config import UsageError, from_mapping
from experiments.workdir import Workdir
from jaxfl import keys
from jaxfl.digest import digest
from jaxfl.models import native, transformer
from jaxfl.models.config import Config
from tests.models.hf_tools import FIXTURES
from tests.test_experiments import environment as environment
from tests.test_experiments import launch

pytestmark = pytest.mark.fast_compile
SLOW = pytest.mark.slow

SHAPE = Config(
  vocab_size=256, num_layers=1, model_dim=128, num_heads=2, num_kv_heads=2,
  head_dim=64, mlp_dim=128, norm='rms',
)  # fmt: skip
# two matrices are quick to compile
SMALL = {
  'num_clients': 2, 'num_rounds': 2, 'sequence_length': 16, 'adapter': 'lora',
  'lora_rank': 64, 'lora_targets': 'layers/mlp/up/kernel',
}  # fmt: skip
POOL = {'method': 'fedkseed', 'num_seeds': 4096, 'local_steps': 2}
RUNS = {
  'spsa': {'method': 'spsa', 'num_perturbations': 2},
  'rademacher': POOL | {'num_seeds': 64, 'weight_decay': 0.1},
  'walsh': POOL | {'distribution': 'walsh'},
  'ferret': {'method': 'ferret', 'coordinates': 64, 'local_steps': 1},
}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A byte model in the project's own layout."""
  place = tmp_path_factory.mktemp('model') / 'bytes'
  native.save(place, SHAPE, transformer.init(SHAPE, jax.random.key(0)))
  return place


def make_run(directory, base, **settings):
  """A run of two rounds in which clients send what is made up.

  Returns:
    The digest of its weights.
  """
  config = defaults.resolve(
    from_mapping(SMALL | {'model': str(base)} | settings)
  )
  method = build.build_method(config, build.no_loss)
  found = models.load_model(config, 'lm')
  _, params, frozen = models.adapt(config, found)
  task = types.SimpleNamespace(digest='')
  run: Any = types.SimpleNamespace(
    task=task, params=params, frozen=frozen, shape=found.shape
  )
  header = run_log.header_of(config, method, run)
  rng = np.random.default_rng(0)

  def sent(x):
    if x.dtype == np.uint8:  # codes
      return rng.integers(40, 80, (2, *x.shape), np.uint8)
    return rng.random((2, *x.shape)).astype(x.dtype)

  with run_log.open_log(header, Workdir(directory), run) as log:
    for round in range(2):
      messages = jax.tree.map(sent, method.message(params))
      log.append(round, [0, 1], [1, 1], messages)
  return digest(replayer.rebuild(directory)[0])


@pytest.fixture(scope='module')
def run(model, tmp_path_factory):
  """Makes a run of a name, once: its directory and its digest."""
  made = {}

  def make(name):
    if name not in made:
      directory = tmp_path_factory.mktemp(name)
      made[name] = directory, make_run(directory, model, **RUNS[name])
    return made[name]

  return make


def passed_on(seeds):
  """What is read from the file."""
  return seeds_file.decode(seeds_file.encode(seeds))


@pytest.mark.parametrize(
  ('name', 'form', 'found'),
  [
    ('spsa', 'auto', 'log'),
    pytest.param('rademacher', 'auto', 'coordinates', marks=SLOW),
    ('walsh', 'coordinates', 'coordinates'),
    pytest.param('ferret', 'log', 'log', marks=SLOW),
    ('ferret', 'weights', 'weights'),
  ],
)
def test_a_rebuild_has_the_digest_of_the_run(name, form, found, run):
  directory, expected = run(name)
  seeds = passed_on(fine_tune.make(directory, form))
  assert seeds.form == found
  base = fine_tune.load_base(seeds)
  assert seeds.rounds == 2
  rebuilt = digest(fine_tune.weights(seeds, base.trainable))
  assert rebuilt == seeds.digest == expected != seeds.base_digest


def test_tensors_that_are_rebuilt_alone_give_the_same_bits(run, monkeypatch):
  seeds = fine_tune.make(run('walsh')[0], 'coordinates')
  base = dict(keys.named_leaves(fine_tune.load_base(seeds).trainable))
  assert len(fine_tune._parts(base)) == 1  # the small ones together
  monkeypatch.setattr(fine_tune, '_LARGE', 1)
  assert len(fine_tune._parts(base)) == 2
  assert digest(fine_tune.weights(seeds, base)) == seeds.digest


def pooled(run, coordinates):
  """A file with these coordinates."""
  seeds = fine_tune.make(run('walsh')[0], 'coordinates')
  state = type('State', (), {'coordinates': coordinates, 'base_scale': 1 << 30})
  return fine_tune._pool(seeds, state, 'walsh'), state


def test_a_pool_of_4096_fits_in_18_and_5_kilobytes(run):
  """Of any coordinates: these can't be packed."""
  rng = np.random.default_rng(0)
  worst = rng.integers(-(2**30), 2**30, 4096).astype(np.int32)
  seeds, state = pooled(run, worst)
  assert 16_384 < len(seeds_file.encode(seeds)) <= 18_000
  np.testing.assert_array_equal(passed_on(seeds).coordinates, worst)
  as_bytes = dataclasses.replace(seeds, form='bytes')
  as_bytes = fine_tune._pool(as_bytes, state, 'walsh')
  assert 4096 < len(seeds_file.encode(as_bytes)) <= 5_000
  error = passed_on(as_bytes).coordinates - worst.astype(np.int64)
  assert as_bytes.shift == 23 + 1
  assert np.abs(error).max() <= 1 << (as_bytes.shift - 1)


def test_bytes_are_near_the_run_and_have_a_digest_of_their_own(run):
  directory, expected = run('walsh')
  exact = fine_tune.make(directory, 'coordinates')
  seeds = passed_on(fine_tune.make(directory, 'bytes'))
  base = fine_tune.load_base(seeds).trainable
  found = fine_tune.weights(seeds, base)
  assert digest(found) == seeds.digest != expected
  wanted = fine_tune.weights(exact, base)
  start = dict(keys.named_leaves(base))
  difference = lambda x, y: np.sqrt(
    sum(np.sum((np.asarray(x[k]) - np.asarray(y[k])) ** 2) for k in start)
  )
  assert difference(found, wanted) < 0.01 * difference(wanted, start)


def test_rounding_to_bytes():
  for limit, shift in ((127, 0), (128, 1), (2**30 - 1, 23)):
    x = np.array([limit, -limit, 0, limit // 3], np.int32)
    found, unit = seeds_file.round_to_bytes(x)
    assert unit in (shift, shift + 1)
    error = (found.astype(np.int64) << unit) - x
    assert np.abs(error).max() <= (1 << unit) / 2
  assert seeds_file.round_to_bytes(np.zeros(3, np.int32))[1] == 0


def test_another_base_is_refused_by_its_digest(run, model, tmp_path):
  seeds = fine_tune.make(run('spsa')[0])
  other = tmp_path / 'other'
  params = transformer.init(SHAPE, jax.random.key(1))
  native.save(other, SHAPE, params)
  with pytest.raises(UsageError, match='not what it was .* digest'):
    fine_tune.load_base(seeds, str(other))
  wrong = dataclasses.replace(seeds, base_digest=64 * '0')
  with pytest.raises(UsageError, match='another base'):  # what is trained
    fine_tune.load_base(wrong)
  shape = dataclasses.replace(SHAPE, norm_eps=1e-3)
  native.save(other, shape, params)
  with pytest.raises(UsageError, match='another shape'):
    fine_tune.load_base(seeds, str(other))
  with pytest.raises(UsageError, match='nowhere'):
    fine_tune.load_base(seeds, str(tmp_path / 'nowhere'))
  shutil.copytree(model, tmp_path / 'moved')
  moved = fine_tune.load_base(seeds, str(tmp_path / 'moved'))
  assert digest(moved.trainable) == seeds.base_digest


def test_forms_that_a_method_lacks(run):
  with pytest.raises(UsageError, match='for seed pools .* spsa has none'):
    fine_tune.make(run('spsa')[0], 'coordinates')


def test_a_damaged_file_is_refused(run, tmp_path):
  data = seeds_file.encode(fine_tune.make(run('spsa')[0]))
  path = tmp_path / 'x.seeds'
  rng = np.random.default_rng(0)
  for at in rng.integers(9, len(data), 20):
    path.write_bytes(data[:at])
    with pytest.raises(UsageError, match='damaged or truncated'):
      seeds_file.read(path)
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    with pytest.raises(UsageError, match=r'x\.seeds: damaged or truncated'):
      seeds_file.read(path)
  for wrong, message in (
    (b'', 'not a file of'),
    (b'\x80' + data, 'not a file of'),
    (data[:8] + b'\x02' + data[9:], 'version 2; this program reads version 1'),
  ):
    path.write_bytes(wrong)
    with pytest.raises(UsageError, match=message):
      seeds_file.read(path)
  with pytest.raises(UsageError, match='No such file'):
    seeds_file.read(tmp_path / 'missing')


def test_a_file_of_another_contract_is_refused(run):
  seeds = fine_tune.make(run('spsa')[0])
  other = seeds_file.encode(dataclasses.replace(seeds, spec='dice/1'))
  with pytest.raises(ValueError, match="under 'dice/1'"):
    seeds_file.decode(other)


def test_the_commands_give_what_transformers_loads(environment, tmp_path):
  """A model of the hub's layout, which has moved since."""
  base, moved, out = (tmp_path / name for name in ('base', 'moved', 'out'))
  shutil.copytree(FIXTURES / 'opt', base)
  (tmp_path / 'run').mkdir()
  expected = make_run(
    tmp_path / 'run', base, lora_targets='*attention/q/kernel', lora_rank=2
  )
  file = str(tmp_path / 'x.seeds')
  base.rename(moved)
  done = launch(
    'export', f'--workdir={tmp_path / "run"}', f'--out={file}',
    environment=environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert f'digest {expected}' in done.stdout
  done = launch(
    'rebuild', file, f'--out={out}', f'--base_model={moved}',
    environment=environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert f'digest {expected}' in done.stdout
  there, here = (load_file(x / 'model.safetensors') for x in (moved, out))
  changed = {k for k in there if not np.array_equal(there[k], here[k])}
  assert set(here) == set(there)
  assert changed
  assert all(k.endswith('q_proj.weight') for k in changed)
  done = launch('rebuild', file, '--out=x', environment=environment)
  assert done.returncode == 1
  assert f'error: base {str(base)!r}' in done.stderr
  assert 'Traceback' not in done.stderr
