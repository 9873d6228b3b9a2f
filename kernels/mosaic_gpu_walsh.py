"""All directions of Walsh pools on one tensor, for GPUs from Hopper on.

The tiles, and the tensors, are those of `jaxfl.kernels.mosaic_gpu`. Every tile
has the two Walsh blocks of its 64 rows: a row of one adds 128 neighbours of a
row of the pool's table, which stands twice side by side, so that a shift needs
no modulus. One pass over memory; tables stay in the nearest cache.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  mosaic_gpu,
  signs,
  walsh,
)

from jaxfl import keys as keys_lib


def _add_pools(number, keys, tables, scale, w, off, *, pools, part, interpret):
  """Adds every pool to a tile of grid weights."""
  zero = np.uint32(0)
  tile = mosaic_gpu.Tile(number, (zero, zero), part, interpret)
  grid = mosaic_gpu.Grid(tile, w, scale)
  left = tile.left // walsh.COLUMNS

  def add(p, values):
    new = []
    shift_key = keys[4 * p + 2], keys[4 * p + 3]
    words = tile.words(keys, 4 * p)
    for first in range(0, part.rows, walsh.ROWS):
      top = (tile.row + first) // walsh.ROWS
      t, s = keys_lib.threefry2x32(
        *shift_key, top.astype(jnp.uint32), left.astype(jnp.uint32)
      )
      t = (t & np.uint32(walsh.ROWS - 1)).astype(jnp.int32)
      s = (s & np.uint32(walsh.COLUMNS - 1)).astype(jnp.int32)
      for r in range(first, min(first + walsh.ROWS, part.rows)):
        row = p * walsh.ROWS + ((t + r) & np.int32(walsh.ROWS - 1))
        entry = tables[row, pl.ds(s, walsh.COLUMNS)]
        new.append(signs.add(values[r], signs.bits(entry), *words[r]))
    return tuple(new)

  values = tuple(x.astype(jnp.int32) for x in grid.floats)
  grid.write(lax.fori_loop(0, pools, add, values), off, number)


def add_pools(w, scale, keys, units, *, interpret=False):
  """`walsh.add_units`: grid weights plus all of some pools; exact.

  Args:
    w: float32[R, C], not small, multiples of 1 / scale[0].
    scale: a power of two and its inverse, float32[] each.
    keys: uint32[P, 4], of P pools.
    units: int32[P, 4096].
    interpret: as `mosaic_gpu` has it.

  Returns:
    An array like `w`, and bool[]: all entries were and are on the grid.
  """
  table = walsh.transform(units).reshape(-1, walsh.COLUMNS)
  args = keys.reshape(-1), jnp.tile(table, (1, 2)), jnp.stack(scale)

  def run_part(part, ref, off):
    body = functools.partial(
      _add_pools, pools=len(keys), part=part, interpret=bool(interpret)
    )
    mosaic_gpu.run(body, part.tiles, *args, ref, off, interpret=interpret)

  return mosaic_gpu.update_grid(run_part, w, interpret)
