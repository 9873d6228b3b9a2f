"""One result schema for all methods: lines of JSON, one value each."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence

LOWER_IS_BETTER = ('loss', 'perplexity', 'bits_per_byte')  # others: higher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One value of one metric after `round` rounds; totals since the start."""

  method: str
  task: str
  seed: int
  round: int
  metric: str
  value: float
  bytes_up: int
  bytes_down: int
  forwards: int
  backwards: int
  wall_s: float
  digest: str  # of the params


def append(path: str | os.PathLike, rows: Iterable[Row]) -> None:
  """Appends rows to a file of JSON lines."""
  text = ''.join(json.dumps(dataclasses.asdict(row)) + '\n' for row in rows)
  with open(path, 'a', encoding='utf-8') as f:
    f.write(text)


def read(path: str | os.PathLike) -> list[Row]:
  """Reads a file of rows; a torn last line is left out.

  Raises:
    ValueError: naming file and line if a line is not a row.
  """
  lines = pathlib.Path(path).read_text(encoding='utf-8').split('\n')
  rows = []
  for number, line in enumerate(lines[:-1], 1):
    try:
      rows.append(Row(**json.loads(line)))
    except (TypeError, ValueError) as error:
      raise ValueError(f'{path}, line {number}: not a row: {error}') from error
  return rows


def keep_until(path: str | os.PathLike, round: int) -> None:
  """Drops rows after a round, for a run that goes on from there."""
  rows = [row for row in read(path) if row.round <= round]
  temporary = pathlib.Path(f'{path}.new')
  temporary.unlink(missing_ok=True)
  append(temporary, rows)
  os.replace(temporary, path)


def best(rows: Sequence[Row], metric: str) -> Row:
  """The row with the best value of a metric, the earliest of equals.

  Args:
    rows: of one run.
    metric: the name; values that are not finite are never the best of several.

  Raises:
    ValueError: if there is no such row.
  """
  chosen = [row for row in rows if row.metric == metric]
  if not chosen:
    raise ValueError(f'no row has the metric {metric!r}')
  sign = 1 if metric in LOWER_IS_BETTER else -1
  bad = lambda row: not math.isfinite(row.value)
  return min(chosen, key=lambda row: math.inf if bad(row) else sign * row.value)
