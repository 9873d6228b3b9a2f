"""Local files as rows. Nothing here unpickles or runs foreign code.

Local files are read by `datasets` (csv, tsv, json, jsonl, parquet, text, each
also as .gz) through a cache of their own that is gone afterwards, so a home
that cannot be written to does no harm. Cells of csv are text exactly as in the
file: 'NA' stays 'NA', '007' stays '007'.
"""

import contextlib
import csv
import glob
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxfl.data import files as files_lib
from jaxfl.data import rows as rows_lib

FORMATS = {
  '.csv': 'csv',
  '.tsv': 'csv',
  '.json': 'json',
  '.jsonl': 'json',
  '.parquet': 'parquet',
  '.txt': 'text',
  '.text': 'text',
}
# what stands for the test split, in this order, if none is named
TEST_SPLITS = ('test', 'validation', 'valid', 'val', 'dev')


class Splits(NamedTuple):
  """Rows as they were read.

  Attributes:
    train: rows to train on.
    test: rows held out, None if the source has no such split.
    names: the names of class labels, per column that has them; their values
      in the rows are these names.
  """

  train: list[rows_lib.Row]
  test: list[rows_lib.Row] | None
  names: dict[str, tuple[str, ...]]


def file_format(path: pathlib.Path) -> str | None:
  """The reader for a file name, None if there is none."""
  suffixes = [s.lower() for s in path.suffixes if s != '.gz']
  return FORMATS.get(suffixes[-1]) if suffixes else None


def local(
  path: str | os.PathLike, train: str = 'train', test: str | None = None
) -> Splits:
  """Rows of a file, or of a folder with files like train.csv and test.csv.

  A split of a folder may have several files, named train-*.parquet.

  Args:
    path: a file or a folder that exists.
    train: name of the split to train on, for a folder.
    test: name of the split to hold out; the first of `TEST_SPLITS` that is
      there if None.

  Raises:
    FileNotFoundError: if a folder has no files of a split.
    ValueError: naming the file, if it is empty, broken or of unknown format;
      or if splits are named, for a file.
  """
  path = pathlib.Path(path)
  if path.is_file():
    if train != 'train' or test:
      raise ValueError(
        f'{path} is one file: train_split={train!r} and test_split={test!r} '
        'name files of a folder, or splits on the hub'
      )
    rows, names = _read_files([path])
    return Splits(rows, None, names)
  candidates = (test,) if test else TEST_SPLITS
  files = next(
    (f for name in candidates if (f := _split_files(path, name))), []
  )
  if test and not files:
    raise FileNotFoundError(_no_split(path, test))
  train_files = _split_files(path, train)
  if not train_files:
    raise FileNotFoundError(_no_split(path, train))
  rows, names = _read_files(train_files)
  return Splits(rows, _read_files(files)[0] if files else None, names)


def _no_split(path: pathlib.Path, split: str) -> str:
  return (
    f'no {split}.csv, .tsv, .json, .jsonl, .parquet or .txt (or .gz of them) '
    f'in folder {str(path)!r}; it holds '
    f'{sorted(p.name for p in path.iterdir())[:20]}. train_split and '
    'test_split name other files'
  )


def is_split_file(path: pathlib.Path, split: str) -> bool:
  """Whether a file is (a part of) a split: train.csv, train-00000.parquet."""
  name = path.name
  named = name.split('.')[0] == split or name.startswith(f'{split}-')
  return named and path.is_file() and file_format(path) is not None


def _split_files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
  files = [p for p in sorted(folder.iterdir()) if is_split_file(p, split)]
  if len({file_format(p) for p in files}) > 1:
    raise ValueError(
      f'folder {str(folder)!r} has split {split!r} in several formats: '
      f'{[p.name for p in files]}; keep one'
    )
  return files


def _read_files(paths: Sequence[pathlib.Path]):
  tables = [_read_file(path) for path in paths]
  return [row for rows, _ in tables for row in rows], tables[0][1]


def _read_file(path: pathlib.Path):
  """(rows, names of class labels) of a file."""
  kind = file_format(path)
  if kind is None:
    raise ValueError(
      f'{path}: unknown format; names end in {", ".join(FORMATS)}, or one of '
      'them and .gz'
    )
  if not path.stat().st_size:
    raise ValueError(f'{path}: the file is empty')
  options = {}
  if kind != 'parquet':
    text = files_lib.read_text(path, 'utf-8-sig')
    if kind == 'csv':
      options = _csv_options(path, text)
    if text.strip() == '[]':
      raise ValueError(f'{path}: no rows')
  import datasets  # heavy, and not needed for tasks in --data_dir

  with tempfile.TemporaryDirectory(prefix='jaxfl-data-') as cache, _quiet():
    try:
      table = datasets.load_dataset(
        kind,
        data_files={'train': [glob.escape(str(path.resolve()))]},
        split='train',
        cache_dir=cache,
        keep_in_memory=True,
        **options,
      )
      assert isinstance(table, datasets.Dataset)
      return to_rows(table, str(path))
    except Exception as error:  # of arrow, pandas, datasets: there is no base
      raise ValueError(
        f'{path}: cannot be read as {kind}: {error.__cause__ or error}'
      ) from error


def _csv_options(path: pathlib.Path, text: str) -> dict[str, Any]:
  """Options that read all cells as text; refuses rows of another width."""
  import datasets

  separator = '\t' if '.tsv' in path.suffixes else ','
  limit = csv.field_size_limit(len(text) + 1)
  try:
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=separator)
    lines = (cells for cells in reader if cells)
    header = next(lines)
    count = 0
    if len(set(header)) < len(header) or '' in header:
      raise ValueError(
        f'{path}: the header must name all columns, each once; got {header}'
      )
    for count, cells in enumerate(lines, 1):  # noqa: B007
      if len(cells) != len(header):
        raise ValueError(
          f'{path}, line {reader.line_num}: {len(cells)} cells, but the header '
          f'has {len(header)}: {header}'
        )
  finally:
    csv.field_size_limit(limit)
  if not count:
    raise ValueError(f'{path}: a header, but no rows')
  return {
    'sep': separator,
    'keep_default_na': False,
    'encoding': 'utf-8-sig',
    'features': datasets.Features(
      {name: datasets.Value('string') for name in header}
    ),
  }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """No progress bars for small files; the former state comes back."""
  import datasets

  disabled = datasets.are_progress_bars_disabled()
  datasets.disable_progress_bars()
  try:
    yield
  finally:
    if not disabled:
      datasets.enable_progress_bars()


def to_rows(table: Any, where: str):
  """(rows, names of class labels) of a `datasets.Dataset`.

  Class labels become their names; those out of range (-1: none) stay.
  """
  names = {
    column: tuple(feature.names)
    for column, feature in table.features.items()
    if type(feature).__name__ == 'ClassLabel'
  }
  rows = table.to_list()
  if not rows:
    raise ValueError(f'{where}: no rows')
  for row in rows:
    for column, labels in names.items():
      value = row[column]
      if value is not None and 0 <= value < len(labels):
        row[column] = labels[value]
  return rows, names
