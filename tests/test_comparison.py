"""Runs side by side, and what TensorBoard is told."""

import math

import pytest

from experiments import board, comparison
from experiments.config import UsageError
from experiments.workdir import Workdir
from jaxfl import metrics
from tests.test_experiments import environment as environment
from tests.test_experiments import launch

pytestmark = pytest.mark.fast_compile


def make(directory, losses, task='text'):
  """A run that is evaluated at 0, 5, 10 ... rounds."""
  directory.mkdir(parents=True)
  for i, loss in enumerate(losses):
    same = {
      'method': 'spsa', 'task': task, 'seed': 0, 'round': 5 * i,
      'bytes_up': 1000 * i, 'bytes_down': 3000 * i, 'forwards': 70 * i,
      'backwards': 0, 'wall_s': 0.5 * i, 'digest': f'{i:064x}',
    }  # fmt: skip
    rows = [
      metrics.Row(metric='loss', value=loss, **same),
      metrics.Row(metric='accuracy', value=1 - loss / 4, **same),
    ]
    metrics.append(Workdir(directory).metrics, rows)
  return str(directory)


def test_the_first_evaluation_at_a_target(tmp_path):
  places = [
    make(tmp_path / 'a', [2.0, math.nan, 1.5, 1.6, 1.0]),
    make(tmp_path / 'deep' / 'b', [2.0, 1.9]),
  ]
  runs = comparison.read(places)
  assert [run.name for run in runs] == ['a', 'deep/b']
  at = lambda run, target: comparison.reached(run, target)
  rounds = [None if x is None else x.round for x in (
    at(runs[0], 2.0), at(runs[0], 1.55), at(runs[0], 1.0), at(runs[0], 0.9),
    at(runs[1], 1.55),
  )]  # fmt: skip
  assert rounds == [0, 10, 20, None, None]
  by_accuracy = comparison.read(places, 'accuracy')[0]
  row = comparison.reached(by_accuracy, 0.61)  # higher is better
  assert row is not None
  assert (row.round, row.bytes_up, row.forwards) == (10, 2000, 140)
  columns = comparison.to_target(runs, 1.55).columns
  cells = [list(column.cells) for column in columns]
  assert cells[1:4] == [['10', '-'], ['2.0 kB', '-'], ['6.0 kB', '-']]


def test_the_command(environment, tmp_path):
  places = [
    make(tmp_path / name, losses)
    for name, losses in (('a', [2.0, 1.5, 1.6]), ('b', [2.0]))
  ]
  out = tmp_path / 'x.png'
  done = launch(
    'compare', *places, '--target=1.55', f'--out={out}',
    environment=environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'to loss 1.55' in done.stdout
  assert '000000000000' in done.stdout
  assert out.read_bytes().startswith(b'\x89PNG')


def test_runs_that_cannot_be_compared(tmp_path):
  a = make(tmp_path / 'a', [1.0])
  b = make(tmp_path / 'b', [1.0], task='other')
  with pytest.raises(UsageError, match='different tasks: other, text'):
    comparison.read([a, b])
  with pytest.raises(UsageError, match="no metric 'f1'; it has loss, accuracy"):
    comparison.read([a], 'f1')
  with pytest.raises(UsageError, match='no run there'):
    comparison.read([a, str(tmp_path / 'c')])
  with pytest.raises(UsageError, match='given twice'):
    comparison.read([a, a + '/'])


def events(directory):
  """Steps and values by name of every event, and the steps of restarts."""
  from tensorboardX.proto.event_pb2 import Event

  values, starts = [], []
  for path in sorted(directory.iterdir()):
    data = path.read_bytes()
    while data:  # length, its checksum, event, checksum
      size = int.from_bytes(data[:8], 'little')
      event = Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      values += [
        (event.step, x.tag, x.simple_value) for x in event.summary.value
      ]
      if event.HasField('session_log'):
        starts.append(event.step)
  return values, starts


def test_tensorboard(tmp_path):
  pytest.importorskip('tensorboardX')
  board.check()
  with board.opened(tmp_path / 'x', 0) as show:
    show(0, {'loss': 2.0})
    show(1, {'loss': 1.5, 'bytes_up': 100})
  assert events(tmp_path / 'x')[0] == [
    (0, 'loss', 2.0), (1, 'loss', 1.5), (1, 'bytes_up', 100.0),
  ]  # fmt: skip
  with board.opened(tmp_path / 'y', 7) as show:
    show(8, {'loss': 1.0})
  assert events(tmp_path / 'y') == ([(8, 'loss', 1.0)], [8])
