"""A run's server on this machine, for tests."""

import asyncio
import contextlib

import pytest

from jaxfl.federation import connect, provision, server, stream
from jaxfl.federation.names import Names

needs_server = pytest.mark.skipif(
  server.find() is None,
  reason=f'nats-server is missing: {server.INSTALL}',
)
NAMES = Names('trial')
MAX_MESSAGE = 3000  # bytes, of a client


class Trial:
  """A provisioned server; `open` connects."""

  def __init__(self, directory, num_clients=2, **settings):
    self.settings = provision.Settings(**settings)
    self.made = provision.provision(
      directory, NAMES.run, num_clients, settings=self.settings
    )
    self.server = server.LocalServer(directory)

  def __enter__(self):
    self.server.start()
    try:
      asyncio.run(self._streams())
    except BaseException:
      self.server.stop()
      raise
    return self

  def __exit__(self, *error):
    self.server.stop()

  @contextlib.asynccontextmanager
  async def open(self, user, **options):
    path = self.made.credentials(user)
    nc = await connect.connect(path, self.server.url, **options)
    try:
      yield nc
    finally:
      await nc.close()

  async def _streams(self):
    async with self.open('coordinator') as nc:
      js = nc.jetstream()
      await stream.make(js, NAMES, MAX_MESSAGE)
      lease = await js.create_key_value(bucket=NAMES.lease, history=1)
      await lease.put('coordinator', b'me')
      for number in range(3):
        await js.publish(NAMES.log, b'record %d' % number)

  async def stored(self, nc):
    """Last sequence and number of messages of every stream."""
    counts = {}
    for info in await nc.jetstream().streams_info():
      counts[info.config.name] = (info.state.last_seq, info.state.messages)
    return counts


async def until(condition, seconds=10.0):
  """Waits until something holds."""
  for _ in range(int(seconds / 0.02)):
    if condition():
      return
    await asyncio.sleep(0.02)
  raise AssertionError(f'not within {seconds} s')
