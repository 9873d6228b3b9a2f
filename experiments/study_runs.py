"""Runs the settings of a study, and makes their table and picture.

The parts of `experiments.study`; `experiments.paper` adds published values.
"""

import concurrent.futures
import os
import pathlib
import platform
import queue
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments import report, studies
from experiments.config import UsageError
from experiments.workdir import Workdir, check_same, read_config
from jaxfl import metrics


def command(settings: dict[str, Any], seed: int) -> list[str]:
  """The arguments of `experiments.train`."""
  return [f'--{k}={v}' for k, v in (settings | {'seed': seed}).items()]


def execute(arguments: Sequence[str], workdir: pathlib.Path, core) -> None:
  """Runs, goes on with, or keeps one run."""
  if (workdir / 'summary.json').exists():
    check_same(Workdir(workdir), arguments)
    return
  resume = ['--resume'] if (workdir / 'config.json').exists() else []
  program = [sys.executable, '-m', 'experiments.train', *arguments]
  process = subprocess.Popen(
    [*program, f'--workdir={workdir}', *resume],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    preexec_fn=None
    if core is None
    else lambda: os.sched_setaffinity(0, {core}),
  )
  output, _ = process.communicate()
  if process.returncode:
    raise RuntimeError(f'{shlex.join(program)}:\n{output}')


def execute_all(runs: dict[tuple[str, int], tuple], jobs: int) -> None:
  """Runs all, `jobs` at once; says which are done."""
  cores: queue.Queue = queue.Queue()
  known = hasattr(os, 'sched_getaffinity')  # not on macOS
  own = sorted(os.sched_getaffinity(0)) if known and jobs > 1 else [None] * jobs
  for core in own[:jobs]:
    cores.put(core)

  def one(item):
    key, (arguments, workdir) = item
    core = cores.get()
    try:
      execute(arguments, workdir, core)
    finally:
      cores.put(core)
    return key

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    for done, key in enumerate(pool.map(one, runs.items()), 1):
      print(f'{done}/{len(runs)}: {key[0]}, seed {key[1]}', flush=True)


def curve(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The evaluations of a run, in order."""
  points: dict[int, dict[str, Any]] = {}
  for row in metrics.read(workdir / 'metrics.jsonl'):
    totals = {
      'round': row.round,
      'bytes_up': row.bytes_up,
      'bytes_down': row.bytes_down,
      'forwards': row.forwards,
      'backwards': row.backwards,
      'wall_s': row.wall_s,
    }
    points.setdefault(row.round, totals)[row.metric] = row.value
  return [points[r] for r in sorted(points)]


def summarise(runs: list[dict[str, Any]], names: Sequence[str]) -> dict:
  """Mean and standard deviation over the seeds, of the last and best values."""
  result = {}
  for name in names:
    pick = min if name in metrics.LOWER_IS_BETTER else max
    columns = {
      'last': [run['curve'][-1][name] for run in runs],
      'best': [pick(point[name] for point in run['curve']) for run in runs],
    }
    result[name] = {
      which: {
        'mean': statistics.fmean(values),
        'std': statistics.stdev(values) if len(values) > 1 else None,
        'values': values,
      }
      for which, values in columns.items()
    }
  return result


def run(
  name: str,
  given: Mapping[str, str | None],
  *,
  seeds: int | None = None,
  jobs: int = 1,
  runs: str = 'runs',
) -> dict[str, Any]:
  """Runs a study.

  Args:
    name: of the study, a key of `studies.STUDIES`.
    given: data_dir and model, or None for what the user did not give.
    seeds: how many; by default, the study's own number.
    jobs: runs at once.
    runs: directory of the runs; what is finished there is kept.

  Returns:
    The commands, the curve of every run, mean and standard deviation over
    seeds; JSON can hold it.

  Raises:
    UsageError: if there is no such study, or it needs what is not given.
    RuntimeError: if a run fails, with its output.
  """
  if name not in studies.STUDIES:
    raise UsageError(
      f'there is no study {name}; studies are {", ".join(studies.STUDIES)}'
    )
  study = studies.STUDIES[name]
  if lack := [k for k in study.needs if given.get(k) is None]:
    raise UsageError(f'study {name} needs --{lack[0]}')
  own = {k: given[k] for k in study.needs}
  root = pathlib.Path(runs) / name
  wanted = {
    (label, seed): (
      command(settings | own, seed),
      root / f'{label.replace(" ", "_")}-{seed}',
    )
    for label, settings in study.settings.items()
    for seed in range(seeds or study.seeds)
  }
  execute_all(wanted, jobs)
  # what the commands look like elsewhere
  places = {k: k.upper() for k in study.needs}
  result: dict[str, Any] = {
    'study': name,
    'title': study.title,
    'metric': study.metrics[0],
    'metrics': study.metrics,
    'x': study.x,
    'log_x': study.log_x,
    'jax': jax.__version__,
    'python': platform.python_version(),
    'jobs': jobs,
    'settings': {},
  }
  for label, settings in study.settings.items():
    mine = {
      seed: workdir
      for (other, seed), (_, workdir) in wanted.items()
      if other == label
    }
    found = [{'seed': seed, 'curve': curve(mine[seed])} for seed in mine]
    arguments = shlex.join(command(settings | places, 0))
    result['settings'][label] = {
      'command': f'python -m experiments.train {arguments}',
      'num_clients': read_config(Workdir(mine[0])).num_clients,
      'summary': summarise(found, study.metrics),
      'runs': found,
    }
  return result


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """The main metric against what the study asks for, one colour per setting."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  panels = result['x']
  figure, axes = plt.subplots(
    1,
    len(panels),
    figsize=(4.8 * len(panels), 3.8),
    sharey=True,
    layout='constrained',
    squeeze=False,
  )
  for axis, name in zip(axes[0], panels, strict=True):
    for i, (label, entry) in enumerate(result['settings'].items()):
      for run in entry['runs']:
        points = [p for p in run['curve'] if p[name] > 0 or not result['log_x']]
        axis.plot(
          [p[name] for p in points],
          [p[result['metric']] for p in points],
          color=f'C{i}',
          lw=1.2,
          label=label if run is entry['runs'][0] else None,
        )
    axis.set_xlabel(name.replace('_', ' '))
    if result['log_x']:
      report.log_x(axis)
    axis.grid(alpha=0.3)
  axes[0][0].set_ylabel(f'held-out {result["metric"].replace("_", " ")}')
  axes[0][0].legend(frameon=False, fontsize=8)
  figure.suptitle(result['title'], fontsize=10)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def show(result: dict[str, Any]) -> None:
  """Prints the table."""
  table = Table(title=result['title'])
  table.add_column('setting')
  for name in result['metrics']:
    table.add_column(f'{name}, last (best)', justify='right')
  for name in ('bytes up', 'forwards', 'backwards', 'seconds'):
    table.add_column(name, justify='right')
  text = lambda s: (
    f'{s["mean"]:.4f}' + ('' if s['std'] is None else f' +- {s["std"]:.4f}')
  )
  for label, entry in result['settings'].items():
    last = entry['runs'][0]['curve'][-1]
    values = [
      f'{text(found["last"])} ({text(found["best"])})'
      for found in (entry['summary'][name] for name in result['metrics'])
    ]
    totals = [
      f'{last[k]:,.0f}' for k in ('bytes_up', 'forwards', 'backwards', 'wall_s')
    ]
    table.add_row(label, *values, *totals)
  Console(width=150).print(table)
