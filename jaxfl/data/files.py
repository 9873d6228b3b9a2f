"""Bytes, text and JSON files, plain or gzipped, with errors that name them."""

import gzip
import json
import pathlib
import zlib
from typing import Any

from jaxfl.data import rows as rows_lib


def find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """`folder/name`, or `folder/name.gz`, or None if neither is there."""
  paths = (folder / name, folder / f'{name}.gz')
  return next((path for path in paths if path.is_file()), None)


def read_bytes(path: pathlib.Path) -> bytes:
  """The bytes of a file, gunzipped if its name ends in .gz.

  Raises:
    ValueError: naming the file, if it is no whole gzip file.
  """
  data = path.read_bytes()
  try:
    return gzip.decompress(data) if path.suffix == '.gz' else data
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f'{path}: not a whole gzip file: {error}') from error


def read_text(path: pathlib.Path, encoding: str = 'utf-8') -> str:
  """The text of a file, gunzipped if its name ends in .gz.

  Raises:
    ValueError: naming the file, if it is empty, broken or not so encoded.
  """
  data = read_bytes(path)
  try:
    text = data.decode(encoding)
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not {encoding} text: {error}') from error
  if not text.strip():
    raise ValueError(f'{path}: the file is empty')
  return text


def read_json(path: pathlib.Path) -> Any:
  """The value in a JSON file; a ValueError names the file if it is broken."""
  try:
    return json.loads(read_text(path))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}: not JSON: {error}') from error


def read_json_lines(path: pathlib.Path) -> list[rows_lib.Row]:
  """One JSON object a line; a ValueError names the file and the line."""
  rows = []
  for number, line in enumerate(read_text(path).split('\n'), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}, line {number}: not JSON: {error}') from error
    if not isinstance(row, dict):
      raise ValueError(f'{path}, line {number}: not an object: {line[:60]!r}')
    rows.append(row)
  return rows
