"""A client, or a keeper: follows the log of a run, and adds to it.

A client computes its message for a round from the state that it has, sends it,
and goes on when the log says what the round was. With a pipeline of s rounds it
does not wait: it may be s rounds ahead of the log, and its messages are then
made from a state that is up to s rounds old.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from nats.aio.client import Client

from jaxfl import wire
from jaxfl.federation import coordinator, direct, handshake, records, stream
from jaxfl.federation.names import Names
from jaxfl.federation.replica import (
  Replica,
  as_party,
  parse_snapshot,
  snapshot_name,
)
from jaxfl.federation.site import Site
from jaxfl.federation.snapshots import Snapshots

_REMEMBERED = 8  # digests that may still be compared
_LAST_S = 15.0  # for the last comparison of digests
_SILENCE_S = 30.0  # without a record, after which everything is said again


class Refused(ValueError):
  """The client does not fit the run; says in what."""


class Diverged(RuntimeError):
  """This device does not compute what the others do."""


@dataclasses.dataclass
class Progress:
  """What a client tells those who watch it."""

  round: int = 0
  sent: int = 0
  bytes_up: int = 0  # of its frames
  bytes_down: int = 0  # of records
  loss: float | None = None
  digest: str | None = None  # of the state, after the last comparison


async def find(nc: Client, names: Names) -> bytes:
  """The header of a run's log, waiting until there is one."""
  pause, number, told = stream.Pause(), 1, False
  while True:
    message = None
    with contextlib.suppress(*direct.TRANSIENT):
      message = await direct.get(nc, names.log_stream, number, names.log)
    if message is None:
      if not told:
        logging.warning('waiting for the run %s to be started', names.run)
      told = True
      await pause()
      continue
    with contextlib.suppress(ValueError):
      records.read_header(message.data)
      return message.data
    number = message.sequence + 1


async def follow(
  nc: Client,
  site: Site,
  replica: Replica,
  watch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
  """Takes part until the last round is applied.

  Args:
    nc: the connection.
    site: what this process brings.
    replica: opened with the header of `find`.
    watch: called whenever something has changed.

  Raises:
    Refused: if the site does not fit the run.
    Diverged: if this device does not compute what the others do.
    FloatingPointError: if a weight has left its range.
  """
  text = handshake.difference(replica.log.header, site.header, site.shared)
  if text is not None:
    raise Refused(text)
  return await _Follower(nc, site, replica, watch).run()


class _Follower:
  """A client or keeper at work."""

  def __init__(self, nc, site, replica, watch):
    self._nc, self._js = nc, nc.jetstream()
    self._store = Snapshots(nc, site.names)
    self._site, self._replica, self._watch = site, replica, watch
    self._progress = Progress()
    self._local = site.method.init_local(replica.state.params)
    self._next = 0  # the round of the next message
    self._ahead = None  # a round, and a task that loads its batches
    self._losses = []
    self._digests = collections.OrderedDict()  # own, by round
    self._attested = {}
    self._rebuilt = False  # since replicas were last found to be equal
    self._sending = set()
    self._open = {}  # what was sent for rounds that are not closed
    self._heard = time.monotonic()  # of a record, or said everything again
    self._said = False  # hello, so that an answer to it is for this process
    self._refused = None
    self._packed = {}  # a keeper's states, by round
    self._one = threading.Lock()  # one computation at a time

  async def run(self):
    site, replica = self._site, self._replica
    names = site.names
    start = replica.log.num_rounds + 2  # header and rounds take one each
    async with direct.Reader(self._nc, names, start) as reader:
      await self._catch_up(reader)
      hello = names.sent('hello', site.client or 0)
      if site.client is not None:
        # compiles, before anybody waits
        await self._message(replica.round)
        await stream.publish(self._js, hello, self._passport())
        self._said = True
      if site.judge is not None:
        site.judge.skip(replica.round)
        self._publish(names.trust, site.judge.verdict())
      try:
        while replica.round < site.num_rounds:
          if self._may_compute():
            await self._contribute()
          await self._drain(reader, wait=not self._may_compute())
          self._repeat()
          if self._refused is not None:
            raise Refused(f'the coordinator refuses it: {self._refused}')
        await asyncio.gather(*self._sending)
        until = time.monotonic() + _LAST_S
        while site.num_rounds in self._digests and time.monotonic() < until:
          await self._drain(reader, wait=True)
      finally:
        for task in self._sending:
          task.cancel()
        if self._ahead is not None:
          self._ahead[1].cancel()
      if site.client is not None:
        await stream.publish(self._js, hello, handshake.BYE)
    return self._progress

  def _passport(self):
    site, header = self._site, self._replica.log.header
    shared = {name: header.config.get(name) for name in site.shared}
    return handshake.encode(handshake.passport(site.header, shared))

  # Following.

  async def _catch_up(self, reader):
    """Reads what there is, and makes the state of it as cheaply as possible."""
    replica = self._replica
    while (message := await reader.next(timeout=0)) is not None:
      self._take(message)
    await self._thread(replica.restore)
    await self._adopt()
    while replica.round < replica.log.num_rounds:
      await self._step()

  async def _adopt(self):
    """Takes the newest snapshot that others have confirmed."""
    replica = self._replica
    with contextlib.suppress(*direct.TRANSIENT):
      found = [
        (*parsed, name)
        for name in await self._store.list()
        if (parsed := parse_snapshot(name)) is not None
        and self._attested.get(parsed[0]) == parsed[1]
      ]
      for round, digest, name in sorted(found, reverse=True):
        if not replica.round < round <= replica.log.num_rounds:
          continue
        try:
          data = await self._store.get(name, replica.max_bytes)
        except ValueError as error:
          logging.warning('%s', error)
          continue
        if await self._thread(replica.adopt, round, data, digest):
          return

  def _take(self, message):
    """A message of the log's stream; whether it is the next record."""
    names = self._site.names
    if message.subject == names.note:
      with contextlib.suppress(ValueError, KeyError, TypeError):
        note = json.loads(message.data)
        if note.get('refused') == self._site.client and self._said:
          self._refused = note['reason']
        self._attested[int(note['round'])] = note['digest']
      return False
    if message.subject != names.log:
      return False
    if not self._replica.receive(message.data, message.headers):
      self._check_same(message)
      return False
    self._progress.bytes_down += len(message.data)
    self._heard = time.monotonic()
    closed = self._replica.log.num_rounds
    self._open = {r: data for r, data in self._open.items() if r >= closed}
    return True

  def _check_same(self, message):
    """Whether a record that is there already is the one that was taken."""
    number = message.headers.get(records.ROUND, '')
    chain = message.headers.get(records.CHAIN)
    live = self._replica.log
    if not number.isdecimal() or int(number) >= live.num_rounds:
      return
    if live.digest_at(int(number) + 1)[: len(chain or '')] != chain:
      raise Diverged(
        f'the server has another record of round {number} than the log in'
        f' {live.path}: it has lost rounds, or it is another run; move the'
        ' directory away to follow what the server has'
      )

  async def _drain(self, reader, wait):
    """Takes what has arrived, at least one message if `wait`; applies it."""
    message = await reader.next(timeout=1.0 if wait else 0)
    while message is not None:
      self._take(message)
      message = await reader.next(timeout=0)
    while self._replica.round < self._replica.log.num_rounds:
      await self._step()
    await self._compare()

  async def _step(self):
    replica, site = self._replica, self._site
    if site.judge is not None:
      await self._judge()
    await self._thread(replica.step)
    self._progress.round = round = replica.round
    if round % site.digest_every == 0 or round == site.num_rounds:
      digest = await self._thread(replica.digest)
      self._digests[round] = self._progress.digest = digest
      while len(self._digests) > _REMEMBERED:
        self._digests.popitem(last=False)
      if round > self._attested_last():
        await self._report(round, digest)
      await self._thread(replica.save)
      if site.judge is not None:
        site.judge.save()
      if site.client is None:
        self._packed[round] = await self._thread(replica.pack)
        self._packed = dict(sorted(self._packed.items())[-2:])
    self._watch(self._progress)

  async def _judge(self):
    """Probes what clients claim in the next round; tells whom to trust."""
    replica, judge = self._replica, self._site.judge
    record = replica.log.read(replica.round, replica.like)
    await self._thread(judge.judge, replica.state, record)
    if judge.round == replica.log.num_rounds:
      self._publish(self._site.names.trust, judge.verdict())

  def _attested_last(self):
    return max(self._attested, default=-1)

  async def _report(self, round, digest):
    if self._site.client is None:
      return
    loss = float(np.mean(self._losses)) if self._losses else np.nan
    self._losses.clear()
    data = coordinator.encode_digest(round, digest, loss)
    self._send('digest', data)

  async def _compare(self):
    """Compares digests with what the coordinator says; begins anew if not."""
    replica = self._replica
    for round, own in list(self._digests.items()):
      said = self._attested.get(round)
      if said is None:
        continue
      del self._digests[round]
      if own.startswith(said):
        self._rebuilt = False
        await self._keep(round, said)
        continue
      if self._rebuilt:
        raise Diverged(
          f'after round {round} this replica has the digest {own[:16]}, the'
          f' others {said}, also when it is rebuilt from base and log: this'
          ' device does not compute the same bits'
        )
      logging.error(
        'after round %d this replica differs from the others: it is rebuilt',
        round,
      )
      self._rebuilt = True
      self._digests.clear()
      await self._thread(replica.forget)
      while replica.round < replica.log.num_rounds:
        await self._step()
      await self._compare()
      return

  async def _keep(self, round, digest):
    """A keeper shares a state that others have confirmed."""
    frame = self._packed.pop(round, None)
    if frame is None:
      return
    name = snapshot_name(round, digest)
    with contextlib.suppress(*direct.TRANSIENT):
      await self._store.put(name, frame)
      for other in await self._store.list():
        old = parse_snapshot(other)
        if old is not None and old[0] < round:
          await self._store.delete(other)

  # Contributing.

  def _may_compute(self):
    site, round = self._site, self._replica.round
    if site.client is None:
      return False
    target = max(self._next, round)
    return target < site.num_rounds and target <= round + site.pipeline

  async def _contribute(self):
    site, replica = self._site, self._replica
    round = max(self._next, replica.round)
    message, self._local, loss = await self._message(round)
    self._next = round + 1
    if self._next < site.num_rounds:
      self._load(self._next)  # while it waits
    if np.isfinite(loss):
      self._losses.append(loss)
    if site.tamper is not None:
      message = site.tamper(round, message)
    frame = wire.to_bytes(message)
    self._progress.sent += 1
    self._progress.bytes_up += len(frame)
    self._progress.loss = loss
    self._open[round] = data = wire.varint(round) + frame
    self._send('up', data)
    self._watch(self._progress)

  async def _message(self, round):
    """The message of a round, with its metrics."""
    batches = await self._load(round)
    return await self._thread(
      self._compute, round, self._replica.state, batches
    )

  def _load(self, round):
    """A task that loads the batches of a round; the last one is kept."""
    if self._ahead is None or self._ahead[0] != round:
      batches = asyncio.to_thread(self._site.batch_fn, round)
      self._ahead = round, asyncio.ensure_future(batches)
    return self._ahead[1]

  def _compute(self, round, state, batches):
    site = self._site
    party = as_party(site.client, round)
    message, local, metrics = site.run_client(
      state, self._local, batches, party
    )
    message, loss = jax.device_get((message, metrics['loss']))
    return message, local, float(loss)

  def _repeat(self):
    """Says everything again after a silence: it may not have been taken."""
    silent = time.monotonic() - self._heard > _SILENCE_S
    if self._site.client is None or not silent:
      return
    self._heard = time.monotonic()
    self._send('hello', self._passport())
    for data in self._open.values():
      self._send('up', data)

  def _send(self, kind, data):
    self._publish(self._site.names.sent(kind, self._site.client), data)

  def _publish(self, subject, data):
    task = asyncio.ensure_future(stream.publish(self._js, subject, data))
    self._sending.add(task)
    task.add_done_callback(self._sent)

  def _sent(self, task):
    self._sending.discard(task)
    if not task.cancelled() and task.exception() is not None:
      logging.error('not sent: %s', task.exception())

  async def _thread(self, function, *args):
    def run():
      with self._one:
        return function(*args)

    return await asyncio.to_thread(run)
