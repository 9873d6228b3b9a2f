"""Reads a stream by asking for its messages, without a consumer.

Whoever makes a consumer chooses where the server writes, so clients may not
(`jaxfl.federation.server_config`). A stream made with `allow_direct` answers
every request for a message; with `republish` it also says what it has stored,
with the number, to everybody who listens. A reader listens, and asks for what
it has not heard: what was there before, and what a bad line lost.
"""

import asyncio
import collections
import contextlib
import json
from typing import NamedTuple

import nats.errors
from absl import logging
from nats.aio.client import Client
from nats.js import api

from jaxfl.federation import server_config
from jaxfl.federation.names import Names

TIMEOUT_S = 10.0  # for an answer of the server
POLL_S = 15.0  # asks after so much silence whether something was lost
RETRY_S, MAX_RETRY_S = 0.5, 8.0
_WINDOW = 16  # requests at a time
_GET = '$JS.API.DIRECT.GET'

# what passes with line or server, or once they are back
TRANSIENT = (nats.errors.Error, asyncio.TimeoutError, OSError)


class Message(NamedTuple):
  """A message of a stream."""

  subject: str
  data: bytes
  headers: dict[str, str]
  sequence: int


def stream_config(names: Names) -> dict:
  """What the stream of a log needs to be read so, for `api.StreamConfig`."""
  again = api.RePublish(src='>', dest=server_config.live(names))
  return {'allow_direct': True, 'republish': again}


async def get(
  nc: Client, stream: str, sequence: int, subject: str | None = None
) -> Message | None:
  """The message with a number, or the first one of a subject from it on.

  Args:
    nc: the connection.
    stream: its name.
    sequence: the number.
    subject: may have wildcards.

  Returns:
    None if there is none.

  Raises:
    nats.errors.Error: if there is no answer, as when there is no such stream.
  """
  asked: dict = {'seq': sequence}
  if subject is not None:
    asked['next_by_subj'] = subject
  return await _ask(nc, f'{_GET}.{stream}', json.dumps(asked).encode())


async def last(nc: Client, stream: str, subject: str) -> Message | None:
  """The last message of a subject; None if there is none."""
  return await _ask(nc, f'{_GET}.{stream}.{subject}', b'')


async def _ask(nc, request, data):
  answer = await nc.request(request, data, timeout=TIMEOUT_S)
  headers = dict(answer.headers or {})
  if 'Nats-Sequence' in headers:
    return _message(answer, headers)
  if headers.get('Status') == '404':
    return None
  raise nats.errors.Error(f'{request}: {headers}')


def _message(raw, headers):
  sequence = int(headers['Nats-Sequence'])
  return Message(headers['Nats-Subject'], raw.data, headers, sequence)


class Reader:
  """Messages of a log's stream in order; an async context manager.

  Attributes:
    start: number of the next message.
  """

  def __init__(self, nc: Client, names: Names, start: int = 1):
    """Args:
    nc: the connection.
    names: of the run.
    start: the first number.
    """
    self.start = start
    self._nc, self._stream = nc, names.log_stream
    self._feed = server_config.live(names)
    self._ready: collections.deque[Message] = collections.deque()
    self._sub = None
    self._behind = True  # there may be messages that were not heard
    self._connection = 0  # of those that there were, the one heard on
    self._window = 1
    self._heard = 0.0  # when the server last said something

  async def __aenter__(self) -> 'Reader':
    self._sub = await self._nc.subscribe(self._feed)
    return self

  async def __aexit__(self, *error) -> None:
    assert self._sub is not None
    with contextlib.suppress(*TRANSIENT):
      await self._sub.unsubscribe()

  async def next(self, timeout: float | None = None) -> Message | None:
    """The next message; None if there is none within `timeout` seconds."""
    loop, pause = asyncio.get_running_loop(), RETRY_S
    until = None if timeout is None else loop.time() + timeout
    while True:
      if self._ready:
        message = self._ready.popleft()
        self.start = message.sequence + 1
        return message
      left = POLL_S if until is None else max(0.0, until - loop.time())
      try:
        if self._behind or self._connection != self._nc.stats['reconnects']:
          self._connection = self._nc.stats['reconnects']
          await self._fetch()
        else:
          await self._listen(min(left, POLL_S))
      except TRANSIENT as error:
        logging.info('%s: reading again: %r', self._stream, error)
        self._behind = True
        await asyncio.sleep(pause if until is None else min(pause, left))
        pause = min(2 * pause, MAX_RETRY_S)
      if not self._ready and until is not None and loop.time() >= until:
        return None

  async def _listen(self, seconds):
    """Takes what is said next, if it is the next message."""
    assert self._sub is not None
    try:
      raw = await self._sub.next_msg(timeout=max(seconds, 1e-3))
    except nats.errors.TimeoutError:
      self._behind = asyncio.get_running_loop().time() > self._heard + POLL_S
      return
    self._heard = asyncio.get_running_loop().time()
    message = _message(raw, dict(raw.headers or {}))
    if message.sequence == self.start:
      self._ready.append(message)
    elif message.sequence > self.start:
      self._behind = True

  async def _fetch(self):
    """Asks for the next messages."""
    first = self.start
    numbers = range(first, first + self._window)
    found = await asyncio.gather(
      *(get(self._nc, self._stream, number) for number in numbers)
    )
    # a message may have been stored while those after it were asked for
    present: list[Message] = []
    for message in found:
      if message is None:
        break
      present.append(message)
    if not present and any(found):
      after = await get(self._nc, self._stream, first, '>')
      present = [] if after is None else [after]
    self._ready.extend(present)
    self._heard = asyncio.get_running_loop().time()
    full = len(present) == self._window
    self._window = min(2 * self._window, _WINDOW) if full else 1
    self._behind = bool(present)
