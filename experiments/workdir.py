"""What a run keeps in its directory, and how a run finds itself there again."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.config import Config, UsageError, from_mapping


class Workdir:
  """Paths of a run's files."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path).absolute()
    self.config = self.path / 'config.json'
    self.metrics = self.path / 'metrics.jsonl'
    self.summary = self.path / 'summary.json'
    self.privacy = self.path / 'privacy.json'
    self.curve = self.path / 'curve.png'
    self.model = self.path / 'model.json'
    self.log = self.path / 'rounds.log'
    self.base = self.path / 'base'
    self.tensorboard = self.path / 'tensorboard'
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


def read_config(workdir: Workdir) -> Config:
  """The settings of the run that is there.

  Raises:
    UsageError: if they cannot be read.
  """
  try:
    return from_mapping(json.loads(workdir.config.read_text()))
  except (OSError, ValueError, TypeError, UsageError) as error:
    raise UsageError(f'{workdir.config}: {error}') from error


def choose(
  workdir: Workdir, asked: Config, given: set[str], resume: bool
) -> Config:
  """The settings to run with; writes nothing.

  Args:
    workdir: the run's directory.
    asked: the settings of the command line, resolved.
    given: names of the settings that the user gave.
    resume: whether to go on with the run that is there.

  Returns:
    The settings asked for, or those of the run that is there.

  Raises:
    UsageError: if there is a run and `resume` is not set, or none and it is, or
      if a given setting is not that of the run.
  """
  if not resume:
    if workdir.config.exists():
      raise UsageError(
        f'{workdir.path} already holds a run: add --resume to go on with it, or'
        ' choose another --workdir'
      )
    return asked
  if not workdir.config.exists():
    raise UsageError(
      f'{workdir.path}: no run to go on with (no config.json); start it without'
      ' --resume'
    )
  found = read_config(workdir)
  for name in sorted(given):
    there, here = getattr(found, name), getattr(asked, name)
    if there != here:
      raise UsageError(
        f'{workdir.path} holds another run: its {name} is {there!r}, not'
        f' {here!r}; resume without --{name} or choose another --workdir'
      )
  return found


def check_same(workdir: Workdir, arguments: Sequence[str]) -> None:
  """Checks that a run that is there had the settings of a command.

  Args:
    workdir: of the run.
    arguments: `--NAME=VALUE` each; where data and model are does not matter,
      and a config file is not read.

  Raises:
    RuntimeError: naming the setting that differs.
  """
  had = dataclasses.asdict(read_config(workdir))
  for argument in arguments:
    name, _, value = argument.removeprefix('--').partition('=')
    if name not in had or name in ('data_dir', 'model'):
      continue
    found = had[name]
    number = isinstance(found, float)
    same = float(value) == found if number else value == str(found)
    if not same:
      raise RuntimeError(
        f'{workdir.path} holds a run with {name} {found}, not {value}: remove'
        ' it or choose another --runs'
      )


def claim(workdir: Workdir, config: Config) -> None:
  """Makes the directory this run's own, once its settings are known to work.

  Raises:
    UsageError: if it cannot be written.
  """
  if workdir.config.exists():
    return
  try:
    workdir.path.mkdir(parents=True, exist_ok=True)
    write_json(workdir.config, dataclasses.asdict(config))
  except OSError as error:
    raise UsageError(
      f'workdir: {workdir.path} cannot be written: {error}'
    ) from error
