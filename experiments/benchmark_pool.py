"""Measures rebuilding from a seed pool and projecting on it, beside PyTorch.

    python -m experiments.benchmark_pool

Takes about four minutes on one idle core, to which it pins itself, and writes
experiments/results/benchmark_pool.json. Rates are in 1e9 entries times seeds
per second, medians over repeats in which the operations take turns. Two sets of
tensors with 10 M entries: `square`, one matrix, and `model`, those of a small
transformer. The operations, with K seeds each:

  * `add`: `w + c`, the floor of one pass through memory for every seed.
  * `rebuild`: `perturb.replay_int`, exact, weights donated.
  * `project`: `perturb.project`.
  * `fedkseed loop`: for every seed and tensor, a seeded generator draws a
    normal tensor z, and `w -= lr * g * z`. The rebuild of FedKSeed
    (https://arxiv.org/abs/2312.06353) as it is usually written.
  * `ferret project loop`, `ferret rebuild loop`: for every seed and tensor, a
    draw from N(0, 1) truncated to +-1/sqrt(d), d entries, then an inner product
    with the difference, or a scaled sum, as in Ferret
    (https://arxiv.org/abs/2409.06277).

The loops are float32 PyTorch on one thread, typed from the papers, and run only
if torch is installed. They are timed over 8 seeds; their cost per seed does not
depend on the number of seeds. Memory is what a fresh process gains
at its peak while it makes the arguments and runs the operation once, compiled
before, as a multiple of the weights' own size.
"""

import concurrent.futures
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

if hasattr(os, 'sched_setaffinity'):  # before JAX counts the cores
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from jaxfl import perturb

_OUT = flags.DEFINE_string(
  'out',
  os.path.join(os.path.dirname(__file__), 'results', 'benchmark_pool.json'),
  'JSON file for the results.',
)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Repeats of every measurement.')

NUM_SEEDS = (64, 4096)
LOOP_SEEDS = 8  # over which the loops are timed
_EXPONENT = 20
PEERS = {
  'rebuild': ('fedkseed loop', 'ferret rebuild loop'),
  'project': ('ferret project loop',),
}


def _transformer(width, layers, vocab_size):
  shapes = {'embed': (vocab_size, width), 'norm': (width,)}
  for i in range(layers):
    for name in ('query', 'key', 'value', 'out'):
      shapes[f'{i}/{name}'] = (width, width)
    shapes[f'{i}/up'] = (width, 4 * width)
    shapes[f'{i}/down'] = (4 * width, width)
    shapes[f'{i}/norm1'] = shapes[f'{i}/norm2'] = (width,)
  return shapes


TENSORS = {
  'square': {'w': (3200, 3200)},
  'model': _transformer(256, 8, 16384),
}


def _zeros(shapes):
  return {path: jnp.zeros(shape) for path, shape in shapes.items()}


def jax_operation(name: str, shapes: dict, num_seeds: int) -> Callable:
  """Compiles an operation.

  Returns:
    A function weights -> weights or projections; it takes over the weights,
    except for `project`, and waits for the result.
  """
  rng = np.random.default_rng(0)
  seeds = rng.integers(2**32, size=(num_seeds, 2), dtype=np.uint32)
  units = rng.integers(-99, 100, num_seeds, dtype=np.int32)
  every = lambda value: dict.fromkeys(shapes, value)

  def add(params, seeds, units):
    del seeds  # Unused.
    return jax.tree.map(lambda w: w + units[0] * np.float32(1e-9), params)

  def rebuild(params, seeds, units):
    exponents = every(np.int32(_EXPONENT))
    return perturb.replay_int(params, seeds, every(units), exponents)[0]

  def project(params, seeds, units):
    del units  # Unused.
    return perturb.project(params, seeds)

  function = {'add': add, 'rebuild': rebuild, 'project': project}[name]
  donated = () if name == 'project' else (0,)
  compiled = (
    jax.jit(function, donate_argnums=donated)
    .lower(jax.eval_shape(lambda: _zeros(shapes)), seeds, units)
    .compile()
  )
  return lambda params: jax.block_until_ready(compiled(params, seeds, units))


def _normal(z, generator, torch):
  del torch  # Unused.
  z.normal_(generator=generator)


def _truncated(z, generator, torch):
  end = 1 / math.sqrt(z.numel())
  torch.nn.init.trunc_normal_(z, a=-end, b=end, generator=generator)


def torch_operation(name: str, shapes: dict, num_seeds: int) -> Callable:
  """A loop over seeds: a function of the weights, tensors of torch by path."""
  import torch  # pyright: ignore[reportMissingImports]

  torch.set_num_threads(1)
  draw = _normal if name.startswith('fedkseed') else _truncated

  @torch.no_grad()
  def run(params):
    products = []
    for seed in range(num_seeds):
      generator = torch.Generator().manual_seed(seed)
      total = torch.zeros(())
      for path in shapes:
        w = params[path]
        z = torch.empty_like(w)
        draw(z, generator, torch)
        if 'project' in name:
          total += torch.dot(w.view(-1), z.view(-1))
        else:
          w.sub_(1e-9 * (seed + 1) * z)
      products.append(total)
    return torch.stack(products) if 'project' in name else params

  return run


def operation(name: str, shapes: dict, num_seeds: int):
  """The function of weights, and one without arguments that makes weights."""
  if 'loop' in name:
    import torch  # pyright: ignore[reportMissingImports]

    zeros = lambda: {path: torch.zeros(shape) for path, shape in shapes.items()}
    return torch_operation(name, shapes, num_seeds), zeros
  zeros = jax.jit(lambda: _zeros(shapes)).lower().compile()
  return jax_operation(name, shapes, num_seeds), zeros


def names() -> list[tuple[str, int]]:
  """Operations, and over how many seeds they are timed."""
  rows = [('add', 1)]
  rows += [(name, k) for k in NUM_SEEDS for name in ('rebuild', 'project')]
  if importlib.util.find_spec('torch'):
    loops = ('fedkseed', 'ferret rebuild', 'ferret project')
    rows += [(f'{name} loop', LOOP_SEEDS) for name in loops]
  else:
    logging.info('torch is not installed: its loops are left out')
  return rows


def memory(name: str, shapes: dict, num_seeds: int) -> float | None:
  """Peak growth of this process, in units of the weights; None if unknown."""
  run, zeros = operation(name, shapes, num_seeds)
  size = sum(4 * math.prod(shape) for shape in shapes.values())
  try:
    with open('/proc/self/clear_refs', 'w') as f:
      f.write('5')  # forgets the peak so far
    before = _status('VmRSS')
  except OSError:
    return None
  params = zeros()
  run(params)
  return (_status('VmHWM') - before) / size


def _status(field):
  """Bytes, from what Linux says about this process."""
  with open('/proc/self/status') as f:
    lines = dict(line.split(':', 1) for line in f)
  return int(lines[field].split()[0]) * 1024


def measure_memory(name, shapes, num_seeds) -> float | None:
  """`memory` in a process of its own."""
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(memory, name, shapes, num_seeds).result()


def measure(shapes: dict, repeats: int) -> list[dict]:
  """A row for each operation on one set of tensors."""
  entries = sum(math.prod(shape) for shape in shapes.values())
  runs = {}
  for name, num_seeds in names():
    run, zeros = operation(name, shapes, num_seeds)
    runs[name, num_seeds] = [run, zeros(), []]
  for repeat in range(repeats + 1):
    for (name, _), held in runs.items():
      run, params, seconds = held
      start = time.perf_counter()
      result = run(params)
      if repeat:  # the first touches the memory
        seconds.append(time.perf_counter() - start)
      if 'project' not in name:
        held[1] = result
  rows = []
  for (name, num_seeds), (_, _, seconds) in runs.items():
    work = entries * num_seeds
    row = {
      'operation': name,
      'seeds': num_seeds,
      'median_seconds': statistics.median(seconds),
      'rate': work / statistics.median(seconds) / 1e9,
      'best_rate': work / min(seconds) / 1e9,
      'memory': measure_memory(name, shapes, min(num_seeds, 64)),
    }
    for peer in PEERS.get(name, ()):
      if (peer, LOOP_SEEDS) not in runs:
        continue
      theirs = runs[peer, LOOP_SEEDS][2]
      pairs = zip(seconds, theirs, strict=True)
      ratios = [b / LOOP_SEEDS * num_seeds / a for a, b in pairs]
      row[f'times {peer}'] = statistics.median(ratios)
    rows.append(row)
  return rows


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  if _REPEATS.value < 1:
    raise app.UsageError(f'--repeats must be >= 1, got {_REPEATS.value}')
  load = os.getloadavg()[0]
  result = {
    'unit': '1e9 entries times seeds per second, one core, medians',
    'memory': 'peak growth of a process over the size of the weights',
    'loops': f'timed over {LOOP_SEEDS} seeds and scaled by seeds',
    'jax': jax.__version__,
    'load_before': load,
    'tensors': {},
  }
  for tensors, shapes in TENSORS.items():
    rows = measure(shapes, _REPEATS.value)
    result['tensors'][tensors] = rows
    print(f'\n{tensors:20}{"seeds":>6}{"median":>9}{"best":>8}{"memory":>8}')
    for row in rows:
      used = row['memory']
      print(
        f'{row["operation"]:20}{row["seeds"]:6}{row["rate"]:9.2f}'
        f'{row["best_rate"]:8.2f}'
        + (f'{used:8.2f}' if used is not None else f'{"":8}')
        + ''.join(
          f'   {value:.0f} x {key.removeprefix("times ")}'
          for key, value in row.items()
          if key.startswith('times ')
        )
      )
  with open(_OUT.value, 'w') as f:
    json.dump(result, f, indent=2)


if __name__ == '__main__':
  app.run(main)
