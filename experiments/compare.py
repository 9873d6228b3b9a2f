"""Puts runs side by side: a table, and their metric against what they cost.

python -m experiments.compare DIR DIR ...
python -m experiments.compare DIR ... --target=3.3,3.2 --out=compare.png
python -m experiments.compare DIR ... --metric=accuracy --target=0.8

A DIR is the directory of a run, finished or not. The picture has a held-out
metric, by default the main one, against bytes sent by all clients, against
bytes in both directions, and against forward passes of all clients.

`--target` adds what each run had spent when it was first evaluated at the
target or better; `-` if it never was. Runs are evaluated every few rounds
(`--eval_every`): it may have been there before.
"""

import pathlib
import sys

from absl import app, flags, logging
from rich.console import Console

from experiments import comparison
from experiments.config import UsageError

_METRIC = flags.DEFINE_string('metric', None, 'Of metrics.jsonl, by its name.')
_TARGET = flags.DEFINE_list('target', [], 'Values of the metric, with commas.')
_OUT = flags.DEFINE_string('out', 'compare.png', 'Picture to write.')


def main(argv):
  if len(argv) < 2:
    raise app.UsageError('expected one or more directories of runs')
  try:
    try:
      targets = [float(x) for x in _TARGET.value]
    except ValueError as error:
      raise UsageError(f'target: {error}') from error
    runs = comparison.read(argv[1:], _METRIC.value)
    screen = Console(width=120)
    screen.print(comparison.table(runs))
    for target in targets:
      screen.print(comparison.to_target(runs, target))
    comparison.draw(runs, targets, pathlib.Path(_OUT.value))
    print(f'{_OUT.value} written')
  except (UsageError, ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
