"""The streams of a run, as its coordinator makes, reads and writes them.

A `Reader` is an ordered consumer: an ephemeral one that the server pushes to,
made anew from the next sequence after a gap, a lost server, or silence. Clients
may make no consumer; they have `jaxfl.federation.direct`.
"""

import asyncio
import contextlib

import nats.errors
from absl import logging
from nats.aio.client import Client
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from jaxfl.federation import direct
from jaxfl.federation.direct import (
  MAX_RETRY_S,
  RETRY_S,
  TIMEOUT_S,
  TRANSIENT,
  Message,
)
from jaxfl.federation.names import KINDS, Names

KEPT = 64  # messages of each kind and client
HEARTBEAT_S = 5.0  # of a consumer that has nothing to deliver
_EXPECTED = 'Nats-Expected-Last-Subject-Sequence'
_DELIVERED = '$JS.ACK.'  # what a consumer delivers is to be answered there
_WRONG_LAST = 10071  # error code of the server


class NotLast(Exception):
  """Something was written to the subject that the writer has not seen."""


class Pause:
  """Waits longer after every failure."""

  def __init__(self):
    self.seconds = RETRY_S

  async def __call__(self) -> None:
    await asyncio.sleep(self.seconds)
    self.seconds = min(2 * self.seconds, MAX_RETRY_S)


async def end(task: asyncio.Task) -> None:
  """Cancels a task until it has ended; raises what it raised otherwise.

  Once is not enough: `asyncio.wait_for`, on which nats stands, drops what
  cancels it in the moment of its result (Python 3.11).
  """
  while not task.done():
    task.cancel()
    await asyncio.wait([task], timeout=1.0)
  if not task.cancelled():
    task.result()


async def make(
  js: JetStreamContext, names: Names, max_bytes: int, ahead: int = 0
) -> None:
  """Makes the streams of a run that are not there.

  Args:
    js: of the coordinator.
    names: of the run.
    max_bytes: of one message of a client; longer ones the server refuses.
    ahead: rounds that a client may be ahead of the log.
  """
  sent = [names.trust, *(names.sent(kind, '*') for kind in KINDS)]
  # who sends more pushes out what he sent before, and nothing of others
  kept = 2 * ahead + KEPT
  await _make(
    js,
    names.up_stream,
    sent,
    max_msg_size=max_bytes,
    max_msgs_per_subject=kept,
  )
  await _make(
    js,
    names.log_stream,
    [names.log, names.note],
    **direct.stream_config(names),
  )
  bucket = f'OBJ_{names.snapshots}'
  if not await _exists(js, bucket):
    await js.create_object_store(names.snapshots)
    found = (await js.stream_info(bucket)).config
    await js.update_stream(found.evolve(allow_direct=True))


async def _exists(js, name):
  try:
    await js.stream_info(name)
  except NotFoundError:
    return False
  return True


async def _make(js, name, subjects, **fields):
  if await _exists(js, name):
    return
  config = api.StreamConfig(
    name=name,
    subjects=subjects,
    storage=api.StorageType.FILE,
    retention=api.RetentionPolicy.LIMITS,
    discard=api.DiscardPolicy.NEW,  # when the disk is full, nothing is lost
    **fields,
  )
  await js.add_stream(config)


async def append(
  js: JetStreamContext,
  subject: str,
  data: bytes,
  last: int,
  headers: dict[str, str] | None = None,
) -> int:
  """Writes after the last message of a subject.

  Args:
    js: of the writer.
    subject: of a stream.
    data: the message.
    last: sequence of the last message of the subject, 0 if there is none.
    headers: of the message.

  Returns:
    Its sequence.

  Raises:
    NotLast: if there is a later message of the subject.
  """
  headers = {**(headers or {}), _EXPECTED: str(last)}
  try:
    done = await js.publish(subject, data, timeout=TIMEOUT_S, headers=headers)
  except APIError as error:
    if error.err_code == _WRONG_LAST:
      raise NotLast(subject) from error
    raise
  return done.seq


async def last_sequence(js: JetStreamContext, stream: str, subject: str) -> int:
  """Sequence of the last message of a subject; 0 if there is none."""
  try:
    return (await js.get_last_msg(stream, subject)).seq or 0
  except NotFoundError:
    return 0


async def publish(js: JetStreamContext, subject: str, data: bytes) -> None:
  """Publishes until the server has stored it, however long that takes.

  It may be stored more than once.

  Raises:
    APIError: if the server refuses it: too long, or no such stream.
  """
  pause = Pause()
  while True:
    try:
      await js.publish(subject, data, timeout=TIMEOUT_S)
      return
    except ServiceUnavailableError:
      pass
    except APIError:
      raise
    except TRANSIENT as error:
      logging.info('%s: not stored yet: %r', subject, error)
    await pause()


class Reader:
  """Messages of a stream in order; an async context manager.

  Attributes:
    start: sequence of the next message.
  """

  def __init__(
    self,
    nc: Client,
    stream: str,
    start: int = 1,
    *,
    subject: str | None = None,
    last_per_subject: bool = False,
  ):
    """Args:
    nc: the connection.
    stream: its name.
    start: the first sequence.
    subject: only messages of this one, which may have wildcards.
    last_per_subject: only the last message of every subject, then new ones.
    """
    self.start = start
    self._nc, self._js, self._stream = nc, nc.jetstream(), stream
    self._subject, self._last = subject, last_per_subject
    self._sub = None
    self._count = 0  # messages of this consumer
    self._heard = 0.0  # when something of it came, if but a heartbeat
    self._connection = 0  # of those that there were, the one it listens on

  async def __aenter__(self):
    return self

  async def __aexit__(self, *error):
    await self._drop()

  async def _drop(self):
    sub, self._sub = self._sub, None
    if sub is not None:  # the server removes a consumer that nobody listens to
      with contextlib.suppress(*TRANSIENT):
        await sub.unsubscribe()

  async def _open(self):
    inbox, self._connection = self._nc.new_inbox(), self._reconnects()
    policy, start = api.DeliverPolicy.BY_START_SEQUENCE, self.start
    if self._last and self.start == 1:
      policy, start = api.DeliverPolicy.LAST_PER_SUBJECT, None
    sub = await self._nc.subscribe(inbox)
    self._sub = sub
    await self._js.add_consumer(
      self._stream,
      api.ConsumerConfig(
        deliver_subject=inbox,
        deliver_policy=policy,
        opt_start_seq=start,
        filter_subject=self._subject,
        ack_policy=api.AckPolicy.NONE,
        max_deliver=1,
        idle_heartbeat=HEARTBEAT_S,
        inactive_threshold=60.0,
        mem_storage=True,
      ),
      timeout=TIMEOUT_S,
    )
    self._count, self._heard = 0, asyncio.get_running_loop().time()

  def _reconnects(self):
    return self._nc.stats['reconnects']

  async def next(self, timeout: float | None = None) -> Message | None:
    """The next message; None if there is none within `timeout` seconds."""
    loop, pause = asyncio.get_running_loop(), Pause()
    until = None if timeout is None else loop.time() + timeout
    left = lambda: None if until is None else max(0.0, until - loop.time())
    while True:
      try:
        if self._sub is None:
          await self._open()
        message = await self._receive(left())
      except NotFoundError:
        raise
      except (*TRANSIENT, APIError) as error:
        logging.info('%s: reading again: %r', self._stream, error)
        await self._drop()
        await pause()
        continue
      if message is not None:
        return message
      if until is not None and loop.time() >= until:
        return None

  async def _receive(self, timeout):
    """A message; None after a while, or a heartbeat."""
    loop = asyncio.get_running_loop()
    if self._sub is None or self._reconnects() != self._connection:
      await self._drop()  # the server may have forgotten the consumer
      return None
    wait = 1.0 if timeout is None else min(timeout, 1.0)
    try:
      got = await self._sub.next_msg(timeout=max(wait, 1e-3))
    except nats.errors.TimeoutError:
      if loop.time() > self._heard + 3 * HEARTBEAT_S:
        await self._drop()
      return None
    self._heard = loop.time()
    # a heartbeat; a message may have the headers of one, but not its answer
    if not got.reply.startswith(_DELIVERED):
      return None
    meta = got.metadata
    self._count += 1
    if meta.sequence.consumer != self._count:
      await self._drop()  # something was lost on the way
      return None
    self.start = meta.sequence.stream + 1
    return Message(
      got.subject, got.data, dict(got.headers or {}), meta.sequence.stream
    )
