"""A run as a small file, and the model of base and file."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import defaults, fine_tune, models, runner, seeds_file
from experiments.config import UsageError, from_mapping
from jaxfl import keys
from jaxfl.digest import digest
from jaxfl.models import hf, native, transformer
from jaxfl.models.config import Config
from tests.models.hf_tools import FIXTURES
from tests.test_experiments import environment as environment
from tests.test_experiments import launch

SHAPE = Config(
  vocab_size=256, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2,
  head_dim=8, mlp_dim=32, norm='rms',
)  # fmt: skip
SMALL = {
  'num_clients': 2, 'num_rounds': 2, 'sequence_length': 16, 'eval_every': 2,
  'eval_batch_size': 4, 'eval_examples': 4, 'batch_size': 1,
}  # fmt: skip
POOL = {'method': 'fedkseed', 'num_seeds': 4096, 'local_steps': 2}
RUNS = {
  'spsa': {'method': 'spsa', 'num_perturbations': 2},
  'rademacher': POOL | {'weight_decay': 0.1},
  'walsh': POOL | {'distribution': 'walsh'},
  'ferret': {'method': 'ferret', 'coordinates': 64, 'local_steps': 1},
}


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """A byte model and text for two clients."""
  place = tmp_path_factory.mktemp('places')
  params = transformer.init(SHAPE, jax.random.key(0))
  native.save(place / 'model', SHAPE, params)
  for client in 'ab':
    (place / 'text' / client).mkdir(parents=True)
    lines = [f'line {i} of client {client}\n' for i in range(100)]
    (place / 'text' / client / 'text').write_text(''.join(lines))
  return place


@pytest.fixture(scope='module')
def run(places, tmp_path_factory):
  """Makes the run of a name, once: its directory and its summary."""
  made = {}

  def make(name):
    if name not in made:
      data = {'model': str(places / 'model'), 'dataset': str(places / 'text')}
      config = defaults.resolve(from_mapping(SMALL | data | RUNS[name]))
      directory = tmp_path_factory.mktemp('runs') / name
      made[name] = directory, runner.run(config, directory)
    return made[name]

  return make


def passed_on(seeds):
  """What is read from the file."""
  return seeds_file.decode(seeds_file.encode(seeds))


@pytest.mark.parametrize(
  ('name', 'form'),
  [
    ('spsa', 'auto'),
    ('rademacher', 'auto'),
    ('rademacher', 'coordinates'),
    ('walsh', 'coordinates'),
    ('ferret', 'log'),
    ('ferret', 'weights'),
  ],
)
def test_a_rebuild_has_the_digest_of_the_run(name, form, run):
  directory, summary = run(name)
  seeds = passed_on(fine_tune.make(directory, form))
  # two rounds are less than the coordinates and the weights
  assert seeds.form == ('log' if form == 'auto' else form)
  base = fine_tune.load_base(seeds)
  assert seeds.base_digest == summary['base_digest']
  assert seeds.rounds == 2
  found = digest(fine_tune.weights(seeds, base.trainable))
  assert found == seeds.digest == summary['digest'] != seeds.base_digest


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
  directory, summary = run('walsh')
  exact = fine_tune.make(directory, 'coordinates')
  seeds = passed_on(fine_tune.make(directory, 'bytes'))
  base = fine_tune.load_base(seeds).trainable
  found = fine_tune.weights(seeds, base)
  assert digest(found) == seeds.digest != summary['digest']
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


def test_another_base_is_refused_by_its_digest(run, places, tmp_path):
  seeds = fine_tune.make(run('spsa')[0])
  other = tmp_path / 'other'
  params = transformer.init(SHAPE, jax.random.key(1))
  native.save(other, SHAPE, params)
  with pytest.raises(UsageError, match='another base'):
    fine_tune.load_base(seeds, str(other))
  shape = dataclasses.replace(SHAPE, norm_eps=1e-3)
  native.save(other, shape, params)
  with pytest.raises(UsageError, match='is not what it was'):
    fine_tune.load_base(seeds, str(other))
  with pytest.raises(UsageError, match='nowhere'):
    fine_tune.load_base(seeds, str(tmp_path / 'nowhere'))
  shutil.copytree(places / 'model', tmp_path / 'moved')
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


def test_the_commands(environment, places, tmp_path):
  """A Hugging Face model, LoRA factors alone, there and back."""
  rows = [f'good {i},1\nbad {i},0\n' for i in range(8)]
  data = tmp_path / 'data.csv'
  data.write_text('text,label\n' + ''.join(rows))
  source = tmp_path / 'base'
  shutil.copytree(FIXTURES / 'opt', source)
  found = hf.load(source)
  print(found.config)
