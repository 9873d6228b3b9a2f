"""Snapshots in an object store, without consumers and without its API.

The layout is that of the library's object store, so that the coordinator, which
makes the bucket, may use that one. Clients read and the keeper writes with what
`jaxfl.federation.server_config` lets them.
"""

import base64
import binascii
import hashlib
import json
import secrets

from nats.aio.client import Client

from jaxfl.federation import direct
from jaxfl.federation.names import Names

_CHUNK = 128 * 1024
_DIGEST = 'SHA-256='
_ROLLUP = {'Nats-Rollup': 'sub'}  # replaces all earlier ones of the subject


class Snapshots:
  """The snapshots of a run."""

  def __init__(self, nc: Client, names: Names):
    self._nc, self._js = nc, nc.jetstream(timeout=direct.TIMEOUT_S)
    self._bucket = names.snapshots
    self._stream = f'OBJ_{self._bucket}'

  async def list(self) -> list[str]:
    """Names of the snapshots."""
    found, start = [], 1
    while True:
      message = await direct.get(
        self._nc, self._stream, start, f'$O.{self._bucket}.M.*'
      )
      if message is None:
        return found
      start = message.sequence + 1
      meta = _meta(message)
      if meta is not None:
        found.append(meta['name'])

  async def get(self, name: str, max_bytes: int) -> bytes:
    """A snapshot.

    Raises:
      ValueError: if there is none, it is longer, or it is damaged.
    """
    message = await direct.last(self._nc, self._stream, self._subject(name))
    meta = None if message is None else _meta(message)
    if meta is None:
      raise ValueError(f'there is no snapshot {name}')
    if meta['size'] > max_bytes:
      raise ValueError(f'snapshot {name} has {meta["size"]} bytes')
    data, start = bytearray(), 1
    while len(data) < meta['size']:
      chunk = await direct.get(
        self._nc, self._stream, start, f'$O.{self._bucket}.C.{meta["nuid"]}'
      )
      if chunk is None or not chunk.data:
        break
      data += chunk.data
      start = chunk.sequence + 1
    if len(data) != meta['size'] or _digest(data) != meta['digest']:
      raise ValueError(f'snapshot {name} is damaged')
    return bytes(data)

  async def put(self, name: str, data: bytes) -> None:
    """Stores a snapshot."""
    nuid, chunks = secrets.token_hex(11), 0
    for start in range(0, len(data), _CHUNK):
      subject = f'$O.{self._bucket}.C.{nuid}'
      await self._js.publish(subject, data[start : start + _CHUNK])
      chunks += 1
    await self._describe(
      name, nuid=nuid, size=len(data), chunks=chunks, digest=_digest(data)
    )

  async def delete(self, name: str) -> None:
    """Removes a snapshot, if it is there."""
    message = await direct.last(self._nc, self._stream, self._subject(name))
    meta = None if message is None else _meta(message)
    if meta is None:
      return
    empty = {'size': 0, 'chunks': 0, 'digest': '', 'deleted': True}
    await self._describe(name, nuid=meta['nuid'], **empty)
    subject = f'$O.{self._bucket}.C.{meta["nuid"]}'
    await self._js.publish(subject, b'', headers=_ROLLUP)

  def _subject(self, name):
    return (
      f'$O.{self._bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}'
    )

  async def _describe(self, name, **fields):
    meta = {'name': name, 'bucket': self._bucket, **fields}
    await self._js.publish(
      self._subject(name), json.dumps(meta).encode(), headers=_ROLLUP
    )


def _digest(data):
  return (
    _DIGEST + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
  )


def _meta(message):
  """The description of an object; None if it is none, or was deleted."""
  try:
    meta = json.loads(message.data)
    texts = all(isinstance(meta[k], str) for k in ('name', 'nuid', 'digest'))
    fits = texts and isinstance(meta['size'], int)
    name = base64.urlsafe_b64decode(message.subject.rpartition('.')[2]).decode()
  except (ValueError, KeyError, TypeError, binascii.Error):
    return None
  if not fits or meta.get('deleted') or meta['name'] != name:
    return None
  # it is a part of the chunks' subject
  return meta if meta['nuid'].isalnum() else None
