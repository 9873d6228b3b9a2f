"""What every method promises, from one table (methods_table.CASES).

Compiling is what takes time here. All tests of a method share two programs: a
client's for blocks of `BLOCK`, a server's for `SLOTS` slots.
"""

import functools

import jax
import numpy as np
import pytest

from jaxfl import digest, keys, log, wire
from jaxfl import method as method_lib
from jaxfl.runtime import replay, simulate
from tests import methods_table as table

BLOCK, SLOTS = 2, 6
CASES = pytest.mark.parametrize('name', table.CASES)
# one of each kind, for what needs programs of its own
FEW = pytest.mark.parametrize(
  'name', ['spsa', 'fedkseed', 'decomfl', 'ferret', 'fed_avg']
)
# `follow` of SPSA and Ferret is their server, whose codecs and distributions
# are replayed from a log in any case
SAME_FOLLOW = (
  'spsa-sign1', 'spsa-one-sided', 'spsa-sum-popcount16', 'spsa-rank4',
  'spsa-gaussian', 'ferret-adam-server',
)  # fmt: skip


@functools.cache
def built(name):
  """One method per case for all tests: what is compiled once stays compiled."""
  return table.CASES[name].build()


compiled = functools.cache(simulate.compile_method)


def run(method, num_rounds=8, *, log=None, noise=0.01, **changes):
  """The rounds of a small simulation, with `SLOTS` slots."""
  settings = {
    'num_clients': 9, 'participation_rate': 0.67, 'dropout_rate': 0.2,
    'weights': (1, 2, 3, 4, 5, 6, 1, 2, 3),
  } | changes  # fmt: skip
  block_size = settings.pop('block_size', BLOCK)
  population = simulate.Population(**settings)
  assert population.num_slots == SLOTS
  return list(
    simulate.simulate(
      method,
      method.init(table.params()),
      table.batch_fn(method.num_batches, noise),
      population,
      num_rounds=num_rounds,
      log=log,
      block_size=block_size,
      programs=compiled(method),
    )
  )


EVERYBODY = {
  'num_clients': SLOTS, 'participation_rate': 1.0, 'weights': None
}  # fmt: skip


def messages_of(method, state, ids, round=0, noise=0.01):
  """Stacked messages of some parties, and the cohort."""
  batches = table.batch_fn(method.num_batches, noise)
  arrived = []
  for i in range(0, len(ids), BLOCK):
    block = np.resize(ids[i : i + BLOCK], BLOCK).astype(np.int32)
    party = party_of(block, round)
    stacked = [batches(round, int(client)) for client in block]
    message, _, _ = compiled(method).client(
      state, (), jax.tree.map(lambda *x: np.stack(x), *stacked), party
    )
    arrived.append(jax.device_get(message))
  messages = jax.tree.map(lambda *x: np.concatenate(x)[: len(ids)], *arrived)
  return messages, party_of(ids, round)


def party_of(ids, round):
  return method_lib.Party(
    np.array(ids, np.int32),
    np.full(len(ids), round, np.int32),
    np.array([1 + i for i in ids], np.float32),
  )


def serve(method, state, messages, cohort):
  """A server step, in `SLOTS` slots."""
  round = cohort.round[0] if len(cohort.round) else 0
  padded = simulate.pad(messages, cohort.id, cohort.weight, round, SLOTS)
  return compiled(method).server(state, *padded)


def header(method):
  params = table.params()
  return log.Header(
    spec=keys.SPEC,
    base_digest=digest.digest(params),
    config={},
    params=wire.describe(params),
    message=wire.describe(method.message(params)),
  )


# converge as another case of their method does; in all other tests here
ALIKE = {
  'spsa-sign1', 'spsa-sum-popcount16', 'spsa-rank4', 'spsa-gaussian',
  'spsa-256', 'fedkseed-sent', 'fedkseed-schedule-decay',
  'fedkseed-pro-weighted', 'decomfl-one-sided', 'ferret-schedule',
  'ferret-adam-server',
}  # fmt: skip


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE))
    for name in table.CASES
  ],
)
def test_quadratic_converges(name):
  case = table.CASES[name]
  rounds = run(built(name), 60, **EVERYBODY, dropout_rate=0.0, noise=0.0)
  batch = {'noise': np.zeros(1, np.float32)}
  before = table.loss_fn(table.params(), batch)
  after = table.loss_fn(rounds[-1].state.params, batch)
  assert float(after) < case.converges_to * float(before)


@CASES
def test_replay_equals_live(name, tmp_path):
  method = built(name)
  path = tmp_path / 'rounds.log'
  with log.RoundLog.create(path, header(method)) as live:
    rounds = run(method, log=live)
  server = compiled(method).server
  with log.RoundLog.open(path, 'r') as read:
    again = list(
      replay.replay(
        server,
        method.init(table.params()),
        read,
        method.message(table.params()),
        num_slots=SLOTS,
      )
    )
  assert [r.round for r in rounds] == [number for number, _ in again]
  for done, (_, state) in zip(rounds, again, strict=True):
    assert digest.digest(done.state) == digest.digest(state)


@pytest.mark.parametrize('name', ['spsa-schedule-decay', 'fed_opt'])
def test_replay_equals_live_with_losses_that_are_not_finite(name, tmp_path):
  """About half of the minibatches have no finite loss."""

  def loss_fn(params, batch):
    bad = np.float32(np.nan)
    return table.loss_fn(params, batch) + jax.lax.select(
      batch['noise'][0] > 0, bad, np.float32(0)
    )

  method = table.CASES[name].build(loss_fn)
  path = tmp_path / 'rounds.log'
  with log.RoundLog.create(path, header(method)) as live:
    rounds = run(method, log=live)
  assert not np.isfinite([r.loss for r in rounds if r.loss is not None]).all()
  start = method.init(table.params())
  with log.RoundLog.open(path, 'r') as read:
    *_, (_, state) = replay.replay(
      compiled(method).server, start, read, method.message(start.params),
      num_slots=SLOTS,
    )  # fmt: skip
  assert digest.digest(rounds[-1].state) == digest.digest(state)
  assert digest.digest(state.params) != digest.digest(start.params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@CASES
def test_order_of_clients_does_not_matter(name):
  method = built(name)
  state = method.init(table.params())
  messages, cohort = messages_of(method, state, range(SLOTS))
  server = compiled(method).server
  digests = set()
  for order in ([0, 1, 2, 3, 4, 5], [4, 2, 5, 0, 3, 1], [1, 0, 4, 3, 5, 2]):
    shuffled = jax.tree.map(
      lambda x, o=order: x[np.array(o)], (messages, cohort)
    )
    digests.add(digest.digest(server(state, *shuffled)))
  assert len(digests) == 1


@CASES
def test_contents_of_an_absent_slot_are_ignored(name):
  method = built(name)
  state = method.init(table.params())
  messages, cohort = messages_of(method, state, [0, 2, 5])
  padded, party = simulate.pad(messages, cohort.id, cohort.weight, 0, SLOTS)
  noisy = jax.tree.map(lambda x: np.concatenate([x[:3], x[:3]]), padded)
  server = compiled(method).server
  assert digest.digest(server(state, noisy, party)) == digest.digest(
    server(state, padded, party)
  )


@FEW
def test_number_of_slots_does_not_matter(name):
  method = built(name)
  state = method.init(table.params())
  messages, cohort = messages_of(method, state, [0, 2, 5])
  fewer = simulate.pad(messages, cohort.id, cohort.weight, 0, 3)
  few = compiled(table.CASES[name].build()).server(state, *fewer)
  many = serve(method, state, messages, cohort)
  if table.CASES[name].exact:
    assert digest.digest(few) == digest.digest(many)
  else:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), few, many
    )


@CASES
def test_empty_round_only_counts(name):
  method = built(name)
  state = method.init(table.params())
  messages, cohort = messages_of(method, state, [1, 2])
  cohort = cohort._replace(weight=np.zeros(2, np.float32))
  after = serve(method, state, messages, cohort)
  assert int(after.round) == 1
  if 'decay' in name or 'float32-weights' in name:
    return  # weights decay even when nobody answers
  assert digest.digest(after.params) == digest.digest(state.params)


@FEW
def test_block_size_does_not_matter(name):
  method = built(name)
  other = table.CASES[name].build()
  end = run(method, 4)[-1].state
  changed = run(other, 4, block_size=4)[-1].state
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), end, changed
  )


@CASES
def test_compiles_once(name):
  method = built(name)
  run(method, 6, dropout_rate=0.5)
  programs = compiled(method)
  assert programs.client._cache_size() == 1
  # the first state comes from init, the others from the server itself
  assert programs.server._cache_size() == 1


@CASES
def test_ledger_is_the_bytes(name, tmp_path, monkeypatch):
  method = built(name)
  frames = []
  to_bytes = wire.to_bytes
  monkeypatch.setattr(
    wire, 'to_bytes', lambda m: frames.append(to_bytes(m)) or frames[-1]
  )
  rounds = run(method, 3, **EVERYBODY)
  up = sum(r.bytes_up for r in rounds)
  down = sum(r.bytes_down for r in rounds)
  senders = sum(r.forwards for r in rounds) // method.forwards
  assert len(frames) == senders + 3
  # a broadcast is encoded once and counted for each of its receivers
  assert up + down // SLOTS == sum(len(f) for f in frames)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name in SAME_FOLLOW else ())
    for name in table.CASES
  ],
)
def test_downlink_is_all_that_a_replica_needs(name):
  """One that sees only frames of the downlink holds the incumbents' params."""
  case, method = table.CASES[name], built(name)
  carried = lambda down: wire.from_bytes(wire.to_bytes(down), down)
  state = follower = method.init(table.params())
  follow = method.follow
  if method.receivers != 'returning':
    follow = jax.jit(follow)
  for round, ids in enumerate(([0, 2], [3, 4], [], [0, 5])):
    messages, cohort = messages_of(method, state, ids or [0], round)
    if not ids:
      messages, cohort = jax.tree.map(lambda x: x[:0], (messages, cohort))
    before = state
    state = serve(method, state, messages, cohort._replace(round=[round]))
    if method.receivers == 'everyone':
      down = method.downlink(before, messages, cohort)
      follower = follow(follower, carried(down))
    elif method.receivers == 'cohort':
      down = method.downlink(state, messages, cohort)
      follower = follow(follower, carried(down))
    elif round in (1, 3):  # it was away for a round
      since = -1 if round == 1 else 2
      follower = follow(follower, carried(method.downlink(state, since)))
    else:
      continue
    if case.exact:
      assert digest.digest(follower.params) == digest.digest(state.params)
    else:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        follower.params,
        state.params,
      )


@CASES
def test_declared_message_is_the_message(name):
  method = built(name)
  state = method.init(table.params())
  # snapshots cannot hold them
  assert all(np.size(x) for x in jax.tree.leaves(state))
  messages, _ = messages_of(method, state, [0])
  like = method.message(state.params)
  wire.from_bytes(wire.to_bytes(jax.tree.map(lambda x: x[0], messages)), like)


@CASES
def test_non_finite_loss_is_left_out(name):
  """A client whose loss is NaN is as good as absent, on every replica."""
  method = built(name)
  state = method.init(table.params())
  good_messages, cohort = messages_of(method, state, [0, 1, 2])
  bad_messages, _ = messages_of(method, state, [0, 1, 2], noise=np.nan)
  mixed = jax.tree.map(
    lambda g, b: np.stack([g[0], b[1], g[2]]), good_messages, bad_messages
  )
  absent = cohort._replace(weight=cohort.weight * np.float32([1, 0, 1]))
  with_bad = serve(method, state, mixed, cohort)
  without = serve(method, state, good_messages, absent)
  assert digest.digest(with_bad) == digest.digest(without)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(with_bad.params))
