"""The benchmarks: what they report, on fake times and on tiny sizes."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.benchmarks import (
  floors,
  kernels,
  machine,
  memory,
  show,
  simulate,
  step,
  tensors,
  timing,
  torch_loops,
)

ROOT = pathlib.Path(__file__).parents[1]
PREDICTIONS = ROOT / 'experiments/results/benchmark_predictions.json'
SHAPES = {'w': (64, 128), 'b': (128,)}


def operation(name, seconds=0.0, **kwargs):
  kwargs = {'on': 'x', 'work': 2.0, 'unit': 'G/s'} | kwargs
  run = lambda: time.sleep(seconds)
  return timing.Operation(name=name, run=run, **kwargs)


def test_a_row_has_rates_rivals_floor_and_target(monkeypatch):
  times = {('x', 'a'): [4.0, 1.0, 2.0], ('x', 'b'): [8.0], ('', 'c'): [0.5]}
  monkeypatch.setattr(timing, 'take_turns', lambda operations, repeats: times)
  floor = lambda seconds: (min(seconds['', 'c']), 'c')
  operations = [
    operation('a', floor=floor, rivals=('b', 'absent')),
    operation('b', shown=False),
    operation('c', on='', shown=False),
  ]
  targets = {'cpu': {'a on x': ('rate', 1.5), 'a': ('rate', 1.0)}}
  (row,) = timing.rows(operations, 3, targets, {'a': 7.0})
  assert row['seconds'] == 2.0
  assert row['best_seconds'] == 1.0
  assert row['rate'] == 1.0
  assert row['best_rate'] == 2.0
  assert row['rivals'] == {'b': {'rate': 0.25, 'ours': 4.0}}
  assert row['floor_rate'] == 4.0
  assert row['of_floor'] == 0.25
  assert row['floor'] == 'c'
  assert row['predicted'] == 7.0
  assert row['target'] == {'kind': 'rate', 'value': 1.5, 'met': False}


@pytest.mark.parametrize(
  ('target', 'met'),
  [
    (('rate', 1.0), True),
    (('seconds', 2.0), True),
    (('seconds', 1.9), False),
    (('of_floor', 0.5), None),  # there is no floor
  ],
)
def test_targets(monkeypatch, target, met):
  times = {('x', 'a'): [2.0]}
  monkeypatch.setattr(timing, 'take_turns', lambda operations, repeats: times)
  (row,) = timing.rows([operation('a')], 1, {'cpu': {'a': target}}, {})
  assert row['target'].get('met') is met


def test_operations_take_turns_and_long_ones_stop(monkeypatch):
  order = []
  first = lambda name: timing.Operation(
    name=name, on='', run=lambda: order.append(name), work=1, unit=''
  )
  clock = iter(np.arange(100) * 3.0)  # every call takes three seconds
  monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
  seconds = timing.take_turns([first('a'), first('b')], 5)
  assert order == ['a', 'b'] * 4
  assert seconds['', 'a'] == [3.0] * 3


def test_the_same_name_twice_is_refused():
  with pytest.raises(ValueError, match='two operations'):
    timing.take_turns([operation('a'), operation('a')], 1)


def test_a_floor_is_memory_or_operations():
  size = floors.sizes()
  measured = {
    ('x', 'w + c'): [1.0, 2.0],  # two passes; the best counts
    ('core', 'hash'): [size.hashes * size.lanes / 64],  # 1 / 64 s each
    ('core', 'sign'): [size.signs * size.lanes / 4],  # 1 / 4 s each
  }
  one = floors.Cost(100, passes=1, directions=0)
  assert floors.floor(one, 'x')(measured) == (0.5, 'memory')
  seconds, why = floors.floor(floors.Cost(64, 2, 3), 'x')(measured)
  assert why == 'operations'
  assert seconds == pytest.approx(3 / 64 + 3 * 64 / 4)


def test_sizes_are_as_asked_for():
  assert tensors.entries(tensors.matrix(1e7)) == 3200**2
  for size in (1e7, 1.3e9):
    found = tensors.entries(tensors.transformer(size))
    assert size <= found <= 1.3 * size


def check(found, suite):
  """A suite's results can be written, and be shown."""
  found = json.loads(json.dumps(found))
  for row in found['rows']:
    assert row['rate'] > 0
    assert row['best_rate'] >= row['rate']
    assert row.get('floor_rate', 1) > 0
  found |= {'suite': suite, 'machine': machine.describe()}
  assert show.table(found).row_count == len(found['rows'])
  return found


def test_kernels_run(tmp_path):
  names = ('w + c', 'perturb rademacher', f'project rademacher K={kernels.FEW}')
  operations = kernels.operations('tiny', SHAPES, names)
  rows = timing.rows(floors.operations() + operations, 1, kernels.TARGETS, {})
  found = check({'unit': 'G/s', 'rows': rows}, 'kernels')
  rows = {row['operation']: row for row in found['rows'] if row['on'] == 'tiny'}
  assert set(rows) == set(names)
  assert rows['w + c']['memory'] < 2  # in place
  has_torch = torch_loops.device() is not None
  assert bool(rows[names[1]]['rivals']) == has_torch
  show.draw(found, tmp_path / 'kernels.png')
  assert (tmp_path / 'kernels.png').read_bytes().startswith(b'\x89PNG')


def test_every_target_and_prediction_has_a_row():
  names = {entry.name for entry in kernels.entries(SHAPES)}
  predictions = json.loads(PREDICTIONS.read_text('utf-8'))
  for kind in ('cpu', 'gpu'):
    assert set(kernels.TARGETS[kind]) <= names
    for row in predictions[kind]['kernels']:
      assert row['operation'].split(' on ')[0] in names
      assert row['why']


def test_simulation_runs():
  method = simulate.methods()['fed_avg']
  operations = simulate.operations('fed_avg', method, 2)
  rows = timing.rows(operations, 1, {}, {})
  found = check({'unit': 'clients/s', 'rows': rows}, 'simulate')
  names = [row['operation'] for row in found['rows']]
  assert names == ['simulate, blocks of 1', 'simulate, blocks of 2']
  assert 'plain loop' in found['rows'][0]['rivals']


def test_a_python_without_fedjax_is_named():
  if importlib.util.find_spec('fedjax'):
    pytest.skip('this python has fedjax')
  with pytest.raises(RuntimeError, match="No module named 'fedjax'"):
    simulate._side(sys.executable, 1, 1)


def _prepared():
  return lambda: np.ones(1 << 24, np.uint8), lambda x: x + x


def test_peak_memory_of_a_process():
  peak = memory.peak(_prepared)
  if peak is None:
    pytest.skip('no /proc')
  assert 1.9 * 2**24 <= peak <= 2.2 * 2**24


@pytest.mark.slow
def test_step_programs_run():
  one = step.Step('embedded', 16)
  state = one.method.init(
    jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), one.like)
  )
  message, _, _ = one.client(state)(state, (), one.batches, one.party)
  new = one.server(state, 1)(state, message[None], one.cohort(1))
  assert int(new.round) == 1
  loss = one.forward()(state.params, one.batch)
  assert loss == pytest.approx(np.log(256), rel=1e-5)  # of equal logits


class TestTorch:
  @pytest.fixture(autouse=True)
  def _torch(self):
    self.torch = pytest.importorskip('torch')

  def test_mezo_restores_the_weights_and_steps(self):
    weights = [self.torch.ones(5), self.torch.ones(3, 2)]
    loss = lambda: sum(w.sum() for w in weights)
    before = [w.clone() for w in weights]
    gradient = torch_loops.mezo_step(weights, loss)
    # the loss is linear: the projected gradient is the sum of z
    self.torch.manual_seed(0)
    z = [self.torch.normal(0.0, 1.0, w.shape) for w in weights]
    assert gradient == pytest.approx(float(sum(x.sum() for x in z)), rel=1e-2)
    for new, old, x in zip(weights, before, z, strict=True):
      expected = old - 1e-6 * gradient * x
      np.testing.assert_allclose(new.numpy(), expected.numpy(), atol=1e-6)

  def test_ferret_projects_on_what_it_adds(self):
    weights = [self.torch.zeros(40)]
    torch_loops.ferret_rebuild(weights)
    total = weights[0] / -torch_loops._SCALE
    norms = torch_loops.ferret_project(weights)
    assert len(norms) == torch_loops.SEEDS
    assert float(total.abs().max()) <= 36 / np.sqrt(40)  # 1 + ... + 8, bounded


@pytest.mark.slow
@pytest.mark.parametrize(
  ('suite', 'flags'),
  [
    ('kernels', ('--params=1e4',)),
    ('step', ('--tokens=16,32',)),
    ('simulate', ('--clients=2',)),
  ],
)
def test_the_launcher_writes_its_results(suite, flags, tmp_path):
  out = tmp_path / 'found.json'
  done = subprocess.run(
    [
      sys.executable, '-m', 'experiments.benchmark', f'--suite={suite}',
      '--repeats=1', f'--out={out}', *flags,
    ],
    cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, text=True,
    capture_output=True, timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert found['machine']['jax'] == jax.__version__
  assert found['machine']['cores'] == 1
  assert found['rows']
  assert found['rows'][0]['operation'] in done.stdout
  assert out.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
