"""A canary audit: do the private methods keep what they claim?

    python -m experiments.audit
    python -m experiments.audit --mechanism=diff2 --bug=none --num_trials=500

An adversary that knows everything but the sign of one example guesses it from
what a run releases, many times. A guess that is right too often refutes the
claimed (epsilon, delta). Audited are DP-GD, DIFF2 and the private byte as they
are shipped, and again with one piece of each changed. Prints a table and writes
`experiments/results/audit.json` and `.png`, in 6.5 minutes of a core. The exit
status is 1 if what is shipped is refuted.
"""

import pathlib
import sys

from absl import app, flags, logging
from rich.console import Console

from experiments.audits import catalog, table
from experiments.papers import common

_DEFAULT = table.Settings()
_EPSILON = flags.DEFINE_list(
  'epsilon_dp',
  [f'{x:g}' for x in _DEFAULT.epsilon_dp],
  'Claims to audit, as 1,3.',
)
_DELTA = flags.DEFINE_float('delta_dp', _DEFAULT.delta_dp, 'Of the claims.')
_TRIALS = flags.DEFINE_integer(
  'num_trials',
  _DEFAULT.num_trials,
  'Runs of a mechanism for a seed; ten times as many of the private byte.',
)
_SEEDS = flags.DEFINE_integer(
  'seeds', _DEFAULT.seeds, 'Data sets, of seeds 0, 1, ...'
)
_MECHANISM = flags.DEFINE_string(
  'mechanism',
  _DEFAULT.mechanism,
  f'all, or one of {", ".join(catalog.MECHANISMS)}.',
)
_BUG = flags.DEFINE_string(
  'bug', _DEFAULT.bug, 'Planted bugs beside what is shipped: all, none or one.'
)
_OUT = flags.DEFINE_string('out', 'experiments/results', 'Where results go.')


def _numbers(texts: list[str]) -> tuple[float, ...]:
  try:
    return tuple(map(float, texts))
  except ValueError as error:
    raise ValueError(
      f'epsilon_dp must be numbers such as 1,3; got {",".join(texts)}'
    ) from error


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  try:
    found = table.make(
      table.Settings(
        epsilon_dp=_numbers(_EPSILON.value),
        delta_dp=_DELTA.value,
        num_trials=_TRIALS.value,
        seeds=_SEEDS.value,
        mechanism=_MECHANISM.value,
        bug=_BUG.value,
      )
    )
  except (ImportError, ValueError) as error:
    sys.exit(f'error: {error}')
  entry = common.Entry('', lambda request: found, table.draw)
  stem = pathlib.Path(_OUT.value) / 'audit'
  common.write(found, entry, stem)
  Console(width=170).print(table.table(found))
  print(f'{stem}.json and .png written')
  if refuted := table.refuted(found):
    sys.exit(f'error: refuted as shipped: {"; ".join(refuted)}')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
