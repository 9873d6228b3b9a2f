"""FedKSeed: pool arithmetic, draws, messages, and what the paper promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import digest, keys, master, perturb, pool, wire
from jaxfl import method as method_lib
from jaxfl.methods import fedkseed
from jaxfl.runtime import simulate
from tests import methods_table as table

pytestmark = pytest.mark.fast_compile

ROOT = keys.root(5)


def build(loss_fn=table.loss_fn, **changes):
  settings = {
    'learning_rate': 0.02, 'mu': 1e-2, 'num_seeds': 64, 'local_steps': 8
  }  # fmt: skip
  return fedkseed.fedkseed(loss_fn, ROOT, **(settings | changes))


compiled = functools.cache(simulate.compile_method)


def cohort_of(ids, round=0):
  n = len(ids)
  return method_lib.Party(
    np.array(ids, np.int32),
    np.full(n, round, np.int32),
    np.ones(n, np.float32),
  )


def step(method, state, ids, round=0):
  """Messages and the next state."""
  batches = [table.batch_fn(method.num_batches)(round, i) for i in ids]
  batches = jax.tree.map(lambda *x: np.stack(x), *batches)
  cohort = cohort_of(ids, round)
  programs = compiled(method)
  messages, _, _ = programs.client(state, (), batches, cohort)
  return messages, programs.server(state, messages, cohort)


def pool_of(num_seeds, distribution='rademacher'):
  return pool.directions(ROOT, np.arange(num_seeds), distribution)


# other ranks than 4 differ in shapes alone
ONE_RANK = [
  pytest.param(name, marks=[pytest.mark.slow] * (name in ('rank1', 'rank16')))
  for name in pool.DISTRIBUTIONS
]


@pytest.mark.parametrize('distribution', ONE_RANK)
def test_rebuild_equals_the_sequence_of_steps(distribution):
  rng = np.random.default_rng(0)
  shapes = {'small': (3, 5), 'ragged': (70, 131)}  # without and with blocks
  base = master.init({k: rng.normal(size=s) for k, s in shapes.items()})
  seeds = pool_of(32, distribution)
  held, at = base, jnp.zeros(32, jnp.int32)
  for _ in range(5):
    amounts = rng.integers(-(2**24), 2**24, 7, dtype=np.int32)
    new, left = pool.add_coordinates(at, rng.integers(0, 32, 7), amounts)
    assert not left
    held = pool.step(
      held, seeds, at, new, max_changes=7, distribution=distribution
    )
    at = new
  rebuilt = pool.rebuild(
    base, jnp.int32(pool.ONE), seeds, at, distribution=distribution
  )
  assert digest.digest(rebuilt) == digest.digest(held)
  # and both are the weights that the equation asks for, to half a grid step
  # per seed
  value = np.ldexp(np.asarray(at, float), -int(pool.exponent(base.exponents)))
  for path, w in keys.named_leaves(base.params):
    z = [
      perturb.field(k, path, w.shape, distribution=distribution) for k in seeds
    ]
    wanted = np.asarray(w, float) + np.tensordot(value, np.stack(z), 1)
    got = dict(keys.named_leaves(rebuilt.params))[path]
    grid_step = 2.0 ** -float(dict(keys.named_leaves(base.exponents))[path])
    largest = np.abs(z).max()
    assert np.abs(got - wanted).max() <= 16 * largest * grid_step


def test_coordinates_out_of_range_are_seen():
  at = jnp.zeros(4, jnp.int32)
  near = jnp.int32(2**30 - 1)
  assert not pool.add_coordinates(at, jnp.array([1]), near[None])[1]
  assert pool.add_coordinates(at, jnp.array([1]), (near + 1)[None])[1]
  # a sum that comes back into the range after it wrapped
  many = jnp.full(4, 2**30, jnp.int32)
  assert pool.add_coordinates(at, jnp.array([1, 1, 1, 1]), many)[1]
  # many that move far, each of them within its range
  new, left = pool.add_coordinates(at, jnp.arange(4), many // 2)
  assert not left
  np.testing.assert_array_equal(new, many // 2)
  method = build()
  state = method.init(table.params())._replace(out_of_range=jnp.array(True))
  assert 'coordinate' in method.check(state)


def test_one_client_ends_where_its_local_steps_end():
  """The server's weights are the client's steps by hand: eq. 7-8, in order."""
  schedule, decay = lambda r: 0.02 / (1 + r), 0.02
  method = build(
    codec='float32', pro=True, importance_weight=True, weight_decay=decay,
    learning_rate=schedule, num_rounds=3, send_indices=True,
  )  # fmt: skip
  state = method.init(table.params())
  levels = jnp.asarray(np.arange(64) * 4, jnp.uint8)
  state = state._replace(levels=levels, round=jnp.int32(2))
  messages, after = step(method, state, [3], 2)
  lr, p = schedule(2), np.exp(np.arange(64) * 4 / 255)
  for path, w in keys.named_leaves(state.params):
    w = np.asarray(w, float)
    for k, g in zip(
      np.asarray(messages['indices'][0]),
      np.asarray(messages['projected_grads'][0]),
      strict=True,
    ):
      z = perturb.field(pool_of(64)[k], path, w.shape)
      step_weight = p.mean() / p[k]
      w = w * (1 - lr * decay) - lr * step_weight * g * np.asarray(z)
    got = dict(keys.named_leaves(after.params))[path]
    np.testing.assert_allclose(got, w, atol=3e-5)


def test_indices_that_are_sent_change_nothing():
  ends = []
  for send in (False, True):
    method = build(send_indices=send, pro=True)
    state = method.init(table.params())
    for round in range(3):
      messages, state = step(method, state, [0, 4, 2], round)
    ends.append(digest.digest(state))
  assert ends[0] == ends[1]
  assert messages['indices'].dtype == np.uint8
  # an index outside the pool is left out, as a projected gradient without value
  bad = messages['indices'].at[0, 0].set(64)
  nan = messages['projected_grads'].at[0, 0].set(128)
  cohort = cohort_of([0, 4, 2])
  hostile = compiled(method).server(state, messages | {'indices': bad}, cohort)
  rejected = compiled(method).server(
    state, messages | {'projected_grads': nan}, cohort
  )
  assert digest.digest(hostile) == digest.digest(rejected)


def test_draws_are_even_and_differ():
  drawn = []
  method = build(send_indices=True, local_steps=2000, num_seeds=16)
  state = method.init(table.params())
  for party, round in ((0, 0), (1, 0), (0, 1)):
    batches = table.batch_fn(2000)(0, 0)
    batches = jax.tree.map(lambda x: x[None], batches)
    message, _, _ = compiled(method).client(
      state, (), batches, cohort_of([party], round)
    )
    drawn.append(np.asarray(message['indices'][0]))
  for a in drawn:
    counts = np.bincount(a, minlength=16)
    # chi square with 15 degrees of freedom, 99.99 %
    assert ((counts - 125.0) ** 2 / 125.0).sum() < 44.3
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert 0.02 < (drawn[a] == drawn[b]).mean() < 0.11  # 1 / 16 by chance


def test_pro_probabilities():
  """Equation 10-11 in float64, to the 256 levels; and the bound e."""
  rng = np.random.default_rng(1)
  sums = rng.gamma(0.5, 20.0, 512).astype(np.float32)
  counts = rng.integers(0, 9, 512).astype(np.uint32)
  sums[counts == 0] = 0
  levels = np.asarray(fedkseed._levels(jnp.asarray(sums), jnp.asarray(counts)))
  mean = sums.astype(float) / (counts + 1)
  scaled = (mean - mean.min()) / (mean.max() - mean.min())
  assert np.abs(levels - 255 * scaled).max() <= 0.51
  weights = fedkseed._draw_weights(512)[levels].astype(float)
  p, wanted = weights / weights.sum(), np.exp(scaled) / np.exp(scaled).sum()
  np.testing.assert_allclose(p, wanted, rtol=0.005)
  assert p.max() / p.min() <= np.e
  assert p.max() / p.min() > 2.6
  even = fedkseed._levels(jnp.zeros(512), jnp.zeros(512, jnp.uint32))
  assert (even == even[0]).all()
  # integers stay exact in float32 for the largest pool
  assert int(fedkseed._draw_weights(pool.MAX_SEEDS)[-1]) * 65536 <= 2**24


def test_pro_draws_by_its_probabilities():
  method = build(pro=True, send_indices=True, local_steps=4000, num_seeds=8)
  state = method.init(table.params())
  levels = np.array([0, 0, 0, 0, 255, 255, 255, 255], np.uint8)
  state = state._replace(levels=jnp.asarray(levels))
  message, _, _ = jax.jit(method.client)(
    state, (), table.batch_fn(4000)(0, 0),
    method_lib.Party(np.int32(1), np.int32(1), np.float32(1)),
  )  # fmt: skip
  often = (np.asarray(message['indices']) >= 4).mean()
  share = np.e / (1 + np.e)
  assert abs(often - share) < 4 * np.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize('weighted', [True, False])
def test_importance_weight_makes_pro_unbiased(weighted):
  """The mean step over draws is the mean over the pool, only if weighted."""
  method = build(
    pro=True, importance_weight=weighted, codec='float32', num_seeds=8,
    local_steps=20_000, learning_rate=2.0**-16,
  )  # fmt: skip
  state = method.init(table.params())
  levels = np.array([0, 40, 80, 120, 160, 200, 240, 255], np.uint8)
  state = state._replace(levels=jnp.asarray(levels))
  message = jnp.ones((1, 20_000))
  after = jax.jit(method.server)(state, message, cohort_of([0]))
  q = int(pool.exponent(state.exponents))
  moved = -np.ldexp(np.asarray(after.coordinates, float), 16 - q) / 20_000
  p = np.exp(levels / 255) / np.exp(levels / 255).sum()
  wanted = np.full(8, 1 / 8) if weighted else p
  weight = 1 / (8 * p) if weighted else np.ones(8)
  spread = weight * np.sqrt(p * (1 - p) / 20_000)
  assert (np.abs(moved - wanted) < 4.5 * spread).all()


def test_history_is_clipped_and_counts_what_was_accepted():
  method = build(pro=True, codec='float32', send_indices=True, local_steps=4)
  state = method.init(table.params())
  message = {
    'projected_grads': jnp.array([[2.0, -3.0, 1e6, jnp.nan]]),
    'indices': jnp.array([[5, 5, 7, 9]], jnp.uint8),
  }
  sums, counts = compiled(method).server(state, message, cohort_of([0])).history
  assert (float(sums[5]), int(counts[5])) == (5.0, 2)
  assert (float(sums[7]), int(counts[7])) == (1000.0, 1)
  assert float(sums.sum()) == 1005.0
  assert int(counts.sum()) == 3


def test_weight_decay_is_the_product_over_all_steps():
  method = build(
    lambda p, b: 0.0 * table.loss_fn(p, b), weight_decay=0.05, num_rounds=40,
    learning_rate=lambda r: 0.02 * (1 - r / 80), local_steps=8,
  )  # fmt: skip
  state = start = method.init(table.params())
  message = jnp.zeros((1, 8), jnp.uint8)
  for _ in range(40):
    state = compiled(method).server(state, message, cohort_of([0]))
  lrs = np.repeat([0.02 * (1 - r / 80) for r in range(40)], 8)
  left = np.prod(1 - lrs * 0.05)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b * left, atol=1e-5),
    state.params,
    start.params,
  )
  assert left < 0.8


def frame_bytes(message):
  return len(wire.to_bytes(message))


def test_communication_of_the_paper_and_ours():
  """K = 4096, 200 steps: the paper's form is its 17,984 bytes and headers."""
  params = {'w': np.zeros((4, 4), np.float32)}
  sizes = {}
  for codec in ('float32', 'bfloat16', 'log8'):
    for send in (True, False):
      method = build(
        num_seeds=4096, local_steps=200, codec=codec, send_indices=send
      )
      like = method.message(params)
      zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
      sizes[codec, send] = frame_bytes(zeros)
  payload = {'float32': 800, 'bfloat16': 400, 'log8': 200}
  for (codec, send), size in sizes.items():
    assert (
      payload[codec] + 400 * send < size <= payload[codec] + 400 * send + 64
    )
  state = method.init(params)
  down = lambda state, since: frame_bytes(method.downlink(state, since))
  assert down(state, -1) < 100  # nothing has changed
  few = state._replace(changed=state.changed.at[:10].set(3))
  assert down(few, -1) < 160
  assert down(few, 4) < 100
  all = state._replace(changed=jnp.zeros_like(state.changed))
  # less than 18 kB in both directions, at the most, with every index
  assert down(all, -1) + sizes['float32', True] < 18_000


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'local_steps': 0}, 'local_steps must be >= 1'),
    ({'num_seeds': 65537}, 'num_seeds must be in .1, 65536.'),
    ({'num_seeds': 0}, 'num_seeds'),
    ({'distribution': 'gaussian'}, 'integer form'),
    ({'importance_weight': True}, 'importance_weight'),
    ({'mu': 0.0}, 'mu must be > 0'),
    ({'weight_decay': 5.0}, 'half of the weights'),
    ({'weight_decay': -1.0}, 'weight_decay must be >= 0'),
    ({'codec': 'none'}, 'codec must be one of'),
    ({'learning_rate': lambda r: 0.1}, 'num_rounds'),
  ],
)
def test_bad_settings_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    build(**changes)


def test_bytes_down_count_what_a_returning_client_missed():
  method = build(num_seeds=64, local_steps=2)
  population = simulate.Population(
    num_clients=4, participation_rate=0.5, seed=3
  )
  state = method.init(table.params())
  rounds = simulate.simulate(
    method,
    state,
    table.batch_fn(2),
    population,
    num_rounds=6,
    programs=compiled(method),
  )
  last = {}
  for done in rounds:
    sampled, _ = population.sample(done.round - 1)
    wanted = sum(
      frame_bytes(method.downlink(state, last.get(int(c), -1))) for c in sampled
    )
    assert done.bytes_down == wanted
    last |= {int(c): done.round - 1 for c in sampled}
    state = done.state
