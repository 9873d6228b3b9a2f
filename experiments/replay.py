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

import sys

from absl import app, flags, logging

from experiments import workdir as workdir_lib
from experiments.config import UsageError
from experiments.replayer import live_digest, rebuild, write
from jaxfl import digest

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


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
