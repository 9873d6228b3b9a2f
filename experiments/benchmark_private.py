"""Measures a round of DIFF2 beside the gradients of DP-GD.

    python -m experiments.benchmark_private

Takes about two minutes on one idle core, to which it pins itself, and writes
experiments/results/benchmark_private.json. The shapes are those of two tables
that private methods are measured on, filled with random numbers: ten clients,
one hidden layer of ten softplus units. Seconds are of CPU, so that other work
on the core counts less; medians over repeats, operations taking turns:

  * `gradient`: of the mean loss over all examples, without privacy, all at
    once; the floor.
  * `dp_gd gradient`: every client's sum of clipped gradients, client by client.
  * `dp_gd round`: the same, release and server step.
  * `diff2 difference`: every client's sum of clipped differences, two gradients
    for every example.
  * `diff2 round`: the same, release and server step; a round in which DIFF2
    releases a difference. It should cost at most 1.3 times two of `dp_gd
    gradient`: differences, their clip, noise and the step come on top of what
    DP-GD needs for two gradients.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

if hasattr(os, 'sched_setaffinity'):  # before JAX counts the cores
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
from absl import app, flags

from experiments.papers import diff2_runs, diff2_tasks
from jaxfl import noise
from jaxfl.data import tables

_OUT = flags.DEFINE_string(
  'out',
  os.path.join(os.path.dirname(__file__), 'results', 'benchmark_private.json'),
  'JSON file for the results.',
)
_REPEATS = flags.DEFINE_integer('repeats', 9, 'Repeats of every measurement.')

SHAPES = {'california_housing': (16_512, 8), 'blogfeedback': (52_397, 280)}
LIMIT = 1.3  # of a round of DIFF2, over two gradients of DP-GD
_FULL = diff2_runs.Setting(1000, 0.1, 1.0)
_DIFFERENCE = _FULL._replace(clip_norm_diff=10.0, restart_interval=20)


def task_of(rows: int, features: int) -> diff2_tasks.Task:
  """A table of that shape."""
  rng = np.random.default_rng(0)
  draw = lambda count: (
    rng.uniform(-1, 1, (count, features)).astype(np.float32),
    rng.random(count, np.float32),
  )
  table = tables.Table(*draw(rows), *draw(10), (), {})
  return diff2_tasks.of_table('random', table)


def operations(task: diff2_tasks.Task) -> dict[str, Callable[[], Any]]:
  """Compiled operations by name; each waits for its result."""
  programs = diff2_runs.Programs(task)
  plain = jax.jit(jax.grad(task.loss_fn))
  params = task.init(0)
  found: dict[str, Callable[[], Any]] = {
    'gradient': lambda: jax.block_until_ready(plain(params, task.train))
  }
  for name, part, setting in (
    ('dp_gd', 'gradient', _FULL),
    ('diff2', 'difference', _DIFFERENCE),
  ):
    step = diff2_runs.Round(programs, setting, 3.0)
    # the round after a restart
    state = step.all(step.method.init(params), 0, fresh())
    found[f'{name} {part}'] = lambda step=step, state=state: step.messages(
      state
    )
    found[f'{name} round'] = lambda step=step, state=state: (
      jax.block_until_ready(step.all(state, 1, fresh()))
    )
  return found


def fresh() -> noise.NoiseKey:
  """A key for one round: a round's noise is drawn once."""
  return noise.NoiseKey.fresh(run='benchmark')


def measure(task: diff2_tasks.Task, repeats: int) -> dict[str, list[float]]:
  """Seconds of CPU of every operation, which take turns."""
  runs = operations(task)
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for repeat in range(repeats + 1):
    for name, run in runs.items():
      start = time.process_time()
      run()
      if repeat:  # the first touches the memory
        seconds[name].append(time.process_time() - start)
  return seconds


def ratio(seconds: dict[str, list[float]]) -> float:
  """A round of DIFF2 over two gradients of DP-GD: the median of turns."""
  pairs = zip(seconds['diff2 round'], seconds['dp_gd gradient'], strict=True)
  return statistics.median(a / (2 * b) for a, b in pairs)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  if _REPEATS.value < 1:
    raise app.UsageError(f'--repeats must be >= 1, got {_REPEATS.value}')
  result: dict[str, Any] = {
    'unit': 'seconds of CPU, one core, medians',
    'clients': 10,
    'microbatch_size': diff2_runs.MICROBATCH,
    'limit': LIMIT,
    'jax': jax.__version__,
    'load_before': os.getloadavg()[0],
    'shapes': {},
  }
  for name, (rows, features) in SHAPES.items():
    task = task_of(rows, features)
    seconds = measure(task, _REPEATS.value)
    floor = statistics.median(seconds['gradient'])
    print(f'\n{name}: {rows:,} examples, {task.num_params:,} parameters')
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    for operation, median in medians.items():
      print(f'  {operation:18}{median * 1e3:9.2f} ms{median / floor:7.2f} x')
    found = ratio(seconds)
    print(f'  diff2 round / two dp_gd gradients: {found:.2f} (limit {LIMIT})')
    result['shapes'][name] = {
      'examples': rows,
      'parameters': task.num_params,
      'seconds': medians,
      'best': {k: min(v) for k, v in seconds.items()},
      'diff2 round over two dp_gd gradients': found,
    }
  with open(_OUT.value, 'w') as f:
    json.dump(result, f, indent=2)


if __name__ == '__main__':
  app.run(main)
