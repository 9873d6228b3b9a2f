"""Replays a run's log on its base, and writes what comes out of it."""

import dataclasses
import json
import pathlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from experiments import build, models, progress, run_log
from experiments import workdir as workdir_lib
from experiments.config import UsageError, from_mapping
from jaxfl import checkpoint, digest, keys, metrics
from jaxfl import log as log_lib
from jaxfl.models import native
from jaxfl.runtime import replay, simulate


def rebuild(directory: str | pathlib.Path, until_round: int | None = None):
  """Replays a run's log.

  Args:
    directory: of the run.
    until_round: rounds to replay; default all.

  Returns:
    The trained params after them, the number of rounds, and the log's header.

  Raises:
    UsageError: if there is no run, its log or base is damaged, or the log has
      fewer rounds.
  """
  state, rounds, header = rebuild_state(directory, until_round)
  return state.params, rounds, header


def rebuild_state(directory: str | pathlib.Path, until_round=None):
  """The same, with the whole public state in place of the params."""
  workdir = workdir_lib.Workdir(directory)
  if not workdir.log.exists():
    raise UsageError(f'{workdir.path}: no run there (rounds.log is missing)')
  load = lambda header: checkpoint.load_base(
    workdir.base, header.params, header.base_digest
  )
  return follow(workdir.log, load, until_round)


def follow(path: pathlib.Path, load_base, until_round: int | None = None):
  """Replays a log on its base.

  Args:
    path: of the log.
    load_base: header -> the base, as of `checkpoint.load_base`.
    until_round: rounds to replay; default all.

  Returns:
    The public state after them, the number of rounds, and the log's header.

  Raises:
    UsageError: see `rebuild`.
  """
  try:
    with log_lib.RoundLog.open(path, 'r') as log:
      header = log.header
      if header.spec != keys.SPEC:
        raise UsageError(
          f'{path} was written under {header.spec!r}; this version'
          f' implements {keys.SPEC!r}'
        )
      config = from_mapping(run_log.settings_of(header))
      base = load_base(header)
      sizes = header.config.get('num_examples')
      method = build.build_method(config, build.no_loss, sizes)
      uniform = dataclasses.replace(config, weighting='uniform')
      population = build.build_population(uniform, method, None)  # its size
      state, rounds = method.init(base), 0
      server = simulate.compile_method(method).server
      total = log.num_rounds if until_round is None else until_round
      with progress.bar(total, 0) as advance:
        for rounds, replayed in replay.replay(
          server,
          state,
          log,
          method.recorded(base),
          num_slots=simulate.num_slots(method, population),
          until_round=until_round,
        ):
          state = replayed
          advance(rounds, '')
  except (ValueError, OSError) as error:
    raise UsageError(str(error)) from error
  if error := method.check(state):
    raise UsageError(f'{path}: {error}')
  return state, rounds, header


def write(params, header, workdir, out: str, model: str | None = None) -> None:
  """Writes the trained tensors to a file, or the whole model to a directory.

  Args:
    params: what was trained.
    header: of the log.
    workdir: of the run.
    out: the file or directory.
    model: where the base model is; None for where the run had it.

  Raises:
    UsageError: if it cannot be written, or the base model isn't what it was.
  """
  if out.endswith('.safetensors'):
    write_tensors(params, out)
    return
  if not workdir.model.exists():
    raise UsageError(
      f'{workdir.path} trained a linear layer, not a model; --out must end in'
      ' .safetensors'
    )
  settings = run_log.settings_of(header)
  config = from_mapping(settings | ({} if model is None else {'model': model}))
  models.check_new(out)
  shape = native.from_json(json.loads(workdir.model.read_text()))
  base = models.load_base(config, shape, header.config['frozen_digest'])
  models.export(base, params, out)


def write_tensors(params, out: str) -> None:
  """Writes the trained tensors; UsageError if that is not possible."""
  tensors = {k: np.asarray(x) for k, x in keys.named_leaves(params)}
  try:
    save_file(tensors, out, metadata={'digest': digest.digest(params)})
  except (OSError, SafetensorError) as error:
    raise UsageError(f'out: {out} cannot be written: {error}') from error


def live_digest(workdir, rounds: int) -> str | None:
  """The digest that the run itself recorded after so many rounds."""
  if workdir.summary.exists():
    summary = json.loads(workdir.summary.read_text())
    if summary['rounds'] == rounds:
      return summary['digest']
  if not workdir.metrics.exists():
    return None
  rows = metrics.read(workdir.metrics)
  return next((x.digest for x in rows if x.round == rounds), None)
