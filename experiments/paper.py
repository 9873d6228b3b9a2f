"""Figures, tables and claims of papers, again at the scale of a CPU.

    python -m experiments.paper --paper=ferret --figure=7
    python -m experiments.paper --paper=list

Prints a table of what was published beside what we find, and writes
`experiments/results/paper_PAPER_FIGURE.json` and `.png`. Spread is the standard
deviation over seeds. Entries that are studies of training runs need what their
study needs (`--data_dir`, `--model`) and keep their runs under `--runs`, as
`experiments.study` does.
"""

import pathlib
import sys

from absl import app, flags, logging

from experiments.config import UsageError
from experiments.papers import catalog, common

_PAPER = flags.DEFINE_string(
  'paper',
  None,
  f'list, or the paper of a figure ({catalog.names()}).',
  required=True,
)
_FIGURE = flags.DEFINE_string('figure', None, 'Which of the paper.')
_SEEDS = flags.DEFINE_integer(
  'seeds', None, "Seeds 0, 1, ...; 3, or the study's own.", lower_bound=1
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where the task files are.')
_DATASET = flags.DEFINE_string(
  'dataset', None, 'A csv file, for entries that take any.'
)
_TARGET = flags.DEFINE_string('target', None, 'Its column to predict.')
_MODEL = flags.DEFINE_string(
  'model', None, 'Directory of the model, for studies that ask for one.'
)
_JOBS = flags.DEFINE_integer(
  'jobs', 1, 'Runs of a study at once, each on its own core.', lower_bound=1
)
_RUNS = flags.DEFINE_string('runs', 'runs', 'Directory of the runs of studies.')
_OUT = flags.DEFINE_string('out', 'experiments/results', 'Where results go.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  paper, figure = _PAPER.value, _FIGURE.value
  if paper == 'list':
    for name, entries in catalog.PAPERS.items():
      for figure, entry in entries.items():
        print(f'{f"--paper={name} --figure={figure}":42}{entry.title}')
    return
  request = common.Request(
    seeds=_SEEDS.value,
    data_dir=_DATA_DIR.value,
    dataset=_DATASET.value,
    target=_TARGET.value,
    model=_MODEL.value,
    jobs=_JOBS.value,
    runs=_RUNS.value,
  )
  try:
    entry = catalog.find(paper, figure)
    found = entry.run(request)
  except (RuntimeError, UsageError) as error:
    sys.exit(f'error: {error}')
  stem = pathlib.Path(_OUT.value) / f'paper_{paper}_{figure}'
  common.write({'paper': paper, 'figure': figure, **found}, entry, stem)
  common.show(found)
  kinds = '.json' if entry.draw is None else '.json and .png'
  print(f'{stem}{kinds} written')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
