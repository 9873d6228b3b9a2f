"""A model's config as JSON."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxfl.models.config import Config

MODEL_TYPE = 'jaxfl'


def to_json(config: Config) -> dict[str, Any]:
  """The fields of config.json."""
  return {'model_type': MODEL_TYPE, **dataclasses.asdict(config)}


def from_json(fields: Mapping[str, Any], where: str = 'config.json') -> Config:
  """The config of `to_json`, also after JSON made lists of its tuples.

  Args:
    fields: of config.json; those that have a default may be missing.
    where: names the file in errors.

  Raises:
    ValueError: if they are of another format, a field is unknown, missing or
      of the wrong type, or the fields do not fit each other.
  """
  if fields.get('model_type') != MODEL_TYPE:
    raise ValueError(
      f'{where}: model_type is {fields.get("model_type")!r}, expected '
      f'{MODEL_TYPE!r}'
    )
  rest = {name: x for name, x in fields.items() if name != 'model_type'}
  return _build(Config, rest, where)


def _build(cls, values, where):
  """A dataclass from plain values."""
  hints = typing.get_type_hints(cls)
  if unknown := sorted(set(values) - set(hints)):
    raise ValueError(f'{where}: unknown fields {", ".join(unknown)}')
  made = {
    name: _convert(hints[name], value, f'{where}: {name}')
    for name, value in values.items()
  }
  try:
    return cls(**made)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{where}: {error}') from error


def _convert(hint, value, where):
  """A value of the hinted type: plain, `X | None`, `tuple[X, ...]`, a class."""
  if isinstance(hint, types.UnionType):
    hint, _ = typing.get_args(hint)
    return None if value is None else _convert(hint, value, where)
  if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
    return tuple(_convert(typing.get_args(hint)[0], x, where) for x in value)
  if dataclasses.is_dataclass(hint) and isinstance(value, dict):
    return _build(hint, value, where)
  if type(value) is hint:
    return value
  if hint is float and type(value) is int:
    return float(value)
  name = getattr(hint, '__name__', str(hint))
  raise ValueError(f'{where} is {value!r}, expected a value of type {name}')
