"""Figures of papers: budgets, laws at small sizes, tables, mistakes."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import UsageError
from experiments.papers import (
  budgets,
  catalog,
  common,
  deltas,
  fedkseed_bytes,
  fedkseed_fp16,
  ferret_allocation,
  ferret_cosine,
  ferret_sine,
  sine,
  study_entry,
)
from jaxfl import wire

pytestmark = pytest.mark.fast_compile

ROOT = pathlib.Path(__file__).parents[1]
REQUEST = common.Request(seeds=2)


def point(round, bytes_up, bytes_down, forwards, backwards, accuracy):
  return {
    'round': round, 'bytes_up': bytes_up, 'bytes_down': bytes_down,
    'forwards': forwards, 'backwards': backwards, 'accuracy': accuracy,
    'wall_s': 2.0 * round,
  }  # fmt: skip


def settings(**curves):
  """As in the result of a study, of two clients; seeds differ by 0.02."""
  moved = lambda curve: [p | {'accuracy': p['accuracy'] + 0.02} for p in curve]
  return {
    label: {
      'command': f'run {label}',
      'num_clients': 2,
      'runs': [
        {'seed': 0, 'curve': curve},
        {'seed': 1, 'curve': moved(curve)},
      ],
    }
    for label, curve in curves.items()
  }


STUDY = {
  'study': 'tiny',
  'title': 'A tiny study',
  'metric': 'accuracy',
  'settings': settings(
    small=[
      point(0, 0, 0, 0, 0, 0.5),
      point(5, 20, 20, 100, 0, 0.6),
      point(10, 40, 40, 200, 0, 0.7),
    ],
    large=[
      point(0, 0, 0, 0, 0, 0.5),
      point(1, 600, 400, 30, 30, 0.8),
      point(2, 1200, 800, 60, 60, 0.9),
    ],
  ),
}


def test_budgets_take_the_last_evaluation_within_them():
  equal = budgets.compare(STUDY['settings'], 'accuracy')
  assert equal['bytes']['amount'] == 40  # (40 + 40) / 2 clients
  # the first round of `large` costs more: it is where it started
  assert equal['bytes']['settings']['large']['rounds'] == [0, 0]
  small = equal['bytes']['settings']['small']
  np.testing.assert_allclose(small['values'], [0.7, 0.72])
  np.testing.assert_allclose(small['std'], 0.02 / math.sqrt(2))
  # (60 + 2 * 60) / 2 = 90 passes, of which `small` has evaluated 50
  assert equal['forwards']['amount'] == 90
  assert equal['forwards']['settings']['small']['rounds'] == [5, 5]
  assert equal['forwards']['settings']['large']['mean'] == pytest.approx(0.91)
  with pytest.raises(ValueError, match='before anything is spent'):
    budgets.within([point(1, 10, 0, 1, 0, 0.5)], 'bytes', 4, 1)


def test_a_study_beside_published_values(tmp_path):
  published = {'large': '0.95 at 100', 'huge': '0.99'}
  found = study_entry.summarise(STUDY, published, 'not found', ['A note.'])
  rows = {row['setting']: row for row in found['rows']}
  assert list(rows) == ['small', 'large', 'huge']
  assert rows['small']['published'] == 'not found'
  assert rows['large']['published'] == '0.95 at 100'
  assert rows['large']['bytes'] == 1000
  assert rows['large']['forwards'] == 90
  assert rows['large']['seconds'] == 4
  assert rows['huge']['ours'] is None
  entry = common.Entry('', lambda request: found, study_entry.draw)
  common.write(found, entry, tmp_path / 'x')
  text = (tmp_path / 'x.json').read_text()
  assert json.loads(text) == found
  assert '"values": [ 0.7, 0.72 ]' in text  # a list of numbers is a line
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
  shown = common.table(found)
  columns = {str(c.header): list(c.cells) for c in shown.columns}
  assert list(columns) == [
    'setting', 'published', 'ours', 'spread', 'bytes', 'forwards', 'seconds',
    'at equal bytes', 'at equal forwards',
  ]  # fmt: skip
  assert columns['ours'] == ['0.7100', '0.9100', 'not run here']
  assert columns['bytes'] == ['40', '1,000', '-']
  assert columns['at equal bytes'][1] == '0.5100 +- 0.0141 (0)'
  assert 'A note.' in str(shown.caption)


def test_unknown_names_list_the_choices():
  with pytest.raises(UsageError, match='list or one of ferret, fedkseed'):
    catalog.find('fedprox', '1')
  with pytest.raises(UsageError, match=r'7, 8a, .*; got None'):
    catalog.find('ferret', None)
  missing = study_entry.entry('', 'no_such_study')
  with pytest.raises(UsageError, match='no study no_such_study; studies are'):
    missing.run(REQUEST)
  with pytest.raises(UsageError, match='needs --data_dir'):
    catalog.find('fedkseed', 'K').run(REQUEST)


def test_the_launcher(tmp_path):
  program = """
import sys
from absl import app, flags
from experiments import paper
def main(argv):
  paper.main(argv)
  flags.FLAGS.figure = '9'
  paper.main(argv)
app.run(main)
"""
  done = subprocess.run(
    [sys.executable, '-c', program, '--paper=ferret', '--figure=table2',
     f'--out={tmp_path}'],
    cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, capture_output=True,
    text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 1
  assert 'Dolly, 3 B: Ferret' in done.stdout
  assert 'not run here' in done.stdout
  result = json.loads((tmp_path / 'paper_ferret_table2.json').read_text())
  assert (result['paper'], result['figure']) == ('ferret', 'table2')
  assert all(row['values'] == [] for row in result['rows'])
  assert 'error: figure of ferret must be one of 7, 8a' in done.stderr
  assert 'Traceback' not in done.stderr


def test_truncated_normals_have_the_variance_of_the_constant():
  d = 400
  bound = 1 / math.sqrt(d)
  rng = np.random.default_rng(0)
  x = ferret_cosine.truncated_normal(rng, 400_000, bound)
  assert np.abs(x).max() <= bound
  # relative standard deviation sqrt((9/5 - 1) / n) = 0.0014
  assert np.square(x).mean() * (3 * d + 0.4) == pytest.approx(1, abs=0.006)
  # not the flat distribution, whose variance is that of 3 d
  u = np.random.default_rng(0).random(400_000, np.float32) - 0.5
  ratio = np.square(x).mean() / np.square(2 * bound * u).mean()
  assert ratio - 1 == pytest.approx(-2 / (15 * d), rel=0.05)


def test_the_cosine_is_measured_for_every_basis():
  delta = np.ones((4, 8), np.float32)
  for distribution in ferret_cosine.DISTRIBUTIONS:
    (found,) = ferret_cosine.ours(delta, distribution, [1], 0)
    assert -1 <= found['cosine'] <= 1


def test_the_cosine_follows_its_law(monkeypatch):
  monkeypatch.setattr(ferret_cosine, 'DISTRIBUTIONS', ('rademacher',))
  shape, counts = (64, 8), (100, ferret_allocation.COORDINATES)
  found = ferret_cosine.run(common.Request(seeds=4), shape, counts)
  assert len(found['rows']) == 3 * len(counts)
  for row in found['rows']:
    code = row['setting'].startswith(ferret_cosine.CODE)
    assert row['ours'] == pytest.approx(row['more']['law'], abs=0.05)
    slope = row['more']['slope'] * (3 if code else 1)
    # standard deviation sqrt(2 / K / 4 seeds), of six rows
    count = int(row['setting'].rpartition(' ')[2].replace(',', ''))
    assert slope == pytest.approx(1, abs=4 * math.sqrt(0.5 / count))
  assert ferret_cosine.law(1000, 1000) == pytest.approx(math.sqrt(0.5))
  ferret_cosine.draw(json.loads(json.dumps(found)))


def test_sine_counts_frames_and_converges(monkeypatch):
  problem = sine.Problem((8, 8), num_clients=2, num_examples=4, num_rounds=3)
  panel = ('methods', {'FedAvg': ferret_sine.of_fed_avg(5)})
  monkeypatch.setitem(ferret_sine.PANELS, '8a', panel)
  found = ferret_sine.run(REQUEST, '8a', problem)
  (row,) = found['rows']
  frame = len(wire.to_bytes({'w': np.zeros((8, 8), np.float32)}))
  assert row['bytes'] == 3 * 2 * frame  # up and down
  assert row['forwards'] == 3 * (5 + 2 * 5)
  assert 0 < row['ours'] < 0.4
  assert found['curves']['FedAvg'][0]['share'][0] == 1
  ferret_sine.draw(json.loads(json.dumps(found)))
  # the examples are zero on average, and those of unlike clients
  data = sine.make(problem, 0)
  np.testing.assert_allclose(data.examples.mean((0, 1)), 0, atol=1e-6)
  assert data.examples.mean(1).std() == pytest.approx(sine.OFFSET, rel=0.4)
  # K / (K + d / C)
  assert ferret_sine.server_lr(problem, 32) == 0.5


def test_each_allocation_is_best_at_its_own_budget():
  rng = np.random.default_rng(0)
  sizes = rng.integers(64, 5000, 20)
  norms = jnp.asarray(rng.lognormal(0, 1, 20), jnp.bfloat16)
  norms = np.asarray(norms, np.float32)
  costs = {'bytes': np.ones(20), 'compute': sizes.astype(float)}
  budget = {'bytes': 4000.0, 'compute': 4000.0 * sizes.mean()}
  for equal, cost in costs.items():
    errors = {}
    for name, rule in ferret_allocation.RULES.items():
      counts = ferret_allocation.spend(rule, norms, sizes, cost, budget[equal])
      assert counts @ cost == pytest.approx(budget[equal], rel=0.005)
      errors[name] = ferret_allocation.predicted(norms, sizes, counts)
    # rounding to whole coordinates moves an error by less than 1 %
    assert errors[equal] <= 1.01 * min(errors.values())
    assert errors['uniform'] > 1.2 * errors[equal]
  paper = ferret_allocation.RULES['paper']
  assert list(paper(np.array([4.0, 1.0, 0.01]), sizes, 9)) == [9, 2, 2]


def test_predicted_errors_are_those_measured():
  # blocks as large as that of the test of the cosine: compiled once
  delta = deltas.normal_delta({'a': (128, 8), 'b': (64, 8)}, 0)
  delta['b'] *= 2
  case = deltas.cut('', delta, 512)
  np.testing.assert_array_equal(case.parts[1], delta['a'][64:])
  counts = np.array([40, 20, 60], np.int32)
  errors = [ferret_allocation.measured(case, counts, s) for s in range(12)]
  expected = ferret_allocation.predicted(case.norms(), case.sizes, counts)
  assert np.mean(errors) == pytest.approx(expected, rel=0.1)


def test_frames_of_fedkseed_are_under_18_kb():
  up, down = fedkseed_bytes.papers_form()
  assert fedkseed_bytes.PUBLISHED < up + down < fedkseed_bytes.PUBLISHED + 80
  size = fedkseed_bytes.up_bytes
  assert 800 < size('float32') < 820
  assert 200 < size('one byte') < 220
  # an index of 4,096 takes two bytes
  assert size('one byte and indices') - size('one byte') >= 400
  assert size('float32') + down < fedkseed_bytes.PUBLISHED


def test_half_precision_loses_small_steps(monkeypatch):
  monkeypatch.setattr(fedkseed_fp16, 'SHAPE', (8, 32))
  coordinates = np.random.default_rng(0).normal(0, 1, 128)
  floats = fedkseed_fp16.floats(coordinates, 0)
  assert floats['float16, one by one'] > 0.9
  assert floats['float32, one by one'] < 0.02
  three, four, zero = (np.full(4, x) for x in (3.0, 4.0, 0.0))
  assert fedkseed_fp16.relative(three, four, zero) == 0.25
