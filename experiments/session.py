"""A live run on disk: base, log, snapshots, metrics; opened anew or again.

Of several processes, the first alone reads and writes the run's directory; the
others get from it what they need.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from experiments import build, guarantee, report, run_log
from experiments import problem as problem_lib
from experiments.config import Config, UsageError
from experiments.workdir import Workdir, write_json
from jaxfl import adapters, checkpoint, metrics, noise
from jaxfl import digest as digest_lib
from jaxfl import method as method_lib
from jaxfl.runtime import distributed, mesh_clients, simulate
from jaxfl.runtime import mesh as mesh_lib

TOTALS = (
  'bytes_up', 'bytes_down', 'forwards', 'backwards', 'projected_grads'
)  # fmt: skip


@contextlib.contextmanager
def open_session(
  config: Config,
  workdir: Workdir,
  method: method_lib.Method,
  problem: problem_lib.Problem,
  mesh: Mesh | None = None,
) -> Iterator['Session']:
  """Starts the run of a directory, or finds where it was left.

  Args:
    config: resolved settings.
    workdir: claimed by `workdir.claim`.
    method: the method.
    problem: data and model, neither of which a run can change.
    mesh: where clients run; by default, in the simulator.

  Yields:
    The session; log and snapshots are on disk when the context ends.

  Raises:
    UsageError: if the directory's log or base are of another run or damaged, or
      if processes don't run the same.
  """
  header = run_log.header_of(config, method, problem)
  run_log.check_alike(header)
  log = snapshots = None
  with contextlib.ExitStack() as stack:
    with distributed.together(UsageError):
      try:
        if mesh is not None:
          local = jax.eval_shape(method.init_local, problem.params)
          mesh_clients.check_private(mesh, local)
        if distributed.is_first():
          log = stack.enter_context(run_log.open_log(header, workdir, problem))
          snapshots = checkpoint.Snapshots(workdir.snapshots)
          stack.callback(snapshots.close)
      except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    yield Session(config, workdir, method, problem, mesh, log, snapshots)


class Session:
  """The run between two rounds.

  In other processes than the first, nothing is written.

  Attributes:
    round: rounds done.
    state: the public state after them.
    log: None in other processes than the first.
    ledger: totals since the start: bytes, passes, seconds.
  """

  def __init__(self, config, workdir, method, problem, mesh, log, snapshots):
    self.config, self.workdir, self.log = config, workdir, log
    self._method, self._snapshots = method, snapshots
    self._problem, base = problem, problem.params
    compile_method = simulate.compile_method
    if mesh is not None:
      compile_method = functools.partial(mesh_lib.compile_method, mesh=mesh)
    self._programs = compile_method(
      method,
      build=lambda frozen: build.build_method(
        config,
        functools.partial(problem.loss_fn, frozen),
        problem.task.num_examples,
      ),
      frozen=problem.frozen,
      donate=True,
    )
    # arrays of its own, as the first round takes them
    self.state = jax.tree.map(jnp.copy, method.init(base))
    self.round = 0
    self.ledger: dict[str, Any] = dict.fromkeys(TOTALS, 0) | {'wall_s': 0.0}
    self._local = simulate.init_local(method, base, config.num_clients)
    if snapshots is not None:
      self._restore(snapshots)
    self.round = distributed.share_int(self.round)
    if self.round:
      self.state = distributed.share(self.state)
    self._shared_log = distributed.SharedLog(log)

  def _restore(self, snapshots):
    """Goes back to the newest usable snapshot, if there is one."""
    found = snapshots.newest(self.state, self._local, self.log)
    if found is not None and self._keep_metrics(found.round):
      self.round, self.state, self._local, self.ledger = found
    else:  # from the start: the log has all the rounds there were
      self.workdir.metrics.unlink(missing_ok=True)
    if self.log.num_rounds:
      logging.info(
        'resuming: snapshot of round %d, log of %d rounds',
        self.round,
        self.log.num_rounds,
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
    task, base, key = self._problem.task, self._problem.params, None
    prepare = self._method.prepare
    if prepare is None:
      batch_fn = lambda round, client: task.batches(
        self.config.seed,
        client,
        round,
        self._method.num_batches,
        self.config.batch_size,
      )
    else:
      key = noise.NoiseKey.fresh(run=str(self.workdir.path))
      batch_fn = lambda round, client: prepare(
        base, task.whole(client), round, client, key
      )
    for done in simulate.simulate(
      self._method,
      self.state,
      batch_fn,
      population,
      num_rounds=self.config.num_rounds,
      first_round=self.round,
      local=self._local,
      log=self._shared_log,
      block_size=self.config.block_size,
      programs=self._programs,
      noise=key,
    ):
      self.round, self.state, self._local = done.round, done.state, done.local
      for name in TOTALS:
        self.ledger[name] += getattr(done, name)
      yield done

  def evaluate(self, task: str, wall_s: float) -> dict[str, float]:
    """Evaluates the weights and appends the values to `metrics.jsonl`."""
    if self.log is None:
      return {}
    values = self._problem.evaluate(mesh_lib.on_one_device(self.state.params))
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
    return values

  def asked(self, stop: bool) -> bool:
    """Whether some process is asked to stop; compares the replicas.

    Raises:
      FloatingPointError: if replicas differ.
    """
    if jax.process_count() == 1:
      return stop
    own = [digest_lib.digest(self.state.params), stop]
    rows = [json.loads(x) for x in distributed.exchange(json.dumps(own))]
    for process, (digest, _) in enumerate(rows):
      if digest != rows[0][0]:
        raise FloatingPointError(
          f'after round {self.round} the weights of process {process} are not'
          f' those of process 0: the updates of method {self.config.method} are'
          ' not exact on these devices'
        )
    return any(stop for _, stop in rows)

  def snapshot(self, wall_s: float) -> None:
    """Saves a snapshot in the background."""
    if self.log is None:
      return
    self.ledger['wall_s'] = wall_s
    self._snapshots.save(
      checkpoint.Snapshot(
        self.round, self.state, self._local, dict(self.ledger)
      ),
      self.log,
    )

  def finish(self, task: str) -> dict[str, Any] | None:
    """Writes `summary.json` and `curve.png`; returns the summary."""
    if self.log is None:
      return None
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
    if self._method.private:
      summary['epsilon_spent'] = guarantee.spent(self.config, self.round)
    write_json(self.workdir.summary, summary)
    report.curve(rows, rows[0].metric, self.workdir.curve)
    return summary


def _best(rows, name) -> dict[str, float]:
  """The best value of a metric in a run, and after which round it was."""
  row = metrics.best(rows, name)
  return {'value': row.value, 'round': row.round}
