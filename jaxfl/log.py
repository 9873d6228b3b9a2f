"""The run's truth: an append-only, hash-chained file of rounds.

`RoundLog` writes a record per round, in one write, followed by fsync; opening a
log verifies every byte of it. A torn end, which a crash may leave, is dropped
with a warning; anything else that differs from what was written is refused with
its place. The bytes are specified in `jaxfl.log_format`.
"""

import array
import bisect
import contextlib
import errno
import io
import os
import secrets
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import logging

from jaxfl import log_format, wire
from jaxfl import typing as jt

try:
  import fcntl
except ImportError:  # not on Windows: there, nothing keeps a second writer out
  fcntl = None

Header = log_format.Header


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


class RoundLog:
  """A log file, opened by `create` or `open`; also a context manager.

  Attributes:
    path: the file.
    header: a `log_format.Header`.
    torn_bytes: what opening left out at the end of the file.
  """

  def __init__(self, path: str, file: io.FileIO, writable: bool):
    """Reads and verifies everything; use `create` or `open` instead."""
    self.path, self._file, self._writable = path, file, writable
    self._offsets = array.array('Q')  # of the records of rounds
    self._chains = bytearray()  # the 32 bytes of the chain before each
    self._changes = array.array('Q')  # rounds stored as COHORT
    self._cached = (
      -1,
      log_format.cohort_of((), ()),
    )  # the latest change that was read
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
  def create(
    cls, path: str | os.PathLike, header: log_format.Header
  ) -> 'RoundLog':
    """Starts a log and opens it for appending; it appears whole or not at all.

    Raises:
      FileExistsError: if there is such a file.
      TypeError: if JSON can't hold the config.
      ValueError: if the header is wrong.
    """
    path = os.fspath(path)
    block = log_format.encode_header(header)
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
    tip, cohort = self._tip, log_format.cohort_of(ids, weights)
    spec, lead = self.header.message, (cohort.size,)
    payload = wire.pack(messages, spec, lead=lead).tobytes()
    record = log_format.encode_record(tip, cohort, payload)
    new = log_format.advance(tip, record, cohort)
    block = log_format.encode_seal(tip) if tip.seal_due else b''
    offset = self._end + len(block)
    block += record
    if new.seal_due:
      block, new = (
        block + log_format.encode_seal(new),
        new._replace(sealed=True),
      )
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
      start = log_format.PREFIX + len(cohort.code) if change == round else 1
      size = start + cohort.size * self._row_bytes + 1
      record = self._pread(at, size)
      if (
        len(record) < size or record[-1] != log_format.crc8(record[:-1]) ^ first
      ):
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
        with self._writing(log_format.encode_seal(self._tip)):
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
    if tag == log_format.COHORT:
      self._changes.append(len(self._offsets))
    self._offsets.append(offset)
    self._chains += chain

  def _pread(self, at: int, size: int) -> bytes:
    self._file.seek(at)
    return self._file.read(size)

  def _read_cohort(self, round: int) -> log_format.Cohort:
    if self._cached[0] != round:
      at = self._offsets[round] if round >= 0 else 0
      length, count = (
        log_format.lengths(self._pread(at, log_format.PREFIX)) if at else (0, 0)
      )
      code = self._pread(at + log_format.PREFIX, length)
      self._cached = round, log_format.decode_cohort(code, count)
    return self._cached[1]

  def _scan(self, file) -> tuple[log_format.Header, log_format.Tip, int]:
    """Verifies the file: its header, its tip, and where the rounds end."""
    size, round, at = os.fstat(file.fileno()).st_size, -1, 0
    try:
      header, chain, at = log_format.read_header(file, size)
      row_bytes = wire.payload_bytes(header.message)
      tip = log_format.Tip(0, chain, log_format.cohort_of((), ()), True)
      while at < size:
        round = tip.round
        file.seek(at)
        record, after = log_format.read_record(file, size - at, tip, row_bytes)
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


def _messages(payload: bytes, cohort: log_format.Cohort, spec: wire.Spec, like):
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
