"""Operations that take turns, and what a run of them is reported as."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.benchmarks import machine

_LONG, _FEW = 2.0, 3  # seconds; an operation that takes longer has few repeats

Seconds = Mapping[tuple[str, str], list[float]]  # (on, name) -> of its calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
  """Something to time, and what to report it beside.

  Attributes:
    name: of the row; a rival or a floor's part is an operation, too.
    on: the tensors, the model or the task.
    run: does it once and returns when the result is there.
    work: of one call, in `unit`s.
    unit: of the rate, which is work per second.
    rivals: names of operations on the same, to be shown beside it.
    floor: the seconds of all operations -> the least that it could take, and
      what sets that.
    memory: bytes that the compiled program holds at once, and over what.
    shown: whether it has a row of its own.
  """

  name: str
  on: str
  run: Callable[[], Any]
  work: float
  unit: str
  rivals: tuple[str, ...] = ()
  floor: Callable[[Seconds], tuple[float, str]] | None = None
  memory: float | None = None
  shown: bool = True


def take_turns(
  operations: Sequence[Operation], repeats: int
) -> dict[tuple[str, str], list[float]]:
  """Seconds of every call, after one that touches the memory.

  The operations take turns, so that all see the same machine.

  Args:
    operations: what to time; their (on, name) must differ.
    repeats: of every operation, but for those that take longer than two
      seconds, which have three at most.
  """
  seconds: dict[tuple[str, str], list[float]] = {}
  first = {}
  for operation in operations:
    key = operation.on, operation.name
    if key in seconds:
      raise ValueError(f'two operations {key}')
    first[key], seconds[key] = _time(operation), []
  for repeat in range(repeats):
    for operation in operations:
      key = operation.on, operation.name
      if repeat < _FEW or first[key] < _LONG:
        seconds[key].append(_time(operation))
  return seconds


def _time(operation):
  start = time.perf_counter()
  operation.run()
  return time.perf_counter() - start


# A target: 'rate' and 'of_floor' are to be reached, 'seconds' not exceeded.
Target = tuple[str, float]


def rows(
  operations: Sequence[Operation],
  repeats: int,
  targets: Mapping[str, Mapping[str, Target]],
  predictions: Mapping[str, float],
) -> list[dict[str, Any]]:
  """Times the operations and returns a row for each that is shown.

  Args:
    operations: what to time.
    repeats: see `take_turns`.
    targets: 'cpu' or 'gpu' -> '{name} on {on}' or name -> its target.
    predictions: the same -> the rate that was expected.
  """
  taken = take_turns(operations, repeats)
  medians = {key: statistics.median(times) for key, times in taken.items()}
  mine = targets.get('cpu' if machine.on_cpu() else 'gpu', {})
  found = []
  for o in operations:
    if not o.shown:
      continue
    median = medians[o.on, o.name]
    row: dict[str, Any] = {
      'operation': o.name,
      'on': o.on,
      'unit': o.unit,
      'seconds': median,
      'best_seconds': min(taken[o.on, o.name]),
      'repeats': len(taken[o.on, o.name]),
      'rate': o.work / median,
      'best_rate': o.work / min(taken[o.on, o.name]),
      'rivals': {},
      'memory': o.memory,
    }
    for rival in operations:
      if rival.on == o.on and rival.name in o.rivals:
        theirs = rival.work / medians[rival.on, rival.name]
        row['rivals'][rival.name] = {
          'rate': theirs,
          'ours': row['rate'] / theirs,
        }
    if o.floor is not None:
      least, why = o.floor(taken)
      row |= {'floor_rate': o.work / least, 'of_floor': least / median}
      row['floor'] = why
    names = f'{o.name} on {o.on}', o.name
    expected = [predictions[name] for name in names if name in predictions]
    if expected:
      row['predicted'] = expected[0]
    wanted = [mine[name] for name in names if name in mine]
    if wanted:
      kind, value = wanted[0]
      row['target'] = {'kind': kind, 'value': value}
      if kind in row:
        met = row[kind] <= value if kind == 'seconds' else row[kind] >= value
        row['target']['met'] = met
    found.append(row)
  return found
