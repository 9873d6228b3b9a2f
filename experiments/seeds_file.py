"""A fine-tune as one file: all but the weights that it starts from.

    8 bytes   magic 'JAXFLSDS'
    1 byte    version 1
    4 bytes   length of the next field, little-endian
    zlib      JSON object with the fields of `Seeds` but the payload
    rest      payload, zlib where `packed` says so
    32 bytes  sha256 of everything before

Payloads by form, integers little-endian:

  * `log`: the run's log, byte for byte.
  * `coordinates`: int32[K] of a seed pool, see `jaxfl.pool`.
  * `bytes`: int8[K], coordinates in units of 2**shift; not those of the run.
  * `weights`: a frame of `jaxfl.wire` with the trained tensors.

Nothing is unpickled.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from typing import Any

import numpy as np

from experiments.config import UsageError
from jaxfl import keys

FORMS = ('log', 'coordinates', 'bytes', 'weights')

_MAGIC, _VERSION = b'JAXFLSDS', 1
_START = len(_MAGIC) + 1 + 4
_MAX_HEADER, _MAX_PAYLOAD = 1 << 22, 1 << 30  # bytes, unpacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds:
  """What a file says.

  Attributes:
    form: one of `FORMS`.
    base: the settings that say what the base is, `model` among them.
    shape: of the model, as in `model.json`.
    base_digest: of the trained weights at the start.
    frozen_digest: of the others.
    rounds: of the run.
    digest: of the trained weights that a rebuild gives.
    payload: see the module.
    distribution: of the pool's directions; of coordinates and bytes.
    base_scale: see `jaxfl.pool.rebuild`; of coordinates and bytes.
    shift: of bytes.
    spec: the seed contract, `keys.SPEC`.
    packed: whether the payload is stored as zlib.
  """

  form: str
  base: dict[str, Any]
  shape: dict[str, Any]
  base_digest: str
  frozen_digest: str
  rounds: int
  digest: str
  payload: bytes
  distribution: str = ''
  base_scale: int = 0
  shift: int = 0
  spec: str = keys.SPEC
  packed: bool = False

  @property
  def coordinates(self) -> np.ndarray:
    """int32[K], of coordinates and bytes."""
    dtype = '<i4' if self.form == 'coordinates' else 'i1'
    return np.frombuffer(self.payload, dtype).astype(np.int32) << self.shift


def round_to_bytes(coordinates: np.ndarray) -> tuple[np.ndarray, int]:
  """The nearest multiples of a power of two that eight bits can count.

  Args:
    coordinates: int32[K], below 2**30 in magnitude.

  Returns:
    int8[K], and the logarithm of the unit, the smallest that will do.
  """
  shift, half = 0, 0
  while np.abs((coordinates + half) >> shift).max(initial=0) > 127:
    half = 1 << shift
    shift += 1
  return ((coordinates + half) >> shift).astype(np.int8), shift


def encode(seeds: Seeds) -> bytes:
  """The bytes of a file; a payload is packed where that is shorter."""
  payload, packed = seeds.payload, False
  if seeds.form != 'weights':
    shorter = zlib.compress(payload, 9)
    packed = len(shorter) < len(payload)
    payload = shorter if packed else payload
  fields = {
    k: v
    for k, v in vars(dataclasses.replace(seeds, packed=packed)).items()
    if k != 'payload'
  }
  text = json.dumps(fields, sort_keys=True, separators=(',', ':')).encode()
  header = zlib.compress(text, 9)
  start = _MAGIC + bytes([_VERSION]) + len(header).to_bytes(4, 'little')
  body = start + header + payload
  return body + hashlib.sha256(body).digest()


def decode(data: bytes) -> Seeds:
  """The inverse of `encode`.

  Raises:
    ValueError: saying what is wrong.
  """
  if not data.startswith(_MAGIC):
    raise ValueError('not a file of experiments.export')
  if len(data) > len(_MAGIC) and data[len(_MAGIC)] != _VERSION:
    raise ValueError(
      f'version {data[len(_MAGIC)]}; this program reads version {_VERSION}'
    )
  body, checksum = data[:-32], data[-32:]
  if len(body) < _START or hashlib.sha256(body).digest() != checksum:
    raise ValueError('damaged or truncated: its sha256 is wrong')
  end = _START + int.from_bytes(body[_START - 4 : _START], 'little')
  try:
    fields = json.loads(_unpack(body[_START:end], _MAX_HEADER))
    payload = body[end:]
    if fields['packed']:
      payload = _unpack(payload, _MAX_PAYLOAD)
    seeds = Seeds(**fields, payload=payload)
  except (KeyError, TypeError, ValueError, zlib.error) as error:
    raise ValueError(f'its header is wrong: {error}') from error
  if seeds.form not in FORMS:
    raise ValueError(f'form {seeds.form!r}, not one of {", ".join(FORMS)}')
  if seeds.spec != keys.SPEC:
    raise ValueError(
      f'written under {seeds.spec!r}; this version implements {keys.SPEC!r}'
    )
  return seeds


def _unpack(data: bytes, limit: int) -> bytes:
  inflate = zlib.decompressobj()
  found = inflate.decompress(data, limit)
  if not inflate.eof or inflate.unused_data:
    raise ValueError(f'zlib data is cut off, or of more than {limit} bytes')
  return found


def read(path: str | os.PathLike) -> Seeds:
  """Reads and checks a file.

  Raises:
    UsageError: naming the file, if it can't be read or is not as it was
      written.
  """
  try:
    return decode(pathlib.Path(path).read_bytes())
  except (OSError, ValueError) as error:
    raise UsageError(f'{path}: {error}') from error
