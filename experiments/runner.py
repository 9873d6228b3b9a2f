"""Runs an experiment in a directory: what `experiments.train` does."""

import contextlib
import math
import pathlib
import time
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from experiments import (
  board,
  build,
  guarantee,
  problem,
  progress,
  report,
  session,
)
from experiments import workdir as workdir_lib
from experiments.config import Config, UsageError
from jaxfl.runtime import distributed

_NOT_FINITE = (
  'round %d: a loss is not finite; such contributions are rejected by all. If'
  ' it lasts, lower the learning rate.'
)


class Stopped(KeyboardInterrupt):
  """The user has asked to stop; all processes stop after the same round."""


def run(
  config: Config,
  directory: str | pathlib.Path,
  mesh: Mesh | None = None,
  tensorboard: bool = False,
) -> dict[str, Any] | None:
  """Runs, or goes on with, an experiment.

  Args:
    config: resolved settings, see `defaults.resolve`.
    directory: of the run; if it holds a run, the one to go on with. Used by the
      first process only.
    mesh: where clients run; by default, in the simulator. The result is the
      same, see `jaxfl.runtime.mesh`.
    tensorboard: whether to write for TensorBoard, too.

  Returns:
    The summary, as written to `summary.json`; None in other processes than the
    first.

  Raises:
    UsageError: if settings and directory, log or base do not fit.
    FloatingPointError: if weights leave their range, or replicas differ.
    Stopped: if the user has asked for it.
  """
  workdir = workdir_lib.Workdir(directory)
  first = distributed.is_first()
  with distributed.together(UsageError):
    if tensorboard:
      board.check()
    method = build.build_method(config, build.no_loss)
    found = problem.build(config)
    private = method.private
    if private and found.task.whole is None:
      raise UsageError(
        f'method {config.method} needs all examples of a client at once, which'
        f' dataset {config.dataset} does not give; use features, images or'
        ' tables'
      )
    num_examples = found.task.num_examples
    method = build.build_method(config, build.no_loss, num_examples)
    build.check_params(method, found.params)
    population = build.build_population(config, method, num_examples)
  with distributed.together(UsageError):
    if first:
      workdir_lib.claim(workdir, config)
  if found.notes and first and not private:  # they count labels
    print(found.notes)
  if private:
    promise = guarantee.describe(config, num_examples)
    workdir_lib.write_json(workdir.privacy, promise)
    print(guarantee.text(promise))
  task = found.task.name
  started = time.monotonic()
  with session.open_session(config, workdir, method, found, mesh) as live:
    past = live.ledger['wall_s']
    wall_s = lambda: past + time.monotonic() - started

    start = live.evaluate(task, wall_s()) if live.round == 0 else {}
    with (
      board.opened(workdir.tensorboard, live.round)
      if tensorboard and first
      else contextlib.nullcontext(lambda round, values: None) as show,
      progress.stop_on_signals() as stop,
      progress.bar(config.num_rounds, live.round)
      if first
      else contextlib.nullcontext(lambda round, text: None) as advance,
    ):
      show(live.round, start)
      shown = {}
      for done in live.rounds(population):
        last = done.round == config.num_rounds
        values = {}
        if last or done.round % config.eval_every == 0:
          values = live.evaluate(task, wall_s())
        due = last or done.round % config.snapshot_every == 0
        # one process can stop after any round, several when they meet
        stops = stop.asked
        if jax.process_count() > 1:
          stops = due and live.asked(stop.asked)
        if due or stops:
          live.snapshot(wall_s())
        if done.loss is not None:
          shown['loss'] = done.loss
          if not math.isfinite(done.loss):
            logging.log_first_n(logging.WARNING, _NOT_FINITE, 1, done.round)
        shown |= values
        train = {} if done.loss is None else {'train_loss': done.loss}
        totals = {k: live.ledger[k] for k in ('bytes_up', 'bytes_down')}
        show(done.round, values | train | totals)
        text = ''.join(f'{k} {v:.3f}  ' for k, v in shown.items())
        advance(
          done.round, f'{text}up {report.amount(live.ledger["bytes_up"])}'
        )
        if stops and not last:
          raise Stopped
    return live.finish(task)
