"""Rounds a second on a bad line, with and without a pipeline.

    python -m experiments.bad_line --minutes=10 --num_clients=8

starts, four times, a nats-server, a coordinator and clients as processes: the
line clean or bad, the pipeline on or off. Every client is behind a proxy of its
own (`experiments.federation.line`). On a bad line it has a rate of 64 kbit/s, a
round trip of 300 ms and 5 % loss; in every minute a client has SIGKILL, and is
started again 2 to 5 s later; the coordinator has it once, and is started again
after a second; two clients join late.

What limits the rate: so many processes share the cores of one machine, hence
the model is tiny and a local step sleeps until it has taken `--step_s`, which
stands for the computation of a real model. Without a pipeline a round takes a
step, a round trip and what is lost on the way; with one of s rounds the steps
hide s * step_s of that. A client keeps its compiled programs in a directory
(JAX_COMPILATION_CACHE_DIR) that it finds when it is started again. Runs on a
bad line are compared with those on a clean one (a proxy without limits, nobody
killed) with the same pipeline.

A condition runs for so many rounds that steps (and the round trip, without a
pipeline) take `--minutes`. It hangs if it takes three times as long and five
minutes more. All clients, and a replay of the log, must have equal digests in
the end. Writes `experiments/results/bad_line.json` and `bad_line.png`, and
prints the table; the exit status is 1 if a run has hung or digests differ.
Kills, joins, data and losses are by `--seed`; what happens in between depends
on the time.
"""

import asyncio
import dataclasses
import datetime
import logging as std_logging
import os
import pathlib
import platform
import signal
import sys

import jax
from absl import app, flags, logging
from rich.console import Console

from experiments import bad_line_report
from experiments.workdir import write_json

try:
  from experiments import bad_line_runs
  from experiments.federation import line as line_lib
except ModuleNotFoundError as missing:
  sys.exit(f"error: {missing}; install it with pip install -e '.[federation]'")

_DEFAULT = bad_line_runs.Settings()
_MINUTES = flags.DEFINE_float(
  'minutes', _DEFAULT.minutes, 'Of a condition.', lower_bound=0.1
)
_CLIENTS = flags.DEFINE_integer(
  'num_clients', _DEFAULT.num_clients, 'All of them.', lower_bound=2
)
_SEED = flags.DEFINE_integer('seed', _DEFAULT.seed, 'Of it all.', lower_bound=0)
_STEP = flags.DEFINE_float(
  'step_s', _DEFAULT.step_s, 'Seconds of a local step.', lower_bound=0.01
)
_RATE = flags.DEFINE_string('rate', '64k', 'Of a bad line, bits/s each way.')
_ROUND_TRIP = flags.DEFINE_float(
  'round_trip', _DEFAULT.round_trip, 'Of a bad line, seconds.', lower_bound=0
)
_LOSS = flags.DEFINE_float(
  'loss',
  _DEFAULT.loss,
  'Of a bad line, probability that a segment is lost.',
  lower_bound=0,
  upper_bound=0.9,
)
_PIPELINE = flags.DEFINE_integer(
  'pipeline',
  None,
  'Rounds that clients may be ahead; by default those of a round trip with a'
  ' segment that is lost twice, and one more.',
  lower_bound=1,
)
_DEADLINE = flags.DEFINE_float(
  'deadline_s',
  _DEFAULT.deadline_s,
  'Seconds after which a round is closed without those who are silent.',
  lower_bound=0.1,
)
_ONLY = flags.DEFINE_multi_enum(
  'only',
  None,
  [f'{x},{y}' for x in ('clean', 'bad') for y in ('pipeline', 'none')],
  'A condition; default all four.',
)
_OUT = flags.DEFINE_string('out', 'experiments/results', 'Where results go.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the processes; default runs/DATE-TIME-bad-line.'
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  std_logging.getLogger('nats').setLevel(std_logging.CRITICAL)
  # as Ctrl-C, so that no process is left
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    rate = line_lib.parse_rate(_RATE.value)
  except ValueError as error:
    sys.exit(f'error: --{error}')
  settings = bad_line_runs.Settings(
    minutes=_MINUTES.value,
    num_clients=_CLIENTS.value,
    seed=_SEED.value,
    step_s=_STEP.value,
    rate=rate,
    round_trip=_ROUND_TRIP.value,
    loss=_LOSS.value,
    pipeline=_PIPELINE.value,
    deadline_s=_DEADLINE.value,
  )
  stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  directory = pathlib.Path(_WORKDIR.value or f'runs/{stamp}-bad-line')
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  result = {
    'command': 'python -m experiments.bad_line',
    'settings': dataclasses.asdict(settings),
    'jax': jax.__version__,
    'python': platform.python_version(),
    'cores': os.cpu_count(),
    'rows': [],
  }
  for line in ('clean', 'bad'):
    for pipelined in (True, False):
      name = f'{line},{"pipeline" if pipelined else "none"}'
      if _ONLY.value and name not in _ONLY.value:
        continue
      print(f'{name}: {settings.rounds(line == "bad", pipelined)} rounds')
      place = directory / name.replace(',', '-')
      try:
        row = asyncio.run(
          bad_line_runs.run(settings, line == 'bad', pipelined, place)
        )
      except (OSError, RuntimeError) as error:
        sys.exit(f'error: {error}')
      except KeyboardInterrupt:
        sys.exit(130)
      result['rows'].append(row)
      bad_line_report.compare(result['rows'])
      write_json(out / 'bad_line.json', result)
  bad_line_report.draw(result, out / 'bad_line.png')
  Console(width=150).print(bad_line_report.table(result))
  print(f'{directory} has the log and the output of every process.')
  for row in result['rows']:
    if row['hung']:
      print(f'{bad_line_report.name_of(row)}: {row["hung"]}', file=sys.stderr)
  if wrong := [
    bad_line_report.name_of(row) for row in result['rows'] if not row['equal']
  ]:
    sys.exit(f'error: no equal digests: {"; ".join(wrong)}')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
