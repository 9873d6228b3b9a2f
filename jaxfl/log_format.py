"""The bytes of a log: header, records, seals, and what damage looks like.

    header, record, record, ...

Integers are little-endian. The header:

    8 bytes   magic 'JAXFLLOG'
    1 byte    version 1
    4 bytes   length of the next field
    zlib      JSON object with the fields of `Header`, keys sorted
    32 bytes  sha256 of everything before; it is chain(-1)

A message is stored as its payload (`wire.pack`), N bytes as the message spec in
the header says. The payload of a round of C clients is their C messages in the
order of ids. chain(r) = sha256(chain(r - 1) + record of round r). A record
starts with a tag; `chain` is the chain before it:

    SAME      1 byte   01: the clients and weights of the round before
              C N      payload
              1 byte   check
    COHORT    1 byte   02: new clients or weights
              3 bytes  chain[0:3], all bits inverted
              3 bytes  length of the cohort
              3 bytes  C
              2 bytes  CRC-16/IBM-3740 of the 10 bytes before
              cohort   varints (see `wire`): the first id, every further id
                       minus the one before minus 1, then the weights, C of
                       them, or one if they are equal; nothing at all if C = 0
              C N      payload
              1 byte   check
    SEAL      1 byte   03
              32 bytes chain; a seal is no part of the chain

check = CRC-8/SMBUS of the record before the check, xor chain[0]. Before the
first record the cohort is empty. A seal stands where the number of rounds is a
positive multiple of 64, and where the log was closed; never first, never after
a seal. An unchanged cohort is stored as SAME, except if bytes 1 to 3 of that
record (or 1 to its end) are those of chain or of its inverse, or if all bytes
but the tag are zero; then it is stored as COHORT.

From these rules follows, for every record, that one wrong byte is noticed in
the record itself: the CRCs see any single byte, lengths have their own CRC, and
no tag turns into another one, since only COHORT and SEAL go on with the chain.
Nor is damage mistaken for a torn end: what a crash leaves is the start of a
record, or zeros where a record should be. That much is dropped, with a warning;
any other difference is an error. Several wrong bytes pass the check of a record
with probability 1/256; the next seal finds them.
"""

import binascii
import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxfl import keys, wire

SEAL_INTERVAL = 64  # rounds

_MAGIC = b'JAXFLLOG\x01'
_MAX_HEADER = 1 << 24  # bytes of JSON
SAME, COHORT, SEAL = 1, 2, 3
PREFIX = 12  # bytes of a COHORT record before the cohort


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
  """What a replica needs besides the rounds.

  Attributes:
    base_digest: `digest.digest` of the initial parameters, 64 hex digits.
    config: dict of what JSON holds; what a log returns has lists for tuples.
    params: `wire.describe` of the parameters, [path, dtype, shape] each.
    message: `wire.describe` of one client's message.
    spec: the seed contract, `keys.SPEC`.
  """

  base_digest: str
  config: Mapping[str, Any]
  params: list
  message: wire.Spec
  spec: str = keys.SPEC


class Cohort(NamedTuple):
  ids: np.ndarray
  weights: np.ndarray
  code: bytes  # as in a COHORT record

  @property
  def size(self) -> int:
    return len(self.ids)


class Tip(NamedTuple):
  """What is known between two records."""

  round: int  # the next one
  chain: bytes
  cohort: Cohort
  sealed: bool  # the last record is a seal, or there is none

  @property
  def seal_due(self) -> bool:
    return self.round % SEAL_INTERVAL == 0 and not self.sealed


# The header.


def encode_header(header: Header) -> bytes:
  fields = {**vars(header), 'config': dict(header.config)}
  text = json.dumps(
    fields, sort_keys=True, separators=(',', ':'), allow_nan=False
  ).encode()
  _decode_fields(text)  # it must be readable
  body = zlib.compress(text, 9)
  block = _MAGIC + len(body).to_bytes(4, 'little') + body
  return block + hashlib.sha256(block).digest()


def read_header(file, size: int) -> tuple[Header, bytes, int]:
  start = file.read(len(_MAGIC) + 4)
  if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + 4:
    raise ValueError('not a log of version 1')
  length = int.from_bytes(start[-4:], 'little')
  if length > min(_MAX_HEADER, size - len(start) - 32):
    raise ValueError(f'a header of {length} bytes does not fit')
  body, chain = file.read(length), file.read(32)
  if hashlib.sha256(start + body).digest() != chain:
    raise ValueError('the hash is wrong')
  try:
    inflate = zlib.decompressobj()
    text = inflate.decompress(body, _MAX_HEADER)
  except zlib.error as e:
    raise ValueError(f'not zlib: {e}') from e
  if not inflate.eof or inflate.unused_data:
    raise ValueError('the JSON is cut off, too long or followed by something')
  return _decode_fields(text), chain, len(start) + length + 32


def _decode_fields(text: bytes) -> Header:
  try:
    fields = json.loads(text)
  except RecursionError as e:
    raise ValueError('the JSON is nested too deeply') from e
  names = {'base_digest', 'config', 'message', 'params', 'spec'}
  if not isinstance(fields, dict) or fields.keys() != names:
    raise ValueError(f'not an object with the fields {sorted(names)}')
  kinds = {'base_digest': str, 'config': dict, 'params': list, 'spec': str}
  for name, kind in kinds.items():
    if not isinstance(fields[name], kind):
      raise ValueError(f'{name} is no {kind.__name__}')
  wire.check_spec(fields['message'])
  if len(text) > _MAX_HEADER:
    raise ValueError(f'more than {_MAX_HEADER} bytes of JSON')
  return Header(**fields)


# Records.


def encode_record(tip: Tip, cohort: Cohort, payload: bytes) -> bytes:
  if cohort.code == tip.cohort.code:
    record = _with_check(bytes([SAME]) + payload, tip.chain)
    if not _imitates(record[1:4], tip.chain) and any(record[1:]):
      return record
  prefix = bytes([COHORT]) + _invert(tip.chain[:3])
  prefix += len(cohort.code).to_bytes(3, 'little')
  prefix += cohort.size.to_bytes(3, 'little')
  prefix += binascii.crc_hqx(prefix, 0xFFFF).to_bytes(2, 'little')
  return _with_check(prefix + cohort.code + payload, tip.chain)


def read_record(file, left: int, tip: Tip, row_bytes: int):
  """The record at the file's position, `left` > 0 bytes before its end.

  Returns:
    The record's bytes, and the tip after it. The bytes are None if the rest of
    the file is what a crash can leave of one record.

  Raises:
    ValueError: if it is anything else but a record.
  """
  start = file.read(min(left, 1 + 32))
  tag, chain, first, count = start[0], tip.chain, 1, tip.cohort.size
  if tag == 0 and _only_zeros(start, file):
    return None, tip
  if tip.seal_due and tag != SEAL:
    raise ValueError(f'a seal must follow {tip.round} rounds, not tag {tag}')
  if tag == SEAL:
    if tip.sealed or not chain.startswith(start[1:]):
      raise ValueError('the seal differs from the rounds before it')
    return (None if left < 33 else start), tip._replace(sealed=True)
  if tag == COHORT:
    if not _invert(chain).startswith(start[1:4]):
      raise ValueError('the record differs from the rounds before it')
    if left < PREFIX:
      return None, tip
    length, count = lengths(start)
    first = PREFIX + length
  elif tag == SAME:
    own = start[1 : min(4, 2 + count * row_bytes)]
    whole = left >= 2 + count * row_bytes
    if (whole or len(own) == 3) and _imitates(own, chain):
      raise ValueError('tag 1 on another kind of record')
  else:
    raise ValueError(f'unknown tag {tag}')
  size = first + count * row_bytes + 1
  if left < size:
    return None, tip
  record = start[:size] + file.read(max(0, size - len(start)))
  if record[-1] != crc8(record[:-1]) ^ chain[0]:
    raise ValueError('the check byte is wrong')
  cohort = tip.cohort
  if tag == COHORT:
    cohort = decode_cohort(record[PREFIX:first], count)
  if record != encode_record(tip, cohort, record[first:-1]):
    raise ValueError('the record is not in its only form')
  return record, advance(tip, record, cohort)


def encode_seal(tip: Tip) -> bytes:
  return bytes([SEAL]) + tip.chain


def advance(tip: Tip, record: bytes, cohort: Cohort) -> Tip:
  chain = hashlib.sha256(tip.chain + record).digest()
  return Tip(tip.round + 1, chain, cohort, False)


def _with_check(record: bytes, chain: bytes) -> bytes:
  return record + bytes([crc8(record) ^ chain[0]])


def _invert(data: bytes) -> bytes:
  return bytes(b ^ 0xFF for b in data)


def _imitates(data: bytes, chain: bytes) -> bool:
  return chain.startswith(data) or _invert(chain).startswith(data)


def _only_zeros(start: bytes, file) -> bool:
  while start and not any(start):
    start = file.read(1 << 16)
  return not start


def lengths(prefix: bytes) -> tuple[int, int]:
  """Length of the cohort and number of clients of a COHORT record."""
  crc = int.from_bytes(prefix[10:12], 'little')
  if binascii.crc_hqx(prefix[:10], 0xFFFF) != crc:
    raise ValueError('the lengths are wrong')
  length, count = prefix[4:7], prefix[7:10]
  return int.from_bytes(length, 'little'), int.from_bytes(count, 'little')


# Cohorts.


def cohort_of(ids, weights) -> Cohort:
  """Checks and encodes a cohort; raises ValueError."""
  ids, weights = np.asarray(ids), np.asarray(weights)
  if ids.ndim != 1 or ids.shape != weights.shape:
    raise ValueError(f'ids {ids.shape}, weights {weights.shape}: not [C] both')
  if not len(ids):
    return Cohort(np.zeros(0, np.int32), np.zeros(0, np.float32), b'')
  if ids.dtype.kind not in 'iu' or weights.dtype.kind not in 'iuf':
    raise ValueError('ids must be integers and weights whole numbers')
  whole = weights.astype(np.float64)
  if not ((whole >= 0) & (whole < 2**24) & (whole == np.floor(whole))).all():
    raise ValueError('weights must be whole numbers in [0, 2**24)')
  if not (ids[:-1] < ids[1:]).all() or ids[0] < 0 or ids[-1] >= 2**31:
    raise ValueError('ids must be in [0, 2**31) and ascending')
  ids, whole = ids.astype(np.int64), whole.astype(np.int64)
  gaps = np.diff(ids, prepend=-1) - 1
  some = whole[:1] if (whole == whole[0]).all() else whole
  code = _varints(np.concatenate([gaps, some]))
  if len(code) >= 2**24:
    raise ValueError(f'a cohort of {len(ids)} clients is too large for a log')
  return Cohort(ids.astype(np.int32), whole.astype(np.float32), code)


def decode_cohort(code: bytes, count: int) -> Cohort:
  numbers = _read_varints(code)
  if len(numbers) not in ((count + 1, 2 * count) if count else (0,)):
    raise ValueError(f'{len(numbers)} numbers can not be {count} clients')
  ids = np.cumsum(numbers[:count] + 1) - 1
  weights = np.broadcast_to(numbers[count:], count)
  cohort = cohort_of(ids, weights)
  if cohort.code != code:
    raise ValueError('the cohort is not in its only form')
  return cohort


def _varints(numbers: np.ndarray) -> bytes:
  """LEB128 of int64[n] in [0, 2**35)."""
  rest = numbers[:, None] >> np.arange(0, 42, 7)[None, :]
  rest, more = rest[:, :5], rest[:, 1:] > 0
  data = ((rest & 0x7F) | np.where(more, 0x80, 0)).astype(np.uint8)
  rest[:, 0] = 1  # zero takes one byte
  return data[rest > 0].tobytes()


def _read_varints(code: bytes) -> np.ndarray:
  """The inverse, int64[n]; raises ValueError."""
  data = np.frombuffer(code, np.uint8).astype(np.int64)
  if not len(data):
    return data
  last = data < 0x80
  first = np.flatnonzero(np.append(True, last[:-1]))
  place = np.arange(len(data)) - np.repeat(
    first, np.diff(first, append=len(data))
  )
  if not last[-1] or place.max() > 4:
    raise ValueError('the cohort holds a wrong integer')
  return np.add.reduceat((data & 0x7F) << (7 * place), first)


@functools.cache
def _crc8_table() -> list[int]:
  table = list(range(256))
  for _ in range(8):
    table = [(c << 1 ^ 0x07 if c & 0x80 else c << 1) & 0xFF for c in table]
  return table


def crc8(data: bytes) -> int:
  """CRC-8/SMBUS: polynomial x^8 + x^2 + x + 1, initial value 0."""
  if len(data) > 127:
    # the polynomial divides x^127 - 1: bytes that are 127 apart count alike
    rows = np.frombuffer(bytes(-len(data) % 127) + data, np.uint8)
    data = np.bitwise_xor.reduce(rows.reshape(-1, 127), axis=0).tobytes()
  table, crc = _crc8_table(), 0
  for byte in data:
    crc = table[crc ^ byte]
  return crc
