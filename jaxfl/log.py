"""The run's truth: an append-only, hash-chained file of rounds.

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

import array
import binascii
import bisect
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from jaxfl import keys, wire
from jaxfl import typing as jt

try:
  import fcntl
except ImportError:  # not on Windows: there, nothing keeps a second writer out
  fcntl = None

SEAL_INTERVAL = 64  # rounds

_MAGIC = b'JAXFLLOG\x01'
_MAX_HEADER = 1 << 24  # bytes of JSON
_SAME, _COHORT, _SEAL = 1, 2, 3
_PREFIX = 12  # bytes of a COHORT record before the cohort


class LogCorruptError(ValueError):
  """A log that differs from what was written; says where.

  Attributes:
    path: the file.
    offset: byte at which the wrong record starts.
    round: the wrong one, or the one after a wrong seal; -1 for the header.
  """

  def __init__(self, path: str, offset: int, round: int, reason: str):
    place = f'round {round}' if round >= 0 else 'header'
    super().__init__(f'{path}: {reason} ({place}, byte {offset})')
    self.path, self.offset, self.round = path, offset, round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
  """What a replica needs besides the rounds.

  Attributes:
    base_digest: `digest.digest` of the initial parameters, 64 hex digits.
    config: dict of what JSON holds; what a log returns has lists for tuples.
    params: `digest.describe` of the parameters, [path, dtype, shape] each.
    message: `wire.describe` of one client's message.
    spec: the seed contract, `keys.SPEC`.
  """

  base_digest: str
  config: Mapping[str, Any]
  params: list
  message: wire.Spec
  spec: str = keys.SPEC


class Record(NamedTuple):
  """One round; NumPy arrays."""

  round: int
  ids: np.ndarray  # int32[C], ascending
  weights: np.ndarray  # float32[C], whole numbers < 2**24
  messages: jt.Message  # leaves [C, ...]


class Summary(NamedTuple):
  """The result of `verify`."""

  num_rounds: int
  digest: str  # the chain after the last round, hex
  torn_bytes: int  # at the end of the file, no part of any round


class _Cohort(NamedTuple):
  ids: np.ndarray
  weights: np.ndarray
  code: bytes  # as in a COHORT record

  @property
  def size(self) -> int:
    return len(self.ids)


class _Tip(NamedTuple):
  """What is known between two records."""

  round: int  # the next one
  chain: bytes
  cohort: _Cohort
  sealed: bool  # the last record is a seal, or there is none

  @property
  def seal_due(self) -> bool:
    return self.round % SEAL_INTERVAL == 0 and not self.sealed


class RoundLog:
  """A log file, opened by `create` or `open`; also a context manager.

  Attributes:
    path: the file.
    header: a `Header`.
    torn_bytes: what opening left out at the end of the file.
  """

  def __init__(self, path: str, file: io.FileIO, writable: bool):
    """Reads and verifies everything; use `create` or `open` instead."""
    self.path, self._file, self._writable = path, file, writable
    self._offsets = array.array('Q')  # of the records of rounds
    self._chains = bytearray()  # the 32 bytes of the chain before each
    self._changes = array.array('Q')  # rounds stored as COHORT
    self._cached = (-1, _cohort((), ()))  # the latest change that was read
    file.seek(0)
    buffered = io.BufferedReader(file)
    try:
      self.header, self._tip, self._end = self._scan(buffered)
    finally:
      buffered.detach()
    self._row_bytes = wire.payload_bytes(self.header.message)
    self.torn_bytes = os.fstat(file.fileno()).st_size - self._end
    if self.torn_bytes:
      logging.warning(
        '%s: the record of round %d is torn, %d bytes dropped at byte %d',
        *(path, self.num_rounds, self.torn_bytes, self._end),
      )

  @classmethod
  def create(cls, path: str | os.PathLike, header: Header) -> 'RoundLog':
    """Starts a log and opens it for appending; it appears whole or not at all.

    Raises:
      FileExistsError: if there is such a file.
      TypeError: if JSON can't hold the config.
      ValueError: if the header is wrong.
    """
    path = os.fspath(path)
    block = _encode_header(header)
    temp = f'{path}.{secrets.token_hex(4)}.tmp'
    file = open(temp, 'x+b', buffering=0)  # noqa: SIM115
    try:
      _lock(file, path)
      _write(file, block)
      _link(temp, path)
      _sync_directory(path)
      return cls(path, file, True)
    except BaseException:
      file.close()
      raise
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(temp)

  @classmethod
  def open(cls, path: str | os.PathLike, mode: str = 'r') -> 'RoundLog':
    """Opens a log and verifies all of it.

    Args:
      path: the file.
      mode: `r` to read, `a` to append as well; a torn end is then cut off.

    Raises:
      BlockingIOError: if another writer has the log open (mode `a`).
      LogCorruptError: if the file is not as it was written.
    """
    if mode not in ('r', 'a'):
      raise ValueError(f"mode must be 'r' or 'a', got {mode!r}")
    path = os.fspath(path)
    file = open(path, 'rb' if mode == 'r' else 'r+b', buffering=0)  # noqa: SIM115
    try:
      if mode == 'a':
        _lock(file, path)
      log = cls(path, file, mode == 'a')
      if log._writable and log.torn_bytes:
        file.truncate(log._end)
        os.fsync(file.fileno())
      return log
    except BaseException:
      file.close()
      raise

  @property
  def num_rounds(self) -> int:
    return self._tip.round

  @property
  def digest(self) -> str:
    """The chain after the last round, 64 hex digits: header and rounds."""
    return self._tip.chain.hex()

  def digest_at(self, round: int) -> str:
    """The chain after so many rounds, 64 hex digits.

    Raises:
      IndexError: if the log has fewer rounds.
    """
    if not 0 <= round <= self.num_rounds:
      raise IndexError(f'{self.path} has {self.num_rounds} rounds: {round}')
    if round == self.num_rounds:
      return self.digest
    return self._chains[32 * round : 32 * (round + 1)].hex()

  def append(self, round: int, ids, weights, messages: jt.Message) -> None:
    """Adds a round; when this returns, the round is on the disk.

    Args:
      round: the next one; the first is 0.
      ids: integers [C] in [0, 2**31), ascending; C may be 0.
      weights: whole numbers [C] in [0, 2**24).
      messages: pytree of arrays [C, ...] as in the header's message spec.

    Raises:
      ValueError: if something does not fit; nothing is written.
      OSError: if writing fails; the log must then be opened again.
    """
    if not self._writable:
      raise ValueError(f'{self.path} is not open for appending')
    if round != self.num_rounds:
      raise ValueError(f'{self.path}: next is round {self.num_rounds}: {round}')
    tip, cohort = self._tip, _cohort(ids, weights)
    spec, lead = self.header.message, (cohort.size,)
    payload = wire.pack(messages, spec, lead=lead).tobytes()
    record = _encode_record(tip, cohort, payload)
    new = _advance(tip, record, cohort)
    block = _encode_seal(tip) if tip.seal_due else b''
    offset = self._end + len(block)
    block += record
    if new.seal_due:
      block, new = block + _encode_seal(new), new._replace(sealed=True)
    with self._writing(block):
      self._note(offset, tip.chain, record[0])
      self._tip = new

  def read(self, round: int, like: jt.Message = None) -> Record:
    """One round.

    Args:
      round: in [0, num_rounds).
      like: pytree of arrays or `ShapeDtypeStruct`, one client's message; see
        `wire.unpack`.

    Raises:
      IndexError: if there is no such round.
      LogCorruptError: if the file has changed since it was opened.
      ValueError: if `like` does not match the header's message spec.
    """
    if not 0 <= round < self.num_rounds:
      raise IndexError(f'{self.path} has {self.num_rounds} rounds: {round}')
    if self._file.closed:
      raise ValueError(f'{self.path} is closed')
    at, first = self._offsets[round], self._chains[32 * round]
    try:
      change = bisect.bisect(self._changes, round) - 1
      change = self._changes[change] if change >= 0 else -1
      cohort = self._read_cohort(change)
      start = _PREFIX + len(cohort.code) if change == round else 1
      size = start + cohort.size * self._row_bytes + 1
      record = self._pread(at, size)
      if len(record) < size or record[-1] != crc8(record[:-1]) ^ first:
        raise ValueError('the check byte is wrong')
    except ValueError as e:
      reason = f'{e}; it was right when the log was opened'
      raise LogCorruptError(self.path, at, round, reason) from e
    messages = _messages(record[start:-1], cohort, self.header.message, like)
    return Record(round, cohort.ids.copy(), cohort.weights.copy(), messages)

  def __iter__(self) -> Iterator[Record]:
    for round in range(self.num_rounds):
      yield self.read(round)

  def close(self) -> None:
    """Seals the log, if it is open for appending, and closes the file."""
    if self._file.closed:
      return
    try:
      if self._writable and not self._tip.sealed:
        with self._writing(_encode_seal(self._tip)):
          pass
    finally:
      self._writable = False
      self._file.close()

  def __enter__(self) -> 'RoundLog':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  @contextlib.contextmanager
  def _writing(self, block: bytes):
    """Writes `block`; the body tells the memory what the file then holds."""
    self._writable = False  # unless everything below happens
    try:
      self._file.seek(self._end)
      _write(self._file, block)
    except BaseException:
      with contextlib.suppress(OSError):
        self._file.truncate(self._end)
      raise
    yield
    self._end += len(block)
    self._writable = True

  def _note(self, offset: int, chain: bytes, tag: int) -> None:
    if tag == _COHORT:
      self._changes.append(len(self._offsets))
    self._offsets.append(offset)
    self._chains += chain

  def _pread(self, at: int, size: int) -> bytes:
    self._file.seek(at)
    return self._file.read(size)

  def _read_cohort(self, round: int) -> _Cohort:
    if self._cached[0] != round:
      at = self._offsets[round] if round >= 0 else 0
      length, count = _lengths(self._pread(at, _PREFIX)) if at else (0, 0)
      code = self._pread(at + _PREFIX, length)
      self._cached = round, _decode_cohort(code, count)
    return self._cached[1]

  def _scan(self, file) -> tuple[Header, _Tip, int]:
    """Verifies the file: its header, its tip, and where the rounds end."""
    size, round, at = os.fstat(file.fileno()).st_size, -1, 0
    try:
      header, chain, at = _read_header(file, size)
      row_bytes = wire.payload_bytes(header.message)
      tip = _Tip(0, chain, _cohort((), ()), True)
      while at < size:
        round = tip.round
        file.seek(at)
        record, after = _read_record(file, size - at, tip, row_bytes)
        if record is None:
          break
        if after.round > round:
          size_of_payload = after.cohort.size * row_bytes
          payload = record[len(record) - 1 - size_of_payload : -1]
          _messages(payload, after.cohort, header.message, None)
          self._note(at, tip.chain, record[0])
        at, tip = at + len(record), after
    except ValueError as e:
      raise LogCorruptError(self.path, at, round, str(e)) from e
    return header, tip, at


def verify(path: str | os.PathLike) -> Summary:
  """Reads and verifies a whole log.

  Raises:
    LogCorruptError: saying where the log is not as it was written.
  """
  with RoundLog.open(path) as log:
    return Summary(log.num_rounds, log.digest, log.torn_bytes)


def _messages(payload: bytes, cohort: _Cohort, spec: wire.Spec, like):
  rows = np.frombuffer(payload, np.uint8)
  rows = rows.reshape(cohort.size, wire.payload_bytes(spec))
  return wire.unpack(rows, spec, like)


# Files.


def _lock(file: io.FileIO, path: str) -> None:
  if fcntl is None:
    return
  try:
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    reason = 'another writer has this log open'
    raise BlockingIOError(errno.EWOULDBLOCK, reason, path) from e


def _write(file: io.FileIO, block: bytes) -> None:
  rest = memoryview(block)
  while rest:
    rest = rest[file.write(rest) :]
  os.fsync(file.fileno())


def _link(temp: str, path: str) -> None:
  """Gives `temp` its final name; unlike a rename, a link replaces no file."""
  try:
    os.link(temp, path)
  except FileExistsError:
    raise
  except OSError:  # a file system without links
    if os.path.exists(path):
      raise FileExistsError(errno.EEXIST, 'the log exists', path) from None
    os.rename(temp, path)


def _sync_directory(path: str) -> None:
  if os.name == 'posix':
    directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
      os.fsync(directory)
    finally:
      os.close(directory)


# The header.


def _encode_header(header: Header) -> bytes:
  fields = {**vars(header), 'config': dict(header.config)}
  text = json.dumps(
    fields, sort_keys=True, separators=(',', ':'), allow_nan=False
  ).encode()
  _decode_fields(text)  # it must be readable
  body = zlib.compress(text, 9)
  block = _MAGIC + len(body).to_bytes(4, 'little') + body
  return block + hashlib.sha256(block).digest()


def _read_header(file, size: int) -> tuple[Header, bytes, int]:
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


def _encode_record(tip: _Tip, cohort: _Cohort, payload: bytes) -> bytes:
  if cohort.code == tip.cohort.code:
    record = _with_check(bytes([_SAME]) + payload, tip.chain)
    if not _imitates(record[1:4], tip.chain) and any(record[1:]):
      return record
  prefix = bytes([_COHORT]) + _invert(tip.chain[:3])
  prefix += len(cohort.code).to_bytes(3, 'little')
  prefix += cohort.size.to_bytes(3, 'little')
  prefix += binascii.crc_hqx(prefix, 0xFFFF).to_bytes(2, 'little')
  return _with_check(prefix + cohort.code + payload, tip.chain)


def _read_record(file, left: int, tip: _Tip, row_bytes: int):
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
  if tip.seal_due and tag != _SEAL:
    raise ValueError(f'a seal must follow {tip.round} rounds, not tag {tag}')
  if tag == _SEAL:
    if tip.sealed or not chain.startswith(start[1:]):
      raise ValueError('the seal differs from the rounds before it')
    return (None if left < 33 else start), tip._replace(sealed=True)
  if tag == _COHORT:
    if not _invert(chain).startswith(start[1:4]):
      raise ValueError('the record differs from the rounds before it')
    if left < _PREFIX:
      return None, tip
    length, count = _lengths(start)
    first = _PREFIX + length
  elif tag == _SAME:
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
  if tag == _COHORT:
    cohort = _decode_cohort(record[_PREFIX:first], count)
  if record != _encode_record(tip, cohort, record[first:-1]):
    raise ValueError('the record is not in its only form')
  return record, _advance(tip, record, cohort)


def _encode_seal(tip: _Tip) -> bytes:
  return bytes([_SEAL]) + tip.chain


def _advance(tip: _Tip, record: bytes, cohort: _Cohort) -> _Tip:
  chain = hashlib.sha256(tip.chain + record).digest()
  return _Tip(tip.round + 1, chain, cohort, False)


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


def _lengths(prefix: bytes) -> tuple[int, int]:
  """Length of the cohort and number of clients of a COHORT record."""
  crc = int.from_bytes(prefix[10:12], 'little')
  if binascii.crc_hqx(prefix[:10], 0xFFFF) != crc:
    raise ValueError('the lengths are wrong')
  length, count = prefix[4:7], prefix[7:10]
  return int.from_bytes(length, 'little'), int.from_bytes(count, 'little')


# Cohorts.


def _cohort(ids, weights) -> _Cohort:
  """Checks and encodes a cohort; raises ValueError."""
  ids, weights = np.asarray(ids), np.asarray(weights)
  if ids.ndim != 1 or ids.shape != weights.shape:
    raise ValueError(f'ids {ids.shape}, weights {weights.shape}: not [C] both')
  if not len(ids):
    return _Cohort(np.zeros(0, np.int32), np.zeros(0, np.float32), b'')
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
  return _Cohort(ids.astype(np.int32), whole.astype(np.float32), code)


def _decode_cohort(code: bytes, count: int) -> _Cohort:
  numbers = _read_varints(code)
  if len(numbers) not in ((count + 1, 2 * count) if count else (0,)):
    raise ValueError(f'{len(numbers)} numbers can not be {count} clients')
  ids = np.cumsum(numbers[:count] + 1) - 1
  weights = np.broadcast_to(numbers[count:], count)
  cohort = _cohort(ids, weights)
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
