"""A client whose steps take a given time, for `experiments.bad_line`.

    python -m experiments.federation.paced --step_s=0.5 --client=3 \\
      --server=nats://127.0.0.1:4222 --workdir=runs/client-3

is `experiments.federate --role=client --noevaluate`, but that a local step
sleeps until it has taken `--step_s`, as if the model were larger.
"""

import asyncio
import dataclasses
import functools
import logging as std_logging
import pathlib
import sys
import time

import jax
from absl import app, flags, logging

from experiments.config import UsageError
from experiments.federation import roles, site


def paced(function, step_s: float):
  """A function that returns after `step_s` seconds at the earliest."""

  @functools.wraps(function)
  def run(*args):
    end = time.monotonic() + step_s
    result = jax.block_until_ready(function(*args))
    time.sleep(max(0.0, end - time.monotonic()))
    return result

  return run


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  options = flags.FLAGS
  std_logging.getLogger('nats').setLevel(std_logging.CRITICAL)

  def make(*args):
    made = site.Bench(*args)
    run_client = paced(made.site.run_client, options.step_s)
    made.site = dataclasses.replace(made.site, run_client=run_client)
    return made

  place = roles.Place(
    run=options.run,
    server=options.server,
    credentials=None,
    directory=pathlib.Path(options.workdir),
  )
  try:
    asyncio.run(
      roles.follow(
        place, options.client, {}, own_data=False, evaluate=False, make=make
      )
    )
  except (UsageError, FloatingPointError, RuntimeError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  # not above, as tests import this
  flags.DEFINE_string('run', 'run', 'Name of the run.')
  flags.DEFINE_string('server', 'nats://127.0.0.1:4222', 'Of the nats-server.')
  flags.DEFINE_integer('client', 0, 'Id of this client.')
  flags.DEFINE_string('workdir', None, 'Directory.', required=True)
  flags.DEFINE_float('step_s', 0.5, 'Seconds of a step.', lower_bound=0)
  logging.set_verbosity(logging.WARNING)
  app.run(main)
