"""Who is the coordinator: a key that expires, renewed by its holder.

The lease saves work, no more: two that write at the same time can't both write
a round, as `stream.append` names what it goes on from.
"""

import asyncio
import contextlib
import secrets
import time
from typing import Any

from absl import logging
from nats.js import JetStreamContext
from nats.js.errors import APIError, KeyWrongLastSequenceError

from jaxfl.federation import stream
from jaxfl.federation.names import Names

_KEY = 'coordinator'


class Lease:
  """The lease of a run; use `hold`."""

  def __init__(self, js: JetStreamContext, names: Names, seconds: float):
    self._js, self._names, self._seconds = js, names, seconds
    self._own = secrets.token_hex(8).encode()
    self._kv: Any = None
    self._revision = 0
    self._until = 0.0

  @property
  def held(self) -> bool:
    """Whether nobody else can have it."""
    return time.monotonic() < self._until

  async def acquire(self) -> None:
    """Waits until the lease is free, and takes it."""
    pause, told = stream.Pause(), False
    while True:
      asked = time.monotonic()
      try:
        if self._kv is None:
          self._kv = await self._js.create_key_value(
            bucket=self._names.lease, history=1, ttl=self._seconds
          )
        self._revision = await self._kv.create(_KEY, self._own)
        self._until = asked + self._seconds
        return
      except KeyWrongLastSequenceError:
        if not told:
          logging.info('another coordinator is at work; this one stands by')
        told = True
        await asyncio.sleep(self._seconds / 3)
      except (*stream.TRANSIENT, APIError) as error:
        logging.info('no lease yet: %r', error)
        await pause()

  async def keep(self) -> None:
    """Renews the lease until it is lost."""
    while self.held:
      await asyncio.sleep(self._seconds / 3)
      asked = time.monotonic()
      try:
        self._revision = await self._kv.update(
          _KEY, self._own, last=self._revision
        )
        self._until = asked + self._seconds
      except KeyWrongLastSequenceError:
        self._until = 0.0
      except (*stream.TRANSIENT, APIError) as error:
        logging.info('the lease is not renewed: %r', error)

  async def release(self) -> None:
    """Gives the lease back, so that a successor need not wait."""
    if self.held:
      self._until = 0.0
      with contextlib.suppress(*stream.TRANSIENT, APIError):
        await self._kv.delete(_KEY, last=self._revision)
