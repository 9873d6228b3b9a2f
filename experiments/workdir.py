"""What a run keeps in its directory, and how a run finds itself there again."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from experiments.config import Config, UsageError, from_mapping


class Workdir:
  """Paths of a run's files."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path).absolute()
    self.config = self.path / 'config.json'
    self.metrics = self.path / 'metrics.jsonl'
    self.summary = self.path / 'summary.json'
    self.curve = self.path / 'curve.png'
    self.log = self.path / 'rounds.log'
    self.base = self.path / 'base'
    self.snapshots = self.path / 'snapshots'


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(path.name + '.new')
  with open(temporary, 'w', encoding='utf-8') as f:
    json.dump(value, f, indent=2, sort_keys=True)
    f.write('\n')
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


def read_config(workdir: Workdir) -> Config | None:
  """The config of the run in a directory; None if there is no run.

  Raises:
    UsageError: if the file is damaged.
  """
  if not workdir.config.exists():
    return None
  try:
    return from_mapping(json.loads(workdir.config.read_text()))
  except (ValueError, UsageError) as error:
    raise UsageError(f'{workdir.config}: {error}') from error


def claim(
  workdir: Workdir, config: Config, given: set[str], resume: bool
) -> Config:
  """Makes the directory this run's own.

  Args:
    workdir: the directory; is made if it does not exist.
    config: the settings asked for, resolved.
    given: names of the settings that the user gave.
    resume: whether to go on with the run that is there.

  Returns:
    The settings of the run: those found when resuming.

  Raises:
    UsageError: if the directory belongs to another run.
  """
  found = read_config(workdir)
  if found is None:
    if workdir.path.is_dir() and workdir.log.exists():
      raise UsageError(f'{workdir.path}: a log without config.json')
    workdir.path.mkdir(parents=True, exist_ok=True)
    write_json(workdir.config, dataclasses.asdict(config))
    return config
  if not resume:
    raise UsageError(
      f'{workdir.path} already holds a run: add --resume to go on with it, or'
      ' choose another --workdir'
    )
  for name in sorted(given):
    there, here = getattr(found, name), getattr(config, name)
    if there != here:
      raise UsageError(
        f'{workdir.path} holds another run: its {name} is {there!r}, not'
        f' {here!r}; resume without --{name} or choose another --workdir'
      )
  return found
