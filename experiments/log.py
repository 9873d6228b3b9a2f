"""Shows, verifies and exports the log of a run.

python -m experiments.log DIR
python -m experiments.log DIR --verify
python -m experiments.log DIR --out=rounds.csv
python -m experiments.log DIR --out=rounds.json

DIR is the directory of a run, or a log. A row is a round: its clients (and
their weights, as CLIENT:WEIGHT, where those are not 1), the bytes of the frames
that they sent, and where the run was evaluated, the totals of bytes in both
directions and the held-out metric. The log of a private run with an aggregator
has releases in place of messages, so that its rows lack clients and bytes.

Reading a log checks every byte and the hash chain. `--verify` also rebuilds the
weights and compares their digest with that of the live run; it needs the base.
`--out` writes all rounds, `--show` of them are printed.
"""

import sys

from absl import app, flags, logging
from rich.console import Console

from experiments import log_table
from experiments.config import UsageError

_VERIFY = flags.DEFINE_bool('verify', False, 'Rebuild and compare digests.')
_OUT = flags.DEFINE_string('out', None, 'NAME.csv or NAME.json to write.')
_HEAD = flags.DEFINE_integer(
  'show', 20, 'Rounds on the screen; 0 for all of them.', 0
)


def main(argv):
  if len(argv) != 2:
    raise app.UsageError('expected one directory of a run, or one log')
  try:
    if _OUT.value and not _OUT.value.endswith(('.csv', '.json')):
      raise UsageError(f'out: {_OUT.value} must end in .csv or .json')
    found = log_table.read(argv[1])
    Console(width=100).print(log_table.table(found, _HEAD.value))
    print(log_table.description(found))
    if _OUT.value:
      log_table.write(found, _OUT.value)
      print(f'{_OUT.value} written')
    if _VERIFY.value:
      print(log_table.verify(found))
  except (UsageError, ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
