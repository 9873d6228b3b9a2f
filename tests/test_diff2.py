"""DIFF2 and DP-GD: against their equations, their bounds and their log."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import calibration, digest, keys, log, noise, wire
from jaxfl import method as method_lib
from jaxfl import plan as plan_lib
from jaxfl.methods import diff2
from jaxfl.runtime import replay, simulate

SIZES = (5, 3, 4)
SETTINGS = {
  'learning_rate': 0.1, 'clip_norm': 0.8, 'clip_norm_diff': 0.3,
  'num_examples': SIZES, 'microbatch_size': 2, 'research_float_noise': True,
  'allow_unstable': True,
}  # fmt: skip
PLAN = plan_lib.Plan(12, 4, 0.2, 0.3)
ENTROPY = bytes(range(32))


def loss_fn(params, batch):
  out = jnp.tanh(batch['x'] @ params['w']) @ params['v'] + params['b']
  return jnp.mean((out - batch['y']) ** 2)


def params():
  rng = np.random.default_rng(3)
  return {
    'w': rng.normal(size=(4, 3)).astype(np.float32),
    'v': rng.normal(size=3).astype(np.float32),
    'b': np.float32(0.1),
  }


def data(seed=0):
  rng = np.random.default_rng(seed)
  return [
    {
      'x': rng.normal(size=(n, 4)).astype(np.float32),
      'y': rng.normal(size=n).astype(np.float32),
    }
    for n in SIZES
  ]


def padded(clients):
  """The batches of every client, all of one length."""

  def one(client):
    n = len(client['y'])
    fill = lambda x: np.concatenate([x, np.ones((5 - n, *x.shape[1:]))])
    rows = {k: fill(x).astype(np.float32) for k, x in client.items()}
    rows['example_weight'] = (np.arange(5) < n).astype(np.float32)
    return {k: x[None] for k, x in rows.items()}

  return [one(client) for client in clients]


def build(**changes):
  return diff2.diff2(loss_fn, **({'plan': PLAN} | SETTINGS | changes))


def run(method, *, log=None, num_rounds=12, first=None, entropy=ENTROPY):
  batches = padded(data())
  return list(
    simulate.simulate(
      method,
      method.init(params()) if first is None else first.state,
      lambda round, client: batches[client],
      simulate.Population(num_clients=3),
      num_rounds=num_rounds,
      first_round=0 if first is None else first.round,
      log=log,
      noise=noise.NoiseKey(entropy, run='test'),
    )
  )


def noise_of(std, round):
  """What the aggregator adds in a round of `run`."""
  key = noise.NoiseKey(ENTROPY, run='test')
  zeros = jax.tree.map(lambda x: np.zeros(np.shape(x)), params())
  return noise.add_gaussian(key, zeros, std, round=round, name='release')


def flat(tree):
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


def gradients(at, client):
  """float64[n, d] by client, one gradient an example."""
  return np.stack(
    [
      flat(jax.grad(loss_fn)(at, {k: x[i : i + 1] for k, x in client.items()}))
      for i in range(len(client['y']))
    ]
  )


def clipped(rows, bound):
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  return rows * np.minimum(1.0, bound / np.maximum(norms, 1e-30))


def test_is_the_algorithm():
  """Releases and weights beside NumPy, round for round."""
  rounds = run(build())
  clients = data()
  x = previous = params()
  v = np.zeros_like(flat(x))
  structure = jax.tree.structure(x)
  shapes = [np.shape(leaf) for leaf in jax.tree.leaves(x)]
  for r, done in enumerate(rounds):
    bound = 0.8
    if r % 4:
      bound = 0.3 * np.linalg.norm(flat(x) - flat(previous))
    means = []
    for client in clients:
      rows = gradients(x, client)
      if r % 4:
        rows = rows - gradients(previous, client)
      means.append(clipped(rows, bound).mean(0))
    std = (0.3 if r % 4 else 0.2) * 2 * bound / (3 * 3)

    release = np.mean(means, 0) + flat(noise_of(std, r))
    v = v + release if r % 4 else release
    new = flat(x) - 0.1 * v
    np.testing.assert_allclose(flat(done.state.params), new, rtol=0, atol=3e-4)
    previous, x = x, done.state.params  # errors do not add up
    x = structure.unflatten(
      [np.asarray(leaf).reshape(s)
       for leaf, s in zip(jax.tree.leaves(x), shapes, strict=True)]
    )  # fmt: skip
    v = flat(done.state.estimate)


def released(method, state, clients, round):
  """What one round would release, without its noise."""
  batches = padded(clients)
  party = method_lib.Party(
    np.arange(3, dtype=np.int32),
    np.full(3, round, np.int32),
    np.ones(3, np.float32),
  )
  stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
  messages, _, _ = jax.jit(jax.vmap(method.client, (None, 0, 0, 0)))(
    state, (), stacked, party
  )
  key = noise.NoiseKey(ENTROPY, run='test')
  out = method.release.make(state, jax.device_get(messages), party, key)
  z = PLAN.noise_multiplier_diff if round % 4 else PLAN.noise_multiplier
  std = z * 2 * float(state.clip) / 9
  return flat(out) - flat(noise_of(std, round))


@pytest.mark.parametrize('round', [0, 1])
def test_neighbours_are_within_the_sensitivity(round):
  """One example replaced by another moves a release by 2 C / (P n) at most."""
  method = build()
  state = method.init(params())
  if round:
    state = run(method, num_rounds=1)[-1].state
  bound = 2 * float(state.clip) / 9
  here = released(method, state, data(), round)
  worst = 0.0
  for trial in range(12):
    rng = np.random.default_rng(trial)
    other = data()
    client = trial % 3
    i = rng.integers(SIZES[client])
    scale = 10.0 ** rng.integers(-1, 4)
    other[client]['x'][i] = rng.normal(size=4) * scale
    other[client]['y'][i] = -other[client]['y'][i] * scale
    there = released(method, state, other, round)
    worst = max(worst, np.linalg.norm(here - there) / bound)
  assert 0.2 < worst <= 1 + 1e-5  # releases are float32


def test_log_holds_releases_and_rebuilds_the_run(tmp_path):
  method = build()
  header = log.Header(
    spec=keys.SPEC,
    base_digest=digest.digest(params()),
    config={},
    params=wire.describe(params()),
    message=wire.describe(method.recorded(params())),
  )
  path = tmp_path / 'rounds.log'
  with log.RoundLog.create(path, header) as live:
    rounds = run(method, log=live)
  like = method.recorded(params())
  with log.RoundLog.open(path, 'r') as read:
    states = list(
      replay.replay(
        jax.jit(method.server), method.init(params()), read, like, num_slots=1
      )
    )
    first = read.read(0, like)
  assert [digest.digest(r.state) for r in rounds] == [
    digest.digest(state) for _, state in states
  ]
  assert len(first.ids) == 1  # of the aggregator, not of the clients
  np.testing.assert_array_equal(
    flat(jax.tree.map(lambda x: x[0], first.messages)),
    flat(rounds[0].state.estimate),
  )
  assert all(done.loss is None for done in rounds)
  # from its log a run goes on with other noise, and the same past
  with log.RoundLog.open(path, 'a') as live:
    again = run(method, log=live, entropy=bytes(32))
  assert digest.digest(again[-1].state) == digest.digest(rounds[-1].state)
  assert [r.bytes_up for r in again] == [r.bytes_up for r in rounds]


def test_follower_of_the_downlink_holds_the_weights():
  method = build()
  follower = method.init(params())
  for done in run(method):
    state = done.state
    restart = (done.round - 1) % 4 == 0
    release = state.estimate
    if not restart:
      release = jax.tree.map(jnp.subtract, state.estimate, follower.estimate)
    follower = method.follow(follower, release)
    np.testing.assert_allclose(
      flat(follower.params), flat(state.params), atol=1e-5
    )


def test_noise_has_its_law():
  """Over many rounds at one point, releases scatter as announced."""
  method = build(plan=plan_lib.Plan(400, 1, 20.0, 0.0), learning_rate=1e-6)
  rounds = run(method, num_rounds=400)
  found = np.stack([flat(r.state.estimate) for r in rounds])
  std = 20.0 * 2 * 0.8 / 9
  values = (found - found.mean(0)).ravel() / std
  assert abs(values.std() - 1) < 4 / math.sqrt(2 * values.size)


@pytest.mark.parametrize(('unit', 'divisor'), [('record', 9), ('client', 3)])
def test_unit_scales_the_noise(unit, divisor):
  method = build(unit=unit)
  state = method.init(params())
  party = method_lib.Party(
    np.arange(3, dtype=np.int32), np.zeros(3, np.int32), np.ones(3, np.float32)
  )
  zeros = jax.tree.map(lambda x: np.zeros((3, *np.shape(x))), params())
  key = noise.NoiseKey(ENTROPY, run='test')
  out = method.release.make(state, zeros, party, key)
  np.testing.assert_allclose(
    flat(out), flat(noise_of(0.2 * 2 * float(np.float32(0.8)) / divisor, 0))
  )


def test_faulty_clients_are_clipped_or_left_out():
  method = build()
  state = method.init(params())
  party = method_lib.Party(
    np.arange(3, dtype=np.int32), np.zeros(3, np.int32), np.ones(3, np.float32)
  )
  ones = jax.tree.map(lambda x: np.ones((3, *np.shape(x))), params())
  ones['b'][1] = np.nan
  key = noise.NoiseKey(ENTROPY, run='test')
  out = method.release.make(state, ones, party, key)
  std = 0.2 * 2 * float(np.float32(0.8)) / 9
  rest = flat(out) - flat(noise_of(std, 0))
  np.testing.assert_allclose(np.linalg.norm(rest), 0.8 * 2 / 3, rtol=1e-5)


@pytest.mark.parametrize('scale', [1e-30, 1e-6, 1.0, 3e4])
def test_exact_norm(scale):
  rng = np.random.default_rng(0)
  tree = {
    'a': (rng.normal(size=(300, 7)) * scale).astype(np.float32),
    'b': (rng.normal(size=1000) * scale).astype(np.float32),
  }
  found = diff2.exact_norm(tree)
  np.testing.assert_allclose(found, np.linalg.norm(flat(tree)), rtol=2e-3)
  mixed = {'a': tree['a'][::-1].T, 'b': tree['b'][::-1]}
  assert float(diff2.exact_norm(mixed)) == float(found)
  assert diff2.exact_norm({'a': np.zeros(3, np.float32)}) == 0


def test_exact_norm_of_many_entries():
  """The sum of squares leaves 32 bits."""
  x = np.full(1 << 16, 0.999, np.float32)
  np.testing.assert_allclose(diff2.exact_norm({'x': x}), 256 * 0.999, rtol=1e-3)


def test_dp_gd_is_diff2_that_restarts():
  """Every release is the whole gradient, at the target's noise."""
  plan = calibration.diff2(3.0, 1e-5, num_rounds=6)
  assert plan.noise_multiplier_diff == 0
  rounds = run(build(plan=plan, allow_unstable=False), num_rounds=6)
  before = build().init(params())
  for r, done in enumerate(rounds):
    assert float(done.state.clip) == np.float32(0.8)
    found = flat(done.state.estimate)
    means = [clipped(gradients(before.params, c), 0.8).mean(0) for c in data()]
    std = plan.noise_multiplier * 2 * float(np.float32(0.8)) / 9
    wanted = np.mean(means, 0) + flat(noise_of(std, r))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3)
    before = done.state


def test_learns():
  """With little noise the loss falls as without."""
  plan = plan_lib.Plan(60, 5, 1e-3, 1e-3)
  method = build(
    plan=plan, clip_norm=100.0, clip_norm_diff=100.0, learning_rate=0.05
  )
  end = run(method, num_rounds=60)[-1].state
  whole = {k: np.concatenate([c[k] for c in data()]) for k in ('x', 'y')}
  assert loss_fn(end.params, whole) < 0.5 * loss_fn(params(), whole)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'clip_norm': math.inf}, 'clip_norm'),
    ({'clip_norm_diff': 0.0}, 'clip_norm_diff'),
    ({'unit': 'city'}, 'unit must be one of record, client'),
    ({'research_float_noise': False}, 'research_float_noise must be set'),
    ({'num_examples': (3, 0)}, 'num_examples'),
    ({'microbatch_size': 0}, 'microbatch_size'),
    ({'plan': PLAN._replace(noise_multiplier=0.0)}, 'noise_multiplier'),
    (
      {'plan': PLAN._replace(noise_multiplier_diff=0.0)},
      'noise_multiplier_diff',
    ),
    ({'plan': PLAN._replace(local_steps=3)}, 'local_steps'),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    build(**changes)


def test_refuses_noise_that_grows():
  loud = PLAN._replace(noise_multiplier_diff=30.0)
  method = build(allow_unstable=False, plan=loud)
  with pytest.raises(ValueError, match='allow_unstable'):
    method.init(params())
  with pytest.raises(ValueError, match='allow_unstable'):
    method.message(params())


def test_refuses_more_than_the_budget():
  method = build()
  last = run(method)[-1]
  with pytest.raises(ValueError, match='the budget is spent'):
    run(method, num_rounds=13, first=last)


def test_refuses_absent_clients_and_shared_keys():
  method = build()
  state = method.init(params())
  party = method_lib.Party(
    np.arange(2, dtype=np.int32), np.zeros(2, np.int32), np.ones(2, np.float32)
  )
  zeros = jax.tree.map(lambda x: np.zeros((2, *np.shape(x))), params())
  key = noise.NoiseKey(ENTROPY, run='test')
  with pytest.raises(ValueError, match='2 of 3 clients take part'):
    method.release.make(state, zeros, party, key)
  with pytest.raises(TypeError, match='NoiseKey'):
    build(num_examples=(3, 3)).release.make(state, zeros, party, keys.root(0))
