"""SPSA: predicted moments, exactness, and defects seen in other code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import digest, grid, keys, master, perturb
from jaxfl import method as method_lib
from jaxfl.methods import spsa
from jaxfl.runtime import simulate
from tests import methods_table as table

pytestmark = pytest.mark.fast_compile

ROOT = keys.root(11)
KURTOSIS = {
  'rademacher': 1.0, 'popcount16': 2.875, 'gaussian': 3.0,
  'rank1': 1.0, 'rank4': 2.5, 'rank16': 2.875,
}  # fmt: skip


def cohort_of(ids, round=0, weight=1.0):
  n = len(ids)
  return method_lib.Party(
    np.asarray(ids, np.int32),
    np.full(n, round, np.int32),
    np.full(n, weight, np.float32),
  )


def linear(slope):
  """A loss with the gradient `slope` everywhere."""
  return lambda params, batch: jnp.vdot(params['w'], slope)


@functools.cache
def programs(method):
  """Client and server: traced once, however many rounds there are."""
  client = jax.jit(jax.vmap(method.client, (None, None, None, 0)))
  return client, jax.jit(method.server)


def run_round(method, state, ids, batch=None):
  """One round of parties that share a batch; the new state and messages."""
  cohort = cohort_of(ids, int(state.round))
  batches = batch or {'x': np.zeros((method.num_batches, 1), np.float32)}
  client, server = programs(method)
  messages, _, _ = client(state, (), batches, cohort)
  return server(state, messages, cohort), messages


# other ranks than 4 differ in shapes alone
ONE_RANK = [
  pytest.param(name, marks=[pytest.mark.slow] * (name in ('rank1', 'rank16')))
  for name in perturb.DISTRIBUTIONS
]


@pytest.mark.parametrize('distribution', ONE_RANK)
def test_mean_update_is_the_gradient_with_the_predicted_variance(distribution):
  slope = np.array([1.0, -2.0, 0.5, 3.0, 0.0], np.float32)
  lr, parties, samples = 2.0**-6, 2000, 8
  method = spsa.spsa(
    linear(slope), ROOT, learning_rate=lr, mu=2.0**-6, codec='float32',
    num_perturbations=samples, distribution=distribution,
  )  # fmt: skip
  state = method.init({'w': np.zeros(5, np.float32)})
  after, _ = run_round(method, state, range(parties))
  mean = -np.asarray(after.params['w']) / lr
  # Var (g z)_i = sum_{j != i} slope_j^2 + (kurtosis - 1) slope_i^2
  kappa = KURTOSIS[distribution]
  variance = np.sum(slope**2) + (kappa - 2) * slope**2
  error = np.sqrt(variance / (parties * samples))
  assert (np.abs(mean - slope) < 4.5 * error).all()
  # a scale wrong by a tenth would be seen
  assert not (np.abs(1.1 * mean - slope) < 4.5 * error).all()


@pytest.mark.parametrize('distribution', perturb.DISTRIBUTIONS)
def test_second_moment_of_one_estimate(distribution):
  """E |g z|^2 = (d - 1 + kurtosis) |slope|^2."""
  slope = np.linspace(-1, 1, 40).astype(np.float32)
  n = 20_000
  directions = keys.fold(ROOT, np.arange(n))
  z = jax.jit(
    jax.vmap(
      lambda k: perturb.perturb(
        {'w': jnp.zeros(40)}, k, jnp.float32(1), distribution=distribution
      )['w']
    )
  )(directions)
  found = np.square(z @ slope) * np.sum(np.square(z), axis=1)
  expected = (40 - 1 + KURTOSIS[distribution]) * np.sum(slope**2)
  error = found.std() / np.sqrt(n)
  assert abs(found.mean() - expected) < 4 * error
  assert abs(found.mean() - 1.1 * expected) > 4 * error


def test_update_is_along_the_perturbation():
  """Cosine 1 between what was tried and what is applied."""
  slope = np.ones(300, np.float32)
  method = spsa.spsa(
    linear(slope), ROOT, learning_rate=0.01, mu=2.0**-8, codec='float32'
  )
  state = method.init({'w': np.zeros(300, np.float32)})
  after, messages = run_round(method, state, [7])
  direction = keys.fold(ROOT, 7, 0, 0)
  z = perturb.field(direction, 'w', (300,))
  step = np.asarray(after.params['w'], np.float64)
  cosine = step @ np.asarray(z) / np.linalg.norm(step) / np.sqrt(300)
  assert abs(abs(cosine) - 1) < 1e-5
  assert np.sign(step @ np.asarray(z)) == -np.sign(float(messages[0, 0]))


def test_equal_shaped_tensors_move_independently():
  both = lambda p, b: jnp.sum(p['a']) + 2 * jnp.sum(p['b'])
  method = spsa.spsa(both, ROOT, learning_rate=0.01, mu=2.0**-8)
  zeros = np.zeros((40, 50), np.float32)
  state = method.init({'a': zeros, 'b': zeros})
  after, _ = run_round(method, state, [0])
  a, b = (np.asarray(after.params[k]).ravel() for k in 'ab')
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert abs(cosine) < 4 / np.sqrt(a.size)


def test_weights_are_arguments_not_constants():
  """Under jit the two sides differ, and a new state gives a new gradient."""
  square = lambda p, b: jnp.sum(jnp.square(p['w']))
  method = spsa.spsa(square, ROOT, learning_rate=0.1, mu=0.01, codec='float32')
  client = jax.jit(method.client)
  party = jax.tree.map(lambda x: x[0], cohort_of([0]))
  batches = {'x': np.zeros((1, 1), np.float32)}
  found = []
  for value in (1.0, 2.0):
    state = method.init({'w': np.full(11, value, np.float32)})
    found.append(float(client(state, (), batches, party)[0][0]))
  assert found[0] != 0
  np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-3)


def test_one_client_equals_the_centralised_optimizer():
  """A float codec and one client: textbook SPSA, to the grid's step."""
  method = table.CASES['spsa'].build(codec='float32', num_perturbations=1)
  state = method.init(table.params())
  reference = jax.tree.map(np.float64, table.params())
  batches = table.batch_fn(1)
  server, client = jax.jit(method.server), jax.jit(method.client)
  for round in range(20):
    batch = batches(round, 0)
    party = jax.tree.map(lambda x: x[0], cohort_of([0], round))
    message, _, _ = client(state, (), batch, party)
    add = lambda x: x[None]
    state = server(state, jax.tree.map(add, message), jax.tree.map(add, party))
    direction = keys.fold(table.ROOT, 0, round, 0)
    z = jax.tree.map(
      np.float64,
      perturb.perturb(
        jax.tree.map(jnp.zeros_like, table.params()), direction, jnp.float32(1)
      ),
    )
    one = jax.tree.map(lambda x: x[0], batch)
    loss = lambda sign: float(
      table.loss_fn(
        jax.tree.map(
          lambda w, d, s=sign: jnp.float32(w + s * 1e-2 * d), reference, z
        ),
        one,
      )
    )
    g = (loss(1) - loss(-1)) / 2e-2
    reference = jax.tree.map(lambda w, d: w - 0.05 * g * d, reference, z)
  for found, expected in zip(
    *map(jax.tree.leaves, (state.params, reference)), strict=True
  ):
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.slow
def test_accuracy_works_as_an_objective():
  """Not differentiable: 1 - accuracy of a sign classifier."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(512, 10)).astype(np.float32)
  y = x @ rng.normal(size=10).astype(np.float32) > 0

  def error_rate(params, batch):
    return jnp.mean((batch['x'] @ params['w'] > 0) != batch['y'])

  method = spsa.spsa(
    error_rate, ROOT, learning_rate=2.0, mu=0.3, num_perturbations=8
  )
  state = method.init({'w': rng.normal(size=10).astype(np.float32)})
  batch = {'x': np.stack([x] * 8), 'y': np.stack([y] * 8)}
  before = float(error_rate(state.params, {'x': x, 'y': y}))
  for _ in range(40):
    state, _ = run_round(method, state, range(4), batch)
  after = float(error_rate(state.params, {'x': x, 'y': y}))
  assert after < 0.5 * before


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('weights', master.WEIGHTS)
def test_a_hundred_thousand_cycles_at_rate_zero_change_no_bit(dtype, weights):
  method = spsa.spsa(
    lambda p, b: jnp.sum(jnp.square(p['w'].astype(jnp.float32))),
    ROOT, learning_rate=0.0, mu=1e-3, weights=weights, forward_dtype=dtype,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  params = {'w': jnp.asarray(rng.normal(size=(3, 5)), dtype)}
  start = method.init(params)

  @jax.jit
  def cycles(state):
    def cycle(_, state):
      party = method_lib.Party(jnp.int32(0), state.round, jnp.float32(1))
      message, _, _ = method.client(state, (), jnp.zeros((1, 1)), party)
      add = lambda x: x[None]
      return method.server(state, add(message), jax.tree.map(add, party))

    return jax.lax.fori_loop(0, 100_000, cycle, state)

  end = cycles(start)
  assert int(end.round) == 100_000
  assert digest.digest(end.params) == digest.digest(start.params)


def test_bf16_forward_comes_from_the_float32_master():
  seen = []

  def loss(params, batch):
    seen.append(params['w'].dtype)
    return jnp.sum(params['w'].astype(jnp.float32))

  method = spsa.spsa(
    loss, ROOT, learning_rate=1e-6, mu=0.01, forward_dtype='bfloat16'
  )
  state = method.init({'w': jnp.ones(8, jnp.bfloat16)})
  for _ in range(10):
    state, _ = run_round(method, state, [0, 1])
  assert set(seen) == {np.dtype(jnp.bfloat16)}
  assert state.params['w'].dtype == jnp.float32
  # steps far below a bfloat16 ulp of 1.0 are kept
  assert float(jnp.max(jnp.abs(state.params['w'] - 1))) > 0


@pytest.mark.parametrize(
  ('weights', 'learning_rate'), [('grid', 50.0), ('float32', 2.0**100)]
)
def test_overflow_is_reported_with_the_tensor(weights, learning_rate):
  method = spsa.spsa(
    linear(np.full(3, 1e10, np.float32)), ROOT, weights=weights, mu=0.01,
    learning_rate=learning_rate, codec='float32',
  )  # fmt: skip
  state = method.init({'v': np.zeros(2, np.float32), 'w': np.ones(3, 'f')})
  assert method.check(state) is None
  for _ in range(3):
    state, _ = run_round(method, state, [0])
  assert 'weights left their range in: v, w' in method.check(state)


def test_huge_coefficients_that_cancel_are_reported():
  slope = lambda p, b: 3e5 * p['w'] * b['x'][0]
  method = spsa.spsa(slope, ROOT, learning_rate=1.0, mu=0.01, codec='float32')
  state = method.init({'w': np.float32(0.5)})
  for round in range(10):
    after, _ = run_round(
      method, state._replace(round=jnp.int32(round)), [0, 1],
      {'x': np.ones((1, 1), np.float32)},
    )  # fmt: skip
    assert method.check(after) is not None


@pytest.mark.parametrize('weights', master.WEIGHTS)
def test_padding_changes_no_bit(weights):
  """One message in one slot is inlined and fused; in four it is not."""
  method = table.CASES['spsa'].build(
    num_perturbations=1, weights=weights, weight_decay=1e-3
  )
  rng = np.random.default_rng(0)
  state = method.init({'w': rng.normal(size=(64, 50)).astype(np.float32)})
  message = np.array([[77]], np.uint8)
  ends = []
  for slots in (1, 4):
    padded = simulate.pad(message, np.array([3]), np.ones(1), 0, slots)
    ends.append(jax.jit(method.server)(state, *padded).params)
    with jax.disable_jit():
      ends.append(method.server(state, *padded).params)
  assert len({digest.digest(e) for e in ends}) == 1


def test_updates_are_whole_units_of_the_grid():
  method = table.CASES['spsa-schedule-decay'].build()
  state = method.init(table.params())
  for _ in range(5):
    state, _ = run_round(
      method, state, range(3), table.batch_fn(method.num_batches)(0, 0)
    )
  for w, e in zip(
    *map(jax.tree.leaves, (state.params, state.exponents)), strict=True
  ):
    units = np.asarray(w, np.float64) * 2.0 ** int(e)
    np.testing.assert_array_equal(units, np.round(units))


def test_schedules_follow_the_round():
  rates = [0.5, 0.25, 0.0, 0.125]
  method = spsa.spsa(
    linear(np.ones(1, np.float32)), ROOT, learning_rate=lambda r: rates[r],
    mu=lambda r: 2.0 ** -(r + 4), num_rounds=4, codec='float32',
  )  # fmt: skip
  state = method.init({'w': np.zeros(1, np.float32)})
  for rate in rates + rates[-1:]:
    before = state
    state, messages = run_round(method, state, [0])
    moved = float(state.params['w'][0] - before.params['w'][0])
    np.testing.assert_allclose(
      abs(moved), rate * abs(float(messages[0, 0])), rtol=1e-5
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'mu': 0.0}, 'mu must be > 0'),
    ({'mu': lambda r: 1.0 - r, 'num_rounds': 2}, 'mu must be > 0'),
    ({'learning_rate': -1.0}, 'learning_rate must be 0 or in'),
    ({'learning_rate': lambda r: 1.0}, 'num_rounds is needed'),
    ({'num_perturbations': 0}, 'num_perturbations must be >= 1'),
    ({'codec': 'gzip'}, 'codec must be one of'),
    ({'distribution': 'uniform'}, 'distribution must be one of'),
    ({'sides': 'three'}, 'sides must be one of'),
    ({'scaling': 'max'}, 'scaling must be one of'),
    ({'weights': 'int4'}, 'weights must be one of'),
    ({'weight_decay': 1e4}, 'weight_decay must be < 0.25'),
  ],
)
def test_bad_arguments_are_named(changes, message):
  settings = {'learning_rate': 0.1, 'mu': 0.01} | changes
  with pytest.raises(ValueError, match=message):
    spsa.spsa(table.loss_fn, ROOT, **settings)


def test_grid_equals_float_weights_to_rounding():
  """Both arithmetics take the same steps; grids round each coefficient."""
  ends = []
  for weights in master.WEIGHTS:
    method = table.CASES['spsa'].build(codec='float32', weights=weights)
    state = method.init(table.params())
    for round in range(10):
      state, _ = run_round(
        method, state, range(4), table.batch_fn(method.num_batches)(round, 0)
      )
    ends.append(state)
  step = float(grid.power_of_two(-ends[0].exponents['other']))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1000 * step),
    ends[0].params,
    ends[1].params,
  )
