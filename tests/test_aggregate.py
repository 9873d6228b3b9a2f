"""Robust merging against NumPy, in any order, with absent clients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import build, defaults
from experiments.config import UsageError, from_mapping
from jaxfl import aggregate, keys
from jaxfl import method as method_lib
from jaxfl.methods import decomfl, fed_avg, ferret

C, N = 9, 6
IDS = np.array([4, 0, 7, 2, 9, 1, 5, 3, 8], np.int32)
_RNG = np.random.default_rng(0)
VALUES = _RNG.normal(size=(C, N)).astype(np.float32)
WEIGHT = np.array([1, 2, 0, 3, 1, 1, 5, 1, 2], np.float32)  # one is absent
BROKEN = VALUES.copy()
BROKEN[1, 2] = np.nan
BROKEN[3, 2] = -np.inf
RULES = {
  name: aggregate.Aggregator(name=name, **more)
  for name, more in {
    'mean': {}, 'median': {}, 'trimmed_mean': {'trim_fraction': 0.3},
    'krum': {'num_byzantine': 2}, 'multi_krum': {'num_byzantine': 2},
    'sign_vote': {'clip_value': 0.25},
  }.items()
}  # fmt: skip


@functools.cache
def merger(name):
  return jax.jit(RULES[name].merge)


def columns(values=VALUES, weight=WEIGHT):
  """What counts of every entry: its values and weights, in float64."""
  for column in values.T:
    counts = np.isfinite(column) & (weight > 0)
    yield column[counts].astype(float), weight[counts].astype(float)


def krum(values, weight, f):
  """Scores of the present clients as the paper has them, and their places."""
  at = np.flatnonzero((weight > 0) & np.isfinite(values).all(1))
  rows = values[at].astype(float)
  squares = np.square(rows[:, None] - rows[None]).sum(-1)
  near = np.sort(squares, axis=1)[:, 1 : len(at) - f - 1]
  assert near.shape[1] == len(at) - f - 2
  return at, near.sum(1)


@pytest.mark.parametrize('values', [VALUES, BROKEN], ids=['whole', 'broken'])
def test_closed_forms(values):
  def cut(x):
    k = int(0.3 * len(x))
    return np.sort(x)[k : len(x) - k].mean()

  expected = {
    'mean': [np.average(x, weights=w) for x, w in columns(values)],
    'median': [np.median(x) for x, _ in columns(values)],
    'trimmed_mean': [cut(x) for x, _ in columns(values)],
    'sign_vote': [0.25 * np.sign(np.sign(x).sum()) for x, _ in columns(values)],
  }
  at, score = krum(values, WEIGHT, 2)
  best = at[np.argsort(score)]
  expected['krum'] = values[best[0]]
  chosen = best[: len(at) - 2]
  expected['multi_krum'] = np.average(
    values[chosen], axis=0, weights=WEIGHT[chosen]
  )
  for name, want in expected.items():
    got = merger(name)(values, WEIGHT, IDS)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize('name', RULES)
def test_the_order_of_clients_changes_no_bit(name):
  merged = np.asarray(merger(name)(BROKEN, WEIGHT, IDS))
  for seed in range(4):
    order = np.random.default_rng(seed).permutation(C)
    again = merger(name)(BROKEN[order], WEIGHT[order], IDS[order])
    assert np.asarray(again).tobytes() == merged.tobytes()


@pytest.mark.parametrize('name', RULES)
def test_an_absent_client_changes_nothing_and_nobody_is_zero(name):
  merged = np.asarray(merger(name)(VALUES, WEIGHT, IDS))
  others = VALUES.copy()
  others[2] = 1e30  # of weight 0
  np.testing.assert_array_equal(merger(name)(others, WEIGHT, IDS), merged)
  nobody = merger(name)(VALUES, np.zeros(C, np.float32), IDS)
  np.testing.assert_array_equal(nobody, np.zeros(N))


@pytest.mark.parametrize('name', ['median', 'trimmed_mean', 'krum'])
def test_two_liars_of_eight_do_not_leave_the_range_of_the_others(name):
  lies = VALUES.copy()
  lies[[0, 4]] = [[3e38], [-3e38]]
  honest = np.delete(VALUES, [0, 2, 4], axis=0)
  merged = np.asarray(merger(name)(lies, WEIGHT, IDS))
  assert (merged >= honest.min(0)).all()
  assert (merged <= honest.max(0)).all()


def test_one_vote_per_client_whatever_its_weight():
  values = np.array([[-1.0], [2.0], [3.0]], np.float32)
  weight = np.array([1000, 1, 1], np.float32)
  assert aggregate.sign_vote(values, weight).tolist() == [1.0]
  rule = aggregate.Aggregator(name='sign_vote', clip_value=0.5)
  votes, weights = rule.limit(values, np.array([1000, 0, 2], np.float32))
  assert votes.tolist() == [[-0.5], [0.5], [0.5]]
  assert weights.tolist() == [1.0, 0.0, 1.0]


def test_clips():
  clipped = aggregate.clip_entries(BROKEN, 0.5)
  np.testing.assert_array_equal(clipped, np.where(
    np.isfinite(BROKEN), np.clip(BROKEN, -0.5, 0.5), BROKEN
  ))  # fmt: skip
  rows = VALUES * np.float32(2.0) ** np.arange(-4, 5)[:, None]
  norms = np.linalg.norm(rows, axis=1)
  found = np.asarray(aggregate.clip_norm(rows, 1.0))
  expected = rows * np.minimum(1, 1 / norms)[:, None]
  assert (norms < 0.9).any()
  assert (norms > 1.1).any()
  np.testing.assert_allclose(found, expected, rtol=1.5e-3)
  np.testing.assert_array_equal(found[norms < 0.99], rows[norms < 0.99])


def test_mistakes_are_named():
  for text, wrong in {
    'aggregator must be one of': {'name': 'average'},
    r'trim_fraction must be in \[0, 0.5\), got 0.5': {'trim_fraction': 0.5},
    'num_byzantine must be >= 0': {'num_byzantine': -1},
    'clip_value is for aggregator mean or sign_vote': {
      'name': 'median', 'clip_value': 1.0,
    },
    'clip_value must be in': {'clip_value': 0.0},
  }.items():  # fmt: skip
    with pytest.raises(ValueError, match=text):
      aggregate.Aggregator(**wrong)
  for name in ('median', 'trimmed_mean', 'krum', 'multi_krum'):
    with pytest.raises(ValueError, match='directions of its own.*decomfl'):
      RULES[name].check_own_directions('spsa')
  RULES['sign_vote'].check_own_directions('spsa')
  with pytest.raises(ValueError, match='sign_vote does not apply to ferret'):
    RULES['sign_vote'].check_own_directions('ferret', signs=False)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'aggregator': 'mode'}, 'aggregator must be one of mean, median'),
    ({'aggregator': 'median'}, 'median does not apply to spsa.*decomfl'),
    (
      {'aggregator': 'krum', 'method': 'fedkseed', 'num_clients': 9},
      'krum does not apply to fedkseed.*directions of its own',
    ),
    (
      {'aggregator': 'sign_vote', 'method': 'ferret'},
      'sign_vote does not apply to ferret',
    ),
    (
      {'aggregator': 'krum', 'method': 'decomfl', 'num_byzantine': 3},
      'num_byzantine 3 needs 9 clients in a round for aggregator krum',
    ),
    ({'trim_fraction': 0.1}, 'trim_fraction does not apply to aggregator mean'),
    ({'num_byzantine': 2}, 'num_byzantine does not apply to aggregator mean'),
    (
      {'aggregator': 'median', 'method': 'fed_avg', 'clip_value': 1.0},
      'clip_value does not apply to aggregator median',
    ),
    ({'clip_value': 0.0}, 'clip_value must be > 0'),
    ({'trim_fraction': 0.5}, r'trim_fraction must be in \[0, 0.5\)'),
    ({'method': 'dp_gd', 'aggregator': 'median'}, 'aggregator does not apply'),
  ],
)
def test_the_launcher_refuses(settings, message):
  with pytest.raises(UsageError, match=message):
    build.build_method(defaults.resolve(from_mapping(settings)), build.no_loss)


def test_every_method_takes_its_aggregators():
  for method, more in {
    'decomfl': {'aggregator': 'trimmed_mean', 'trim_fraction': 0.1},
    'fed_sgd': {'aggregator': 'multi_krum', 'num_byzantine': 2},
    'fed_avg': {'clip_value': 0.5},
    'ferret': {'clip_value': 0.5},
    'spsa': {'aggregator': 'sign_vote', 'clip_value': 0.1},
    'fedkseed_pro': {'clip_value': 2.0},
  }.items():
    config = defaults.resolve(from_mapping({'method': method} | more))
    assert build.build_method(config, build.no_loss).server


def test_methods_do_what_their_aggregator_says():
  """DeComFL sends the median down; FedAvg moves by it."""
  messages = VALUES[:, :4]
  cohort = method_lib.Party(IDS, np.zeros(C, np.int32), WEIGHT)
  method = decomfl.decomfl(
    build.no_loss, keys.root(1), learning_rate=0.1, mu=1.0,
    num_perturbations=4, codec='float32', aggregator=RULES['median'],
  )  # fmt: skip
  median = aggregate.median(messages, WEIGHT)
  np.testing.assert_array_equal(method.downlink(None, messages, cohort), median)
  average = fed_avg.fed_avg(
    build.no_loss, client_optimizer=optax.sgd(1.0), aggregator=RULES['median']
  )
  params = {'a': np.ones(1, np.float32), 'b': np.zeros((3, 1), np.float32)}
  deltas = {'a': messages[:, :1], 'b': messages[:, 1:, None]}
  moved = average.server(average.init(params), deltas, cohort).params
  np.testing.assert_allclose(moved['a'], 1 - median[:1])
  np.testing.assert_allclose(moved['b'][:, 0], -median[1:])


def test_ferret_bounds_the_norm_of_a_block():
  """A client whose norms are beyond the bound moves weights as one at it."""
  clipped = ferret.ferret(
    build.no_loss, keys.root(1), client_optimizer=optax.sgd(1.0),
    coordinates=8, aggregator=aggregate.Aggregator(clip_value=0.5),
  )  # fmt: skip
  state = clipped.init({'w': np.zeros(16, np.float32)})
  cohort = method_lib.Party(IDS[:1], np.zeros(1, np.int32), WEIGHT[:1])
  message = lambda norm: {
    'coordinates': np.full((1, 2), 0b10101, np.uint8),
    'norms': jnp.full((1, 1), norm, jnp.bfloat16),
  }
  server = jax.jit(clipped.server)
  bounded = server(state, message(64.0), cohort).params['w']
  np.testing.assert_array_equal(
    bounded, server(state, message(0.5), cohort).params['w']
  )
  below = server(state, message(0.25), cohort).params['w']
  np.testing.assert_array_equal(bounded, 2 * below)
  assert np.any(below)
