"""Runs a study: several settings, several seeds, one table and one picture.

    python -m experiments.study --study=minilm_head --data_dir=DATA

Every run is a command of `experiments.train` in a process of its own, under
`runs/STUDY/`; runs that are finished there are not made again, runs that were
stopped go on. The result is `experiments/results/STUDY.json` (the commands, the
curve of every run, mean and standard deviation over seeds) and `STUDY.png`. The
studies are those of `experiments.studies`.
"""

import pathlib
import sys

from absl import app, flags

from experiments import studies, study_runs
from experiments.config import UsageError
from experiments.workdir import write_json

_STUDY = flags.DEFINE_enum(
  'study', None, sorted(studies.STUDIES), 'Which study.', required=True
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where the task files are.')
_MODEL = flags.DEFINE_string(
  'model', None, 'Directory of the model, for studies that ask for one.'
)
_SEEDS = flags.DEFINE_integer(
  'seeds', None, "Seeds 0, 1, ...; the study's own.", lower_bound=1
)
_JOBS = flags.DEFINE_integer(
  'jobs', 1, 'Runs at once, each on its own core.', lower_bound=1
)
_RUNS = flags.DEFINE_string('runs', 'runs', 'Directory of the runs.')
_OUT = flags.DEFINE_string('out', 'experiments/results', 'Where results go.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  name = _STUDY.value
  try:
    result = study_runs.run(
      name,
      {'data_dir': _DATA_DIR.value, 'model': _MODEL.value},
      seeds=_SEEDS.value,
      jobs=_JOBS.value,
      runs=_RUNS.value,
    )
  except (RuntimeError, UsageError) as error:
    sys.exit(f'error: {error}')
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / f'{name}.json', result)
  study_runs.draw(result, out / f'{name}.png')
  study_runs.show(result)
  print(f'{out / name}.json and .png written')


if __name__ == '__main__':
  app.run(main)
