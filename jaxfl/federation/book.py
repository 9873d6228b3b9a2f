"""Which messages a round has: what the coordinator decides, without a network.

A client takes part once its handshake was accepted. A round is closed

  * with the messages of all members that are awaited, as soon as they are there
    (or `quorum` of them, if that is fewer);
  * or, `deadline_s` after the round before it was closed, with those that are
    there; with none, it stays open.

Where a keeper weighs the clients (`verdict`), its verdict on the rounds before
is awaited like a message, and the first round is not closed without one.

A member that missed a round is not awaited again until it sends a message for
the open round, or, in a pipeline of s rounds, for one of the s before it: where
the others are ahead, who is behind by a round trip would be late for ever. The
first message of a client for a round counts, whatever comes later. Everything
else is refused with a reason and counted.
"""

import collections
import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from jaxfl import method as method_lib
from jaxfl import typing as jt
from jaxfl import wire
from jaxfl.federation import handshake, records
from jaxfl.federation import verdict as verdict_lib

# why a message was refused
LATE = 'late'  # its round is closed; no fault of the client's
REPEATED = 'repeated'  # sent again, as after a lost acknowledgement
REASONS = (
  LATE, REPEATED, 'no handshake', 'unknown client', 'damaged', 'wrong round',
  'contradicts', 'not finite',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """When a round is closed.

  Attributes:
    num_clients: ids are below it; slots of a cohort.
    min_clients: members before the first round is closed.
    quorum: messages with which a round is closed at once; None for those of all
      awaited members.
    deadline_s: seconds after which a round is closed with what there is.
    pipeline: rounds that a client may be ahead of the log.
  """

  num_clients: int
  min_clients: int = 1
  quorum: int | None = None
  deadline_s: float = 60.0
  pipeline: int = 0

  def __post_init__(self):
    for name, low, high in (
      ('num_clients', 1, 2**31 - 1),
      ('min_clients', 1, self.num_clients),
      ('quorum', 1, self.num_clients),
      ('pipeline', 0, 1000),
    ):
      value = getattr(self, name)
      if value is not None and not low <= value <= high:
        raise ValueError(f'{name} must be in [{low}, {high}], got {value}')
    if not 0 < self.deadline_s < math.inf:
      raise ValueError(f'deadline_s must be > 0, got {self.deadline_s}')


def usable(method: method_lib.Method) -> Callable[[jt.Message], bool]:
  """Whether a message of a method says anything that is finite."""
  finite = lambda x: bool(np.isfinite(np.asarray(x, np.float32)).any())
  values = method.values
  if values is not None:
    return lambda message: finite(values(message))
  is_float = lambda x: x.dtype.kind not in 'iub'
  return lambda message: all(
    finite(x) for x in jax.tree.leaves(message) if is_float(x)
  )


def size(method: method_lib.Method) -> Callable[[jt.Message], float]:
  """Root mean square of the scalars of a message, as `probe.Trust` has it."""
  values = method.values
  assert values is not None
  square = lambda x: np.square(np.nan_to_num(np.asarray(x)), dtype=float)
  return lambda message: float(np.sqrt(np.mean(square(values(message)))))


class Member:
  """A client with an accepted handshake."""

  def __init__(self, round: int):
    self.since = round
    self.awaited = True
    self.accepted = 0  # messages in closed rounds


class Book:
  """The open round, and the rounds ahead of it.

  Attributes:
    members: by client id.
    refused: counts of reasons, by client id.
    round: the open one.
    verdict: the last that came.
  """

  def __init__(
    self,
    rules: Rules,
    passport: handshake.Passport,
    like: jt.Message,
    usable: Callable[[jt.Message], bool] = lambda message: True,
    size: Callable[[jt.Message], float] | None = None,
    *,
    round: int = 0,
    now: float = 0.0,
  ):
    """Args:
    rules: when rounds are closed.
    passport: of the run, see `handshake`.
    like: shape of a message, a pytree of `ShapeDtypeStruct`.
    usable: whether a message of the right shape says anything.
    size: of a message, to weigh clients by verdicts (`verdict`); None to weigh
      all alike.
    round: the open one.
    now: seconds; when it was opened.
    """
    self.rules, self.round = rules, round
    self.members: dict[int, Member] = {}
    self.refused: dict[int, collections.Counter] = collections.defaultdict(
      collections.Counter
    )
    self._passport, self._like, self._usable = passport, like, usable
    self._size = size
    self.verdict: verdict_lib.Verdict | None = None
    self._keeper_awaited = size is not None
    self._spec = wire.describe(like)
    self._opened = now
    self._rows: dict[int, dict[int, bytes]] = {}  # by round and client
    self._sizes: dict[tuple[int, int], float] = {}  # by round and client
    self._positions: dict[int, int] = {}  # in the stream, of the first by round

  # What arrives.

  def hello(self, client: int, data: bytes, now: float) -> str | None:
    """A handshake; returns why it was refused."""
    if not 0 <= client < self.rules.num_clients:
      return self._refuse(client, 'unknown client')
    if data == handshake.BYE:
      self.members.pop(client, None)
      return None
    reason = handshake.compare(data, self._passport)
    if reason is not None:
      self.members.pop(client, None)
      self._refuse(client, 'no handshake')
      return reason
    self.members.setdefault(client, Member(self.round))
    if self.round == 0 and not self.arrived:
      self._opened = now
    return None

  def message(self, client: int, data: bytes, position: int) -> str | None:
    """A message of a client for a round; returns why it was refused.

    Args:
      client: that the subject names; the server has checked that it is its own.
      data: varint of the round, then a frame.
      position: in the stream that it came from.
    """
    member = self.members.get(client)
    if member is None:
      known = 0 <= client < self.rules.num_clients
      return self._refuse(client, 'no handshake' if known else 'unknown client')
    try:
      round, start = wire.read_varint(data, 0)
    except ValueError:
      return self._refuse(client, 'damaged')
    if round < self.round:
      if round >= self.round - self.rules.pipeline:
        member.awaited = True  # it can't catch up while nobody waits
      return self._refuse(client, LATE)
    if round > self.round + self.rules.pipeline:
      return self._refuse(client, 'wrong round')
    try:
      message = wire.from_bytes(data[start:], self._like)
    except ValueError:
      return self._refuse(client, 'damaged')
    if not self._usable(message):
      return self._refuse(client, 'not finite')
    row = wire.pack(message, self._spec).tobytes()
    rows = self._rows.setdefault(round, {})
    if client in rows:
      same = rows[client] == row
      return self._refuse(client, REPEATED if same else 'contradicts')
    rows[client] = row
    if self._size is not None:
      self._sizes[round, client] = self._size(message)
    member.awaited = True
    self._positions.setdefault(round, position)
    return None

  def judged(self, data: bytes) -> str | None:
    """A keeper's verdict; returns why it was refused."""
    if self._size is None:
      return None
    try:
      verdict = verdict_lib.decode(data, self.rules.num_clients)
    except ValueError as error:
      return str(error)
    if self.verdict is None or verdict.round >= self.verdict.round:
      self.verdict = verdict
    if self._judged:
      self._keeper_awaited = True
    return None

  @property
  def _judged(self) -> bool:
    """Whether a keeper has judged what it can have seen."""
    seen = self.round - self.rules.pipeline
    return self.verdict is not None and self.verdict.round >= seen

  def _weight(self, client: int) -> int:
    """Of a client's message for the open round."""
    if self._size is None:
      return 1
    if self.verdict is None:
      return 0
    small = self._sizes[self.round, client] <= self.verdict.limit
    return self.verdict.levels[client] if small else 0

  def _refuse(self, client, reason):
    self.refused[client][reason] += 1
    return reason

  # What is decided.

  @property
  def arrived(self) -> int:
    """Messages of the open round."""
    return len(self._rows.get(self.round, {}))

  @property
  def awaited(self) -> int:
    """Messages with which the open round is closed at once."""
    members = sum(m.awaited for m in self.members.values())
    if self.rules.quorum is None:
      return members
    return min(members, self.rules.quorum)

  def due(self, now: float) -> bool:
    """Whether the open round is to be closed."""
    if self.round == 0 and len(self.members) < self.rules.min_clients:
      return False
    if self.round == 0 and self._keeper_awaited and self.verdict is None:
      return False
    if not self.arrived:
      return False
    all_there = self._judged or not self._keeper_awaited
    if all_there and self.arrived >= self.awaited:
      return True
    return now >= self._opened + self.rules.deadline_s

  def wait_s(self, now: float) -> float:
    """Seconds until `due` may change by itself."""
    return max(0.0, self._opened + self.rules.deadline_s - now)

  def rows(self) -> records.Rows:
    """The open round as it would be closed."""
    rows = dict(sorted(self._rows.get(self.round, {}).items()))
    ids = np.array(list(rows), np.int32)
    payload = b''.join(rows.values())
    weights = np.array([self._weight(client) for client in rows], np.float32)
    return records.Rows(self.round, ids, weights, payload)

  def position(self, read: int) -> int:
    """Up to where a successor need not read again, `read` having been read.

    All messages for later rounds come after it.
    """
    ahead = [p for r, p in self._positions.items() if r > self.round]
    return min([read, *(p - 1 for p in ahead)])

  def closed(self, ids: np.ndarray, now: float) -> None:
    """Goes on to the next round, after one that the log has with these ids."""
    if not self._judged:
      self._keeper_awaited = False
    for client in self._rows.pop(self.round, ()):
      self._sizes.pop((self.round, client), None)
    self._positions.pop(self.round, None)
    present = set(ids.tolist())
    for client, member in self.members.items():
      member.accepted += client in present
      # who is ahead has been heard of
      ahead = any(client in rows for rows in self._rows.values())
      missed = client not in present and member.since < self.round
      if missed and not ahead:
        member.awaited = False
    self.round += 1
    self._opened = now
