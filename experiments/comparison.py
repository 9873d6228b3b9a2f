"""Runs side by side, see `experiments.compare`."""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from experiments import report
from experiments.config import UsageError
from experiments.workdir import Workdir
from jaxfl import metrics


class Run(NamedTuple):
  """A run by its name, with its rows of one metric, in the order of rounds."""

  name: str
  rows: list[metrics.Row]


def read(directories: Sequence[str], metric: str | None = None) -> list[Run]:
  """The runs in directories.

  Args:
    directories: of runs.
    metric: to compare; by default the first run's main one.

  Raises:
    UsageError: if a directory has no run, or its run no such metric.
    ValueError: if its metrics are damaged.
  """
  runs = []
  for name in _names(directories):
    path = Workdir(directories[len(runs)]).metrics
    if not path.exists():
      raise UsageError(f'{path}: no run there, or it was never evaluated')
    rows = metrics.read(path)
    if not rows:
      raise UsageError(f'{path}: it has no rows')
    metric = metric or rows[0].metric
    chosen = [row for row in rows if row.metric == metric]
    if not chosen:
      there = ', '.join(dict.fromkeys(row.metric for row in rows))
      raise UsageError(f'{path}: no metric {metric!r}; it has {there}')
    runs.append(Run(name, chosen))
  tasks = {run.rows[0].task for run in runs}
  if len(tasks) > 1:
    raise UsageError(f'runs of different tasks: {", ".join(sorted(tasks))}')
  return runs


def _names(directories: Sequence[str]) -> list[str]:
  """The paths without what all of them share."""
  paths = [os.path.abspath(d) for d in directories]
  if len(set(paths)) < len(paths):
    raise UsageError('a directory is given twice')
  shared = os.path.commonpath([os.path.dirname(p) for p in paths])
  return [os.path.relpath(p, shared) for p in paths]


def table(runs: Sequence[Run]) -> Table:
  """Where runs have got to."""
  metric = runs[0].rows[0].metric
  result = Table(title=f'held-out {metric.replace("_", " ")}')
  result.add_column('run', overflow='fold')
  result.add_column('method')
  for name in (
    'rounds', 'first', 'last', 'best', 'after', 'bytes up', 'bytes down',
    'forwards',
  ):  # fmt: skip
    result.add_column(name, justify='right')
  result.add_column('digest')
  for run in runs:
    first, last = run.rows[0], run.rows[-1]
    best = metrics.best(run.rows, metric)
    result.add_row(
      run.name,
      last.method,
      str(last.round),
      *(f'{row.value:.4f}' for row in (first, last, best)),
      str(best.round),
      report.amount(last.bytes_up),
      report.amount(last.bytes_down),
      f'{last.forwards:,}',
      last.digest[:12],
    )
  return result


def reached(run: Run, target: float) -> metrics.Row | None:
  """The first evaluation at the target or better; None if there is none."""
  sign = 1 if run.rows[0].metric in metrics.LOWER_IS_BETTER else -1
  good = (
    row
    for row in run.rows
    if math.isfinite(row.value) and sign * row.value <= sign * target
  )
  return next(good, None)


def to_target(runs: Sequence[Run], target: float) -> Table:
  """What runs had spent when they first were at the target."""
  metric = runs[0].rows[0].metric
  result = Table(title=f'to {metric.replace("_", " ")} {target:g}')
  result.add_column('run', overflow='fold')
  for name in ('rounds', 'bytes up', 'bytes down', 'forwards', 'seconds'):
    result.add_column(name, justify='right')
  for run in runs:
    row = reached(run, target)
    if row is None:
      result.add_row(run.name, *'-----')
      continue
    result.add_row(
      run.name,
      str(row.round),
      report.amount(row.bytes_up),
      report.amount(row.bytes_down),
      f'{row.forwards:,}',
      f'{row.wall_s:.1f}',
    )
  return result


def draw(
  runs: Sequence[Run], targets: Sequence[float], path: pathlib.Path
) -> None:
  """Draws the metric against bytes and forward passes.

  Args:
    runs: from `read`.
    targets: drawn as lines.
    path: of the file to write; its suffix says which format.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  panels = {
    'bytes up, all clients': lambda row: row.bytes_up,
    'bytes up and down, all clients': lambda row: row.bytes_up + row.bytes_down,
    'forward passes, all clients': lambda row: row.forwards,
  }
  figure, axes = plt.subplots(
    1, 3, figsize=(12, 3.8), sharey=True, layout='constrained'
  )
  for axis, (label, cost) in zip(axes, panels.items(), strict=True):
    for run in runs:
      rows = [row for row in run.rows if cost(row) > 0]  # the axis has no zero
      axis.plot(
        [cost(row) for row in rows],
        [row.value for row in rows],
        marker='.',
        label=run.name,
      )
    for target in targets:
      axis.axhline(target, color='0.6', ls='--', lw=1)
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    if axis.lines and any(len(line.get_xdata()) for line in axis.lines):
      report.log_x(axis)
  axes[0].set_ylabel(f'held-out {runs[0].rows[0].metric.replace("_", " ")}')
  axes[0].legend(frameon=False)
  figure.suptitle(runs[0].rows[0].task)
  figure.savefig(path, dpi=120)
  plt.close(figure)
