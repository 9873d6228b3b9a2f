"""DIFF2 and DP-GD: against their equations, their bounds and their log."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import calibration, digest, exact_norm, keys, log, noise, wire
from jaxfl import method as method_lib
from jaxfl import plan as plan_lib
from jaxfl.methods import diff2
from jaxfl.runtime import replay, simulate

pytestmark = pytest.mark.fast_compile

SIZES = (5, 3, 4)
SETTINGS = {
  'learning_rate': 0.1, 'clip_norm': 0.8, 'clip_norm_diff': 0.3,
  'num_examples': SIZES, 'microbatch_size': 2, 'research_float_noise': True,
  'allow_unstable': True,
}  # fmt: skip
PLAN = plan_lib.Plan(12, 4, 0.2, 0.3)
LOCAL = plan_lib.Plan(6, 3, 0.2, 0.3, 4, 3, 0.4, 0.5)
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
  key = noise.NoiseKey(entropy, run='test')
  examples = [{k: x[0] for k, x in b.items()} for b in batches]
  return list(
    simulate.simulate(
      method,
      method.init(params()) if first is None else first.state,
      lambda round, client: method.prepare(
        params(), examples[client], round, client, key
      ),
      simulate.Population(num_clients=3),
      num_rounds=num_rounds,
      first_round=0 if first is None else first.round,
      log=log,
      noise=key,
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
  found = exact_norm.exact_norm(tree)
  np.testing.assert_allclose(found, np.linalg.norm(flat(tree)), rtol=2e-3)
  mixed = {'a': tree['a'][::-1].T, 'b': tree['b'][::-1]}
  assert float(exact_norm.exact_norm(mixed)) == float(found)
  assert exact_norm.exact_norm({'a': np.zeros(3, np.float32)}) == 0


def test_exact_norm_of_many_entries():
  """The sum of squares leaves 32 bits."""
  x = np.full(1 << 16, 0.999, np.float32)
  found = exact_norm.exact_norm({'x': x})
  np.testing.assert_allclose(found, 256 * 0.999, rtol=1e-3)


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


def local_steps(x, v, clip_norm_diff, exchange, client):
  """The local routine in NumPy: what a client makes of x and v."""
  examples = data()[client]
  key = noise.NoiseKey(ENTROPY, run='test')
  count, steps = len(examples['y']), LOCAL.local_steps - 1
  chosen = key.bernoulli(
    (steps, count), 0.4, round=exchange, name=f'samples of {client}'
  )
  draws = [
    key.gaussian(
      (steps, *np.shape(leaf)), 1.0, round=exchange,
      name=f'steps of {client}/{path}',
    )
    for path, leaf in keys.named_leaves(params())
  ]  # fmt: skip
  structure = jax.tree.structure(params())

  def tree(row):
    leaves, at = [], 0
    for leaf in jax.tree.leaves(params()):
      size = np.size(leaf)
      leaves.append(row[at : at + size].reshape(np.shape(leaf)))
      at += size
    return structure.unflatten([leaf.astype(np.float32) for leaf in leaves])

  old, y, w = flat(x), flat(x) - 0.1 * flat(v), flat(v)
  for k in range(steps):
    c = clip_norm_diff * np.linalg.norm(y - old)
    rows = gradients(tree(y), examples) - gradients(tree(old), examples)
    total = (clipped(rows, c) * chosen[k][:, None]).sum(0)
    normal = np.concatenate([d[k].ravel() for d in draws])
    w = w + (total + 0.5 * c * normal) / (0.4 * count)
    old, y = y, y - 0.1 * w
  return y


def test_local_routine_is_the_algorithm():
  """Clients take turns; every second exchange is theirs alone."""
  rounds = run(build(plan=LOCAL))
  assert [r.bytes_up for r in rounds[:4]] == [
    rounds[0].bytes_up,
    rounds[0].bytes_up // 3,
  ] * 2
  # one whole gradient of three clients; six passes of one over small samples
  assert [r.forwards for r in rounds[:4]] == [3, 6, 6, 6]
  before = build(plan=LOCAL).init(params())
  for exchange, done in enumerate(rounds):
    state = done.state
    if exchange % 2 == 0:
      np.testing.assert_array_equal(flat(state.params), flat(before.params))
      std = (0.2 if exchange % 6 == 0 else 0.3) * float(before.clip) / 9
      release = flat(state.estimate)
      if exchange % 6:
        release = release - flat(before.estimate)
      means = []
      for client in data():
        rows = gradients(before.params, client)
        if exchange % 6:
          rows = rows - gradients(before.previous, client)
        means.append(clipped(rows, float(before.clip)).mean(0))
      wanted = np.mean(means, 0) + flat(noise_of(std, exchange))
      np.testing.assert_allclose(release, wanted, rtol=0, atol=2e-3)
    else:
      client = exchange // 2 % 3
      wanted = local_steps(
        before.params, before.estimate, 0.3, exchange, client
      )
      np.testing.assert_allclose(flat(state.params), wanted, rtol=0, atol=3e-4)
      moved = np.linalg.norm(flat(state.params) - flat(before.params))
      wanted = 0.8 if exchange % 6 == 5 else 0.3 * moved
      np.testing.assert_allclose(state.clip, wanted, rtol=2e-3)
    before = state


def test_local_steps_that_went_astray_change_nothing():
  method = build(plan=LOCAL)
  state = run(method, num_rounds=1)[0].state
  bad = jax.tree.map(lambda x: np.full((1, *np.shape(x)), np.nan), params())
  after = method.server(state, bad, None)
  np.testing.assert_array_equal(flat(after.params), flat(state.params))
  assert int(after.round) == 2


def test_samples_are_of_the_client_alone_and_of_the_rate():
  method = build(plan=LOCAL._replace(local_steps=2001, sampling_rate=0.3))
  key = noise.NoiseKey(ENTROPY, run='test')
  rows = {k: x[0] for k, x in padded(data())[1].items()}
  given = method.prepare(params(), rows, 1, 1, key)
  mask = given['mask'][0]
  assert mask.shape == (2000, 5)
  assert abs(mask.sum() / (2000 * 3) - 0.3) < 0.025
  drawn = given['examples']['y'][0][mask]
  assert set(drawn.tolist()) == set(data()[1]['y'].tolist())
  with pytest.raises(TypeError, match='NoiseKey'):
    method.prepare(params(), rows, 3, 1, keys.root(0))


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
    ({'plan': PLAN._replace(local_steps=3)}, 'turns of 1 clients'),
    ({'plan': LOCAL, 'unit': 'client'}, 'local_steps hide records'),
    ({'plan': LOCAL._replace(sampling_rate=1.0)}, 'sampling_rate'),
    (
      {'plan': LOCAL._replace(noise_multiplier_local=0.0)},
      'noise_multiplier_local',
    ),
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
