"""The coordinator: closes rounds, holds no weights, remembers nothing.

All that it knows is in the run's streams. It can be killed at any instant and
started again, here or elsewhere, and several can stand by.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from jaxfl import log, log_format, wire
from jaxfl import typing as jt
from jaxfl.federation import book, handshake, lease, records, stream
from jaxfl.federation.names import Names
from jaxfl.federation.records import frame_bytes, like_of

DIGEST_BYTES = 8
_SETTLE_S = 10.0  # for the last digests


class RunDiffers(ValueError):
  """The run of this name has another header, or does not fit the server."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a coordinator is to do.

  Attributes:
    names: of the run.
    rules: when rounds are closed.
    header: to start the run with; None to go on with the one that is there.
    shared: header -> the settings that sites must have in common.
    usable: header -> whether a message says anything, see `book.Book`.
    num_rounds: rounds of the run, from its header.
    lease_s: seconds after which a silent coordinator is replaced.
    size: header -> the size of a message, to weigh clients by the verdicts of
      a keeper, see `book.Book`; None to weigh all alike.
  """

  names: Names
  rules: book.Rules
  header: log.Header | None
  shared: Callable[[log.Header], dict[str, Any]]
  usable: Callable[[log.Header], Callable[[jt.Message], bool]]
  num_rounds: Callable[[log.Header], int]
  lease_s: float = 5.0
  size: Callable[[log.Header], Callable[[jt.Message], float]] | None = None


@dataclasses.dataclass
class Status:
  """What a coordinator tells those who watch it.

  Attributes:
    round: rounds that are closed.
    members: ids of clients with a handshake.
    bytes_up: of the frames in closed rounds.
    bytes_down: of the records, which every replica reads.
    refused: counts of reasons by client.
    losses: mean loss that members reported, by round.
    attested: digests by round, 16 hex digits; None where members differed.
    levels: of trust by client, of the last verdict; empty without one.
    done: whether all rounds are closed.
  """

  round: int = 0
  num_rounds: int = 0
  members: tuple[int, ...] = ()
  bytes_up: int = 0
  bytes_down: int = 0
  refused: dict[int, dict[str, int]] = dataclasses.field(default_factory=dict)
  losses: dict[int, float] = dataclasses.field(default_factory=dict)
  attested: dict[int, str | None] = dataclasses.field(default_factory=dict)
  levels: tuple[int, ...] = ()
  done: bool = False


def max_bytes(header: log.Header) -> int:
  """The longest message that a client of a run has reason to send."""
  fields = sum(len(path.encode()) + 64 for path, *_ in header.message)
  return 4096 + fields + wire.payload_bytes(header.message)


async def coordinate(
  nc: Client,
  plan: Plan,
  watch: Callable[[Status], None] = lambda status: None,
) -> Status:
  """Coordinates a run until its last round is closed.

  Args:
    nc: connection of the coordinator.
    plan: what to do.
    watch: called whenever something has changed.

  Returns:
    How it ended.

  Raises:
    RunDiffers: if the run of this name has another header, or its records are
      longer than the server's limit.
    NotFoundError: if there is no such run and the plan has no header.
  """
  js, status = nc.jetstream(), Status()
  while not status.done:
    own = lease.Lease(js, plan.names, plan.lease_s)
    await own.acquire()
    keeping = asyncio.create_task(own.keep())
    try:
      await _Office(nc, plan, own, status, watch).work()
    except (*stream.TRANSIENT, stream.NotLast) as error:
      logging.info('the coordinator starts over: %r', error)
      await asyncio.sleep(stream.RETRY_S)
    finally:
      await stream.end(keeping)
      await own.release()
  return status


def encode_digest(round: int, digest: str, loss: float) -> bytes:
  """What a replica reports: rounds done, its digest, its mean loss."""
  short = bytes.fromhex(digest)[:DIGEST_BYTES]
  return wire.varint(round) + short + np.float32(loss).tobytes()


def decode_digest(data: bytes) -> tuple[int, str, float]:
  """The inverse; the digest as 16 hex digits. Raises ValueError."""
  round, at = wire.read_varint(data, 0)
  if len(data) != at + DIGEST_BYTES + 4:
    raise ValueError(f'a report of {len(data)} bytes')
  loss = float(np.frombuffer(data[-4:], np.float32)[0])
  return round, data[at : at + DIGEST_BYTES].hex(), loss


class _Office:
  """A coordinator from the moment it has the lease until it loses it."""

  def __init__(self, nc, plan, own, status, watch):
    self._nc, self._js, self._plan = nc, nc.jetstream(), plan
    self._names, self._lease = plan.names, own
    self._status, self._watch = status, watch
    self._digests = collections.defaultdict(dict)  # round -> client -> digest
    self._first = {}  # when the first digest of a round came
    self._told = set()  # clients that were told why they are refused
    self._answers = []  # notes that are not published yet
    self._last = 0  # sequence of the last message of the log's subject
    self._read = 0  # of the last message of clients that was read

  async def work(self):
    self._tail = tail = await self._open()
    header, status = tail.header, self._status
    self._frame_bytes = frame_bytes(header)
    self._book = book.Book(
      self._plan.rules,
      handshake.passport(header, self._plan.shared(header)),
      like_of(header.message),
      self._plan.usable(header),
      self._plan.size and self._plan.size(header),
      round=tail.round,
      now=time.monotonic(),
    )
    status.num_rounds = self._plan.num_rounds(header)
    await self._greet()
    async with stream.Reader(
      self._nc, self._names.up_stream, self._read + 1
    ) as reader:
      while tail.round < status.num_rounds and self._lease.held:
        await self._listen(reader, self._book.wait_s(time.monotonic()))
        if self._book.due(time.monotonic()):
          await self._close_round()
      if self._lease.held:
        await self._settle(reader)

  async def _open(self):
    """The end of the log; starts the run if it is not there."""
    names, header = self._names, self._plan.header
    if header is not None:
      ahead = self._plan.rules.pipeline
      self._check_size(header)
      longest = max(max_bytes(header), 16 + self._plan.rules.num_clients)
      await stream.make(self._js, names, longest, ahead)
    last = await stream.last_sequence(self._js, names.log_stream, names.log)
    if not last:
      if header is None:
        raise NotFoundError(description=f'there is no run {names.run}')
      block = log_format.encode_header(header)
      last = await stream.append(self._js, names.log, block, 0)
    tail, size = None, 0
    async with stream.Reader(self._nc, names.log_stream) as reader:
      while self._last < last and self._lease.held:
        message = await reader.next(timeout=stream.TIMEOUT_S)
        if message is None:
          continue
        if message.subject == names.note:
          self._remember(message.data)
          continue
        self._last = message.sequence
        if tail is None:
          with contextlib.suppress(ValueError):
            tail = records.Tail(message.data)
            self._status.bytes_up, size = 0, frame_bytes(tail.header)
            self._status.bytes_down = 0
        elif (rows := tail.take(message.data, message.headers)) is not None:
          self._read = int(message.headers.get(records.POSITION, '0'))
          self._count(rows, size, len(message.data))
    if tail is None:
      raise stream.NotLast('the lease was lost while reading the log')
    if header is not None and header != tail.header:
      raise RunDiffers(
        handshake.difference(tail.header, header, frozenset(header.config))
        or 'another header'
      )
    return tail

  def _check_size(self, header):
    """Whether the server takes the records of a run."""
    clients = self._plan.rules.num_clients
    row = wire.payload_bytes(header.message)
    longest = max(max_bytes(header), clients * (row + 16) + 1024)
    if longest > self._nc.max_payload:
      raise RunDiffers(
        f'a record of {clients} clients may have {longest} bytes, and the'
        f' server takes messages of {self._nc.max_payload} at most'
        ' (max_payload in its configuration)'
      )

  def _remember(self, data):
    with contextlib.suppress(ValueError, KeyError, TypeError):
      note = json.loads(data)
      self._status.attested[int(note['round'])] = note['digest']

  def _count(self, rows, frame_bytes, size):
    self._status.round = rows.round + 1
    self._status.bytes_up += len(rows.ids) * frame_bytes
    self._status.bytes_down += size

  async def _greet(self):
    """Who is there already: the last that each has said."""
    name, subject = self._names.up_stream, self._names.sent('hello', '*')
    info = await self._js.stream_info(name, subjects_filter=subject)
    for said in sorted(info.state.subjects or {}):
      found = self._names.sender(said)
      if found is not None:
        last = await self._js.get_last_msg(name, said)
        reason = self._book.hello(found[1], last.data or b'', time.monotonic())
        if reason is not None:
          logging.warning('client %d: hello refused: %s', found[1], reason)
    with contextlib.suppress(NotFoundError):
      last = await self._js.get_last_msg(name, self._names.trust)
      self._judged(last.data or b'')
    # what they said after `self._read` is read again

  async def _listen(self, reader, wait_s):
    """Takes the messages that are there; waits for the first one."""
    message = await reader.next(timeout=min(wait_s, 1.0) or 0.01)
    while message is not None:
      self._read = message.sequence
      self._take(message)
      if self._book.due(time.monotonic()):
        break
      message = await reader.next(timeout=0)
    for answer in self._answers:
      data = json.dumps(answer).encode()
      await stream.publish(self._js, self._names.note, data)
    self._answers.clear()
    self._tell()

  def _judged(self, data):
    reason = self._book.judged(data)
    if reason is not None:
      logging.warning('a verdict is refused: %s', reason)

  def _take(self, message):
    if message.subject == self._names.trust:
      self._judged(message.data)
      return
    found = self._names.sender(message.subject)
    if found is None:
      return
    kind, client = found
    if kind == 'hello':
      reason = self._book.hello(client, message.data, time.monotonic())
    elif kind == 'digest':
      reason = self._report(client, message.data)
    else:
      position = message.sequence
      reason = self._book.message(client, message.data, position)
    if reason is not None and reason not in (book.LATE, book.REPEATED):
      logging.warning('client %d: %s refused: %s', client, kind, reason)
      if kind == 'hello' and client not in self._told:
        self._told.add(client)
        self._answers.append({'refused': client, 'reason': reason})

  def _report(self, client, data):
    if client not in self._book.members:
      return 'no handshake'
    try:
      round, digest, loss = decode_digest(data)
    except ValueError as error:
      return str(error)
    if round <= self._tail.round and round not in self._status.attested:
      self._digests[round][client] = digest, loss
      self._first.setdefault(round, time.monotonic())
    return None

  async def _close_round(self):
    rows = self._book.rows()
    record, headers = self._tail.write(rows.ids, rows.weights, rows.payload)
    headers[records.POSITION] = str(self._book.position(self._read))
    log_subject = self._names.log
    try:
      self._last = await stream.append(
        self._js, log_subject, record, self._last, headers
      )
    except (*stream.TRANSIENT, stream.NotLast):
      await self._catch_up()
      return
    taken = self._tail.take(record, headers)
    assert taken is not None
    self._closed(taken, len(record))
    await self._attest()

  async def _catch_up(self):
    """Reads what was written to the log meanwhile, by whomever."""
    names = self._names
    async with stream.Reader(
      self._nc, names.log_stream, self._last + 1, subject=names.log
    ) as reader:
      while (message := await reader.next(timeout=1.0)) is not None:
        self._last = message.sequence
        rows = self._tail.take(message.data, message.headers)
        if rows is not None:
          self._closed(rows, len(message.data))

  def _closed(self, rows, size):
    self._book.closed(rows.ids, time.monotonic())
    self._count(rows, self._frame_bytes, size)
    self._tell()

  async def _attest(self, final=False):
    """Says which digest a round has, once the members have told theirs."""
    for round, told in sorted(self._digests.items()):
      awaited = [c for c, m in self._book.members.items() if m.awaited]
      waited = time.monotonic() - self._first[round]
      late = final or waited > self._plan.rules.deadline_s
      if not late and not all(c in told for c in awaited):
        continue
      counts = collections.Counter(digest for digest, _ in told.values())
      (digest, votes), *others = counts.most_common()
      if 2 * votes <= sum(counts.values()):
        digest = None
      if others:
        logging.error('after round %d replicas differ: %s', round, dict(counts))
      note = json.dumps({'round': round, 'digest': digest, 'votes': votes})
      await stream.publish(self._js, self._names.note, note.encode())
      self._status.attested[round] = digest
      losses = [loss for _, loss in told.values() if np.isfinite(loss)]
      if losses:
        self._status.losses[round] = float(np.mean(losses))
      del self._digests[round], self._first[round]
      self._tell()

  async def _settle(self, reader):
    """Waits for the digests after the last round."""
    until, last = time.monotonic() + _SETTLE_S, self._tail.round
    while last not in self._status.attested and self._lease.held:
      final = time.monotonic() >= until
      await self._attest(final=final)
      if final:
        break
      await self._listen(reader, 0.2)
    self._status.done = True
    self._tell()

  def _tell(self):
    status = self._status
    status.members = tuple(sorted(self._book.members))
    if self._book.verdict is not None:
      status.levels = tuple(self._book.verdict.levels)
    status.refused = {c: dict(n) for c, n in self._book.refused.items()}
    self._watch(status)
