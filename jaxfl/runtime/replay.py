"""Rebuilds a run from its base and its log alone: no data, no clients."""

from collections.abc import Iterator
from typing import Any

from jaxfl import log as log_lib
from jaxfl import typing as jt
from jaxfl.runtime import simulate


def replay(
  server: Any,
  state: Any,
  log: log_lib.RoundLog,
  like: jt.Message,
  *,
  num_slots: int,
  first_round: int = 0,
  until_round: int | None = None,
) -> Iterator[tuple[int, Any]]:
  """Applies the log's rounds to a state, bit for bit as the live run did.

  Args:
    server: the compiled `Programs.server` of the run's method.
    state: `method.init(base)`, or a snapshot after `first_round` rounds.
    log: the run's log.
    like: shape of what the log holds, from `Method.recorded`.
    num_slots: `simulate.num_slots` of the run.
    first_round: rounds that `state` has behind it.
    until_round: rounds to have behind it in the end; default all.

  Yields:
    Rounds done, and the state after them.

  Raises:
    ValueError: if the log ends before `until_round`.
  """
  until_round = log.num_rounds if until_round is None else until_round
  if not first_round <= until_round <= log.num_rounds:
    raise ValueError(
      f'until_round must be in [{first_round}, {log.num_rounds}], the rounds'
      f' that the log holds, got {until_round}'
    )
  for round in range(first_round, until_round):
    record = log.read(round, like)
    state = server(
      state,
      *simulate.pad(
        record.messages, record.ids, record.weights, round, num_slots
      ),
    )
    yield round + 1, state
