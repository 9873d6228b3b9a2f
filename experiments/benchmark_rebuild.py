"""Measures how long a model is rebuilt from a file, at the size of OPT-125M.

    python -m experiments.benchmark_rebuild

Makes a base of that shape with random weights, and files of 4096 coordinates,
none of them zero, along independent signs and along Walsh directions; then
reads and rebuilds as `experiments.rebuild` does, on all cores. Seconds of wall
time, so that the machine should be idle: of reading base and file, of the first
rebuild, with compilation, and of the median of later ones. Writes
experiments/results/benchmark_rebuild.json.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments import fine_tune, seeds_file
from experiments.benchmarks import machine, models
from jaxfl import adapters, digest, pool
from jaxfl.models import native, transformer

_OUT = flags.DEFINE_string(
  'out',
  str(pathlib.Path(__file__).with_name('results') / 'benchmark_rebuild.json'),
  'JSON file for the results.',
)
_LAYERS = flags.DEFINE_integer('layers', 12, 'Layers of the model.', 1)
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Rebuilds after the first.', 1)

SEEDS = 4096
TARGETS = {'rademacher': 60.0, 'walsh': 5.0}  # seconds at 125 M, on two cores
# facebook/opt-125m, beside OPT-1.3B
_SHAPE = dataclasses.replace(
  models.OPT, num_layers=12, model_dim=768, num_heads=12, num_kv_heads=12,
  mlp_dim=3072,
)  # fmt: skip


def make_file(model: pathlib.Path, distribution: str) -> seeds_file.Seeds:
  """A file of random coordinates for the model in a directory."""
  shape, params = native.load(model)
  rng = np.random.default_rng(0)
  coordinates = rng.integers(1, 1000, SEEDS, dtype=np.int32) * 64
  settings = {'model': str(model), 'adapter': 'full', 'seed': 0}
  return seeds_file.Seeds(
    form='coordinates',
    base=settings,
    shape=native.to_json(shape),
    base_digest=digest.digest(params),
    frozen_digest=digest.digest(adapters.full().init(params, None)[1]),
    rounds=0,
    digest='',
    payload=coordinates.astype('<i4').tobytes(),
    distribution=distribution,
    base_scale=pool.ONE,
  )


def measure(model: pathlib.Path, distribution: str, repeats: int) -> dict:
  """The row of a distribution."""
  data = seeds_file.encode(make_file(model, distribution))
  start = time.perf_counter()
  seeds = seeds_file.decode(data)
  base = fine_tune.load_base(seeds).trainable
  laps = [time.perf_counter() - start]
  for _ in range(1 + repeats):
    start = time.perf_counter()
    jax.block_until_ready(fine_tune.weights(seeds, base))
    laps.append(time.perf_counter() - start)
  return {
    'distribution': distribution,
    'seeds': SEEDS,
    'parameters': adapters.count(base),
    'bytes': len(data),
    'load_s': laps[0],
    'first_rebuild_s': laps[1],
    'rebuild_s': statistics.median(laps[2:]),
    'target_s': TARGETS[distribution],
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  shape = dataclasses.replace(_SHAPE, num_layers=_LAYERS.value)
  description = machine.describe()
  with tempfile.TemporaryDirectory() as directory:
    model = pathlib.Path(directory) / 'base'
    init = jax.jit(lambda key: transformer.init(shape, key))
    native.save(model, shape, init(jax.random.key(0)))
    rows = [measure(model, name, _REPEATS.value) for name in TARGETS]
  table = Table(*rows[0])
  for row in rows:
    table.add_row(
      *(f'{x:.2f}' if isinstance(x, float) else str(x) for x in row.values())
    )
  Console(width=120).print(table)
  found = {'machine': description, 'rows': rows}
  pathlib.Path(_OUT.value).write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
