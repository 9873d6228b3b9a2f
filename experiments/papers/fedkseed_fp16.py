"""What a rebuild of FedKSeed loses in half precision.

A rebuild adds K directions, each times a learning rate and a coordinate:
w = w_0 - lr sum_k A_k z_k. Done one after the other on weights in float16, as
the reference code does, most of the additions are below half a unit of the last
place and vanish; adding in float32 and casting once loses what float16 cannot
hold. Coordinates on the grid add as integers and lose nothing.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.papers import common
from jaxfl import grid, keys, master, perturb, pool

NUM_SEEDS, SHAPE = 4096, (64, 128)
LEARNING_RATE, WEIGHT_STD = 3e-7, 0.02
STDS = (1, 10, 100)
EARLIER = {  # measured in preparation, by other code
  'float16, one by one': {1: '96 %', 10: '66 %', 100: '13 %'},
  'float32, cast once to float16': {1: '21 %', 10: '2.2 %', 100: '0.2 %'},
}


def relative(found: np.ndarray, wanted: np.ndarray, base: np.ndarray) -> float:
  """|found - wanted| / |wanted - base|, in float64."""
  found, wanted = (x.astype(np.float64) for x in (found, wanted))
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - base))


@jax.jit
def one_by_one(weights, directions, amounts):
  """float16 weights after `w - float16(amount z)` for every direction.

  The product is rounded once; it is the kindest order of the operations.
  """

  def step(w, x):
    z = perturb.field(x[0], 'w', w.shape, distribution='gaussian')
    return w - (x[1] * z).astype(jnp.float16), None

  return jax.lax.scan(step, weights, (directions, amounts))[0]


def floats(coordinates: np.ndarray, seed: int) -> dict[str, float]:
  """Errors of three ways in floats, with Gaussian directions.

  Args:
    coordinates: float64[K], A.
    seed: of weights and directions.
  """
  rng = np.random.default_rng([seed, 4])
  base = rng.normal(0, WEIGHT_STD, SHAPE).astype(np.float16)
  directions = pool.directions(
    keys.root(seed), np.arange(len(coordinates)), 'rademacher'
  )
  amounts = jnp.asarray(LEARNING_RATE * coordinates, jnp.float32)
  wide = np.asarray(base, np.float32)
  zeros = {'w': jnp.zeros(SHAPE)}
  total = perturb.replay(zeros, directions, -amounts, distribution='gaussian')
  wanted = wide.astype(np.float64) + np.asarray(total['w'], np.float64)
  sequential = np.asarray(one_by_one(jnp.asarray(base), directions, amounts))
  cast = wanted.astype(np.float16)
  single = perturb.replay(
    {'w': jnp.asarray(wide)}, directions, -amounts, distribution='gaussian'
  )
  return {
    'float16, one by one': relative(sequential, wanted, wide),
    'float32, cast once to float16': relative(cast, wanted, wide),
    'float32, one by one': relative(np.asarray(single['w']), wanted, wide),
  }


def on_grid(coordinates: np.ndarray, seed: int) -> dict[str, float]:
  """Errors of a rebuild on the grid, with signs.

  Returns:
    Against the exact sum of the integer coordinates, and against the sum of
    coordinates before they were rounded to the grid.
  """
  rng = np.random.default_rng([seed, 4])
  base = master.init({'w': rng.normal(0, WEIGHT_STD, SHAPE).astype(np.float32)})
  start = np.asarray(base.params['w'], np.float64)
  q = int(pool.exponent(base.exponents))
  e = int(base.exponents['w'])
  directions = pool.directions(
    keys.root(seed), np.arange(len(coordinates)), 'rademacher'
  )
  amounts = -LEARNING_RATE * coordinates
  units = grid.round_units(
    jnp.asarray(amounts, jnp.float32) * grid.power_of_two(jnp.int32(q)),
    keys.uniform(keys.stream(directions, 'rounding')),
  )
  rebuilt = pool.rebuild(
    base,
    jnp.int32(pool.ONE),
    directions,
    units,
    distribution='rademacher',
  )
  found = np.asarray(rebuilt.params['w'], np.float64)
  # the same sums in NumPy: integers on the grid of the tensor, and floats
  shift = q - e
  on_tensor = (np.asarray(units, np.int64) + (1 << (shift - 1))) >> shift
  exact, real = np.zeros(SHAPE, np.int64), np.zeros(SHAPE)
  field = jax.jit(lambda d: perturb.field(d, 'w', SHAPE))
  rows = zip(directions, on_tensor, amounts, strict=True)
  for direction, unit, amount in rows:
    z = np.asarray(field(direction))
    exact += unit * z.astype(np.int64)
    real += amount * z
  return {
    'ours: grid, of the integer coordinates': relative(
      found, start + exact * 2.0**-e, start
    ),
    'ours: grid, with the rounding of coordinates': relative(
      found, start + real, start
    ),
  }


def run(request: common.Request, num_seeds: int = NUM_SEEDS) -> common.Result:
  """All ways at all scales of the coordinates."""
  seeds = request.seed_list
  found: dict[tuple[str, int], list[float]] = {}
  seconds: dict[tuple[str, int], float] = {}
  for std, seed in common.track((x, s) for x in STDS for s in seeds):
    rng = np.random.default_rng([seed, 5])
    coordinates = rng.normal(0, std, num_seeds)
    for measure in (floats, on_grid):
      start = time.process_time()
      for name, error in measure(coordinates, seed).items():
        found.setdefault((name, std), []).append(100 * error)
        spent = time.process_time() - start
        seconds[name, std] = seconds.get((name, std), 0.0) + spent / len(seeds)
  order = list(dict.fromkeys(name for name, _ in found))
  rows = [
    common.row(
      f'{name}; std of A {std}',
      found[name, std],
      published='not published',
      seconds=seconds[name, std],
      more={'earlier': EARLIER.get(name, {}).get(std, '-')},
    )
    for name in order
    for std in STDS
  ]
  return common.result(
    f'FedKSeed: rebuilding weights from {num_seeds:,} coordinates A',
    'error of the rebuilt update, % of its norm',
    rows,
    style='.4f',
    settings={
      'w': f'N(0, {WEIGHT_STD}^2), {SHAPE[0]} x {SHAPE[1]}',
      'learning rate': f"{LEARNING_RATE} (the paper's)",
      'float16 step': 'w - float16(lr A z)',
      'z': 'Gaussian; signs on the grid',
    },
    notes=[
      'earlier: measured by other code before; the paper has no such numbers.',
      'The grid is of float32 weights. Its rebuild is compared with a sum in'
      ' int64, and with the real-valued update: what rounding the coordinates'
      ' themselves costs.',
      'seconds: of CPU, all ways in floats or both on the grid, for a seed.',
    ],
    seeds=seeds,
    keys=[[name, std] for name in order for std in STDS],
  )


def draw(found: common.Result):
  """Error against the scale of the coordinates."""
  figure, (axis,) = common.subplots(1, found['title'])
  figure.set_size_inches(6.4, 4.2)
  by_name: dict[str, dict[int, list[float]]] = {}
  for (name, std), line in zip(found['keys'], found['rows'], strict=True):
    by_name.setdefault(name, {})[std] = line['values']
  for name, values in by_name.items():
    if any(map(any, values.values())):
      runs = list(zip(*values.values(), strict=True))
      common.band(axis, list(values), runs, name, marker='o')
    else:
      axis.plot([], [], ' ', label=f'{name}: 0')
  report.log_x(axis)
  axis.set_yscale('log')
  axis.set_xlabel('standard deviation of the coordinates A')
  axis.set_ylabel('error of the update, % of its norm')
  axis.legend(frameon=False, fontsize=8)
  return figure
