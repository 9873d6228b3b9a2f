"""Labels of any spelling as indices."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxfl.data import rows as rows_lib


def _name(value: Any, where: str) -> str:
  """The label as text; integers keep their value."""
  if isinstance(value, str) and value.strip():
    return value.strip()
  if isinstance(value, int):  # bool too: 'False', 'True'
    return str(value)
  raise ValueError(
    f"{where}: field 'label' must be text or an integer, got {value!r}"
  )


def _order(name: str) -> tuple[bool, int, str]:
  number = re.fullmatch(r'-?\d+', name)
  return not number, int(name) if number else 0, name


def names_of(rows: Sequence[rows_lib.Row], where: str) -> tuple[str, ...]:
  """The different labels: integers by value, then text by code point.

  Raises:
    ValueError: if there are fewer than two.
  """
  found = {
    _name(row['label'], f'{where}, row {number}')
    for number, row in enumerate(rows, 1)
  }
  if len(found) < 2:
    raise ValueError(
      f"{where}: field 'label' has one value only, {found.pop()!r}; a "
      'classification task needs at least two'
    )
  return tuple(sorted(found, key=_order))


def encode(
  rows: Sequence[rows_lib.Row],
  label_names: Sequence[str],
  where: str,
  *,
  aliases: Mapping[str, str] | None = None,
) -> list[rows_lib.Row]:
  """Rows whose `label` is an index into `label_names`.

  A label is a name, an alias of one, or (if that is neither) the index itself.

  Args:
    rows: all with a field `label`, text or integer.
    label_names: what the indices stand for.
    where: what to call the rows in errors.
    aliases: from other spellings to names.

  Raises:
    ValueError: naming the row, for a label that is none of these.
  """
  index = {name: i for i, name in enumerate(label_names)}
  index |= {other: index[name] for other, name in (aliases or {}).items()}
  index = {str(i): i for i in range(len(label_names))} | index
  result = []
  for number, row in enumerate(rows, 1):
    name = _name(row['label'], f'{where}, row {number}')
    if name not in index:
      raise ValueError(
        f'{where}, row {number}: label {row["label"]!r} is none of '
        f'{tuple(label_names)}, nor an index of one'
        + (
          '; -1 marks a row without a label: name another split'
          if name == '-1'
          else ''
        )
      )
    result.append(row | {'label': index[name]})
  return result
