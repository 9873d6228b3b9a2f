"""DIFF2 beside DP-GD: the tuning rule, the problems, toy entries."""

import json
import math

import jax
import numpy as np
import pytest

from experiments.config import UsageError
from experiments.papers import (
  catalog,
  common,
  diff2,
  diff2_compare,
  diff2_tasks,
)
from experiments.papers import diff2_runs as runs
from experiments.papers import diff2_tune as tuning
from experiments.papers.diff2_runs import Setting
from jaxfl import accounting, digest, gdp
from jaxfl import typing as jt
from jaxfl.data import tables
from jaxfl.runtime import simulate

pytestmark = pytest.mark.fast_compile


@pytest.fixture(scope='module')
def location():
  return diff2_tasks.of_location(
    stiff=True, dimensions=10, num_examples=401, num_clients=4
  )


@pytest.fixture(scope='module')
def programs(location):
  return runs.Programs(location)


def test_the_gradient_of_the_stiff_problem(location):
  k = np.array([1.0] * 9 + [diff2_tasks.SLOW])
  b = np.asarray(location.train['b'], np.float64)
  x = np.linspace(-2, 4, 10)
  far = x - b
  expected = k * far / (1 + far**2 / 2)
  params = {'x': x.astype(np.float32)}
  got = jax.grad(location.loss_fn)(params, location.train)['x']
  np.testing.assert_allclose(got, expected.mean(0), rtol=2e-4, atol=1e-6)
  loss = (k * np.log1p(far**2 / 2)).sum(1).mean()
  assert float(location.loss_fn(params, location.train)) == pytest.approx(
    loss, rel=1e-5
  )
  # the bounds hold, and are reached: |g| at far = sqrt(2), curvature at 0
  norms = np.sqrt((expected**2).sum(1))
  assert (
    norms.max()
    <= location.clip_norm
    == pytest.approx(math.sqrt((k**2).sum() / 2))
  )
  one = {'b': x[None].astype(np.float32)}
  at = lambda v: np.asarray(jax.grad(location.loss_fn)({'x': v}, one)['x'])
  edge = at((x + math.sqrt(2)).astype(np.float32))
  assert np.linalg.norm(edge) == pytest.approx(location.clip_norm, rel=1e-4)
  slope = np.abs(at((x + 1e-2).astype(np.float32))).max() / 1e-2
  assert slope == pytest.approx(location.clip_norm_diff, rel=1e-2)


def test_the_minimum_is_one(location):
  step = jax.jit(jax.value_and_grad(location.loss_fn))
  rng = np.random.default_rng(0)
  start = np.zeros(10, np.float32)
  for _ in range(300):
    start = start - np.asarray(step({'x': start}, location.train)[1]['x'])
  loss = float(step({'x': start}, location.train)[0])
  assert loss >= location.floor - 1e-5
  assert location.floor < float(step({'x': 0 * start}, location.train)[0])
  for _ in range(10):
    near = (start + rng.normal(size=10)).astype(np.float32)
    assert float(step({'x': near}, location.train)[0]) > location.floor


def test_a_table_of_classes_has_cross_entropy():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
  table = tables.Table(x, y, x[:5], y[:5], ('a', 'b', 'c'), {})
  task = diff2_tasks.of_table('classes', table, num_clients=3)
  params = jax.device_get(task.init(0))
  first = params['hidden']
  hidden = np.logaddexp(0, x @ first['kernel'] + first['bias'])
  scores = hidden @ params['out']['kernel'] + params['out']['bias']
  p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
  wanted = -np.log(p[np.arange(30), y]).mean()
  found = float(task.loss_fn(params, task.train))
  assert found == pytest.approx(wanted, rel=1e-5)
  assert task.sizes == (10, 10, 10)


def test_examples_are_dealt_once():
  examples = {'y': np.arange(23, dtype=np.float32)}
  clients, sizes = diff2_tasks.deal(examples, 4)
  assert sizes == (6, 6, 6, 5)
  real = [
    np.asarray(c['y'][0])[np.asarray(c['example_weight'][0]) > 0]
    for c in clients
  ]
  assert [len(x) for x in real] == list(sizes)
  assert sorted(np.concatenate(real)) == list(range(23))


@pytest.mark.parametrize(
  'setting',
  [
    Setting(5, 0.5, 2.0, 0.8, 2, 0.4),
    # the accountant of local steps takes its time
    pytest.param(Setting(3, 0.1, 2.0, 0.8, 2, 0.4, 3), marks=pytest.mark.slow),
  ],
)
def test_runs_are_those_of_the_simulator(
  programs, location, setting, monkeypatch
):
  monkeypatch.setattr(runs, 'LOCAL_BATCH', 10)
  found = runs.one_run(programs, setting, 3.0, seed=7)
  method = runs.build(location, setting, 3.0)
  key = runs.noise_of(7, f'{setting} 3.0')
  prepare = method.prepare
  assert prepare is not None
  params = location.init(7)
  examples = [
    jax.tree.map(lambda x: np.asarray(x[0]), batch)
    for batch in location.clients
  ]
  rounds = simulate.simulate(
    method,
    method.init(params),
    lambda round, client: prepare(params, examples[client], round, client, key),
    simulate.Population(num_clients=4),
    num_rounds=setting.num_rounds * (1 if setting.local_steps == 1 else 2),
    noise=key,
  )
  *_, last = rounds
  assert digest.digest(last.state.params) == digest.digest(
    found['state'].params
  )
  assert found['round'] == list(range(setting.num_rounds + 1))
  loss = float(location.loss_fn(last.state.params, location.train))
  assert found['loss'][-1] == pytest.approx(loss - location.floor, abs=1e-4)
  # the noise of another seed is other noise
  other = runs.one_run(programs, setting, 3.0, seed=8)
  assert other['loss'][-1] != found['loss'][-1]


def test_plans_are_at_the_target(location):
  mu = gdp.mu_of(3.0, runs.DELTA)
  assert gdp.mu_of(runs.if_dropped(3.0), runs.DELTA) == pytest.approx(mu / 2)
  for setting in (Setting(50, 1, 1), Setting(50, 1, 1, 2, 7, 0.3)):
    plan = runs.plan_of(location, setting, 3.0)
    spent = accounting.epsilon(plan.rounds(), runs.DELTA, 'gdp')
    assert spent == pytest.approx(3.0, abs=1e-6)
    assert plan.adjacency == 'replace'


def test_divergence_is_rejected():
  run = lambda *losses: {'loss': list(losses), 'failed': False}
  assert tuning.score(run(2.0, 1.5)) == 1.5
  assert tuning.score(run(2.0, 0.1, 2.0)) == math.inf
  assert tuning.score(run(2.0, math.nan)) == math.inf
  assert tuning.score(run(2.0, 1.5) | {'failed': True}) == math.inf
  assert tuning.score(run(2.0, -math.inf)) == math.inf
  slow, fast, wild = (Setting(9, lr, 1.0) for lr in (0.1, 1.0, 9.0))
  scores = {slow: [1.0, 1.2], fast: [0.1, math.inf], wild: [math.inf] * 2}
  assert tuning.best_of(scores, 'DP-GD') == slow
  with pytest.raises(RuntimeError, match='DP-GD: no setting of 1 ends below'):
    tuning.best_of({wild: [math.inf]}, 'DP-GD')


def test_a_diverged_run_ends_early():
  """Flat once it has diverged: by its gradient it would be the best."""

  def loss_fn(params: jt.Params, batch: jt.Batch) -> jax.Array:
    far = params['x'][None] - batch['b']
    return 50 * jax.numpy.mean(1 + jax.numpy.tanh(far[:, 0] - 6))

  b = np.zeros((40, 1), np.float32)
  clients, sizes = diff2_tasks.deal({'b': b}, 2)
  task = diff2_tasks.Task(
    'flat', clients, sizes, {'b': b}, None, loss_fn,
    lambda seed: {'x': np.full(1, 2.9, np.float32)},
  )  # fmt: skip
  programs = runs.Programs(task)
  # noise alone moves it, over the edge or down
  ends = [
    runs.one_run(programs, Setting(12, 30.0, 1.0), 0.5, seed)
    for seed in range(8)
  ]
  up = [end for end in ends if tuning.score(end) == math.inf]
  assert up
  assert any(e['gradient'][-1] < e['gradient'][0] for e in up)
  assert all(len(end['round']) < 13 for end in up if end['loss'][-1] > 2)


def test_stages_and_refusals(programs, location):
  first = Setting(0, 0, 0, clip_norm_diff=1.0, restart_interval=3)
  kind = tuning.diff2(
    'DIFF2-GD', first, clip_norm_diff=(1.0, 1e6), restart_interval=(3, 2)
  )
  grid = diff2.grid((6,), (0.5, 1e-3), (location.clip_norm,))
  assert len(grid) == 2
  # the two of the grid, (1, 2) of its own; (1e6, 3) and (1e6, 2) are unstable
  texts = []
  tuned = tuning.tune(programs, kind, tuning.Rule(grid, 1), 50.0, texts.append)
  assert len(tuned.tried) == 3
  assert tuned.refused == 2
  assert len(texts) == 3 + 1  # one finalist, on the second seed
  assert tuned.best == tuned.finalists[0]
  assert tuned.best.learning_rate == 0.5
  assert [len(x) for x in tuned.tried.values()].count(2) == 1


def test_an_entry_of_a_known_problem(location, tmp_path):
  protocol = diff2.of_location(location, rounds=(4, 8), tuning_seeds=1)
  seeds = range(2)
  found = diff2_compare.compare(location, protocol, seeds)
  result = diff2_compare.summarise(location, protocol, found, seeds)
  gd, ours = result['rows']
  assert gd['setting'] == 'DP-GD, epsilon 3'
  assert len(gd['values']) == 2
  assert gd['published'] == 'not in the paper'
  assert gd['more']['loss against DP-GD'] == '-'
  assert 'lower)' in ours['more']['loss against DP-GD']
  assert gd['forwards'] in (12, 24)
  assert ours['forwards'] > gd['forwards'] / 2
  entry = common.Entry('', lambda request: result, diff2_compare.draw)
  common.write(result, entry, tmp_path / 'x')
  json.loads((tmp_path / 'x.json').read_text())
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def test_an_entry_of_a_csv(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  rows = [f'{a},{b},{a - b}' for a, b in rng.random((50, 2)).round(3)]
  path = tmp_path / 'x.csv'
  path.write_text('\n'.join(['a,b,y', *rows]))
  tiny = diff2.of_table(
    4, rates=(0.01,), clips=(3.0,), curvatures=(10.0,), intervals=(2,)
  )
  monkeypatch.setattr(diff2, 'of_table', lambda rounds: tiny)
  # a guarantee that hides little, as 40 examples can't hide in noise
  object.__setattr__(tiny, 'epsilons', (1e4, 2e4))
  request = common.Request(seeds=2, dataset=str(path), target='y')
  found = catalog.find('diff2', 'csv').run(request)
  assert [row['setting'] for row in found['rows']] == [
    f'{name}, epsilon {e}'
    for name in ('DP-GD', 'DIFF2-GD')
    for e in ('10000', '20000')
  ]
  assert all(len(row['values']) == 2 for row in found['rows'])
  assert 'test loss' in found['rows'][0]['more']
  diff2_compare.draw(json.loads(json.dumps(found)))


def test_mistakes_name_the_flag(tmp_path):
  entry = lambda name: catalog.find('diff2', name).run
  with pytest.raises(UsageError, match='needs --data_dir'):
    entry('california_housing')(common.Request())
  with pytest.raises(UsageError, match='csv needs --dataset, .* --target'):
    entry('csv')(common.Request())
  with pytest.raises(UsageError, match=r'no .*housing.csv .* --data_dir'):
    entry('california_housing')(common.Request(data_dir=str(tmp_path)))
  table = tables.split(np.ones((9, 2)), np.arange(9.0))
  with pytest.raises(ValueError, match='7 rows for 10 clients'):
    diff2_tasks.of_table('small', table)
