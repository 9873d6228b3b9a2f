"""Writes a run's fine-tune as one small file: everything but the base weights.

python -m experiments.export --workdir=DIR --out=model.seeds
python -m experiments.export --workdir=DIR --out=model.seeds --form=bytes

`experiments.rebuild` makes the model of it. The file names its base, by where
it was and by digest, and has the run's weights in the smallest form that
gives their bits again, of

  log          what was sent in all rounds;
  coordinates  of a seed pool, an integer of four bytes for each seed;
  weights      what was trained, where that is less (a head, LoRA factors),
               and always if the log is longer, as that of fed_avg is.

`--form` chooses one. `--form=bytes` is a seed pool with one byte for each seed:
coordinates rounded to 8 bits. They are sums over rounds, which no byte holds
exactly: what is rebuilt is near the run's weights, and equal on every machine,
but it has a digest of its own, and has not been evaluated.
"""

import pathlib
import sys

from absl import app, flags, logging

from experiments import fine_tune, report, seeds_file
from experiments.config import UsageError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
_OUT = flags.DEFINE_string('out', 'model.seeds', 'File to write.')
_FORM = flags.DEFINE_enum(
  'form', 'auto', ['auto', *seeds_file.FORMS], 'See above; auto: the smallest.'
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  try:
    if not _WORKDIR.value:
      raise UsageError('--workdir is needed: the directory of a run')
    seeds = fine_tune.make(_WORKDIR.value, _FORM.value)
    data = seeds_file.encode(seeds)
    pathlib.Path(_OUT.value).write_bytes(data)
  except (UsageError, ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(
    f'{_OUT.value}: {report.amount(len(data))}, form {seeds.form}, after'
    f' {seeds.rounds} rounds\nbase {seeds.base["model"]}'
    f' {seeds.base_digest[:16]}\ndigest {seeds.digest}'
  )
  if seeds.form == 'bytes':
    print('(not the digest of the run: coordinates are rounded to bytes)')
  print(
    'To make the model of it:\n  python -m experiments.rebuild'
    f' {_OUT.value} --out=DIR'
  )


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
