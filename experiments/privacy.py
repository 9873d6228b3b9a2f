"""What a private run costs: noise for a target epsilon, epsilon after rounds.

    python -m experiments.privacy --epsilon_dp=3 --delta_dp=1e-5 \\
        --num_rounds=2000 --restart_interval=20

DIFF2 (with `--restart_interval=1`: DP-GD), its local routine if `--local_steps`
is above 1, DP-SGD with a `--sampling_rate` alone, or integer noise on scalars
(`--mechanism=discrete_gaussian` or `skellam`). Nothing is trained. Prints the
multipliers of the noise and who is protected against what, then epsilon spent
after rounds by three accountants, and writes `experiments/results/privacy.json`
and `.png`.
"""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
from rich.console import Console

from experiments import privacy_cost
from experiments.config import UsageError, types_of
from experiments.papers import common

_DEFINE = {
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}
_FLAGS = {
  field.name: _DEFINE[types_of(field)[0]](
    field.name, field.default, field.metadata['help']
  )
  for field in dataclasses.fields(privacy_cost.Settings)
}
_OUT = flags.DEFINE_string('out', 'experiments/results', 'Where results go.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  settings: dict[str, Any] = {k: flag.value for k, flag in _FLAGS.items()}
  try:
    found = privacy_cost.make(privacy_cost.Settings(**settings))
  except (ImportError, UsageError, ValueError) as error:
    sys.exit(f'error: {error}')
  entry = common.Entry('', lambda request: found, privacy_cost.draw)
  stem = pathlib.Path(_OUT.value) / 'privacy'
  common.write(found, entry, stem)
  for table in privacy_cost.tables(found):
    Console(width=78).print(table)
  print(f'{stem}.json and .png written')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
