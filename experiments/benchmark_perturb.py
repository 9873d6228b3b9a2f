"""Measures the hot loop on one CPU core, beside a bare add and the usual loops.

    python -m experiments.benchmark_perturb --out=perturb.json

Takes about a minute on an idle core. Each row is one operation on one set of
tensors, in billions (G) of entries per second; an operation over 64 directions
counts every entry 64 times. The columns are the best and the median repeat by
the clock, the best by the process's CPU time (which other processes on the same
core disturb less), and the CPU seconds of the compilation. The rows:

  * `add`: `w + c`, the floor that memory sets.
  * `perturb`, `replay`, `replay_int`: `jaxfl.perturb`.
  * `jax.random`: `w + c * jax.random.rademacher(key, shape)` per tensor.
  * `torch`: what zeroth-order code does in PyTorch: seed the generator, then
    for each tensor draw a normal tensor, scale it and add it in place, on one
    thread. Only if torch is installed.

Buffers are donated.

The last lines time a whole round of one-byte SPSA on the embedded model, beside
the forward passes that it cannot do without: the clients' work (two-sided) and
the server's step, with 8 examples of 128 bytes per pass.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

if hasattr(os, 'sched_setaffinity'):  # before JAX counts the cores
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxfl import keys as keys_lib
from jaxfl import method as method_lib
from jaxfl import objectives, perturb
from jaxfl.methods import spsa
from jaxfl.models import native

_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
_REPEATS = flags.DEFINE_integer('repeats', 30, 'Repeats of every measurement.')

NUM_DIRECTIONS = 64
_SCALE = np.float32(1e-3)


def large() -> dict[str, jax.Array]:
  """One tensor of 4 M entries, 16 MiB."""
  return {'w': jnp.zeros((2048, 2048))}


def model() -> dict[str, jax.Array]:
  """The tensors of the embedded model, 0.82 M entries."""
  return dict(keys_lib.named_leaves(native.load_embedded()[1]))


def operations(params) -> dict[str, tuple[Callable, tuple, int]]:
  """Names to (function of params, further arguments, entries per element)."""
  keys = jax.random.bits(jax.random.key(0), (NUM_DIRECTIONS, 2), jnp.uint32)
  scales = jnp.full(NUM_DIRECTIONS, _SCALE)
  units = jax.tree.map(
    lambda _: jnp.arange(NUM_DIRECTIONS, dtype=jnp.int32) - 32, params
  )
  exponents = jax.tree.map(lambda _: jnp.int32(12), params)

  def add(params, scale):
    return jax.tree.map(lambda w: w + scale, params)

  def sampled(params, key, scale):
    draws = jax.random.split(key, len(params))
    return {
      path: w + scale * jax.random.rademacher(draw, w.shape, jnp.float32)
      for (path, w), draw in zip(params.items(), draws, strict=True)
    }

  table: dict[str, tuple[Callable, tuple, int]] = {'add': (add, (_SCALE,), 1)}
  for name in perturb.DISTRIBUTIONS:
    kwargs = {'distribution': name}
    table[f'perturb {name}'] = (
      lambda *a, kw=kwargs: perturb.perturb(*a, **kw),
      (keys[0], _SCALE),
      1,
    )
    table[f'replay {name}'] = (
      lambda *a, kw=kwargs: perturb.replay(*a, **kw),
      (keys, scales),
      NUM_DIRECTIONS,
    )
    if name != 'gaussian':
      table[f'replay_int {name}'] = (
        lambda *a, kw=kwargs: perturb.replay_int(*a, **kw)[0],
        (keys, units, exponents),
        NUM_DIRECTIONS,
      )
  table['jax.random rademacher'] = (sampled, (jax.random.key(1), _SCALE), 1)
  return table


class Times(NamedTuple):
  """Seconds of every repeat, and CPU seconds of the compilation."""

  clock: list[float]
  cpu: list[float]
  compilation: float | None


def summary(times: Times, entries: int) -> dict[str, float | None]:
  """Rates in 1e9 entries per second."""
  return {
    'best': entries / min(times.clock) / 1e9,
    'median': entries / statistics.median(times.clock) / 1e9,
    'best_cpu': entries / min(times.cpu) / 1e9,
    'compile_cpu_seconds': times.compilation,
  }


def time_repeats(run, repeats: int) -> tuple[list[float], list[float]]:
  """Clock and CPU seconds of every call of `run()`."""
  clock, cpu = [], []
  for _ in range(repeats):
    start = time.perf_counter(), time.process_time()
    run()
    clock.append(time.perf_counter() - start[0])
    cpu.append(time.process_time() - start[1])
  return clock, cpu


def time_jax(function, params, args, repeats: int) -> Times:
  """Times `params = function(params, *args)` with donated buffers."""
  lowered = jax.jit(function, donate_argnums=0).lower(params, *args)
  start = time.process_time()
  compiled = lowered.compile()
  compilation = time.process_time() - start
  state = [jax.tree.map(jnp.copy, params)]

  def run():
    state[0] = jax.block_until_ready(compiled(state[0], *args))

  run()
  return Times(*time_repeats(run, repeats), compilation)


def time_torch(params, repeats: int) -> Times | None:
  """Times the peers' loop; None without torch."""
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None
  torch.set_num_threads(1)
  tensors = [torch.zeros(w.shape) for w in params.values()]

  def run():
    torch.manual_seed(0)
    for w in tensors:
      z = torch.normal(mean=0.0, std=1.0, size=w.size())
      w.add_(z * float(_SCALE))

  run()
  return Times(*time_repeats(run, repeats), None)


def measure(repeats: int) -> list[dict]:
  """All rows; see the module's docstring."""
  rows = []
  for tensors in (large, model):
    params = tensors()
    size = sum(w.size for w in params.values())
    row = {'tensors': tensors.__name__, 'entries': size}
    for name, (function, args, factor) in operations(params).items():
      slow = factor > 1 and not name.endswith('rademacher')
      count = max(3, repeats // (10 if slow else 1))
      times = time_jax(function, params, args, count)
      result = summary(times, size * factor)
      rows.append({**row, 'operation': name, **result})
    times = time_torch(params, repeats)
    if times is not None:
      rows.append({**row, 'operation': 'torch', **summary(times, size)})
  return rows


def measure_step(repeats: int) -> dict[str, float]:
  """Seconds of a forward pass, of a client and of the server.

  Passes and clients take turns, so that both see the same machine.

  Returns:
    Medians, and the ratio of a round to its forward passes alone.
  """
  config, params = native.load_embedded()
  loss_fn = objectives.lm_loss(config)
  clients, perturbations = 8, 4
  method = spsa.spsa(
    loss_fn,
    keys_lib.root(0),
    learning_rate=1e-4,
    mu=1e-3,
    num_perturbations=perturbations,
  )
  state = method.init(params)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 128, (perturbations, 8, 129)).astype(np.uint8)
  party = method_lib.Party(np.int32(0), np.int32(0), np.float32(1))
  forward, client = jax.jit(loss_fn), jax.jit(method.client)
  server = jax.jit(method.server)
  one = {'tokens': tokens[0]}
  message = client(state, (), {'tokens': tokens}, party)[0]
  cohort = method_lib.Party(
    np.arange(clients, dtype=np.int32),
    np.zeros(clients, np.int32),
    np.ones(clients, np.float32),
  )
  messages = np.stack([message] * clients)
  runs = {
    'forward': lambda: forward(state.params, one),
    'client': lambda: client(state, (), {'tokens': tokens}, party)[0],
    'server': lambda: server(state, messages, cohort).params,
  }
  seconds = {name: [] for name in runs}
  for repeat in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if repeat:  # the first compiles
        seconds[name].append(time.perf_counter() - start)
  forward_s, client_s, server_s = (
    statistics.median(seconds[name]) for name in runs
  )
  passes = 2 * perturbations * forward_s
  return {
    'forward_seconds': forward_s,
    'client_seconds': client_s,
    'server_seconds': server_s,
    'client_over_forwards': client_s / passes,
    'round_over_forwards': (clients * client_s + server_s) / clients / passes,
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  rows = measure(_REPEATS.value)
  print(
    f'{"tensors":8}{"operation":24}{"best":>8}{"median":>8}{"best CPU":>10}'
    f'{"compile s":>11}'
  )
  for row in rows:
    compilation = row['compile_cpu_seconds']
    print(
      f'{row["tensors"]:8}{row["operation"]:24}{row["best"]:8.2f}'
      f'{row["median"]:8.2f}{row["best_cpu"]:10.2f}'
      + ('' if compilation is None else f'{compilation:11.2f}')
    )
  step = measure_step(_REPEATS.value)
  print('\nSPSA on the embedded model, 8 clients x 4 perturbations, medians')
  for name, value in step.items():
    print(f'  {name:24}{value:10.4f}')
  if _OUT.value:
    result = {
      'unit': '1e9 entries (times directions) per second, one core',
      'jax': jax.__version__,
      'directions': NUM_DIRECTIONS,
      'rows': rows,
      'step': step,
    }
    with open(_OUT.value, 'w') as f:
      json.dump(result, f, indent=2)


if __name__ == '__main__':
  app.run(main)
