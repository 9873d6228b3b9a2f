"""Tables of numbers: a number or a class to predict from numbers.

Where a file has no test rows, a fifth is held out. Which rows those are follows
from how many there are and from nothing else, so a row that changes its values
moves no other row.

What features and targets are divided by is public or it isn't:

  * `auto`: ranges that `known_tables` has written down, of the data sets that
    it knows; values beyond are clipped, row by row. Files are left alone.
  * `none`: as in the file.
  * `minmax`: features to [-1, 1] and a target to [0, 1], by the smallest and
    the largest values among the rows to train on.
  * `standard`: features to mean 0 and variance 1, a target divided by its
    largest magnitude, both of the rows to train on.

**`minmax` and `standard` are functions of private rows that get no noise: no
guarantee of a private method covers them.** Papers on private methods use
them; to compare with their figures is what they are for.
"""

import csv
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfl.data import arrays, batching, files, labels

SCALINGS = ('auto', 'none', 'minmax', 'standard')
HELD_OUT = 5  # one row in five


class Table(NamedTuple):
  """Rows to train on and rows that are held out.

  Attributes:
    x_train: float[N, D], features.
    y_train: float[N], targets, or int32[N], classes.
    x_test: float[M, D].
    y_test: float[M] or int32[M].
    label_names: what the classes are called; () if the target is a number.
    groups: values of the rows to train on by column, for partitions; not
      features.
  """

  x_train: np.ndarray
  y_train: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  label_names: tuple[str, ...]
  groups: dict[str, list[Any]]


def split(
  x: np.ndarray,
  y: np.ndarray,
  *,
  label_names: Sequence[str] = (),
  groups: Mapping[str, Sequence[Any]] | None = None,
) -> Table:
  """Holds out a fifth of the rows, at random but always the same ones.

  Args:
    x: float[N, D], N > 1.
    y: float[N] or int32[N].
    label_names: of classes.
    groups: values of all rows by column.

  Raises:
    ValueError: if there is one row only.
  """
  if len(x) < 2:
    raise ValueError(f'{len(x)} rows; two at least are needed to hold one out')
  # words of the key that no client's batches use
  order = batching.generator(0, 2**32 - 2, 0).permutation(len(x))
  size = max(round(len(x) / HELD_OUT), 1)
  test, train = np.sort(order[:size]), np.sort(order[size:])
  own = {
    name: [values[i] for i in train] for name, values in (groups or {}).items()
  }
  return Table(x[train], y[train], x[test], y[test], tuple(label_names), own)


def load_csv(
  path: str | os.PathLike,
  target: str,
  *,
  label_names: Sequence[str] = (),
  group: str | None = None,
) -> Table:
  """Reads a csv or tsv file with a header, gunzipped if its name ends in .gz.

  All columns but `target` and `group` are features.

  Args:
    path: of the file.
    target: the column to predict.
    label_names: of its classes; numbers if there are none.
    group: a column for partitions, of any text.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the column that is not there, or column and line of a
      cell that is no number or no label.
  """
  cells = read_csv(path)
  answers = column(cells, target)
  groups = {group: column(cells, group)} if group else {}
  header = list(cells.columns)
  names = [name for name in header if name not in (target, group)]
  if not names:
    raise ValueError(
      f'{cells.path} has no columns for features; it has {header}'
    )
  advice = 'leave the column out, or divide by it with --partition_column'
  x = np.stack([numbers(cells, name, advice) for name in names], axis=1)
  if not label_names:
    y = numbers(cells, target, 'name classes with --label_names')
    if np.ptp(y) == 0:
      raise ValueError(f'{cells.path}: column {target!r} is {y[0]} in all rows')
    return split(x, y, groups=groups)
  if len(set(label_names)) < max(len(label_names), 2) or '' in label_names:
    raise ValueError(
      'label_names must be two or more different names, got'
      f' {tuple(label_names)}'
    )
  rows = labels.encode(
    [{'label': cell} for cell in answers],
    label_names,
    f'{cells.path}, column {target!r}',
  )
  y = np.array([row['label'] for row in rows], np.int32)
  return split(
    x, y, label_names=label_names, groups=groups | {'label': y.tolist()}
  )


class Cells(NamedTuple):
  """The text of a csv file, by column.

  Attributes:
    path: of the file.
    columns: cells by the name of their column, in the order of the file.
    lines: of the file, on which rows end.
  """

  path: pathlib.Path
  columns: dict[str, tuple[str, ...]]
  lines: tuple[int, ...]


def read_csv(path: str | os.PathLike) -> Cells:
  """Reads a csv file with a header, or tsv, gunzipped if it ends in .gz.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming file and line, if it is empty or no such file.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f'no table at {str(path)!r}')
  text = files.read_text(path, 'utf-8-sig')
  separator = '\t' if '.tsv' in path.suffixes else ','
  reader = csv.reader(io.StringIO(text, newline=''), delimiter=separator)
  try:
    found = [(cells, reader.line_num) for cells in reader if cells]
  except csv.Error as error:
    raise ValueError(f'{path}, line {reader.line_num}: {error}') from error
  header = [name.strip() for name in found[0][0]]
  if len(set(header)) < len(header) or '' in header:
    raise ValueError(
      f'{path}: the header must name all columns, each once; got {header}'
    )
  if len(found) < 2:
    raise ValueError(f'{path}: a header, but no rows')
  for cells, line in found[1:]:
    if len(cells) != len(header):
      raise ValueError(
        f'{path}, line {line}: {len(cells)} cells, but the header has'
        f' {len(header)}'
      )
  rows, lines = zip(*found[1:], strict=True)
  columns = dict(zip(header, zip(*rows, strict=True), strict=True))
  return Cells(path, columns, lines)


def column(cells: Cells, name: str) -> tuple[str, ...]:
  """The text of a column; a ValueError names those that are there."""
  if name not in cells.columns:
    raise ValueError(
      f'{cells.path} has no column {name!r}; it has {list(cells.columns)}'
    )
  return cells.columns[name]


def numbers(cells: Cells, name: str, advice: str = '') -> np.ndarray:
  """The float64[N] of a column.

  Raises:
    ValueError: naming column, line and `advice`, for what is no finite number
      of float32's range.
  """
  values = np.empty(len(cells.lines))
  for i, cell in enumerate(column(cells, name)):
    try:
      values[i] = float(cell)
    except ValueError:
      values[i] = np.nan
    if not abs(values[i]) <= np.finfo(np.float32).max:
      raise ValueError(
        f'{cells.path}, line {cells.lines[i]}, column {name!r}: {cell!r} is no'
        f' finite number{advice and "; "}{advice}'
      )
  return values


def scale(table: Table, scaling: str) -> Table:
  """The table in float32, scaled by its own rows; see the module.

  Args:
    table: with rows to train on.
    scaling: `none`, `minmax` or `standard`.

  Raises:
    ValueError: for another scaling.
  """
  x, y = table.x_train, table.y_train
  number = not table.label_names
  if scaling == 'none':
    middle, width, least, span = 0, 1, 0, 1
  elif scaling == 'minmax':
    low, high = x.min(0), x.max(0)
    middle, width = (low + high) / 2, (high - low) / 2
    least, span = y.min(), np.ptp(y)
  elif scaling == 'standard':
    middle, width = x.mean(0), x.std(0)
    least, span = 0.0, np.abs(y).max()
  else:
    raise ValueError(
      f'feature_scaling must be none, minmax or standard, got {scaling!r}'
    )
  width = np.where(width > 0, width, 1.0)  # of columns that are constant
  span = span or 1.0

  def features(x):
    return ((x - middle) / width).astype(np.float32)

  def targets(y):
    return ((y - least) / span).astype(np.float32) if number else y

  return table._replace(
    x_train=features(x),
    x_test=features(table.x_test),
    y_train=targets(y),
    y_test=targets(table.y_test),
  )


def task(
  table: Table,
  partition: Sequence[np.ndarray],
  *,
  name: str,
  eval_batch_size: int = 512,
) -> batching.Task:
  """A task whose batches are `features` and `target` or `label`.

  Args:
    table: float32, scaled.
    partition: indices int[n] of the train examples of every client.
    name: of the task.
    eval_batch_size: as in `arrays.task`; all test rows are evaluated.

  Raises:
    ValueError: if a client has no example.
  """
  y = 'label' if table.label_names else 'target'
  return arrays.task(
    {'features': table.x_train, y: table.y_train},
    {'features': table.x_test, y: table.y_test},
    partition,
    name=name,
    eval_batch_size=eval_batch_size,
  )
