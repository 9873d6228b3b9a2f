"""What a client's message gives away: its inputs, reconstructed from it.

    python -m experiments.attack
    python -m experiments.attack --data_dir=DATA        # MNIST, 7 x 7 pixels

A client computes a message of one batch: a gradient, coordinates, a sketch,
scalars, private ones. An attacker who knows all that is shared, the weights and
the labels looks for inputs that would have made the same message. Prints how
far they are from the truth, and writes `experiments/results/attack.json` and
`.png` (`attack_mnist` with MNIST).
"""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
from rich.console import Console

from experiments.attacks import report, table
from experiments.config import UsageError, types_of
from experiments.papers import common

_DEFINE = {int: flags.DEFINE_integer, str: flags.DEFINE_string}
_FLAGS = {
  field.name: _DEFINE[types_of(field)[0]](
    field.name, field.default, field.metadata['help']
  )
  for field in dataclasses.fields(table.Settings)
}
_OUT = flags.DEFINE_string('out', 'experiments/results', 'Where results go.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  settings: dict[str, Any] = {k: flag.value for k, flag in _FLAGS.items()}
  try:
    found = table.make(table.Settings(**settings))
  except (ImportError, OSError, UsageError, ValueError) as error:
    sys.exit(f'error: {error}')
  entry = common.Entry('', lambda request: found, report.draw)
  name = 'attack_mnist' if found['pictures'] == 'mnist' else 'attack'
  stem = pathlib.Path(_OUT.value) / name
  common.write(found, entry, stem)
  console = Console()
  if not console.is_terminal:
    console = Console(width=120)
  console.print(report.table(found))
  print(f'{stem}.json and .png written after {found["seconds"]:.0f} s')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
