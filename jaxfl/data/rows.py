"""Rows of a data set: what they are, their labels, their digest.

A row is a dict from field to value. Fields that tasks share have fixed names
(`catalog` lists them); whatever else a file holds stays in the row, so that
`partition` can use it.
"""

import datetime
import decimal
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
HELD_OUT = 0.1  # share of the rows that `hold_out` takes
# fields that hold text wherever they occur
TEXT_FIELDS = (
  'text',
  'premise',
  'hypothesis',
  'passage',
  'question',
  'sentence1',
  'sentence2',
  'word',
  'choice1',
  'choice2',
  'instruction',
  'input',
  'response',
)


class Dataset(NamedTuple):
  """Examples to train on and examples that are held out.

  Attributes:
    name: what was asked for.
    train: rows to train on; `label` is an index into `label_names`.
    test: rows for the evaluation, none of which is trained on.
    label_names: what the labels are called; () for generation tasks.
    digest: sha256 over all rows, in hexadecimal: see `digest`.
  """

  name: str
  train: list[Row]
  test: list[Row]
  label_names: tuple[str, ...]
  digest: str


def _plain(value: Any) -> str:
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  if isinstance(value, decimal.Decimal):
    return str(value)
  if isinstance(value, bytes):
    return value.hex()
  raise TypeError(f'a value of type {type(value).__name__}')


def canonical(row: Row) -> bytes:
  """A row as JSON: keys sorted, no spaces, ASCII.

  Raises:
    ValueError: if a value is neither text, number, date nor bytes, or a list
      or dict of them.
  """
  try:
    text = json.dumps(
      row, sort_keys=True, separators=(',', ':'), default=_plain
    )
  except TypeError as error:
    raise ValueError(
      f'a row with the columns {sorted(map(str, row))} holds {error}; only '
      'text, numbers, dates, lists and dicts of them can be read'
    ) from error
  return text.encode()


def digest(train: Sequence[Row], test: Sequence[Row]) -> str:
  """sha256 of `canonical` rows, one a line, each split after its name."""
  h = hashlib.sha256()
  for split, rows in (('train', train), ('test', test)):
    h.update(f'{split} {len(rows)}\n'.encode())
    for row in rows:
      h.update(canonical(row) + b'\n')
  return h.hexdigest()


def parse_columns(text: str | None) -> dict[str, str]:
  """Reads the value of `--columns`.

  Args:
    text: 'text=sentence,label=sentiment': our field = the file's column.

  Returns:
    A dict from field to column, empty if there is no text.

  Raises:
    ValueError: if an item has no name on a side, or a field comes twice.
  """
  columns = {}
  for item in (text or '').split(',') if text else ():
    field, sign, column = (part.strip() for part in item.partition('='))
    if not (field and sign and column):
      raise ValueError(
        f'--columns: {item!r} is not of the form field=column, as in '
        "'text=sentence,label=sentiment'"
      )
    if field in columns:
      raise ValueError(f'--columns: field {field!r} comes twice')
    columns[field] = column
  return columns


def rename(
  rows: Sequence[Row], columns: Mapping[str, str], where: str
) -> list[Row]:
  """Renames columns; a column that already has a field's name is replaced.

  Args:
    rows: not empty.
    columns: from field to the column that it is in.
    where: what to call the rows in errors.

  Raises:
    ValueError: if there is no such column.
  """
  for field, column in columns.items():
    if column not in rows[0]:
      raise ValueError(
        f'{where} has no column {column!r} (for field {field!r}); it has '
        f'{sorted(rows[0])}'
      )
  gone = {*columns, *columns.values()}
  return [
    {key: value for key, value in row.items() if key not in gone}
    | {field: row[column] for field, column in columns.items()}
    for row in rows
  ]


def check_fields(rows: Sequence[Row], fields: Iterable[str], where: str):
  """Refuses rows that lack a field, or whose text is not text.

  Args:
    rows: not empty.
    fields: fields that every row must have.
    where: what to call the rows in errors.

  Raises:
    ValueError: naming the field and the row, counted from 1.
  """
  fields = set(fields)
  for number, row in enumerate(rows, 1):
    missing = sorted(fields - row.keys())
    if missing:
      raise ValueError(
        f'{where}, row {number} has no field {missing[0]!r}; it has '
        f'{sorted(row)}. If the column is there under another name, say so '
        f'with --columns={missing[0]}=COLUMN'
      )
    for field in TEXT_FIELDS:
      if field in row and not isinstance(row[field], str):
        raise ValueError(
          f'{where}, row {number}: field {field!r} must be text, got '
          f'{row[field]!r}'
        )


def make_generation(rows: Sequence[Row], where: str) -> list[Row]:
  """Rows with `instruction`, `input`, `response` and `references`.

  `input` is '' where there is none. `references` are all answers that count
  as right; if there are none they are `[response]`. A list as the `response`
  gives the references, and its first is the response.

  Raises:
    ValueError: if a row has no instruction or no answer.
  """
  result = []
  for number, row in enumerate(rows, 1):
    answers = row.get('response')
    answers = answers if isinstance(answers, list) else [answers]
    references = row.get('references') or answers
    if not (
      answers
      and isinstance(references, list)
      and all(isinstance(x, str) for x in [*answers, *references])
    ):
      raise ValueError(
        f'{where}, row {number}: response and references must be text, got '
        f'{row.get("response")!r} and {row.get("references")!r}'
      )
    result.append(
      row
      | {
        'input': '' if row.get('input') is None else row['input'],
        'response': answers[0],
        'references': references,
      }
    )
  check_fields(result, ('instruction',), where)
  return result


def hold_out(
  rows: Sequence[Row], where: str, share: float = HELD_OUT
) -> tuple[list[Row], list[Row]]:
  """Splits rows where the data come without a test split.

  The rows of least sha256 (of 'held out' and `canonical`) are held out: the
  split depends on the rows alone, not on a seed, their order or a library,
  and equal rows are never on both sides.

  Args:
    rows: at least two that differ.
    where: what to call the rows in errors.
    share: of the rows, in (0, 1).

  Returns:
    (train, test), in the order of `rows`.

  Raises:
    ValueError: if fewer than two rows differ.
  """
  ranks = [
    hashlib.sha256(b'held out' + canonical(row)).digest() for row in rows
  ]
  if len(set(ranks)) < 2:
    raise ValueError(
      f'{where}: {len(rows)} rows, {len(set(ranks))} of them different; at '
      'least two are needed to hold one out for the evaluation'
    )
  ordered = sorted(ranks)
  last = ordered[max(round(len(rows) * share), 1) - 1]
  last = last if last != ordered[-1] else ordered[0]
  train = [row for row, rank in zip(rows, ranks, strict=True) if rank > last]
  test = [row for row, rank in zip(rows, ranks, strict=True) if rank <= last]
  return train, test
