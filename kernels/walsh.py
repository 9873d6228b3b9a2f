"""All 4096 directions of a Walsh pool at once, whatever their number.

Direction k of a pool is, with d, g and the blocks of `jaxfl.kernels.xla`,

    z_k[r, c] = d[r, c] (-1)**|k & g|
    g = 128 ((r + t) & 31) + ((c + s) & 127)

so that each is a field of independent signs, and any two are orthogonal over
every whole block. A sum over the pool is one transform of its coefficients and
one pass over the tensor, and the products with all directions are one pass and
one transform, because the transform is its own transpose:

    sum_k x_k z_k[r, c] = d[r, c] (H x)[g]
    <z_k, y> = (H a)_k,    a_g = sum of d y over the entries whose place is g

with (H x)_g = sum_k (-1)**|k & g| x_k (Sylvester's Hadamard matrix). Sums of
integers are exact. The key of a pool on a tensor is uint32[4]: a leaf key, and
that of the shifts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import custom_batching, lax
from jaxfl.kernels import tiles, xla  # pyright: ignore[reportMissingImports]

SIZE = 4096  # directions under one key
ROWS, COLUMNS = xla.BLOCK


def transform(x: jax.Array) -> jax.Array:
  """`H x` over the last axis, of 4096 entries; integers or floats.

  Twelve equal steps, each of one add per entry, in a fixed order.
  """

  def step(_, x):
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.concatenate([even + odd, even - odd], axis=-1)

  return lax.fori_loop(0, SIZE.bit_length() - 1, step, x)


def num_pools(count):
  """P, of pools that have so many seeds; an integer or int32[]."""
  return -(-count // SIZE)


def by_pool(x: jax.Array) -> jax.Array:
  """Values [K] of seeds as [P, 4096], filled up with zeros."""
  return jnp.pad(x, (0, -len(x) % SIZE)).reshape(-1, SIZE)


def is_small(shape: tuple[int, ...]) -> bool:
  """Whether a tensor has no whole block, and so no Walsh directions."""
  rows, cols = xla.view(shape)
  return rows < ROWS or cols < COLUMNS


def spread(table, key, shape, offset):
  """`d[r, c] table[g]`, the sum over the pool whose transform is the table.

  Args:
    table: [4096], int32 or float32.
    key: uint32[4].
    shape: (rows, columns).
    offset: (row, column), multiples of 64 and 128; integers or uint32[].

  Returns:
    An array of the shape, of the table's type.
  """
  rows, cols = shape
  row, col = xla.position(offset)
  groups, width = -(-rows // 64), -(-cols // COLUMNS)
  group = row // np.uint32(64)
  words = xla.hashes(key[:2], groups, cols, group, col)
  minus = xla.expand_signs(words).reshape(-1, cols)[:rows] != 0
  t, s = _shifts(key, groups, width, row, col)
  place = lambda axis: lax.broadcasted_iota(
    jnp.uint32, (2 * groups, ROWS, width, COLUMNS), axis
  )
  r = (place(1) + t[:, None, :, None]) & np.uint32(ROWS - 1)
  c = (place(3) + s[:, None, :, None]) & np.uint32(COLUMNS - 1)
  g = (r * np.uint32(COLUMNS) + c).reshape(-1, width * COLUMNS)[:rows, :cols]
  # in bounds by construction: no check per entry
  value = table.at[g.astype(jnp.int32)].get(mode='promise_in_bounds')
  return jnp.where(minus, -value, value)


def _shifts(key, groups, width, row, col):
  first, left = row // np.uint32(ROWS), col // np.uint32(COLUMNS)
  return xla.shifts(key[2:4], 2 * groups, width, first, left)


def _add_all(w, keys, tables, offset):
  """Pool after pool, in a loop: the program does not grow with their number."""

  def add(w, pool):
    key, table = pool
    return w + spread(table, key, w.shape, offset), None

  return lax.scan(add, w, (keys, tables))[0]


def add_units(w, scale, keys, units, *, looped: bool):
  """`tiles.add_units` of whole pools, to a whole tensor: exact.

  Args:
    w: float32[R, C], multiples of 1 / scale[0].
    scale: a power of two and its inverse, float32[] each.
    keys: uint32[P, 4], of P pools.
    units: int32[P, 4096]; ask `tiles.sum_exceeds`.
    looped: visit tile after tile, for a CPU, and not all at once.

  Returns:
    An array like `w`, and bool[]: all entries were and are on the grid.
  """
  tables = transform(units)

  def visit(carry, tile):
    w, fits = carry
    total = lambda old: _add_all(old, keys, tables, tile.offset)
    part, fit = tiles.on_grid(tile.read(w), scale, total, looped)
    return tile.write(w, part), fits & fit

  whole = [((0, 0), w.shape)]
  plan = tiles.Plan(whole, np.zeros((1, 2), int), looped, COLUMNS)
  return tiles.fold(visit, (w, jnp.ones((), bool)), plan)


def project(x, keys, offset=(0, 0), *, looped: bool):
  """The products `<z_k, x>` with all directions of pools.

  Args:
    x: float[R, C].
    keys: uint32[P, 4], of P pools.
    offset: as for `spread`.
    looped: visit block after block, for a CPU, and not all at once.

  Returns:
    float32[P * 4096], up to rounding.
  """
  x = x.astype(jnp.float32)
  pads = [(0, -n % m) for n, m in zip(x.shape, (64, COLUMNS), strict=True)]
  x = jnp.pad(x, pads)
  rows, cols = x.shape
  row, col = xla.position(offset)
  groups, width = rows // 64, cols // COLUMNS
  sums = _visit if looped else _gather

  def table(key):
    words = xla.hashes(key[:2], groups, cols, row // np.uint32(64), col)
    t, s = _shifts(key, groups, width, row, col)
    return sums(x, words.reshape(-1, cols), t, s).reshape(-1)

  return transform(lax.map(table, keys)).reshape(-1)


def _signed(x, words):
  """x with the signs of its rows: [..., 32, c] and words [..., 1, c]."""
  place = lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 2)
  return jnp.where((words >> place) & np.uint32(1) != 0, -x, x)


# with shifts of its own for each of a batch, slices would become gathers
@custom_batching.sequential_vmap
def _visit(x, words, t, s):
  """Adds every block to a table that is twice as high and wide."""
  height, width = t.shape
  t, s = t.astype(jnp.int32), s.astype(jnp.int32)

  def block(n, table):
    i, j = n // width, n % width
    part = lax.dynamic_slice(x, (i * ROWS, j * COLUMNS), xla.BLOCK)
    word = lax.dynamic_slice(words, (i, j * COLUMNS), (1, COLUMNS))
    at = t[i, j], s[i, j]
    part = _signed(part, word) + lax.dynamic_slice(table, at, xla.BLOCK)
    return lax.dynamic_update_slice(table, part, at)

  table = jnp.zeros((2 * ROWS, 2 * COLUMNS), jnp.float32)
  table = lax.fori_loop(0, height * width, block, table)
  table = table[:ROWS] + table[ROWS:]
  return table[:, :COLUMNS] + table[:, COLUMNS:]


def _gather(x, words, t, s):
  """Turns all blocks back, then adds them."""
  height, width = t.shape
  place = lambda axis: lax.broadcasted_iota(
    jnp.uint32, (height, width, ROWS, COLUMNS), axis
  )
  r = (place(2) - t[:, :, None, None]) & np.uint32(ROWS - 1)
  c = (place(3) - s[:, :, None, None]) & np.uint32(COLUMNS - 1)
  c = place(1) * np.uint32(COLUMNS) + c
  take = lambda a, row: a.at[row.astype(jnp.int32), c.astype(jnp.int32)].get(
    mode='promise_in_bounds'
  )
  value = take(x, place(0) * np.uint32(ROWS) + r)
  minus = (take(words, place(0)) >> r) & np.uint32(1) != 0
  return jnp.sum(jnp.sum(jnp.where(minus, -value, value), axis=0), axis=0)


class Parties(NamedTuple):
  """What several parties add to blocks, each from pools of its own."""

  keys: jax.Array  # uint32[C, P, 4]
  values: jax.Array  # [C, N + 4096]; a span has those of a block; the last 4096
  # are in no span

  def sum(self, part, tile):
    """`part` plus what all parties add to it; the tile's span is [C, 2]."""

    def of_party(c, part):
      start, stop = tile.span[c, 0], tile.span[c, 1]

      def of_pool(p, part):
        at = start + p * SIZE
        mine = lax.dynamic_slice(self.values[c], (at,), (SIZE,))
        mine = jnp.where(np.arange(SIZE) < stop - at, mine, 0)
        step = spread(transform(mine), self.keys[c, p], part.shape, tile.offset)
        return part + step

      return lax.fori_loop(0, num_pools(stop - start), of_pool, part)

    return lax.fori_loop(0, len(self.keys), of_party, part)


def add_parties(w, parties: Parties, plan):
  """`w` plus what the parties add, one rounded add for each pool, in order.

  Args:
    w: float32[R, C].
    parties: with values of float32.
    plan: a `tiles.Plan` that is not tiled, whose spans are int[n, C, 2].
  """

  def visit(w, tile):
    return tile.write(w, parties.sum(tile.read(w), tile))

  return tiles.fold(visit, w, plan)


def add_parties_units(w, scale, parties: Parties, plan):
  """The same on grid weights, exactly; see `tiles.add_units`.

  Args:
    w: float32[R, C].
    scale: a power of two and its inverse, float32[] each.
    parties: with values of int32.
    plan: as for `add_parties`.

  Returns:
    An array like `w`, and bool[]: all entries were and are on the grid.
  """

  def visit(carry, tile):
    w, fits = carry
    total = lambda old: parties.sum(old, tile)
    part, fit = tiles.on_grid(tile.read(w), scale, total, True)
    return tile.write(w, part), fits & fit

  return tiles.fold(visit, (w, jnp.ones((), bool)), plan)


def project_blocks(x, keys, plan, count: int, *, looped: bool):
  """The products of every rectangle with the first of the directions.

  Args:
    x: float[R, C].
    keys: uint32[P, 4], of P pools.
    plan: a `tiles.Plan` that is not tiled; its spans say where products go.
    count: M, of results.
    looped: as for `project`.

  Returns:
    float32[M], zero outside of the spans.
  """
  width = min(SIZE, count)
  index = np.arange(width)

  def visit(out, tile):
    start, stop = tile.span[0], tile.span[1]
    part = tile.read(x)

    def of_pool(p, out):
      at = start + p * SIZE
      y = project(part, keys[p][None], tile.offset, looped=looped)[:width]
      y = jnp.where(
        index < stop - at, y, lax.dynamic_slice(out, (at,), (width,))
      )
      return lax.dynamic_update_slice(out, y, (at,))

    return lax.fori_loop(0, num_pools(stop - start), of_pool, out)

  out = jnp.zeros(count + SIZE, jnp.float32)
  return tiles.fold(visit, out, plan)[:count]
