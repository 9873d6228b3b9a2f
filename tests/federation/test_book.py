"""When rounds are closed, with which messages, and what is refused."""

import numpy as np
import pytest

from jaxfl import wire
from jaxfl.federation import book, handshake, verdict

PASSPORT = {'spec': 's', 'config': 'c'}
HELLO = handshake.encode(PASSPORT)
LIKE = np.zeros(2, np.float32)


def frame(value, round=0):
  return wire.varint(round) + wire.to_bytes(np.full(2, value, np.float32))


def opened(members=3, size=None, **rules):
  rules = {'num_clients': 4, 'deadline_s': 10.0} | rules
  finite = lambda m: bool(np.isfinite(m).any())
  found = book.Book(book.Rules(**rules), PASSPORT, LIKE, finite, size)
  for client in range(members):
    assert found.hello(client, HELLO, 0.0) is None
  return found


def test_a_round_is_closed_with_the_messages_of_all_members():
  found = opened()
  for client in (2, 0):
    assert found.message(client, frame(client), client) is None
    assert not found.due(1.0)
  found.message(1, frame(1), 9)
  assert found.due(1.0)
  rows = found.rows()
  assert rows.ids.tolist() == [0, 1, 2]
  assert rows.weights.tolist() == [1, 1, 1]
  messages = rows.messages(wire.describe(LIKE), LIKE)
  np.testing.assert_array_equal(messages[:, 0], [0, 1, 2])


def test_weights_are_levels_of_the_last_verdict():
  found = opened(size=lambda message: float(message[0]))

  def weights():
    for client, value in enumerate((1.0, 2.0, 3.0)):
      assert found.message(client, frame(value, found.round), client) is None
    rows = found.rows()
    found.closed(rows.ids, 0.0)
    return rows.weights.tolist()

  assert weights() == [0, 0, 0]  # nobody is known yet
  said = verdict.Verdict(1, 2.0, bytes([8, 5, 7, 0]))
  assert found.judged(verdict.encode(said)) is None
  assert weights() == [8, 5, 0]  # 3 is too large a claim
  late = said._replace(round=0, limit=9.0)
  assert found.judged(verdict.encode(late)) is None
  assert weights() == [8, 5, 0]
  assert 'verdict' in found.judged(b'\x05')
  assert found.judged(verdict.encode(late._replace(round=2))) is None
  assert weights() == [8, 5, 7]
  alike = opened()
  assert alike.judged(verdict.encode(said)) is None
  assert alike.verdict is None  # nobody asked for one


def test_a_verdict_is_awaited_until_the_deadline():
  found = opened(1, size=lambda message: 0.0, pipeline=1)
  say = lambda round: found.judged(
    verdict.encode(verdict.Verdict(round, 1.0, bytes(4)))
  )
  found.message(0, frame(0), 0)
  assert not found.due(1e9)  # the first needs a keeper
  say(0)
  for round in range(2):  # it may be behind by the pipeline
    assert found.due(0.0)
    found.closed(np.array([0]), 0.0)
    found.message(0, frame(0, round + 1), round + 1)
  assert not found.due(9.0)
  assert found.due(10.0)
  found.closed(np.array([0]), 10.0)
  found.message(0, frame(0, 3), 3)
  assert found.due(10.0)  # nobody waits for it any more
  say(2)
  found.closed(np.array([0]), 10.0)
  found.message(0, frame(0, 4), 4)
  assert not found.due(10.0)  # it is back
  say(3)
  assert found.due(10.0)


def test_quorum_deadline_and_members_that_are_silent():
  found = opened(quorum=2)
  found.message(0, frame(0), 1)
  assert not found.due(9.9)
  assert found.wait_s(9.0) == 1.0
  assert found.due(10.0)
  found.message(2, frame(0), 2)
  assert found.due(0.1)  # two are enough
  found = opened()
  assert not found.due(1e9)  # with nothing, a round stays open
  found.closed(np.array([0, 1, 2]), 0.0)
  found.message(0, frame(0, 1), 1)
  found.message(1, frame(0, 1), 2)
  assert not found.due(9.0)
  assert found.due(10.0)
  found.closed(np.array([0, 1]), 10.0)
  found.message(0, frame(0, 2), 3)
  found.message(1, frame(0, 2), 4)
  assert found.due(10.0)  # nobody waits for 2 any more
  assert found.message(2, frame(0, 1), 5) == book.LATE
  assert found.due(10.0)  # whoever is late is not waited for
  assert found.message(2, frame(0, 2), 6) is None
  found.closed(np.array([0, 1, 2]), 10.0)
  found.message(0, frame(0, 3), 7)
  found.message(1, frame(0, 3), 8)
  assert not found.due(10.0)  # it is back


def test_the_first_round_waits_for_min_clients():
  found = opened(members=2, min_clients=3)
  found.message(0, frame(0), 1)
  found.message(1, frame(0), 2)
  assert not found.due(1e6)
  found.hello(3, HELLO, 5.0)
  assert found.due(15.0)
  found.hello(3, handshake.BYE, 5.0)
  assert 3 not in found.members


@pytest.mark.parametrize(
  ('client', 'data', 'reason'),
  [
    (0, b'', 'damaged'),
    (0, b'\x00garbage', 'damaged'),
    (0, frame(1)[:-1], 'damaged'),
    (0, frame(1) + b'x', 'damaged'),
    (0, b'\xff' * 100, 'damaged'),
    (0, b'\x00' + wire.to_bytes(np.zeros(3, np.float32)), 'damaged'),
    (0, frame(1, round=1), 'wrong round'),
    (0, frame(np.nan), 'not finite'),
    (3, frame(1), 'no handshake'),
    (4, frame(1), 'unknown client'),
    (99, frame(1), 'unknown client'),
  ],
)
def test_hostile_messages_are_refused_and_counted(client, data, reason):
  found = opened()
  assert found.message(client, data, 1) == reason
  assert found.refused == {client: {reason: 1}}
  assert not found.arrived


def test_the_first_message_counts():
  found = opened()
  found.message(0, frame(1), 1)
  assert found.message(0, frame(1), 2) == book.REPEATED
  assert found.message(0, frame(2), 3) == 'contradicts'
  assert found.rows().payload == np.full(2, 1, np.float32).tobytes()
  found.closed(np.array([0]), 0.0)
  assert found.message(0, frame(1), 4) == book.LATE


def test_members_may_be_ahead_in_a_pipeline():
  found = opened(members=2, pipeline=2)
  found.message(0, frame(0), 5)
  found.message(0, frame(1, 1), 6)
  found.message(0, frame(2, 2), 7)
  assert found.message(0, frame(3, 3), 8) == 'wrong round'
  # a successor reads again what is for later rounds
  assert found.position(8) == 5
  found.message(1, frame(0), 9)
  found.closed(np.array([0, 1]), 0.0)
  assert found.arrived == 1
  assert found.position(9) == 6
  assert found.rows().payload == np.full(2, 1, np.float32).tobytes()


def test_who_is_late_by_the_pipeline_at_most_is_awaited():
  found = opened(members=2, pipeline=2)
  for round in range(4):  # without 1
    found.message(0, frame(0, round), round)
    assert found.due(0.0) == (round > 1)
    found.closed(np.array([0]), 0.0)
  found.message(0, frame(0, 4), 4)
  assert found.message(1, frame(0, 1), 5) == book.LATE
  assert found.due(0.0)  # too late
  assert found.message(1, frame(0, 2), 6) == book.LATE
  assert not found.due(9.0)
  found.message(1, frame(0, 4), 7)
  assert found.due(0.0)


def test_handshakes():
  found = opened(members=0)
  other = handshake.encode(PASSPORT | {'config': 'd'})
  assert found.hello(0, other, 0.0) == (
    "config differs: the run has c, the client 'd'"
  )
  for data in (b'', b'[]', b'{"spec": 1}', b'[' * 10_000, b'x' * 5000):
    assert found.hello(0, data, 0.0) is not None
  assert found.members == {}
  assert found.refused[0]['no handshake'] == 6
  assert found.hello(7, HELLO, 0.0) == 'unknown client'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'quorum': 5}, r'quorum must be in \[1, 4\]'),
    ({'min_clients': 0}, r'min_clients must be in \[1, 4\]'),
    ({'pipeline': -1}, 'pipeline must be in'),
    ({'deadline_s': 0.0}, 'deadline_s must be > 0'),
  ],
)
def test_impossible_rules(changes, message):
  with pytest.raises(ValueError, match=message):
    book.Rules(**{'num_clients': 4} | changes)
