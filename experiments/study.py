"""Runs a study: several settings, several seeds, one table and one picture.

    python -m experiments.study --study=minilm_head --data_dir=DATA

Every run is a command of `experiments.train` in a process of its own, under
`runs/STUDY/`; runs that are finished there are not made again, runs that were
stopped go on. The result is `experiments/results/STUDY.json` (the commands, the
curve of every run, mean and standard deviation over seeds) and `STUDY.png`. The
studies are those of `experiments.studies`.
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
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments import studies
from experiments.workdir import Workdir, check_same, write_json
from jaxfl import metrics

_STUDY = flags.DEFINE_enum(
  'study', None, sorted(studies.STUDIES), 'Which study.', required=True
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where the task files are.')
_MODEL = flags.DEFINE_string(
  'model', None, 'Directory of the model, for studies that ask for one.'
)
_SEEDS = flags.DEFINE_integer(
  'seeds', None, "Seeds 0, 1, ...; the study's own.", lower_bound=1
)
_JOBS = flags.DEFINE_integer(
  'jobs', 1, 'Runs at once, each on its own core.', lower_bound=1
)
_RUNS = flags.DEFINE_string('runs', 'runs', 'Directory of the runs.')
_OUT = flags.DEFINE_string('out', 'experiments/results', 'Where results go.')


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
      axis.set_xscale('log')
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


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  name = _STUDY.value
  study = studies.STUDIES[name]
  given = {'data_dir': _DATA_DIR.value, 'model': _MODEL.value}
  if lack := [k for k in study.needs if given[k] is None]:
    sys.exit(f'error: study {name} needs --{lack[0]}')
  own = {k: given[k] for k in study.needs}
  root = pathlib.Path(_RUNS.value) / name
  runs = {
    (label, seed): (
      command(settings | own, seed),
      root / f'{label.replace(" ", "_")}-{seed}',
    )
    for label, settings in study.settings.items()
    for seed in range(_SEEDS.value or study.seeds)
  }
  try:
    execute_all(runs, _JOBS.value)
  except RuntimeError as error:
    sys.exit(f'error: {error}')
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
    'jobs': _JOBS.value,
    'settings': {},
  }
  for label, settings in study.settings.items():
    found = [
      {'seed': seed, 'curve': curve(workdir)}
      for (other, seed), (_, workdir) in runs.items()
      if other == label
    ]
    arguments = shlex.join(command(settings | places, 0))
    result['settings'][label] = {
      'command': f'python -m experiments.train {arguments}',
      'summary': summarise(found, study.metrics),
      'runs': found,
    }
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / f'{name}.json', result)
  draw(result, out / f'{name}.png')
  show(result)
  print(f'{out / name}.json and .png written')


if __name__ == '__main__':
  app.run(main)
