"""Whom to trust: what a keeper finds by probes, and tells the coordinator.

The coordinator has no weights of the model and no examples, so it can't tell a
true claim from a false one. A keeper can (`jaxfl.probe`): it judges the
messages of every round that it applies, and publishes levels of trust. By
these the coordinator weighs the clients of the round that it closes next, and
the weights are in the log: a replay needs no probe. The first round waits for a
keeper; later ones do until their deadline, and go by the last verdict then.

A verdict is a varint, the rounds that were judged; float32, the largest claim
that counts; and a byte for every client, its level 0 .. `probe.LEVELS`.
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from jaxfl import log, probe, wire
from jaxfl import method as method_lib


class Verdict(NamedTuple):
  """What a keeper thinks of the clients of a run."""

  round: int  # rounds behind it
  limit: float  # root mean square of the values of a message that counts
  levels: bytes  # by client


def encode(verdict: Verdict) -> bytes:
  """As it is published."""
  limit = np.float32(verdict.limit).tobytes()
  return wire.varint(verdict.round) + limit + verdict.levels


def decode(data: bytes, num_clients: int) -> Verdict:
  """The inverse; raises ValueError for anything else."""
  round, at = wire.read_varint(data, 0)
  levels = data[at + 4 :]
  if len(data) < at + 4 or len(levels) != num_clients:
    raise ValueError(f'a verdict of {len(data)} bytes on {num_clients} clients')
  limit = float(np.frombuffer(data[at : at + 4], np.float32)[0])
  if not limit > 0 or max(levels) > probe.LEVELS:
    raise ValueError(f'a verdict with limit {limit} and level {max(levels)}')
  return Verdict(round, limit, levels)


class Judge:
  """The probes of a keeper; what they found is kept in a file.

  Attributes:
    round: rounds that were judged, or that went by without.
  """

  def __init__(
    self, trust: probe.Trust, num_clients: int, path: str | os.PathLike
  ):
    """Goes on from the file, if it is there.

    Args:
      trust: with a budget for the whole run.
      num_clients: of the run.
      path: of the file.
    """
    self._trust, self._clients = trust, num_clients
    self._path, self.round = pathlib.Path(path), 0
    if not self._path.exists():
      return
    try:
      saved = json.loads(self._path.read_text())
      trust.restore(saved['trust'])
      self.round = int(saved['round'])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      logging.warning('%s is no file of probes, and begun anew', self._path)
      logging.info('%r', error)
      trust.reset()

  def judge(self, state: Any, record: log.Record) -> None:
    """Takes note of a round, unless it did before.

    Args:
      state: before the round.
      record: of the round.
    """
    if record.round < self.round:
      return
    ids = np.asarray(record.ids)
    ones = np.ones(len(ids), np.float32)
    cohort = method_lib.Party(ids, np.int32(record.round), ones)
    self._trust(state, record.messages, cohort)
    self.round = record.round + 1

  def skip(self, round: int) -> None:
    """Leaves out the rounds before this one, which a snapshot has in it."""
    self.round = max(self.round, round)

  def verdict(self) -> bytes:
    """What it thinks now, as it is published."""
    levels = self._trust.levels(self._clients)
    return encode(Verdict(self.round, self._trust.limit, levels))

  def save(self) -> None:
    """Writes the file."""
    saved = {'round': self.round, 'trust': self._trust.saved()}
    temporary = self._path.with_suffix('.new')
    temporary.write_text(json.dumps(saved))
    os.replace(temporary, self._path)
