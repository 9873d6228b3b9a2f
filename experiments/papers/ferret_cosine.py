"""Fig. 7 of Ferret: how much of a difference K coordinates keep.

A difference delta of d entries is projected on K directions and put together
again. Measured are the cosine of the two and the slope of the reconstruction,
<rec, delta> / |delta|**2. For entries of a direction with variance 1 and any
kurtosis, the cosine is sqrt(K / (K + d)) up to O(1 / d), and the slope is 1
with a standard deviation of sqrt(2 / K).

Beside our operations: the paper's basis, N(0, 1) truncated to +-1 / sqrt(d),
drawn with NumPy, with its right constant and with that of the reference code.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.papers import common
from jaxfl import blocks, keys

SHAPE = (1000, 100)
COUNTS = (100, 316, 1000, 3162, 10000)
# of independent entries, which the law is for
DISTRIBUTIONS = tuple(name for name in blocks.DISTRIBUTIONS if name != 'walsh')
PAPER, CODE = 'truncated normal, 3 d + 2/5', 'truncated normal, code: d'
_CHUNK = 400_000  # entries of directions at once, for the cache

project = jax.jit(blocks.project, static_argnames=('blocks', 'distribution'))
reconstruct = jax.jit(
  blocks.reconstruct, static_argnames=('blocks', 'distribution')
)


def law(count: int, size: int) -> float:
  """The expected cosine, sqrt(K / (K + d))."""
  return math.sqrt(count / (count + size))


def compare(rec: np.ndarray, delta: np.ndarray) -> dict[str, float]:
  """Cosine and slope."""
  product, square = float(np.vdot(rec, delta)), float(np.vdot(delta, delta))
  return {
    'cosine': product / math.sqrt(square * float(np.vdot(rec, rec))),
    'slope': product / square,
  }


def ours(
  delta: np.ndarray, distribution: str, counts: Sequence[int], seed: int
) -> Iterator[dict[str, float]]:
  """Cosine, slope and seconds for every K, with our operations.

  Args:
    delta: float32[R, C], one block.
    distribution: of the directions.
    counts: K, in any order.
    seed: of the directions.
  """
  tree = {'w': jnp.asarray(delta)}
  parts = blocks.partition(tree, max_size=2 * delta.size)  # one
  numbers = jnp.arange(max(counts))
  directions = keys.fold(keys.root(seed), numbers)
  options: dict[str, Any] = {'distribution': distribution}

  def run(count):
    each = jnp.full(1, count, jnp.int32)
    products = project(tree, parts, each, directions, **options)
    gamma = products / np.float32(count)  # zero where there is no direction
    rec = reconstruct(
      tree, parts, each[None], directions[None], gamma[None], **options
    )
    return np.asarray(rec['w'])

  run(1)  # compiles
  for count in counts:
    start = time.process_time()
    rec = run(count)
    seconds = time.process_time() - start
    yield compare(rec, delta) | {'seconds': seconds}


def truncated_normal(rng, shape, bound: float) -> np.ndarray:
  """N(0, 1) truncated to +-bound, float32, to a relative bound**4.

  The inverse of the distribution function is s + s**3 / 6 with s uniform, as
  the density is nearly flat.
  """
  s = rng.random(shape, np.float32)
  s -= np.float32(0.5)
  s *= np.float32(2 * bound - bound**3 / 3)
  factor = s * s
  factor /= np.float32(6)
  factor += np.float32(1)
  s *= factor
  return s


def truncated(
  delta: np.ndarray, counts: Sequence[int], seed: int
) -> Iterator[dict[str, float]]:
  """The same with the paper's basis and its right constant.

  Args:
    delta: float32[...].
    counts: K, ascending; each continues the directions of the one before.
    seed: of the directions.
  """
  flat, rng = delta.reshape(-1), np.random.default_rng([seed, 1])
  d, done, total = flat.size, 0, np.zeros(delta.size, np.float32)
  start = time.process_time()
  for count in counts:
    while done < count:
      rows = min(max(1, _CHUNK // d), count - done)
      v = truncated_normal(rng, (rows, d), 1 / math.sqrt(d))
      total += (v @ flat) @ v
      done += rows
    seconds = time.process_time() - start
    rec = total * np.float32((3 * d + 0.4) / count)
    yield compare(rec, flat) | {'seconds': seconds}


def bases(delta, counts, seed) -> Iterator[tuple[str, Iterator[dict]]]:
  """What is measured for every basis: its name, and values for every K."""
  for distribution in DISTRIBUTIONS:
    yield distribution, ours(delta, distribution, counts, seed)
  found = list(truncated(delta, counts, seed))
  yield PAPER, iter(found)
  # the same directions times a constant
  ratio = delta.size / (3 * delta.size + 0.4)
  yield CODE, ({**x, 'slope': ratio * x['slope']} for x in found)


def run(
  request: common.Request,
  shape: tuple[int, int] = SHAPE,
  counts: Sequence[int] = COUNTS,
) -> common.Result:
  """The figure, for differences of independent normal entries."""
  seeds, size = request.seed_list, math.prod(shape)
  found: dict[str, dict[int, list]] = {}
  for (seed,) in common.track((seed,) for seed in seeds):
    rng = np.random.default_rng([seed, 0])
    delta = rng.normal(size=shape).astype(np.float32)
    for name, values in bases(delta, counts, seed):
      for count, value in zip(counts, values, strict=True):
        found.setdefault(name, {}).setdefault(count, []).append(value)
  rows = [
    common.row(
      f'{name}, K = {count:,}',
      [x['cosine'] for x in values],
      published='not found',
      seconds=float(np.mean([x['seconds'] for x in values])),
      more={
        'law': law(count, size),
        'slope': float(np.mean([x['slope'] for x in values])),
      },
    )
    for name, by_count in found.items()
    for count, values in by_count.items()
  ]
  return common.result(
    f'Ferret, fig. 7: reconstruction of {size:,} entries from K coordinates',
    'cosine of reconstruction and difference',
    rows,
    settings={
      'K': list(counts),
      'difference': 'independent N(0, 1)',
      'blocks': 1,
    },
    notes=[
      "d = 100,000 is the paper's; its curves could not be read as numbers.",
      'law: sqrt(K / (K + d)). slope: <rec, delta> / |delta|^2, 1 if unbiased;'
      ' the reference code scales by d / K, which is 1/3.',
      'seconds: of CPU, to project and reconstruct; of the truncated normal,'
      ' which is drawn with NumPy, since the first of its directions.',
    ],
    seeds=seeds,
    d=size,
    bases={
      name: {
        key: {count: [x[key] for x in v] for count, v in by_count.items()}
        for key in ('cosine', 'slope')
      }
      for name, by_count in found.items()
    },
  )


def draw(found: common.Result):
  """Cosine and slope against K."""
  figure, (left, right) = common.subplots(2, found['title'], sharey=False)
  counts = [int(k) for k in next(iter(found['bases'].values()))['cosine']]
  for name, values in found['bases'].items():
    for axis, key in ((left, 'cosine'), (right, 'slope')):
      if axis is left and name == CODE:
        continue  # the same
      runs = list(zip(*values[key].values(), strict=True))
      common.band(axis, counts, runs, name, marker='.')
  ks = np.geomspace(min(counts), max(counts), 50)
  law_values = [law(k, found['d']) for k in ks]
  left.plot(ks, law_values, 'k--', lw=1, label='law: sqrt(K / (K + d))')
  right.axhline(1, color='k', ls='--', lw=1)
  for sign in (-1, 1):
    right.plot(
      ks,
      1 + sign * np.sqrt(2 / ks),
      'k:',
      lw=1,
      label='law: 1 +- sqrt(2 / K)' if sign > 0 else None,
    )
  right.axhline(1 / 3, color='0.5', ls=':', lw=1, label='1/3')
  for axis in (left, right):
    report.log_x(axis)
    axis.set_xlabel('coordinates K')
    axis.legend(frameon=False, fontsize=8)
  left.set_yscale('log')
  left.set_ylabel('cosine of reconstruction and difference')
  right.set_ylabel('slope of the reconstruction')
  right.set_ylim(0, 2)
  return figure
