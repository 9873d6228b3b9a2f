"""What leaves a client, as bytes: frames for messages.

A frame describes itself. Integers of the header are varints (LEB128: seven bits
per byte, low bits first, the highest bit set on all bytes but the last, no
superfluous bytes); everything else is little-endian:

    2 bytes   magic f1 4a
    1 byte    version 1
    4 bytes   crc32 of all bytes of the frame but these four
    varint    number of leaves
    leaves    in ascending order of their paths, each
                varint, bytes   length of the path and the path, UTF-8
                1 byte          dtype, position in `DTYPES` counted from 1
                varint          rank
                varints         shape
    payload   the leaves' elements in this order, row-major; bool is 00 or 01

A path is the text of `keys.named_leaves`; a bare array has the path ''. One
message has one encoding, and any other is refused.
"""

import math
import sys
import zlib
from typing import Any

import jax
import numpy as np

from jaxfl import keys
from jaxfl import typing as jt

# fmt: off
DTYPES = (
    'bool', 'uint8', 'uint16', 'uint32', 'uint64', 'int8', 'int16', 'int32',
    'int64', 'float16', 'bfloat16', 'float32', 'float64',
)
# fmt: on
MAX_BYTES = 1 << 30  # default limit of a frame

_MAGIC = b'\xf1\x4a\x01'  # with the version
_MAX_LEAVES = 1 << 16
_MAX_RANK = 32
_MAX_ELEMENTS = 1 << 40  # of one leaf; sizes of 0 count as 1

Spec = list[list]  # [path, dtype, shape] per leaf, in ascending order of paths


def describe(message: jt.Message) -> Spec:
  """`[path, dtype, shape]` of every leaf, sorted by path; JSON can hold it.

  Args:
    message: pytree of arrays or of `jax.ShapeDtypeStruct`.

  Raises:
    TypeError: naming a leaf that is not an array of one of `DTYPES`.
    ValueError: for two leaves of one path, or sizes beyond the format.
  """
  spec = []
  for path, leaf in keys.named_leaves(message):
    dtype = getattr(leaf, 'dtype', None)
    name = getattr(dtype, 'name', None)
    if name not in DTYPES or not hasattr(leaf, 'shape'):
      raise TypeError(
        f'leaf {path!r} is {dtype or type(leaf).__name__}, not an array of'
        f' {", ".join(DTYPES)}'
      )
    spec.append([path, name, [int(n) for n in leaf.shape]])
  return check_spec(sorted(spec))


def check_spec(spec: Any) -> Spec:
  """Returns `spec` if `describe` could have made it.

  Raises:
    ValueError: saying what is wrong.
  """
  if not isinstance(spec, list) or len(spec) > _MAX_LEAVES:
    raise ValueError(f'a spec is a list of at most {_MAX_LEAVES} leaves')
  previous = None
  for leaf in spec:
    if not (isinstance(leaf, list) and len(leaf) == 3):
      raise ValueError('a leaf of a spec is [path, dtype, shape]')
    path, dtype, shape = leaf
    if not isinstance(path, str) or not _encodable(path):
      raise ValueError(f'path {path!r} is not text')
    if not isinstance(dtype, str) or dtype not in DTYPES:
      raise ValueError(f'leaf {path!r}: unknown dtype {dtype!r}')
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
      raise ValueError(f'leaf {path!r}: bad shape')
    if not all(type(n) is int and 0 <= n < _MAX_ELEMENTS for n in shape):
      raise ValueError(f'leaf {path!r}: bad shape')
    if math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
      raise ValueError(f'leaf {path!r}: more than {_MAX_ELEMENTS} elements')
    if previous is not None and path <= previous:
      raise ValueError(f'paths {previous!r}, {path!r} are not in order')
    previous = path
  return spec


def _encodable(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _leaf_bytes(leaf: list) -> int:
  return math.prod(leaf[2]) * np.dtype(leaf[1]).itemsize


def payload_bytes(spec: Spec) -> int:
  """Bytes of a message's elements, without any header."""
  return sum(_leaf_bytes(leaf) for leaf in spec)


def pack(
  messages: jt.Message, spec: Spec, *, lead: tuple[int, ...] = ()
) -> np.ndarray:
  """The payload of messages whose spec is known: uint8[*lead, N].

  Args:
    messages: pytree of arrays [*lead, ...] that match `spec`.
    spec: see `describe`; N is `payload_bytes(spec)`.
    lead: leading axes of every array, e.g. `(num_clients,)`.

  Raises:
    TypeError: see `describe`.
    ValueError: naming a leaf that does not match the spec.
  """
  wanted = [[path, dtype, [*lead, *shape]] for path, dtype, shape in spec]
  _check_equal('the message', describe(messages), wanted)
  leaves = dict(keys.named_leaves(messages))
  rows = [np.zeros((*lead, 0), np.uint8)]
  for leaf in spec:
    x = _host_array(leaf[0], leaves[leaf[0]])
    x = x.reshape((*lead, math.prod(leaf[2])))
    rows.append(np.ascontiguousarray(x).view(np.uint8))
  return np.concatenate(rows, axis=-1)


def _host_array(path: str, leaf: Any) -> np.ndarray:
  if not isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
    raise TypeError(f'leaf {path!r} is {type(leaf).__name__}: it has no values')
  try:
    x = np.asarray(leaf)
  except jax.errors.TracerArrayConversionError as e:
    raise TypeError(f'leaf {path!r} is traced: it has no values') from e
  if x.dtype.name == 'bool':
    return (x.view(np.uint8) != 0).astype(np.uint8)
  return _little_endian(x.astype(x.dtype.newbyteorder('='), copy=False))


def _little_endian(x: np.ndarray) -> np.ndarray:
  """Swaps bytes between the host's order and that of the wire."""
  return x if sys.byteorder == 'little' else x.byteswap()


def unpack(rows: np.ndarray, spec: Spec, like: jt.Message = None) -> jt.Message:
  """The inverse of `pack`.

  Args:
    rows: uint8[*lead, N], N = `payload_bytes(spec)`.
    spec: see `describe`.
    like: pytree of arrays or `ShapeDtypeStruct` without the leading axes; None
      for a dict path -> array, or a bare array if the only path is ''.

  Returns:
    NumPy arrays [*lead, ...] in the structure of `like`.

  Raises:
    ValueError: if `like` does not match the spec, naming the leaf; if a bool is
      neither 0 nor 1.
  """
  if like is not None:
    _check_equal('the message', spec, describe(like))
  lead, start, leaves = rows.shape[:-1], 0, {}
  for leaf in spec:
    path, dtype, shape = leaf
    stop = start + _leaf_bytes(leaf)
    x = np.array(rows[..., start:stop], order='C')
    if dtype == 'bool' and (x > 1).any():
      raise ValueError(f'leaf {path!r}: a bool is neither 0 nor 1')
    leaves[path] = _little_endian(x.view(dtype)).reshape((*lead, *shape))
    start = stop
  if like is not None:
    order = [leaves[path] for path, _ in keys.named_leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), order)
  return leaves[''] if list(leaves) == [''] else leaves


def _check_equal(what: str, found: Spec, wanted: Spec) -> None:
  have = {leaf[0]: leaf[1:] for leaf in found}
  want = {leaf[0]: leaf[1:] for leaf in wanted}
  text = lambda leaf: f'{leaf[0]}{leaf[1]}' if leaf else 'no such leaf'
  for path in sorted(have.keys() | want.keys()):
    if have.get(path) != want.get(path):
      raise ValueError(
        f'leaf {path!r}: {what} has {text(have.get(path))}, expected'
        f' {text(want.get(path))}'
      )


def to_bytes(message: jt.Message) -> bytes:
  """Encodes a message as one frame, see the module's docstring.

  Args:
    message: pytree of arrays of `DTYPES`; its structure is not sent, only the
      leaves' paths.

  Raises:
    TypeError: naming a leaf that is not an array of one of `DTYPES`.
    ValueError: for two leaves of one path, or sizes beyond the format.
  """
  spec = describe(message)
  body = bytearray(varint(len(spec)))
  for path, dtype, shape in spec:
    text = path.encode()
    body += varint(len(text)) + text + bytes([DTYPES.index(dtype) + 1])
    body += varint(len(shape)) + b''.join(map(varint, shape))
  body += pack(message, spec).data
  return _MAGIC + _crc(body) + body


def _crc(body) -> bytes:
  return zlib.crc32(body, zlib.crc32(_MAGIC)).to_bytes(4, 'little')


def from_bytes(
  data: bytes | bytearray | memoryview,
  like: jt.Message = None,
  *,
  max_bytes: int = MAX_BYTES,
) -> jt.Message:
  """Decodes a frame; never allocates more than a few times its length.

  Args:
    data: bytes from `to_bytes`, or from an adversary.
    like: pytree of arrays or `ShapeDtypeStruct` that the message must match.
    max_bytes: longer frames are refused.

  Returns:
    NumPy arrays in the structure of `like`; without it a dict path -> array, or
    a bare array if the only path is ''.

  Raises:
    ValueError: for anything but the one encoding of a message (of `like`).
  """
  if not isinstance(data, (bytes, bytearray, memoryview)):
    raise ValueError(f'a frame is bytes, got {type(data).__name__}')
  size = data.nbytes if isinstance(data, memoryview) else len(data)
  if size > max_bytes:
    raise ValueError(f'frame of {size} bytes, at most {max_bytes} are allowed')
  data = bytes(data)
  if data[:3] != _MAGIC:
    raise ValueError(
      f'not a frame of version 1: starts with {data[:3].hex()!r}, expected'
      f' {_MAGIC.hex()!r}'
    )
  if data[3:7] != _crc(memoryview(data)[7:]):
    raise ValueError('frame is damaged or truncated: its crc32 does not match')
  spec, start = _read_spec(data, 7)
  wanted = payload_bytes(spec)
  if len(data) - start != wanted:
    raise ValueError(
      f'frame declares {wanted} bytes of payload and has {len(data) - start}'
    )
  if like is not None:
    _check_equal('the frame', spec, describe(like))
  return unpack(np.frombuffer(data, np.uint8)[start:], spec, like)


def _read_spec(data: bytes, at: int) -> tuple[Spec, int]:
  """The spec of a frame and where it ends; raises ValueError."""
  count, at = read_varint(data, at)
  if count > min(_MAX_LEAVES, (len(data) - at) // 3):
    raise ValueError(f'frame declares {count} leaves, more than it can hold')
  spec = []
  for _ in range(count):
    size, at = read_varint(data, at)
    if size + 2 > len(data) - at:
      raise ValueError(f'frame ends in leaf {len(spec)}')
    path, code, at = data[at : at + size], data[at + size], at + size + 1
    if not 1 <= code <= len(DTYPES):
      raise ValueError(f'leaf {path!r}: unknown dtype code {code}')
    rank, at = read_varint(data, at)
    if rank > _MAX_RANK:
      raise ValueError(f'leaf {path!r}: rank {rank} is above {_MAX_RANK}')
    shape = []
    for _ in range(rank):
      n, at = read_varint(data, at)
      shape.append(n)
    spec.append([path.decode(), DTYPES[code - 1], shape])
  return check_spec(spec), at


def varint(value: int) -> bytes:
  """LEB128 of an integer in [0, 2**63)."""
  out = bytearray()
  while value > 0x7F:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  out.append(value)
  return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
  """The integer at position `at`, and the position after it.

  Raises:
    ValueError: if it is cut off, longer than 9 bytes, or not the shortest form.
  """
  value = 0
  for i in range(9):
    if at + i >= len(data):
      raise ValueError(f'data ends in an integer at byte {at}')
    byte = data[at + i]
    value |= (byte & 0x7F) << (7 * i)
    if byte < 0x80:
      if byte == 0 and i:
        raise ValueError(f'integer at byte {at} is not in its shortest form')
      return value, at + i + 1
  raise ValueError(f'integer at byte {at} is too long')
