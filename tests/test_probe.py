"""Trust from probes: who keeps it, what it costs, what the log holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import byzantine, codecs, digest, estimators, keys, log, probe, wire
from jaxfl import method as method_lib
from jaxfl.methods import decomfl, fed_avg, fedkseed, spsa
from jaxfl.runtime import replay, simulate
from tests import methods_table as table

pytestmark = pytest.mark.fast_compile

CLIENTS, LIARS, ROUNDS = 6, 3, 24
POPULATION = simulate.Population(num_clients=CLIENTS)
PARAMS = {'w': np.full(24, 0.5, np.float32)}
_SETTINGS = {'mu': 1e-2, 'codec': 'log8'}


def loss_fn(params, batch):
  """A quadratic with its minimum at 0.25, and noise of the batch."""
  w = params['w']
  return 0.5 * jnp.sum(jnp.square(w - 0.25)) + batch['noise'].mean() * w.sum()


BUILDS = {
  'spsa': lambda: spsa.spsa(
    loss_fn, table.ROOT, learning_rate=0.02, num_perturbations=4,
    **_SETTINGS,
  ),
  'fedkseed': lambda: fedkseed.fedkseed(
    loss_fn, table.ROOT, learning_rate=0.005, local_steps=4,
    num_seeds=16, **_SETTINGS,
  ),
  'decomfl': lambda: decomfl.decomfl(
    loss_fn, table.ROOT, learning_rate=0.02, num_perturbations=4,
    **_SETTINGS,
  ),
}  # fmt: skip


@functools.cache
def built(name):
  method = BUILDS[name]()
  return method, simulate.compile_method(method), judge(method)


def judge(method, **changes):
  batch = lambda round: {'noise': np.zeros(4, np.float32)}
  settings = {
    'num_messages': CLIENTS * ROUNDS, 'num_clients': CLIENTS, 'share': 0.25
  }  # fmt: skip
  return probe.Trust(method, batch, table.ROOT, **(settings | changes))


def rounds(name, attack=None, *, trust=None, record=None, num=ROUNDS, **more):
  """The rounds of a run whose first clients lie."""
  method, programs, _ = built(name)
  tamper = attack and byzantine.tamper(
    attack, range(LIARS), codec=codecs.codec('log8', 16.0), num_values=4, **more
  )
  return list(
    simulate.simulate(
      method,
      method.init(PARAMS),
      table.batch_fn(method.num_batches),
      POPULATION,
      num_rounds=num,
      block_size=CLIENTS,
      programs=programs,
      tamper=tamper,
      trust=trust,
      log=record,
    )
  )


def weights_of(name, attack=None, **more):
  """Weights [R, C] that a fresh judge gives."""
  seen, trust = [], built(name)[2]
  trust.reset()

  def keep(*round):
    seen.append(trust(*round))
    return seen[-1]

  forwards = sum(r.forwards for r in rounds(name, attack, trust=keep, **more))
  assert 0 < trust.forwards <= 0.25 * forwards
  assert trust.forwards == 2 * trust.probes
  return np.array(seen)


def test_a_slope_is_that_of_the_claims():
  """On the same batch, of honest claims it is their length; of lies, minus."""
  method, programs, _ = built('spsa')
  state = method.init(PARAMS)
  batches = table.batch_fn(4, noise=0.0)(0, 0)
  party = method_lib.Party(np.int32(3), np.int32(0), np.float32(1))
  stacked = jax.tree.map(lambda x: np.asarray(x)[None], (batches, party))
  message = programs.client(state, (), *stacked)[0][0]
  directions, claims = jax.jit(method.probe.claims)(state, message, party)
  batch = jax.tree.map(lambda x: x[0], batches)
  measure = jax.jit(method.probe.slope)
  slope = lambda c: measure(state.params, directions, c, batch, np.int32(0))
  length = np.linalg.norm(claims)
  np.testing.assert_allclose(slope(claims), length, rtol=0.08)  # of a byte
  np.testing.assert_allclose(slope(-1e20 * claims), -slope(claims), rtol=1e-3)
  assert slope(np.full(4, np.nan, np.float32)) == 0.0
  np.testing.assert_allclose(
    np.linalg.norm(estimators.unit_length(np.float32([3e38, -3e38, 0]))), 1.0,
    rtol=1e-6,
  )  # fmt: skip


@pytest.mark.parametrize('name', BUILDS)
def test_the_honest_are_trusted(name):
  last = weights_of(name)[-1]
  assert (last == probe.LEVELS).all(), last


@pytest.mark.parametrize('name', BUILDS)
@pytest.mark.parametrize('attack', ['sign_flip', 'max_byte'])
def test_half_that_lie_lose_their_weight(name, attack):
  weights = weights_of(name, attack)
  assert not weights[:, :LIARS].any()
  assert (weights[6:, LIARS:] > 0).all()


@pytest.mark.parametrize('attack', ['constant', 'replay'])
def test_noise_weighs_less_than_the_honest(attack):
  weights = weights_of('spsa', attack)
  assert weights[6:, :LIARS].mean() < 0.3 * weights[6:, LIARS:].mean()


def test_a_small_bias_stays_and_a_turncoat_goes():
  assert weights_of('spsa', 'small_bias')[-1, :LIARS].mean() > 4
  weights = weights_of('spsa', 'sign_flip', honest_rounds=8, num=ROUNDS)
  assert (weights[7, :LIARS] == probe.LEVELS).all()
  assert not weights[-1, :LIARS].any()


def test_weights_are_in_the_log_and_replay_gives_the_same_digest(tmp_path):
  method, programs, trust = built('spsa')
  trust.reset()
  like = method.message(PARAMS)
  header = log.Header(
    spec=keys.SPEC,
    base_digest=digest.digest(PARAMS),
    config={},
    params=wire.describe(PARAMS),
    message=wire.describe(like),
  )
  path = tmp_path / 'rounds.log'
  with log.RoundLog.create(path, header) as live:
    done = rounds('spsa', 'sign_flip', trust=trust, record=live, num=8)
  expected = digest.digest(done[-1].state.params)
  levels = {i: r.level for i, r in trust.records.items()}
  with log.RoundLog.open(path, 'r') as read:
    weights = np.array([read.read(r, like).weights for r in range(8)])
    state = method.init(PARAMS)
    *_, (_, state) = replay.replay(
      programs.server, state, read, like, num_slots=CLIENTS
    )
    assert digest.digest(state.params) == expected
    # a run that resumes from the log trusts the same clients
    trust.reset()
    again = rounds('spsa', 'sign_flip', trust=trust, record=read, num=8)
  assert not weights[:, :LIARS].any()
  assert weights[:, LIARS:].any()
  assert digest.digest(again[-1].state.params) == expected
  assert {i: r.level for i, r in trust.records.items()} == levels


def test_who_is_probed_depends_on_what_was_sent():
  trust = judge(built('spsa')[0], share=0.1, burst=0)
  ids = np.arange(1000, dtype=np.int32)
  messages = np.zeros((1000, 4), np.uint8)
  chosen = trust.chosen(3, ids, messages)
  np.testing.assert_array_equal(chosen, trust.chosen(3, ids, messages))
  rate = 0.1 * 8 / 2  # share, forwards of a message, forwards of a probe
  assert abs(chosen.mean() - rate) < 4 * (rate / 1000) ** 0.5
  other = trust.chosen(3, ids, messages + np.uint8(1))
  assert 0.3 < (chosen != other).mean() < 0.7


def test_mistakes_are_named():
  with pytest.raises(ValueError, match='probes are for methods whose'):
    judge(fed_avg.fed_avg(loss_fn, client_optimizer=None))
  for text, wrong in {
    r'share must be in \(0, 1\]': {'share': 0.0},
    r'decay must be in \(0, 1\]': {'decay': 2.0},
    'num_messages must be >= 1': {'num_messages': 0},
  }.items():
    with pytest.raises(ValueError, match=text):
      judge(built('spsa')[0], **wrong)
  with pytest.raises(ValueError, match='attack must be one of'):
    byzantine.tamper('bribe', [0])


@pytest.mark.parametrize('codec', codecs.CODECS)
def test_lies_in_every_codec(codec):
  code = codecs.codec(codec, 2.0)
  honest = np.float32([[1, -0.5, 0.25], [2, 1, -1]])
  encode = jax.jit(jax.vmap(code.encode))
  sent = np.asarray(encode(honest, np.zeros((2, 2), np.uint32)))
  lies = lambda attack, messages=sent: byzantine.tamper(
    attack, [7], codec=code, num_values=3
  )(0, np.array([5, 7]), messages)
  decode = jax.jit(jax.vmap(lambda x: code.decode(x, 3)))
  read = np.asarray(decode(sent))
  for attack in byzantine.ATTACKS:
    np.testing.assert_array_equal(lies(attack)[0], sent[0])  # is honest
  if 'stochastic' not in codec:
    np.testing.assert_array_equal(decode(lies('sign_flip'))[1], -read[1])
  largest = np.asarray(decode(lies('max_byte'))[1])
  assert (np.sign(largest) == -np.sign(read[1])).all()
  assert (np.abs(largest) >= np.abs(read).max()).all()
  assert len(set(np.abs(decode(lies('constant'))[1]).tolist())) == 1
  inside = {'indices': np.zeros((2, 3), np.uint8), 'projected_grads': sent}
  changed = lies('max_byte', inside)
  np.testing.assert_array_equal(decode(changed['projected_grads'])[1], largest)
  np.testing.assert_array_equal(changed['indices'], inside['indices'])


def test_a_replay_is_the_first_message():
  tamper = byzantine.tamper('replay', [1])
  first, second = ({'w': np.full((2, 3), x, np.float32)} for x in (1, 2))
  assert tamper(0, np.array([0, 1]), first)['w'].tolist() == first['w'].tolist()
  later = tamper(1, np.array([0, 1]), second)['w']
  assert later.tolist() == [[2.0] * 3, [1.0] * 3]
