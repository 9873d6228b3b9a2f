"""DP-SGD: against its equations, its bound, and its plan."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import calibration, events, keys, noise, poisson
from jaxfl import method as method_lib
from jaxfl import plan as plan_lib
from jaxfl.methods import dp_sgd
from tests import private_problem as problem

SIZES = (30, 24, 27)
RATE = 0.3
PLAN = plan_lib.SampledPlan(12, RATE, 0.7)


def build(**changes):
  given = {
    'plan': PLAN, 'learning_rate': 0.2, 'clip_norm': 0.8,
    'num_examples': SIZES, 'microbatch_size': 8, 'research_float_noise': True,
  } | changes  # fmt: skip
  return dp_sgd.dp_sgd(problem.loss_fn, **given)


def test_is_the_algorithm():
  key = problem.key()
  x = np.zeros(problem.DIM)
  for r, done in enumerate(problem.run(build(), SIZES, num_rounds=12)):
    total = np.zeros(problem.DIM)
    for id, (client, n) in enumerate(
      zip(problem.data(SIZES), SIZES, strict=True)
    ):
      chosen = key.bernoulli((1, n), RATE, round=r, name=f'sample of {id}')[0]
      f, y = client['x'][:n][chosen], client['y'][:n][chosen]
      g = 2 * (f @ x - y)[:, None] * f
      norms = np.linalg.norm(g, axis=1, keepdims=True)
      total += (g * np.minimum(1, 0.8 / norms)).sum(0)
    zeros = {'w': np.zeros(problem.DIM)}
    std = 0.7 * 0.8 / (RATE * sum(SIZES))
    drawn = noise.add_gaussian(key, zeros, std, round=r, name='release')['w']
    wanted = x - 0.2 * (total / (RATE * sum(SIZES)) + drawn)
    found = np.asarray(done.state.params['w'])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    x = found.astype(np.float64)
    assert done.loss is None


def test_a_record_that_is_dropped_moves_a_sum_by_the_clip():
  """Whatever the sample; nothing is divided by how many were drawn."""
  method = build()
  program = jax.jit(method.client)
  state = method.init(problem.params())
  given = {
    k: x[:1] for k, x in problem.data(SIZES)[0].items() if k != 'example_weight'
  }
  party = method_lib.Party(jnp.int32(0), jnp.int32(0), jnp.float32(1))
  rows = {k: np.repeat(x, 5, axis=0)[None] for k, x in given.items()}
  rows['y'] = np.full((1, 5), 100, np.float32)
  sums = [
    np.asarray(
      program(
        state, (), {'examples': rows, 'mask': np.arange(5)[None] < n}, party
      )[0]['w']
    )
    for n in range(6)
  ]
  moved = [np.linalg.norm(b - a) for a, b in itertools.pairwise(sums)]
  np.testing.assert_allclose(moved, 0.8, rtol=2e-3)
  assert max(moved) <= 0.8 * (1 + 1e-6)


def test_samples_fill_arrays_of_one_size():
  key = problem.key()
  rows = problem.data(SIZES)[1]
  drawn, mask = poisson.draw(rows, 3000, 0.2, key, round=0, name='a')
  size = mask.shape[1]
  assert drawn['x'].shape == (3000, size, problem.DIM)
  assert abs(mask.sum() / (3000 * 24) - 0.2) < 4 * 0.4 / math.sqrt(72000)
  assert not set(drawn['y'][mask]) - set(rows['y'][:24])
  # as binomial as can be: the spread of the sizes
  counts = mask.sum(1)
  assert abs(counts.var() / (24 * 0.2 * 0.8) - 1) < 0.15
  for i in range(20):  # nobody twice
    chosen = drawn['y'][i][mask[i]]
    assert len(set(chosen)) == len(chosen)
  with pytest.raises(TypeError, match='NoiseKey'):
    poisson.draw(rows, 1, 0.2, keys.root(0), round=1, name='a')


def test_plan_is_what_is_accounted_for():
  plan = calibration.dp_sgd(3.0, 1e-5, num_rounds=50, sampling_rate=0.05)
  (event,) = events.merged(plan.rounds())
  assert event == events.PoissonGaussian(plan.noise_multiplier, 0.05, 50)
  # without amplification it would be sqrt(50) / mu, ten times more
  assert 0.6 < plan.noise_multiplier < 1.2


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'clip_norm': math.inf}, 'clip_norm'),
    ({'research_float_noise': False}, 'research_float_noise must be set'),
    ({'num_examples': (3, 0)}, 'num_examples'),
    ({'microbatch_size': 0}, 'microbatch_size'),
    ({'plan': PLAN._replace(noise_multiplier=0.0)}, 'noise_multiplier'),
    ({'plan': PLAN._replace(sampling_rate=1.0)}, 'dp_gd takes all'),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    build(**changes)


def test_refuses_more_than_the_budget():
  with pytest.raises(ValueError, match='the budget is spent'):
    problem.run(build(plan=PLAN._replace(num_rounds=2)), SIZES, num_rounds=3)
