"""Runs an experiment in a directory: what `experiments.train` does."""

import math
import pathlib
import time
from typing import Any

from absl import logging

from experiments import build, problem, progress, report, session
from experiments import workdir as workdir_lib
from experiments.config import Config

_NOT_FINITE = (
  'round %d: a loss is not finite; such contributions are rejected by all. If'
  ' it lasts, lower the learning rate.'
)


def run(config: Config, directory: str | pathlib.Path) -> dict[str, Any]:
  """Runs, or goes on with, an experiment.

  Args:
    config: resolved settings, see `build.resolve`.
    directory: of the run; if it holds a run, the one to go on with.

  Returns:
    The summary, as written to `summary.json`.

  Raises:
    UsageError: if settings and directory, log or base do not fit.
  """
  workdir = workdir_lib.Workdir(directory)
  method = build.build_method(config, build.no_loss)
  found = problem.build(config)
  task = found.task
  population = build.build_population(config, method, task.num_examples)
  if found.notes:
    print(found.notes)
  workdir_lib.claim(workdir, config)
  started = time.monotonic()
  with session.open_session(config, workdir, method, found) as live:
    past = live.ledger['wall_s']
    wall_s = lambda: past + time.monotonic() - started

    if live.round == 0:
      live.record(task.name, found.evaluate(live.state.params), wall_s())
    with (
      progress.stop_on_signals() as stop,
      progress.bar(config.num_rounds, live.round) as advance,
    ):
      shown = {}
      for done in live.rounds(population):
        last = done.round == config.num_rounds
        values = {}
        if last or done.round % config.eval_every == 0:
          values = found.evaluate(done.state.params)
          live.record(task.name, values, wall_s())
        if last or stop.asked or done.round % config.snapshot_every == 0:
          live.snapshot(wall_s())
        if done.loss is not None:
          shown['loss'] = done.loss
          if not math.isfinite(done.loss):
            logging.log_first_n(logging.WARNING, _NOT_FINITE, 1, done.round)
        shown |= values
        text = ''.join(f'{k} {v:.3f}  ' for k, v in shown.items())
        advance(
          done.round, f'{text}up {report.amount(live.ledger["bytes_up"])}'
        )
        if stop.asked and not last:
          raise KeyboardInterrupt
    return live.finish(task.name)
