"""Private scalars: their bound, their law, and the methods that send them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import calibration, codecs, events, keys, private_scalars
from jaxfl import plan as plan_lib
from jaxfl.methods import fedkseed, spsa
from tests import private_problem as problem

pytestmark = pytest.mark.fast_compile

SIZES = (40, 30, 36)
ROOT = keys.root(7)
QUIET = plan_lib.ScalarPlan(60, 4, 1e-3)


def settings(plan=QUIET, **changes):
  given = {'clip_norm': 4.0, 'num_examples': SIZES, 'microbatch_size': 16}
  return private_scalars.Settings(plan, **(given | changes))


def build(name='spsa', codec='linear8', privacy=None, **changes):
  given = {'learning_rate': 0.03, 'mu': 1e-2, 'codec': codec}
  if name == 'spsa':
    factory, given['num_perturbations'] = spsa.spsa, 4
  else:
    factory = fedkseed.fedkseed
    given |= {'num_seeds': 64, 'local_steps': 4, 'learning_rate': 0.02}
  privacy = privacy or settings()
  return factory(problem.loss_fn, ROOT, privacy=privacy, **(given | changes))


def sender(method):
  """clients, round, hidden -> what they send, without noise if not hidden."""
  program = jax.jit(jax.vmap(method.client, (None, 0, 0, 0)))
  key = problem.key()
  state = method.init(problem.params())

  def send(clients, round=0, hidden=False):
    given = [
      method.prepare(problem.params(), clients[i], round, i, key)
      if hidden
      else {
        'examples': {k: x[None] for k, x in clients[i].items()},
        'noise': np.zeros((1, 4), np.int32),
      }
      for i in range(3)
    ]
    party = problem.party(3, round)
    stacked = jax.tree.map(lambda *x: np.stack(x), *given)
    return np.asarray(program(state, (), stacked, party)[0]).astype(int)

  return send


@pytest.mark.parametrize('name', ['spsa', 'fedkseed'])
def test_first_message_is_the_clipped_mean(name):
  """Codes decode to the mean of clipped projected gradients."""
  method = build(name, codec='linear16', privacy=settings(clip_norm=0.5))
  sent = sender(method)(problem.data(SIZES)).astype(np.int16)
  code = codecs.codec('linear16', 0.5 / 15 * 32767)
  g = np.asarray(code.decode(jnp.asarray(sent[0]), 4))
  clients = problem.data(SIZES)
  base = keys.fold(ROOT, 0, 0)
  if name == 'spsa':
    direction = keys.fold(base, 0)
  else:  # of the first step, whose weights are the start
    state = method.init(problem.params())
    u = keys.uniform(keys.fold(keys.stream(base, 'seeds'), jnp.arange(4)))
    assert int(state.round) == 0
    index = jnp.floor(u * 64).astype(int)[0]
    direction = fedkseed.pool.directions(ROOT, index, 'rademacher')
  z = np.asarray(
    spsa.perturb.perturb(
      {'w': jnp.zeros(5)}, direction, jnp.float32(1.0),
      distribution='rademacher',
    )['w']
  )  # fmt: skip
  c = clients[0]
  per_example = -2 * (c['y'] * (c['x'] @ z))  # at w = 0, exact for a quadratic
  wanted = np.clip(per_example, -0.5, 0.5).mean()
  np.testing.assert_allclose(g[0], wanted, atol=1.1 * 0.5 / 15)


def test_one_example_moves_a_code_by_one():
  send = sender(build(privacy=settings(clip_norm=0.2)))
  here = send(problem.data(SIZES))
  worst = 0
  for trial in range(20):
    rng = np.random.default_rng(trial)
    other, client = problem.data(SIZES), trial % 3
    i = rng.integers(SIZES[client])
    other[client]['x'][i] = rng.normal(size=5) * 10.0 ** rng.integers(0, 4)
    other[client]['y'][i] = rng.normal() * 100
    moved = np.abs(here - send(other))
    assert not moved[[j for j in range(3) if j != client]].any()
    worst = max(worst, moved.max())
  assert worst == 1


def test_padding_and_infinite_examples_add_nothing():
  send = sender(build())
  clean = send(problem.data(SIZES))
  dirty = problem.data(SIZES)
  for client, n in zip(dirty, SIZES, strict=True):
    client['x'][n:] = 1e30
  np.testing.assert_array_equal(send(dirty), clean)
  dirty[0]['y'][:] = np.inf
  dirty[1]['y'][0] = np.nan
  found = send(dirty)
  assert not found[0].any()
  assert np.abs(found[1] - clean[1]).max() <= 1


def test_noise_has_its_law():
  plan = plan_lib.ScalarPlan(50, 4, 9.0)
  send = sender(build(privacy=settings(plan)))
  found = np.stack(
    [
      send(problem.data(SIZES), r, hidden=True) - send(problem.data(SIZES), r)
      for r in range(50)
    ]
  )
  assert abs(found.std() / 9.0 - 1) < 4 / np.sqrt(2 * found.size)
  assert abs(found.mean()) < 4 * 9.0 / np.sqrt(found.size)


def test_a_loud_code_is_cut_to_its_byte():
  loud = settings(plan_lib.ScalarPlan(4, 4, 400.0))
  sent = sender(build(privacy=loud))(problem.data(SIZES), hidden=True)
  assert sent.min() == -127
  assert sent.max() == 127


@pytest.mark.parametrize(
  ('name', 'codec'),
  [
    ('spsa', 'linear8'),
    ('spsa', 'float32'),
    pytest.param('fedkseed', 'linear8', marks=pytest.mark.slow),
    pytest.param('fedkseed', 'float32', marks=pytest.mark.slow),
  ],
)
def test_learns_and_counts(name, codec):
  law = 'gaussian' if codec == 'float32' else 'discrete_gaussian'
  plan = plan_lib.ScalarPlan(60, 4, 0.7, law)
  privacy = settings(plan, research_float_noise=True)
  rounds = problem.run(build(name, codec, privacy), SIZES, num_rounds=60)
  whole = problem.whole(SIZES)
  start = float(problem.loss_fn(problem.params(), whole))
  end = float(problem.loss_fn(rounds[-1].state.params, whole))
  assert end < 0.3 * start
  width = {'linear8': 1, 'float32': 4}[codec]
  # frames have a header and a checksum of 12 bytes in all
  assert rounds[0].bytes_up == 3 * (4 * width + 12)
  assert all(done.loss is None for done in rounds)
  assert rounds[0].forwards == 3 * 8


def test_clients_of_a_block_have_noise_of_their_own():
  """A block that is filled up with copies draws nothing twice."""
  one = problem.run(build(), SIZES, num_rounds=3, block_size=2)
  other = problem.run(build(), SIZES, num_rounds=3, block_size=3)
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a.state.params['w'], b.state.params['w'])


def test_plan_is_what_is_accounted_for():
  plan = calibration.scalars(3.0, 1e-5, num_rounds=25, num_scalars=4)
  (event,) = events.merged(plan.rounds())
  assert event == events.IntegerNoise(
    'discrete_gaussian', plan.noise_multiplier, 1, 100
  )
  # sqrt(100) / mu of the closed form; integers cost next to nothing
  assert plan.noise_multiplier == pytest.approx(10 / 0.7191, rel=5e-3)


def test_more_rounds_than_planned_are_refused():
  plan = plan_lib.ScalarPlan(2, 4, 1.0)
  with pytest.raises(ValueError, match='the budget is spent'):
    problem.run(build(privacy=settings(plan)), SIZES, num_rounds=3)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'codec': 'log8'}, 'codec of private scalars must be one of linear8'),
    ({'codec': 'float32'}, 'does not go with discrete_gaussian'),
    ({'sides': 'one_sided'}, 'two_sided'),
    ({'num_perturbations': 3}, 'the plan is for 4 scalars'),
    ({'privacy': settings(clip_norm=np.inf)}, 'clip_norm'),
    ({'privacy': settings(num_examples=(5, 1))}, 'two examples'),
    ({'privacy': settings(microbatch_size=0)}, 'microbatch_size'),
    ({'privacy': settings(QUIET._replace(noise_multiplier=0.0))}, 'noise_mult'),
    (
      {
        'privacy': settings(QUIET._replace(law='gaussian')),
        'codec': 'float32',
      },
      'research_float_noise must be set',
    ),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    build(**changes)


def test_shared_keys_are_refused():
  with pytest.raises(TypeError, match='NoiseKey'):
    build().prepare(
      problem.params(), problem.data(SIZES)[0], 0, 0, keys.root(0)
    )
