"""The private sketch: its integers, its bound, its law, and what it learns."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfl import calibration, events, keys, perturb
from jaxfl import method as method_lib
from jaxfl import plan as plan_lib
from jaxfl.methods import dp_sketch
from tests import private_problem as problem

pytestmark = pytest.mark.fast_compile

SIZES = (20, 15, 17)
ROOT = keys.root(11)
PLAN = plan_lib.SketchPlan(40, 6, 10.0)


def build(**changes):
  given = {
    'plan': PLAN, 'learning_rate': 0.1, 'clip_norm': 2.0,
    'num_examples': SIZES, 'microbatch_size': 8,
  } | changes  # fmt: skip
  return dp_sketch.dp_sketch(problem.loss_fn, ROOT, **given)


def by_client(**changes):
  given = {
    'unit': 'client', 'client_optimizer': optax.sgd(0.05), 'local_steps': 3,
    'batch_size': 4,
  }  # fmt: skip
  return build(**(given | changes))


def sender(method):
  """Clients -> the messages of round 0."""
  program = jax.jit(jax.vmap(method.client, (None, 0, 0, 0)))
  state = method.init(problem.params())

  def send(clients):
    given = [
      method.prepare(problem.params(), clients[i], 0, i, None) for i in range(3)
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *given)
    return np.asarray(program(state, (), stacked, problem.party(3))[0])

  return send


def directions():
  """The directions of round 0 as rows, float64[K, 5]."""
  found = keys.fold(keys.fold(ROOT, 0), jnp.arange(6))
  zeros = {'w': jnp.zeros(5)}
  return np.stack(
    [
      np.asarray(perturb.perturb(zeros, k, jnp.float32(1.0))['w'])
      for k in found
    ]
  ).astype(np.float64)


def test_messages_are_sums_of_clipped_sketches():
  levels = dp_sketch.levels_of(PLAN)
  sent = sender(build())(problem.data(SIZES))
  z = directions() / math.sqrt(6)
  for message, client, n in zip(sent, problem.data(SIZES), SIZES, strict=True):
    g = -2 * client['y'][:n, None] * client['x'][:n]
    y = g @ z.T
    norms = np.linalg.norm(y, axis=1, keepdims=True)
    wanted = (y * np.minimum(1, 2.0 / norms)).sum(0) * levels / 2.0
    # a level at most for every example, and those are unbiased
    np.testing.assert_allclose(message, wanted, atol=4 * math.sqrt(n / 4))


def test_message_of_a_client_is_the_sketch_of_its_update():
  levels = dp_sketch.levels_of(PLAN)
  sent = sender(by_client(clip_norm=0.3))(problem.data(SIZES))
  z = directions() / math.sqrt(6)
  given = by_client().prepare(
    problem.params(), problem.data(SIZES)[1], 0, 1, None
  )
  w = np.zeros(5)
  for x, y in zip(given['x'][0], given['y'][0], strict=True):
    w = w - 0.05 * 2 * ((x @ w - y)[:, None] * x).mean(0)
  sketch = z @ -w
  sketch = sketch * min(1, 0.3 / np.linalg.norm(sketch))
  np.testing.assert_allclose(sent[1], sketch * levels / 0.3, atol=1.01)


@pytest.mark.parametrize('unit', ['record', 'client'])
def test_neighbours_are_within_the_bound(unit):
  """One unit replaced by another moves the sum by 2 B at most."""
  send = sender(build() if unit == 'record' else by_client())
  bound = 2 * dp_sketch.bound_of(dp_sketch.levels_of(PLAN), 6)
  here = send(problem.data(SIZES))
  worst = 0.0
  for trial in range(12):
    rng = np.random.default_rng(trial)
    other, client = problem.data(SIZES), trial % 3
    rows = rng.integers(SIZES[client]) if unit == 'record' else slice(None)
    shape = other[client]['x'][rows].shape
    scale = 10.0 ** rng.integers(0, 4)
    other[client]['x'][rows] = rng.normal(size=shape) * scale
    other[client]['y'][rows] = rng.normal(size=shape[:-1]) * scale
    moved = (send(other) - here).astype(float).sum(0)
    worst = max(worst, np.linalg.norm(moved))
  assert 0.4 * bound < worst <= bound


def test_rounding_keeps_the_norm_and_has_no_bias():
  rng = np.random.default_rng(0)
  x = rng.normal(size=32).astype(np.float32)
  x *= np.float32(10 / np.linalg.norm(x))
  bound = dp_sketch.bound_of(10, 32)
  keys_ = keys.fold(ROOT, jnp.arange(4000))
  dither = keys.uniform(keys.fold(keys_[:, None], jnp.arange(32)))
  found = np.asarray(
    jax.vmap(lambda u: dp_sketch.rounded(jnp.asarray(x), u, bound))(dither)
  )
  norms = np.linalg.norm(found.astype(float), axis=1)
  assert norms.max() <= bound
  cut = (found == np.trunc(x)).all(1)
  assert cut.mean() < 0.01
  np.testing.assert_allclose(found.mean(0), x, atol=4 * 0.5 / math.sqrt(4000))
  # a bound that always bites
  tight = dp_sketch.rounded(jnp.asarray(x), dither[0], 0.5)
  np.testing.assert_array_equal(tight, np.trunc(x))


def test_release_has_the_noise_of_the_plan():
  method = build(plan=PLAN._replace(num_rounds=300, coordinates=20))
  state = method.init(problem.params())
  key = problem.key()
  zeros = np.zeros((3, 20), np.int32)
  found = np.stack(
    [
      method.release.make(
        state._replace(round=jnp.int32(r)), zeros, problem.party(3, r), key
      )
      for r in range(100)
    ]
  )
  levels = dp_sketch.levels_of(PLAN)
  std = 10.0 * 2 * dp_sketch.bound_of(levels, 20)
  assert abs(found.std() / std - 1) < 4 / math.sqrt(2 * found.size)
  assert found.dtype == np.int32


def test_faulty_clients_are_left_out():
  method = build()
  state = method.init(problem.params())
  clean, faulty = np.zeros((2, 3, 6), np.int32)
  clean[0] = faulty[0] = 7
  faulty[1] = 2**30
  made = [
    method.release.make(state, messages, problem.party(3), problem.key())
    for messages in (clean, faulty)
  ]
  np.testing.assert_array_equal(*made)


def test_step_is_the_reconstruction_of_the_mean():
  method = build()
  state = method.init(problem.params())
  release = np.array([5, -3, 0, 2, 1, -1], np.int32)
  after = method.server(state, release[None], None)
  scale = 2.0 / (dp_sketch.levels_of(PLAN) * sum(SIZES) * math.sqrt(6))
  wanted = -0.1 * scale * release @ directions()
  np.testing.assert_allclose(
    after.params['w'], wanted, rtol=0, atol=6 * 2.0**-22
  )
  followed = method.follow(state, release)
  np.testing.assert_array_equal(followed.params['w'], after.params['w'])


@pytest.mark.slow
def test_learns():
  plan = plan_lib.SketchPlan(60, 6, 0.05)
  whole = problem.whole(SIZES)
  start = float(problem.loss_fn(problem.params(), whole))
  for method in (
    build(plan=plan, clip_norm=10.0),
    by_client(plan=plan, clip_norm=1.0, learning_rate=0.3),
  ):
    rounds = problem.run(method, SIZES, num_rounds=60)
    end = float(problem.loss_fn(rounds[-1].state.params, whole))
    assert end < 0.2 * start
    assert all(done.loss is None for done in rounds)
    # frames have 12 bytes of their own
    assert rounds[0].bytes_up == 3 * (6 * 4 + 12)


def test_plan_is_what_is_accounted_for():
  plan = calibration.sketch(3.0, 1e-5, num_rounds=100, coordinates=6)
  (event,) = events.merged(plan.rounds())
  assert event == events.IntegerVector(plan.noise_multiplier, 100)
  # Renyi divergences ask for about 7 % more than sqrt(100) / mu
  assert 1.03 < plan.noise_multiplier / (10 / 0.7191) < 1.1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'unit': 'city'}, 'unit must be one of record, client'),
    ({'clip_norm': math.inf}, 'clip_norm'),
    ({'distribution': 'gaussian'}, 'distribution'),
    ({'plan': PLAN._replace(coordinates=0)}, 'coordinates'),
    ({'plan': PLAN._replace(noise_multiplier=0.0)}, 'noise_multiplier'),
    ({'local_steps': 2}, 'local_steps mix records'),
    ({'unit': 'client'}, 'client_optimizer'),
    ({'client_optimizer': optax.sgd(1.0)}, 'client_optimizer'),
    ({'microbatch_size': 0}, 'microbatch_size'),
    ({'num_examples': (3, 0)}, 'one example'),
    (
      {'num_examples': (2**24,), 'plan': PLAN._replace(noise_multiplier=0.1)},
      'do not fit 32 bits',
    ),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    build(**changes)


def test_refuses_absent_clients_spent_budgets_and_shared_keys():
  method = build()
  state = method.init(problem.params())
  key = problem.key()
  zeros = np.zeros((3, 6), np.int32)
  two = method_lib.Party(*(x[:2] for x in problem.party(3)))
  with pytest.raises(ValueError, match='2 of 3 clients take part'):
    method.release.make(state, zeros[:2], two, key)
  with pytest.raises(TypeError, match='NoiseKey'):
    method.release.make(state, zeros, problem.party(3), keys.root(0))
  with pytest.raises(ValueError, match='the budget is spent'):
    method.release.make(
      state._replace(round=jnp.int32(40)), zeros, problem.party(3), key
    )
