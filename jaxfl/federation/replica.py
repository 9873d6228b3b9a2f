"""A replica of a run: its log on disk, and the state that follows from it."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxfl import digest, log, wire
from jaxfl import method as method_lib
from jaxfl import typing as jt
from jaxfl.federation import records
from jaxfl.runtime import simulate

LOG = 'rounds.log'
SNAPSHOTS = 'snapshots'
DIGITS = 16  # of a digest


class Replica:
  """The log of a run in a directory, and the state after its rounds.

  Attributes:
    log: a `RoundLog`; it holds all rounds that were received.
    tail: its end, see `records`.
    like: the shape of a message.
    state: the public state after `round` rounds.
    round: rounds that were applied.
  """

  def __init__(
    self,
    method: method_lib.Method,
    params: Callable[[], jt.Params],
    server: Any,
    num_slots: int,
    directory: str | os.PathLike,
    block: bytes,
  ):
    """Opens the log, or starts it.

    Args:
      method: of the run.
      params: makes the base weights, anew in every call.
      server: the compiled server, which may take the state that it is given.
      num_slots: of a cohort.
      directory: of the log and of snapshots.
      block: the header of the run's log.

    Raises:
      ValueError: if the log in the directory is damaged, or of another run.
      OSError: if it can't be opened.
    """
    self._method, self._params = method, params
    self._server, self._slots = server, num_slots
    directory = pathlib.Path(directory)
    self.tail = records.Tail(block)
    self.like = method.message(jax.eval_shape(params))
    path = directory / LOG
    if path.exists():
      self.log = log.RoundLog.open(path, 'a')
      if self.log.header != self.tail.header:
        self.log.close()
        raise ValueError(f'{path} is the log of another run')
      for record in self.log:
        spec = self.log.header.message
        rows = wire.pack(record.messages, spec, lead=(len(record.ids),))
        self._take(*self.tail.write(record.ids, record.weights, rows.tobytes()))
    else:
      directory.mkdir(parents=True, exist_ok=True)
      self.log = log.RoundLog.create(path, self.tail.header)
    self._snapshots = directory / SNAPSHOTS
    self._snapshots.mkdir(exist_ok=True)
    self.restart()
    self._apply(self._nobody())  # compiles, before anybody waits
    self.restart()

  def close(self) -> None:
    """Seals the log."""
    self.log.close()

  def _take(self, record, headers):
    if self.tail.take(record, headers) is None:
      raise ValueError('the log differs from its own encoding')

  def receive(self, data: bytes, headers: dict[str, str]) -> bool:
    """Adds a record to the log, on disk, if it is the next; does not apply it.

    Raises:
      OSError: if it can't be written.
    """
    rows = self.tail.take(data, headers)
    if rows is None:
      return False
    messages = rows.messages(self.log.header.message, self.like)
    self.log.append(rows.round, rows.ids, rows.weights, messages)
    return True

  def restart(self) -> None:
    """Goes back to the base weights."""
    fresh = self._method.init(self._params())
    # arrays of its own, as the server may take them
    self.state, self.round = jax.tree.map(jnp.copy, fresh), 0

  def restore(self) -> None:
    """Goes on from the newest usable snapshot in the directory."""
    for round, expected, path in self._saved():
      if self.round < round <= self.log.num_rounds and self.adopt(
        round, path.read_bytes(), expected
      ):
        return

  def forget(self) -> None:
    """Goes back to the base weights, and removes the snapshots."""
    for *_, path in self._saved():
      path.unlink()
    self.restart()

  def save(self) -> None:
    """Saves a snapshot in the directory in place of the last one."""
    old = self._saved()
    name = snapshot_name(self.round, self.digest())
    temporary = self._snapshots / f'{name}.new'
    temporary.write_bytes(self.pack())
    os.replace(temporary, self._snapshots / name)
    for *_, path in old:
      if path.name != name:
        path.unlink()

  def _saved(self):
    """Round, digits of the digest and path of snapshots, the newest first."""
    found = [
      (*parsed, path)
      for path in self._snapshots.iterdir()
      if (parsed := parse_snapshot(path.name)) is not None
    ]
    return sorted(found, reverse=True)

  def adopt(self, round: int, frame: bytes, expected: str) -> bool:
    """Takes a state that another replica has packed, if it is the right one.

    Args:
      round: rounds that it has behind it.
      frame: from `pack`.
      expected: the first digits of its digest, which others have confirmed.

    Returns:
      Whether the state was taken.
    """
    try:
      state = wire.from_bytes(frame, self.state, max_bytes=len(frame))
    except ValueError as error:
      logging.warning('a snapshot of round %d is refused: %s', round, error)
      return False
    if not digest.digest(state).startswith(expected):
      logging.warning('a snapshot of round %d has another digest', round)
      return False
    self.state, self.round = jax.tree.map(jnp.asarray, state), round
    return True

  @property
  def max_bytes(self) -> int:
    """The longest frame that `pack` may give."""
    return 2 * wire.payload_bytes(wire.describe(self.state)) + (1 << 20)

  def pack(self) -> bytes:
    """The state as a frame, for `adopt`."""
    return wire.to_bytes(jax.device_get(self.state))

  def digest(self) -> str:
    """Of the state, 64 hex digits."""
    return digest.digest(self.state)

  def _nobody(self):
    """A round without clients."""
    none = lambda x: np.zeros((0, *x.shape), x.dtype)
    ids, weights = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return log.Record(0, ids, weights, jax.tree.map(none, self.like))

  def _apply(self, record):
    padded = simulate.pad(
      record.messages, record.ids, record.weights, record.round, self._slots
    )
    self.state = self._server(self.state, *padded)

  def step(self) -> None:
    """Applies the next round of the log.

    Raises:
      FloatingPointError: if a weight has left its range.
    """
    record = self.log.read(self.round, self.like)
    self._apply(record)
    if error := self._method.check(self.state):
      raise FloatingPointError(f'round {self.round}: {error}')
    self.round += 1


def snapshot_name(round: int, digest: str) -> str:
  """What a snapshot is called, as a file and in the object store."""
  return f'{round}-{digest[:DIGITS]}'


def parse_snapshot(name: str | None) -> tuple[int, str] | None:
  """Round and first digits of the digest of a snapshot; None for others."""
  round, _, digest = (name or '').partition('-')
  if not round.isdecimal() or len(digest) != DIGITS:
    return None
  return int(round), digest


def as_party(client: int, round: int) -> method_lib.Party:
  """A client in a round, as its program sees it."""
  return method_lib.Party(np.int32(client), np.int32(round), np.float32(1))
