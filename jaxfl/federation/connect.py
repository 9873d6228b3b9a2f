"""Connects to a run's server: TLS by the run's authority, an NKey, patience.

Once there was a connection it is made again for ever, in growing intervals, for
a key that was revoked too; the first one fails at once, and says why.
"""

import asyncio
import os
import random
import socket
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import nats.errors
from absl import logging
from nats.aio.client import Client, Server

from jaxfl.federation.provision import Credentials

_CONNECT_S = 10.0
_PING_S = 20  # a line is lost after two pings without an answer
_FIRST_S, _MAX_S = 0.5, 30.0  # pauses between attempts to connect again
_LOOPBACK = ('localhost', '127.0.0.1', '::1')


class ConnectError(ConnectionError):
  """No connection; the message names the flag that may be wrong."""


class _Client(Client):
  """Says who it is on an encrypted line only.

  A server announces TLS on a line that is not encrypted yet; the library
  believes one that announces none, which could be somebody on the way.
  """

  secure = False

  def _connect_command(self) -> bytes:
    transport: Any = self._transport
    line = transport._io_writer.transport
    if line.get_extra_info('ssl_object') is not None:
      line.get_protocol()._over_ssl = True  # else every end is a warning
    elif self.secure:
      raise nats.errors.SecureConnRequiredError
    return super()._connect_command()

  def abandon(self) -> None:
    """Drops a line that never worked; `close` may wait for it for ever."""
    transport: Any = self._transport
    if transport is not None and transport._bare_io_writer is not None:
      transport._bare_io_writer.transport.abort()


async def connect(
  credentials: str | os.PathLike | None,
  server: str,
  *,
  disconnected: Callable[[], Awaitable[None]] | None = None,
  reconnected: Callable[[], Awaitable[None]] | None = None,
) -> Client:
  """A connection to a server.

  Args:
    credentials: file of `jaxfl.federation.provision`; None for a server on this
      machine that is open to everybody.
    server: `tls://HOST:PORT`, or `nats://`; with credentials it is TLS anyway.
    disconnected: called when the line is lost.
    reconnected: called when it is there again.

  Raises:
    ValueError: if an argument is no such file or address.
    ConnectError: if there is no connection.
  """
  url = _parse(server)
  options: dict[str, Any] = {}
  nc = _Client()
  if credentials is not None:
    own = Credentials.from_file(credentials)
    nc.secure = True
    options = {
      'tls': _context(own, credentials),
      'nkeys_seed_str': own.seed,
      'inbox_prefix': own.inbox_prefix,
      'name': own.user,
    }
  elif url.hostname not in _LOOPBACK:
    raise ValueError(
      f'--credentials: {server} is another machine, which takes nobody without'
      ' credentials'
    )
  first = True

  async def failed(error):
    if first:
      raise error  # the library would try again
    logging.warning('%s', _explain(error, url, credentials) or repr(error))

  try:
    await nc.connect(
      server,
      error_cb=failed,
      disconnected_cb=disconnected,
      reconnected_cb=reconnected,
      connect_timeout=_CONNECT_S,  # pyright: ignore[reportArgumentType]
      max_reconnect_attempts=-1,
      reconnect_to_server_handler=_again,
      ping_interval=_PING_S,
      **options,
    )
  except Exception as error:
    nc.abandon()
    said = _explain(error, url, credentials)
    if said is None:
      raise
    raise ConnectError(said) from error
  first = False
  return nc


def _parse(server):
  expected = f'--server must be tls://HOST:PORT, got {server!r}'
  try:
    url = urllib.parse.urlsplit(server)
    port = url.port
  except ValueError as error:
    raise ValueError(expected) from error
  extra = url.path or url.query or url.username
  if (
    url.scheme not in ('tls', 'nats')
    or not url.hostname
    or port is None
    or extra
  ):
    raise ValueError(expected)
  return url


def _context(own, path):
  try:
    # trusts the run's authority, and no other
    return ssl.create_default_context(cadata=own.ca)
  except (ssl.SSLError, ValueError) as error:
    raise ValueError(f'--credentials: {path}: ca is no certificate') from error


def _again(servers: list[Server], info: dict[str, Any]) -> tuple[None, float]:
  """The pause before the next attempt; the library's choice of server."""
  del info
  pause = min(_FIRST_S * 2 ** min(servers[0].reconnects, 10), _MAX_S)
  return None, pause * random.uniform(0.5, 1.0)


def _explain(error, url, path):
  """What to look at; None for an error that says it itself."""
  place = f'--server: {url.hostname}:{url.port}'
  if isinstance(error, socket.gaierror):
    return f'{place}: there is no such host ({error.strerror})'
  if path is None and isinstance(error, ssl.SSLError):
    return f'{place} takes nobody without --credentials'
  if isinstance(error, ssl.SSLCertVerificationError):
    if 'match' in error.verify_message or 'valid for' in error.verify_message:
      return (
        f'{place}: its certificate is for other hosts; give --server one of'
        f' those that were given to --role=provision ({error.verify_message})'
      )
    return (
      f'{place} has no certificate of the authority in --credentials {path}:'
      ' the file is of another run, or it is not the run that answers'
      f' ({error.verify_message})'
    )
  if isinstance(error, nats.errors.SecureConnRequiredError):
    return (
      f'{place} offers no TLS: it is not the server of --credentials {path}'
    )
  if isinstance(error, asyncio.TimeoutError | nats.errors.TimeoutError):
    return f'{place} does not answer within {_CONNECT_S:g} s'
  text = str(error).lower()
  if 'authorization' in text or 'authentication' in text:
    if path is None:
      return f'{place} takes nobody without --credentials'
    return (
      f'{place} does not take the key in --credentials {path}: it was revoked'
      ' or renewed, or the server has not read its new configuration'
    )
  if isinstance(error, ssl.SSLError):
    return f'{place}: no TLS connection ({error.reason})'
  if isinstance(error, OSError):
    return f'{place}: {error.strerror or error}: is nats-server running there?'
  return None
