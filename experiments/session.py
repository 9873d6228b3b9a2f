"""A live run on disk: base, log, snapshots, metrics; opened anew or again."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

from absl import logging

from experiments import build, report
from experiments import problem as problem_lib
from experiments.config import Config, UsageError
from experiments.workdir import Workdir, write_json
from jaxfl import adapters, checkpoint, keys, metrics, wire
from jaxfl import digest as digest_lib
from jaxfl import log as log_lib
from jaxfl import method as method_lib
from jaxfl.models import native
from jaxfl.runtime import simulate

DIGESTS = ('data_digest', 'frozen_digest')  # in a log beside the settings
TOTALS = (
  'bytes_up', 'bytes_down', 'forwards', 'backwards', 'projected_grads'
)  # fmt: skip


@contextlib.contextmanager
def open_session(
  config: Config,
  workdir: Workdir,
  method: method_lib.Method,
  problem: problem_lib.Problem,
) -> Iterator['Session']:
  """Starts the run of a directory, or finds where it was left.

  Args:
    config: resolved settings.
    workdir: claimed by `workdir.claim`.
    method: the method.
    problem: data and model, neither of which a run can change.

  Yields:
    The session; log and snapshots are on disk when the context ends.

  Raises:
    UsageError: if the directory's log or base are of another run or damaged.
  """
  try:
    log = _open_log(config, workdir, method, problem)
  except (ValueError, OSError) as error:
    raise UsageError(str(error)) from error
  snapshots = checkpoint.Snapshots(workdir.snapshots)
  try:
    yield Session(config, workdir, method, problem, log, snapshots)
  finally:
    snapshots.close()
    log.close()


def settings_of(header: log_lib.Header) -> dict[str, Any]:
  """The settings that a run was started with."""
  return {k: v for k, v in header.config.items() if k not in DIGESTS}


def _open_log(config, workdir, method, problem):
  base = problem.params
  digests = dict.fromkeys(DIGESTS, '') | {
    'data_digest': problem.task.digest,
    'frozen_digest': digest_lib.digest(problem.frozen),
  }
  header = log_lib.Header(
    spec=keys.SPEC,
    base_digest=digest_lib.digest(base),
    config=dataclasses.asdict(config) | digests,
    params=wire.describe(base),
    message=wire.describe(method.message(base)),
  )
  if not workdir.log.exists():
    if problem.shape is not None:
      write_json(workdir.model, native.to_json(problem.shape))
    checkpoint.save_base(workdir.base, base)
    checkpoint.load_base(workdir.base, header.params, header.base_digest)
    return log_lib.RoundLog.create(workdir.log, header)
  if problem.shape is not None:
    _check_shape(workdir, problem.shape)
  log = log_lib.RoundLog.open(workdir.log, 'a')
  there, here = (
    dataclasses.asdict(h) | dict(h.config) for h in (log.header, header)
  )
  different = [k for k in here if k != 'config' and there.get(k) != here[k]]
  if different:
    log.close()
    raise UsageError(
      f'{workdir.log} is the log of another run: it differs in'
      f' {", ".join(different)}'
    )
  return log


def _check_shape(workdir, shape):
  """Equal weights in a model of another shape are another model."""
  try:
    there = native.from_json(json.loads(workdir.model.read_text()))
  except FileNotFoundError:
    write_json(workdir.model, native.to_json(shape))
    return
  except ValueError as error:
    raise UsageError(f'{workdir.model}: {error}') from error
  different = [
    f.name
    for f in dataclasses.fields(shape)
    if getattr(there, f.name) != getattr(shape, f.name)
  ]
  if different:
    raise UsageError(
      f'{workdir.model} is the shape of another model: it differs in'
      f' {", ".join(different)}'
    )


class Session:
  """The run between two rounds.

  Attributes:
    round: rounds done.
    state: the public state after them.
    ledger: totals since the start: bytes, passes, seconds.
  """

  def __init__(self, config, workdir, method, problem, log, snapshots):
    self.config, self.workdir, self.log = config, workdir, log
    self._method, self._snapshots = method, snapshots
    self._problem, base = problem, problem.params
    self._programs = simulate.compile_method(
      method,
      build=lambda frozen: build.build_method(
        config, functools.partial(problem.loss_fn, frozen)
      ),
      frozen=problem.frozen,
    )
    self.state = method.init(base)
    self.round = 0
    self.ledger: dict[str, Any] = dict.fromkeys(TOTALS, 0) | {'wall_s': 0.0}
    self._local = simulate.init_local(method, base, config.num_clients)
    found = snapshots.newest(self.state, self._local, log)
    if found is not None and self._keep_metrics(found.round):
      self.round, self.state, self._local, self.ledger = found
    else:  # from the start: the log has all the rounds there were
      workdir.metrics.unlink(missing_ok=True)
    if log.num_rounds:
      logging.info(
        'resuming: snapshot of round %d, log of %d rounds',
        self.round,
        log.num_rounds,
      )

  def _keep_metrics(self, round: int) -> bool:
    """Drops rows after a round; False if there are no usable rows."""
    try:
      metrics.keep_until(self.workdir.metrics, round)
    except (OSError, ValueError) as error:
      logging.warning('metrics are made anew from the log: %s', error)
      return False
    return True

  def rounds(self, population) -> Iterator[simulate.Round]:
    """Runs the rounds that are left."""
    batch_fn = lambda round, client: self._problem.task.batches(
      self.config.seed,
      client,
      round,
      self._method.num_batches,
      self.config.batch_size,
    )
    for done in simulate.simulate(
      self._method,
      self.state,
      batch_fn,
      population,
      num_rounds=self.config.num_rounds,
      first_round=self.round,
      local=self._local,
      log=self.log,
      block_size=self.config.block_size,
      programs=self._programs,
    ):
      self.round, self.state, self._local = done.round, done.state, done.local
      for name in TOTALS:
        self.ledger[name] += getattr(done, name)
      yield done

  def record(self, task: str, values: dict[str, float], wall_s: float) -> None:
    """Appends the values of an evaluation to `metrics.jsonl`."""
    self.ledger['wall_s'] = wall_s
    shared = {k: self.ledger[k] for k in TOTALS if k != 'projected_grads'}
    digest = digest_lib.digest(self.state.params)
    metrics.append(
      self.workdir.metrics,
      [
        metrics.Row(
          method=self.config.method,
          task=task,
          seed=self.config.seed,
          round=self.round,
          metric=name,
          value=value,
          wall_s=round(wall_s, 3),
          digest=digest,
          **shared,
        )
        for name, value in values.items()
      ],
    )

  def snapshot(self, wall_s: float) -> None:
    """Saves a snapshot in the background."""
    self.ledger['wall_s'] = wall_s
    self._snapshots.save(
      checkpoint.Snapshot(
        self.round, self.state, self._local, dict(self.ledger)
      ),
      self.log,
    )

  def finish(self, task: str) -> dict[str, Any]:
    """Writes `summary.json` and `curve.png`; returns the summary."""
    rows = metrics.read(self.workdir.metrics)
    at = lambda r: {x.metric: x.value for x in rows if x.round == r}
    names = [row.metric for row in rows if row.round == 0]
    summary = {
      'method': self.config.method,
      'task': task,
      'seed': self.config.seed,
      'num_clients': self.config.num_clients,
      'num_params': adapters.count(self._problem.params),
      'num_frozen': adapters.count(self._problem.frozen),
      'rounds': self.round,
      'before': at(0),
      'after': at(self.round),
      'best': {name: _best(rows, name) for name in names},
      'digest': digest_lib.digest(self.state.params),
      'base_digest': self.log.header.base_digest,
      'log_digest': self.log.digest,
      'bytes_log': self.workdir.log.stat().st_size,
      **self.ledger,
    }
    write_json(self.workdir.summary, summary)
    report.curve(rows, rows[0].metric, self.workdir.curve)
    return summary


def _best(rows, name) -> dict[str, float]:
  """The best value of a metric in a run, and after which round it was."""
  row = metrics.best(rows, name)
  return {'value': row.value, 'round': row.round}
