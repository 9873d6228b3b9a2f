"""The server of a federation whose clients are asked: closes rounds.

It has no weights and no network; see `letters` for what is asked and answered,
and `answers` for the clients' side.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
from absl import logging

from jaxfl import log, log_format, wire
from jaxfl import typing as jt
from jaxfl.federation import book, handshake, records
from jaxfl.federation.letters import CHAIN_BYTES, Letter, Post, field

_MAX_RECORDS = 4 << 20  # bytes in a question
_MAX_TEXT = 500
_LONGEST_PAUSE_S = 60.0


@dataclasses.dataclass
class Status:
  """How a run stands.

  Attributes:
    round: rounds that are closed.
    members: ids of clients with a handshake.
    bytes_up: of the frames in closed rounds.
    bytes_down: of the records, which every replica gets.
    refused: counts of reasons by client, see `book`.
    failed: questions without a usable answer, by client or node.
    excluded: why clients or nodes are not asked any more.
    losses: mean loss that the clients of a round reported, by round.
    attested: 16 hex digits that most replicas had, by rounds; None where there
      was no majority.
    differing: rounds after which a client's replica had another digest.
    digest: of the trained weights, 64 hex digits, as most replicas have it
      after the last round.
  """

  round: int = 0
  num_rounds: int = 0
  members: tuple[int, ...] = ()
  bytes_up: int = 0
  bytes_down: int = 0
  refused: dict[int, dict[str, int]] = dataclasses.field(default_factory=dict)
  failed: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  excluded: dict[str, str] = dataclasses.field(default_factory=dict)
  losses: dict[int, float] = dataclasses.field(default_factory=dict)
  attested: dict[int, str | None] = dataclasses.field(default_factory=dict)
  differing: dict[int, list[int]] = dataclasses.field(default_factory=dict)
  digest: str | None = None


class Excluded(RuntimeError):
  """Nobody is left to ask; says why each is not."""


@dataclasses.dataclass
class _Node:
  """What the server knows of a node."""

  number: int
  client: int | None = None  # once its handshake was accepted
  rounds: int = -1  # that it has applied
  answered: int = -1  # the last round that it answered for
  asked_until: float | None = None  # while an answer is awaited
  not_before: float = -math.inf  # when to ask again
  failures: int = 0  # since the last usable answer
  excluded: str | None = None
  rebuild: bool = False  # to be told so
  rebuilt: bool = False  # was told so, since it last agreed

  @property
  def name(self) -> str:
    return f'node {self.number}' if self.client is None else self.client_name

  @property
  def client_name(self) -> str:
    return f'client {self.client}'


def block_of(path: str) -> bytes:
  """The header of a log's file as it is there, byte for byte."""
  with open(path, 'rb') as file:
    *_, size = log_format.read_header(file, 1 << 30)
    file.seek(0)
    return file.read(size)


class Hub:
  """Closes rounds from answers, and says what to ask.

  Attributes:
    book: which messages a round has.
    status: how the run stands.
  """

  def __init__(
    self,
    live: log.RoundLog,
    rules: book.Rules,
    passport: handshake.Passport,
    usable: Callable[[jt.Message], bool],
    num_rounds: int,
    now: float,
  ):
    """Goes on with a log.

    Args:
      live: of the run, open for appending.
      rules: when rounds are closed; no pipeline.
      passport: of the run.
      usable: whether a message says anything, see `book.usable`.
      num_rounds: of the run.
      now: seconds, of the clock of all other methods.

    Raises:
      ValueError: if the rules have a pipeline.
    """
    if rules.pipeline:
      raise ValueError(
        'pipeline must be 0: clients that are asked are not ahead'
      )
    self._log, self._rules = live, rules
    self._block = block_of(live.path)
    self._tail = records.Tail(self._block)
    self._run = bytes.fromhex(self._tail.chain)[:CHAIN_BYTES]
    self._like = records.like_of(live.header.message)
    self._frame_bytes = records.frame_bytes(live.header)
    self._entries: list[bytes] = []
    self._nodes: dict[int, _Node] = {}
    self._digests: dict[int, bytes] = {}  # after the closed rounds, by client
    self._losses: dict[int, float] = {}  # of the open round, by client
    self._params: dict[int, bytes] = {}
    self._started = self._closed_at = now
    self._fresh = True  # no round was closed since the start
    self._done = False
    self.status = Status(num_rounds=num_rounds)
    for record in live:
      spec = live.header.message
      rows = wire.pack(record.messages, spec, lead=(len(record.ids),))
      self._extend(record.ids, record.weights, rows.tobytes())
    self.book = book.Book(
      rules, passport, self._like, usable, round=self._tail.round, now=now
    )

  def _extend(self, ids, weights, payload):
    record, headers = self._tail.write(ids, weights, payload)
    assert self._tail.take(record, headers) is not None
    chain = bytes.fromhex(self._tail.chain)[:CHAIN_BYTES]
    self._entries.append(chain + record)
    self.status.round = self._tail.round
    self.status.bytes_up += len(ids) * self._frame_bytes
    self.status.bytes_down += len(record)

  # Asking.

  def see(self, numbers: set[int], now: float) -> None:
    """Takes note of the nodes that can be asked."""
    for number in self._nodes.keys() - numbers:
      gone = self._nodes.pop(number)
      if gone.client is not None:
        logging.warning('%s is gone', gone.name)
        self.book.hello(gone.client, handshake.BYE, now)
        for other in self._nodes.values():
          if other.client is None:  # perhaps it waits for this id
            other.not_before = now
    for number in numbers - self._nodes.keys():
      self._nodes[number] = _Node(number)

  def ask(self, now: float) -> dict[int, Letter]:
    """Questions by node, for those who have something to do."""
    letters = {}
    for node in self._nodes.values():
      if node.asked_until is not None and now >= node.asked_until:
        self._failed(node, 'no answer in time', now)
      idle = node.asked_until is None and node.excluded is None
      if idle and now >= node.not_before and node.answered < self._tail.round:
        letters[node.number] = self._question(node)
        node.asked_until = now + self.ttl_s
    return letters

  @property
  def ttl_s(self) -> float:
    """Seconds for an answer."""
    return 2 * self._rules.deadline_s

  def _question(self, node):
    since = max(node.rounds, 0)
    entries, size = [], 0
    if node.rounds >= 0 or self._tail.round == 0:
      for entry in self._entries[since:]:
        if entries and size + len(entry) > _MAX_RECORDS:
          break
        entries.append(entry)
        size += len(entry)
    letter: Letter = {
      'run': self._run,
      'open': self._tail.round,
      'since': since,
      'records': entries,
    }
    if node.client is None or node.rounds < 0:
      letter['header'] = self._block
    if node.rebuild:
      letter['rebuild'] = True
      node.rebuild, node.rebuilt = False, True
    return letter

  # Answers.

  def take(self, number: int, answer: Letter | str, now: float) -> None:
    """Takes an answer of a node, or why there is none."""
    node = self._nodes.get(number)
    if node is None or node.excluded is not None:
      return
    node.asked_until = None
    if isinstance(answer, str):
      self._failed(node, answer, now)
      return
    try:
      self._read(node, answer, now)
    except ValueError as error:
      if node.client is not None:
        self.book.message(node.client, b'', 0)  # counts it as damaged
      self._failed(node, f'a wrong answer: {error}', now)

  def _failed(self, node, text, now):
    node.asked_until = None
    self.status.failed[node.name] += 1
    node.not_before = now + min(2.0**node.failures, _LONGEST_PAUSE_S)
    node.failures += 1
    logging.warning('%s: %s', node.name, text[:_MAX_TEXT])

  def _exclude(self, node, text):
    node.excluded = text[:_MAX_TEXT]
    self.status.excluded[node.name] = node.excluded
    logging.error('%s does not take part: %s', node.name, node.excluded)

  def _read(self, node, answer, now):
    client = field(answer, 'client', int)
    if (text := field(answer, 'refused', str, '')) != '':
      if node.client in (None, client) and self._free(client, node):
        self.book.hello(client, b'refused', now)  # counts it
      name = f'client {client}: ' if node.client is None else ''
      self._exclude(node, name + text)
      return
    if node.client is None and not self._greet(node, client, answer, now):
      return
    if client != node.client:
      raise ValueError(f'client {client} in place of {node.client}')
    rounds = field(answer, 'rounds', int)
    if rounds < -1:
      raise ValueError(f'{rounds} rounds')
    if rounds > self._tail.round:
      self.book.hello(client, handshake.BYE, now)
      self._exclude(
        node,
        f'it has {rounds} rounds and the server {self._tail.round}, which has'
        ' lost some, or it is another run: move its directory away, or give the'
        ' run another name',
      )
      return
    if rounds >= 0:
      digest = field(answer, 'digest', bytes)
      if len(digest) != CHAIN_BYTES:
        raise ValueError(f'a digest of {len(digest)} bytes')
      self._compare(node, rounds, digest)
    if node.excluded is not None:
      return
    message = field(answer, 'message', bytes, b'')
    if message:
      reason = self.book.message(client, message, 0)
      if reason is None:
        self._losses[client] = field(answer, 'loss', float, math.nan)
      elif reason not in (book.LATE, book.REPEATED):
        logging.warning('%s: message refused: %s', node.name, reason)
    last = self._tail.round == self.status.num_rounds
    if last and rounds == self._tail.round:
      self._params[client] = field(answer, 'params', bytes)
    elif rounds == self._tail.round and not message:
      raise ValueError('no message for the open round')
    node.rounds = rounds
    if rounds == self._tail.round:
      node.answered = rounds
    node.failures = 0

  def _free(self, client, node):
    """Whether no other node is this client."""
    return all(
      other.client != client or other is node for other in self._nodes.values()
    )

  def _greet(self, node, client, answer, now):
    """The first answer of a node; whether it takes part."""
    if not self._free(client, node):  # or it was, and is not missed yet
      raise ValueError(
        f'client {client} is another node; each needs an id of its own'
      )
    reason = self.book.hello(client, field(answer, 'passport', bytes), now)
    if reason is not None:
      self._exclude(node, f'client {client}: {reason}')
      return False
    node.client = client
    self.status.failed.pop(f'node {node.number}', None)
    return True

  def _compare(self, node, rounds, digest):
    """A digest, at once if others have told theirs, else with them."""
    if rounds == self._tail.round:
      self._digests[node.client] = digest
    elif (said := self.status.attested.get(rounds)) is not None:
      self._judge(node, rounds, digest.hex(), said)

  def _judge(self, node, rounds, digest, said):
    if digest == said:
      node.rebuilt = False
      return
    self.status.differing.setdefault(node.client, []).append(rounds)
    text = (
      f'after round {rounds} its replica has the digest {digest}, the others'
      f' {said}'
    )
    if node.rebuilt:
      self.book.hello(node.client, handshake.BYE, 0.0)
      self._exclude(
        node,
        f'{text}, also when it is rebuilt from base and log: its device does'
        ' not compute the same bits',
      )
    else:
      logging.error('%s: %s; it is rebuilt', node.name, text)
      node.rebuild = True

  def _attest(self):
    """What most of those say who have told the digest of the closed rounds."""
    told, self._digests = self._digests, {}
    if not told:
      return
    (digest, votes), *_ = collections.Counter(told.values()).most_common()
    if 2 * votes <= len(told):
      self.status.attested[self._tail.round] = None
      logging.error(
        'after round %d replicas differ, without a majority: %s',
        *(self._tail.round, {c: d.hex() for c, d in sorted(told.items())}),
      )
      return
    self.status.attested[self._tail.round] = digest.hex()
    for node in self._nodes.values():
      if node.client in told and node.excluded is None:
        self._judge(
          node, self._tail.round, told[node.client].hex(), digest.hex()
        )

  # What is decided.

  def turn(self, now: float) -> bool:
    """Closes the open round if it is time; returns whether it did.

    Raises:
      Excluded: if no node is left that could be asked.
    """
    status = self.status
    status.members = tuple(sorted(self.book.members))
    status.refused = {c: dict(n) for c, n in self.book.refused.items()}
    full = len(self._nodes) >= self._rules.min_clients
    if full and all(n.excluded for n in self._nodes.values()):
      raise Excluded('; '.join(f'{n}: {t}' for n, t in status.excluded.items()))
    if self._tail.round == status.num_rounds:
      self._settle(now)
      return False
    early = len(self.book.members) < self._rules.min_clients
    if self._fresh and early and now < self._started + self._rules.deadline_s:
      return False  # after a start with rounds in the log
    if not self.book.due(now):
      return False
    self._attest()
    self._close(now)
    return True

  def _close(self, now):
    rows = self.book.rows()
    messages = rows.messages(self._log.header.message, self._like)
    self._log.append(rows.round, rows.ids, rows.weights, messages)
    self._extend(rows.ids, rows.weights, rows.payload)
    self.book.closed(rows.ids, now)
    self._closed_at, self._fresh = now, False
    losses = [self._losses.get(int(c), math.nan) for c in rows.ids]
    if finite := [x for x in losses if math.isfinite(x)]:
      self.status.losses[self._tail.round] = float(np.mean(finite))
    self._losses.clear()

  def _settle(self, now):
    """Ends when the members have told the digest after the last round."""
    late = now >= self._closed_at + self._rules.deadline_s
    waiting = [c for c in self.book.members if c not in self._params]
    if (waiting or not self.book.members) and not late:
      return
    if waiting:
      logging.error('no last digest of the clients %s', waiting)
    self._attest()
    if self._params:
      (params, votes), *_ = collections.Counter(
        self._params.values()
      ).most_common()
      if 2 * votes > len(self._params):
        self.status.digest = params.hex()
    self._done = True

  @property
  def done(self) -> bool:
    """Whether all rounds are closed and the last digests compared."""
    return self._done


def serve(
  post: Post,
  hub: Hub,
  *,
  poll_s: float,
  watch: Callable[[Status], None] = lambda status: None,
  clock: Callable[[], float] = time.monotonic,
  sleep: Callable[[float], None] = time.sleep,
) -> Status:
  """Asks until the run is over.

  Args:
    post: carries the letters.
    hub: of the run.
    poll_s: seconds between two looks at what has come.
    watch: called after every round, and at the end.
    clock: seconds.
    sleep: waits so many seconds.

  Raises:
    Excluded: if nobody is left to ask.
  """
  while not hub.done:
    hub.see(post.nodes(), clock())
    if letters := hub.ask(clock()):
      post.send(letters, hub.ttl_s)
    answers = post.receive()
    for number, answer in answers:
      hub.take(number, answer, clock())
    if hub.turn(clock()):
      watch(hub.status)
    elif not answers:
      sleep(poll_s)
  watch(hub.status)
  return hub.status
