"""The log as messages of a stream: its header, then a record each.

A record is sent as the bytes that it has in `rounds.log` (`jaxfl.log_format`;
seals are for files alone), with two headers: `r`, its round, and `c`, the first
16 hex digits of the chain after it. A stream may hold other things: copies of
old records, answers of the server that somebody directed there, the record of a
coordinator that was too late. Whoever reads goes on from `Tail`, which takes
nothing but the next record of its chain.
"""

import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import log, log_format, wire
from jaxfl import typing as jt

ROUND, CHAIN, POSITION = 'r', 'c', 'u'
_CHAIN_DIGITS = 16


class Rows(NamedTuple):
  """A round as it is in a record."""

  round: int
  ids: np.ndarray  # int32[C], ascending
  weights: np.ndarray  # float32[C]
  payload: bytes  # C rows of `wire.pack`

  def messages(self, spec: wire.Spec, like: jt.Message) -> jt.Message:
    """The messages, leaves [C, ...]."""
    rows = np.frombuffer(self.payload, np.uint8)
    rows = rows.reshape(len(self.ids), wire.payload_bytes(spec))
    return wire.unpack(rows, spec, like)


def read_header(data: bytes) -> log.Header:
  """The header of a log from its message.

  Raises:
    ValueError: if it is none.
  """
  header, _, size = log_format.read_header(io.BytesIO(data), len(data))
  if size != len(data):
    raise ValueError(f'a header of {size} bytes is followed by others')
  return header


def like_of(spec: wire.Spec) -> jt.Message:
  """The shape of a message from its description, by path."""
  leaves = {
    path: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    for path, dtype, shape in spec
  }
  return leaves[''] if list(leaves) == [''] else leaves


def frame_bytes(header: log.Header) -> int:
  """Length of a frame, the same for all messages of a run."""
  zeros = lambda x: np.zeros(x.shape, x.dtype)
  return len(wire.to_bytes(jax.tree.map(zeros, like_of(header.message))))


class Tail:
  """The end of a log: writes the next record, or takes it from others.

  Attributes:
    header: of the log.
  """

  def __init__(self, block: bytes):
    """Args: block: the header's message. Raises ValueError if it is none."""
    self.header = read_header(block)
    self._row_bytes = wire.payload_bytes(self.header.message)
    _, chain, _ = log_format.read_header(io.BytesIO(block), len(block))
    self._tip = log_format.Tip(0, chain, log_format.cohort_of((), ()), True)

  @property
  def round(self) -> int:
    """The next one."""
    return self._tip.round

  @property
  def chain(self) -> str:
    """The chain so far, 64 hex digits: `RoundLog.digest`."""
    return self._tip.chain.hex()

  def write(self, ids, weights, payload: bytes) -> tuple[bytes, dict[str, str]]:
    """The record of the next round and its headers; the tail stays.

    Raises:
      ValueError: if something does not fit.
    """
    cohort = log_format.cohort_of(ids, weights)
    if len(payload) != cohort.size * self._row_bytes:
      raise ValueError(f'{len(payload)} bytes are not {cohort.size} messages')
    record = log_format.encode_record(self._tip, cohort, payload)
    after = log_format.advance(self._tip, record, cohort)
    headers = {
      ROUND: str(self.round),
      CHAIN: after.chain.hex()[:_CHAIN_DIGITS],
    }
    return record, headers

  def take(self, data: bytes, headers: dict[str, str] | None) -> Rows | None:
    """Goes on by a message, if it is the next record; else None."""
    headers = headers or {}
    if headers.get(ROUND) != str(self.round) or not data:
      return None
    try:
      record, after = log_format.read_record(
        io.BytesIO(data), len(data), self._tip, self._row_bytes
      )
    except ValueError:
      return None
    whole = record is not None and len(record) == len(data)
    if not whole or after.round != self.round + 1:
      return None
    if headers.get(CHAIN) != after.chain.hex()[:_CHAIN_DIGITS]:
      return None
    self._tip = after._replace(sealed=True)
    size = after.cohort.size * self._row_bytes
    payload = data[len(data) - 1 - size : -1]
    return Rows(
      after.round - 1, after.cohort.ids, after.cohort.weights, payload
    )
