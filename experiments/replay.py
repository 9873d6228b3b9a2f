"""Rebuilds a run's weights from its base and its log alone.

python -m experiments.replay --workdir=DIR
python -m experiments.replay --workdir=DIR --until_round=50
python -m experiments.replay --workdir=DIR --out=trained.safetensors
python -m experiments.replay --workdir=DIR --out=model/
python -m experiments.replay --workdir=DIR --out=model/ --base_model=BASE

The first form of `--out` is what was trained, under the names that the log has;
the second is the whole model, in the layout that it was loaded from. It needs
the base model; `--base_model` says where that is now, if it has moved.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np
from absl import app, flags, logging
from safetensors import SafetensorError
from safetensors.numpy import save_file

from experiments import build, models, progress, run_log
from experiments import workdir as workdir_lib
from experiments.config import UsageError, from_mapping
from jaxfl import checkpoint, digest, keys, metrics
from jaxfl import log as log_lib
from jaxfl.models import native
from jaxfl.runtime import replay, simulate

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
_UNTIL = flags.DEFINE_integer(
  'until_round', None, 'Stop after so many rounds; default all in the log.'
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'Where to write the weights: NAME.safetensors for what was trained, any other'
  ' name for a directory with the whole model.',
)
_BASE_MODEL = flags.DEFINE_string(
  'base_model',
  None,
  'Where the base model is now; default where the run had it.',
)


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
  workdir = workdir_lib.Workdir(directory)
  if not workdir.log.exists():
    raise UsageError(f'{workdir.path}: no run there (rounds.log is missing)')
  try:
    with log_lib.RoundLog.open(workdir.log, 'r') as log:
      header = log.header
      if header.spec != keys.SPEC:
        raise UsageError(
          f'{workdir.log} was written under {header.spec!r}; this version'
          f' implements {keys.SPEC!r}'
        )
      config = from_mapping(run_log.settings_of(header))
      base = checkpoint.load_base(
        workdir.base, header.params, header.base_digest
      )
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
    raise UsageError(f'{workdir.log}: {error}')
  return state.params, rounds, header


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  try:
    if not _WORKDIR.value:
      raise UsageError('--workdir is needed: the directory of a run')
    if _UNTIL.value is not None and _UNTIL.value < 0:
      raise UsageError(f'until_round must be >= 0, got {_UNTIL.value}')
    workdir = workdir_lib.Workdir(_WORKDIR.value)
    params, rounds, header = rebuild(_WORKDIR.value, _UNTIL.value)
    compare(params, rounds, workdir)
    if _OUT.value:
      write(params, header, workdir, _OUT.value, _BASE_MODEL.value)
      print(f'weights written to {_OUT.value}')
  except (UsageError, ValueError, OSError) as error:
    sys.exit(f'error: {error}')


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
    tensors = {k: np.asarray(x) for k, x in keys.named_leaves(params)}
    try:
      save_file(tensors, out, metadata={'digest': digest.digest(params)})
    except (OSError, SafetensorError) as error:
      raise UsageError(f'out: {out} cannot be written: {error}') from error
    return
  if not workdir.model.exists():
    raise UsageError(
      f'{workdir.path} trained a linear layer, not a model; --out must end in'
      ' .safetensors'
    )
  settings = run_log.settings_of(header)
  config = from_mapping(settings | ({} if model is None else {'model': model}))
  models.export(
    config,
    native.from_json(json.loads(workdir.model.read_text())),
    params,
    header.config['frozen_digest'],
    out,
  )


def compare(params, rounds, workdir):
  """Prints the digest beside the live run's."""
  found = digest.digest(params)
  print(f'rebuilt {rounds} rounds from {workdir.log}')
  print(f'digest {found}')
  live = live_digest(workdir, rounds)
  if live is None:
    print('the live run recorded no digest for this round')
  elif live == found:
    print('equal to the digest of the live run')
  else:
    sys.exit(f'error: the live run recorded the digest {live}')


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


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
