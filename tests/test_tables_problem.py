"""Tables of numbers as data of the launchers."""

import functools

import jax
import numpy as np
import pytest

from experiments import defaults, problem, replay, runner
from experiments.config import UsageError, from_mapping
from jaxfl import digest, privacy
from tests.data import test_tables

CITIES = ('Aa', 'Bb', 'Cc')


def table(count=60):
  """Lines of a csv: y is near 2 a - b, kind says whether it is positive."""
  rng = np.random.default_rng(0)
  lines = ['a,b,city,y,kind']
  for i in range(count):
    a, b = rng.uniform(-1, 1, 2)
    y = 2 * a - b
    kind = 'more' if y > 0 else 'less'
    lines.append(f'{a:.5f},{b:.5f},{CITIES[i % 3]},{y:.5f},{kind}')
  return lines


@pytest.fixture
def numbers(tmp_path):
  """A csv file with the target y and a city."""
  lines = [line.rsplit(',', 1)[0] for line in table()]
  return test_tables.write(tmp_path / 'numbers.csv', '\n'.join(lines))


@pytest.fixture
def kinds(tmp_path):
  """A gzipped csv file whose last column is a class."""
  rows = [line.split(',') for line in table()]
  lines = [','.join([a, b, kind]) for a, b, _, _, kind in rows]
  return test_tables.write(tmp_path / 'kinds.csv.gz', '\n'.join(lines))


def config_of(path, **settings):
  fixed = {
    'dataset': str(path), 'target': 'y', 'method': 'fed_sgd',
    'num_clients': 3, 'num_rounds': 20, 'batch_size': 16, 'eval_every': 20,
    'learning_rate': 0.2, 'hidden_units': 4,
  }  # fmt: skip
  return defaults.resolve(from_mapping(fixed | settings))


def by_city(path, **settings):
  return config_of(
    path, partition='column', partition_column='city', **settings
  )


def by_kind(path, **settings):
  return config_of(path, target='kind', label_names='more,less', **settings)


def test_a_number_is_learnt_and_the_run_replays(numbers, tmp_path, capsys):
  summary = runner.run(by_city(numbers), tmp_path / 'run')
  assert 'client 2: Aa 13\n' in capsys.readouterr().out
  assert summary['num_params'] == 2 * 4 + 4 + 4 + 1
  assert summary['after']['loss'] < 0.2 * summary['before']['loss']
  assert summary['after']['r2'] > 0.8
  params, rounds, _ = replay.rebuild(tmp_path / 'run')
  assert rounds == 20
  assert digest.digest(params) == summary['digest'] != summary['base_digest']


def test_the_problem_of_classes(kinds):
  config = by_kind(kinds, method='spsa', objective='accuracy')
  found = problem.build(config)
  assert 'client 0: more' in found.notes
  scores = found.evaluate(found.params)
  assert list(scores) == ['accuracy', 'macro_f1', 'loss']
  # equal scores name the first label, and one minus the accuracy is the loss
  zeros = jax.tree.map(np.zeros_like, found.params)
  share = (found.task.eval_batches['label'] == 0).mean()
  np.testing.assert_allclose(found.evaluate(zeros)['accuracy'], share)
  batch = jax.tree.map(lambda x: x[0], found.task.batches(0, 0, 0, 1, 8))
  loss = jax.jit(found.loss_fn)((), zeros, batch)
  np.testing.assert_allclose(loss, (batch['label'] == 1).mean())


def test_the_problem_of_numbers(numbers):
  found = problem.build(by_city(numbers, feature_scaling='minmax'))
  assert found.task.name == 'numbers'
  batch = found.task.batches(0, 1, 2, 3, 4)
  assert batch['features'].shape == (3, 4, 2)  # neither the city nor y
  assert batch['target'].dtype == np.float32
  assert found.task.num_examples.sum() == 48
  assert found.task.eval_batches['features'].shape == (1, 12, 2)
  assert found.task.whole is not None
  wholes = [found.task.whole(client) for client in range(3)]
  kept = [x['example_weight'] > 0 for x in wholes]
  for name, high, low in (('features', 1, -1), ('target', 1, 0)):
    values = np.concatenate(
      [x[name][m] for x, m in zip(wholes, kept, strict=True)]
    )
    assert len(values) == 48
    assert (values.max(0) == high).all()
    assert (values.min(0) == low).all()


def test_private_methods_get_every_example_once(numbers):
  """Padding adds nothing, and one gradient for each is n times their mean."""
  found = problem.build(by_city(numbers))
  loss_fn = lambda params, batch: found.loss_fn(found.frozen, params, batch)
  assert found.task.whole is not None
  examples = found.task.whole(2)  # the smallest client
  mask = examples['example_weight']
  assert 0 < mask.sum() < len(mask)
  mean = jax.jit(jax.grad(loss_fn))(found.params, examples)
  bare = {k: v for k, v in examples.items() if k != 'example_weight'}
  clip = functools.partial(
    privacy.clipped_sum, loss_fn, clip_norm=1e3, microbatch_size=8
  )
  clipped = jax.jit(clip)(found.params, bare, mask)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y * mask.sum(), rtol=1e-4),
    clipped.total,
    mean,
  )


def test_seeds_start_apart_but_hold_out_the_same(numbers):
  one, other = (problem.build(by_city(numbers, seed=s)) for s in (0, 1))
  np.testing.assert_array_equal(
    one.task.eval_batches['target'], other.task.eval_batches['target']
  )
  assert digest.digest(one.params) != digest.digest(other.params)


def test_a_known_table(tmp_path):
  test_tables.write(
    tmp_path / 'california_housing' / 'housing.csv',
    test_tables.HOUSES + test_tables.HOUSES.split('\n')[1] + '\n',
  )
  settings = {'target': None, 'data_dir': str(tmp_path), 'num_clients': 1}
  config = config_of('california_housing', **settings)
  found = problem.build(config)
  assert found.task.batches(0, 0, 0, 1, 2)['features'].shape == (1, 2, 8)
  assert set(found.evaluate(found.params)) == {'loss', 'r2'}
  config = config_of(
    'california_housing', partition='column',
    partition_column='ocean_proximity', **settings,
  )  # fmt: skip
  assert 'client 0: ' in problem.build(config).notes


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'target': 'z'}, "no column 'z'"),
    ({}, "column 'city': 'Aa' is no finite number; leave the"),
    ({'target': 'city', 'label_names': 'Aa,Bb'}, "label 'Cc' is none of"),
    ({'partition': 'dirichlet', 'partition_column': 'town'}, "column 'town'"),
    ({'objective': 'accuracy', 'method': 'spsa', 'partition': 'label',
      'partition_column': 'city'}, 'objective accuracy needs classes'),
    ({'dataset': 'gone.csv'}, "no table at 'gone.csv'"),
    ({'dataset': 'gas_turbine', 'target': None}, 'needs --data_dir'),
    ({'dataset': 'gas_turbine', 'data_dir': '.'}, 'are for your own csv'),
    ({'dataset': 'gas_turbine', 'target': None, 'data_dir': 'no'},
     'no gas_turbine_2011_2015.csv, or .* put it there, below --data_dir'),
  ],
)  # fmt: skip
def test_what_is_refused(settings, message, numbers):
  with pytest.raises(UsageError, match=message):
    problem.build(config_of(**{'path': numbers} | settings))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'adapter': 'lora'}, 'adapter does not apply to dataset .* kind tables'),
    ({'model': 'cnn'}, 'model does not apply'),
    (
      {'dataset': 'sst2', 'hidden_units': None},
      'target does not apply to dataset sst2',
    ),
    ({'dataset': 'sst2', 'target': None}, 'hidden_units does not apply'),
    ({'feature_scaling': 'max'}, 'feature_scaling must be one of auto, none'),
    ({'hidden_units': 0}, 'hidden_units must be > 0'),
  ],
)
def test_settings_that_do_not_fit(settings, message, numbers):
  with pytest.raises(UsageError, match=message):
    config_of(**{'path': numbers} | settings)
