"""Data sets by name: the tasks of `tasks`, local files, the hub.

What is wrong with the data is said here, before anything is trained.
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from absl import logging

from jaxfl.data import hub, labels, sources, tasks
from jaxfl.data import rows as rows_lib

TASKS = tasks.TASKS


def load(
  name: str,
  *,
  data_dir: str | os.PathLike | None = None,
  columns: Mapping[str, str] | None = None,
  label_names: Sequence[str] | None = None,
  train_split: str = 'train',
  test_split: str | None = None,
) -> rows_lib.Dataset:
  """The data set of that name.

  Args:
    name: a task of `TASKS`; else a path, if there is such a file or folder
      (see `sources.local`); else owner/name or owner/name:config on the hub.
    data_dir: folder in which files of tasks are looked for, in the form that
      `layouts` describes or as TASK/train.csv (or .json, .jsonl, .parquet)
      with columns of the fields' names. Where it has none, the hub is asked.
    columns: from our field to the data's column, as `rows.parse_columns` reads
      them from a flag. Not for tasks.
    label_names: what the labels are called, in the order of their indices; if
      not given, the data's own class labels, or the different labels sorted.
      Not for tasks.
    train_split: name of the split to train on, for folders and the hub.
    test_split: name of the split to hold out; the task's, or the first of
      `sources.TEST_SPLITS`, if None. Where there is none, `rows.hold_out`
      takes a tenth of the rows to train on, chosen by their content.

  Returns:
    A `rows.Dataset`. Rows with `label` are for classification, those with
    `response` for generation, those with just `text` for language modelling
    (where blank texts are left out).

  Raises:
    FileNotFoundError: if there is no such file, or the hub does not answer;
      the text says what to put where.
    ValueError: for data that are empty, broken, lack a field, or have a label
      that is none of the labels; the text names file or split, row and field.
  """
  if label_names and (
    len(label_names) < 2
    or len(set(label_names)) < len(label_names)
    or '' in label_names
  ):
    raise ValueError(
      f'label_names must be two or more different names, got {label_names}'
    )
  if name in TASKS:
    if columns or label_names:
      raise ValueError(
        f'task {name!r} has its own columns and labels; --columns and '
        '--label_names are for local paths and hub ids'
      )
    return _load_task(name, TASKS[name], data_dir, train_split, test_split)
  path = pathlib.Path(name).expanduser()
  if path.exists():
    splits = sources.local(path, train_split, test_split)
  elif re.fullmatch(r'[\w.-]*\w/\w[\w.-]*(:[\w.-]+)?', name) and not (
    sources.file_format(path)
  ):
    splits = _ask_hub(
      functools.partial(hub.read, name, train_split, test_split),
      f'{name!r} is neither a task nor a local path, and the hub does not '
      'have it or cannot be reached. Pass the path of a file or folder, or go '
      f'online. Tasks: {", ".join(TASKS)}',
    )
  else:
    raise FileNotFoundError(
      f'{name!r}: no such file or folder; nor is it a task '
      f'({", ".join(TASKS)}) or of the form of a hub id (owner/name)'
    )
  return _finish(name, splits, columns or {}, label_names)


def _ask_hub(read: Callable[[], sources.Splits], advice: str):
  try:
    return read()
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{advice}. ({error})') from error


def _load_task(name, task, data_dir, train_split, test_split):
  """A task from `data_dir` or the hub, labels and fields as in `TASKS`."""
  splits = _from_data_dir(name, task, data_dir, train_split, test_split)
  columns = {}
  if splits is None:
    wanted = ' or '.join(
      filter(None, (task.layout, f'{name}/{{train,test}}.jsonl'))
    )
    splits = _ask_hub(
      functools.partial(
        hub.read, task.hub, train_split, test_split or task.test_split
      ),
      f'data set {name!r}: no files '
      + (f'below --data_dir={os.fspath(data_dir)}' if data_dir else 'given')
      + f', and {task.hub!r} cannot be had from the hub. Put {wanted} (or .gz '
      'of them) below --data_dir, or pass the path of your own file, or go '
      'online',
    )
    columns = task.columns
  fields = task.fields + (() if task.label_names else ('input', *task.extra))

  def fit(rows, split):
    where = f'data set {name!r}, split {split!r}'
    rows = rows_lib.rename(rows, columns, where)
    rows = [{f: row[f] for f in fields if f in row} for row in rows]
    if not task.label_names:
      return rows_lib.make_generation(rows, where)
    rows_lib.check_fields(rows, task.fields, where)
    if name in ('mnli', 'snli'):  # -1: the annotators did not agree
      rows = [row for row in rows if row['label'] not in (-1, '-1', '-')]
    return labels.encode(rows, task.label_names, where, aliases=task.aliases)

  return _assemble(
    name,
    fit(splits.train, 'train'),
    splits.test and fit(splits.test, 'test'),
    task.label_names,
  )


def _from_data_dir(name, task, data_dir, train_split, test_split):
  if data_dir is None:
    return None
  folder = pathlib.Path(data_dir).expanduser()
  if not folder.is_dir():
    raise FileNotFoundError(f'--data_dir: no folder at {os.fspath(data_dir)!r}')
  found = task.read(folder)
  if found:
    if train_split != 'train' or test_split:
      raise ValueError(
        f'task {name!r} from files below --data_dir has fixed splits; '
        '--train_split and --test_split are for folders and the hub'
      )
    logging.info('data set %r: files below %s', name, folder)
    return sources.Splits(found[0], found[1], {})
  if (folder / name).is_dir():
    return sources.local(folder / name, train_split, test_split)
  return None


def _finish(name, splits, columns, label_names) -> rows_lib.Dataset:
  """Fields and labels of data that are not of a known task."""
  parts = {'train': splits.train}
  parts |= {'test': splits.test} if splits.test else {}
  parts = {
    split: rows_lib.rename(rows, columns, f'{name!r}, split {split!r}')
    for split, rows in parts.items()
  }
  found = parts['train'][0].keys()
  generation = {'instruction', 'response'} <= found
  names = ()
  if 'label' in found and not generation:
    own = splits.names.get(columns.get('label', 'label'))
    names = label_names or own or labels.names_of(parts['train'], repr(name))
  elif label_names:
    raise ValueError(
      f'label_names are given, but {name!r} has no labels; it has the columns '
      f'{sorted(found)}'
    )
  elif not generation and 'text' not in found:
    raise ValueError(
      f'{name!r} has the columns {sorted(found)}: expected label (to '
      'classify), instruction and response (to generate) or text; say which '
      'column is which with --columns=FIELD=COLUMN,..., or, for a table of '
      'numbers, what to predict with --target=COLUMN'
    )
  for split, rows in parts.items():
    where = f'{name!r}, split {split!r}'
    if generation:
      parts[split] = rows_lib.make_generation(rows, where)
      continue
    rows_lib.check_fields(rows, ('label' if names else 'text',), where)
    parts[split] = (
      labels.encode(rows, names, where) if names else _not_blank(rows, where)
    )
  return _assemble(name, parts['train'], parts.get('test'), names)


def _not_blank(rows, where) -> list[rows_lib.Row]:
  """Texts without those that are white space: blank lines mean nothing."""
  kept = [row for row in rows if row['text'].strip()]
  if not kept:
    raise ValueError(f"{where}: field 'text' is blank in all {len(rows)} rows")
  return kept


def _assemble(name, train, test, label_names) -> rows_lib.Dataset:
  for split, rows in (('train', train), ('test', test)):
    if rows is not None and not rows:
      raise ValueError(f'data set {name!r}: split {split!r} has no rows')
  if test is None:
    train, test = rows_lib.hold_out(train, f'data set {name!r}')
  return rows_lib.Dataset(
    name, train, test, tuple(label_names), rows_lib.digest(train, test)
  )
