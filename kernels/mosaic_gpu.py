"""Many directions on one tensor, for NVIDIA GPUs from Hopper on. Rademacher.

Pallas, Mosaic GPU. A thread block of 128 threads owns a tile of 64 rows (or
all, if there are fewer) and 128 columns of the (R, C) view, in registers: a row
of it is one register of every thread. A loop over the directions hashes once
per column and direction. Keys and amounts are read from global memory. Every
tile has the span of directions that its rectangle has.

Columns are padded to a multiple of 128, and the rows that are left over by 64
are tiles of their own. The kernels run on any backend with `interpret`, an
instance of JAX's `InterpretGPUParams`; they are the same there but for the
layouts, which that mode does not know, and for how an array becomes a Ref.

The form of `pl.kernel` that updates a Ref in place is the same in JAX 0.10 and
0.11, so there is no other case; what may change with the next version of JAX is
in `run`, `in_place` and `columns`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  signs,
  tiles,
)

COLS = 128  # threads of a block
_CHUNK = 1024  # directions whose products are held for every tile at a time


def run(body, count, *args, out_type=(), interpret=False) -> Any:
  """`body(number, *args, *outs)`, arguments being Refs, for so many tiles.

  Arguments that are Refs already are updated in place.
  """

  def kernel(*refs):
    body(lax.axis_index('tile'), *refs)

  return pl.kernel(
    kernel,
    out_type,
    mesh=plgpu.Mesh(grid=(count,), grid_names=('tile',)),
    # JAX 0.11 would infer layouts, which takes minutes for a tile of 64 rows
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
    name=body.func.__name__.strip('_'),
  )(*args)


def in_place(update, state, interpret):
  """The arrays after `update(refs)`, without a copy if they are not needed."""
  if interpret:  # asks for the memory space, which `run_state` leaves open
    new = functools.partial(jax.new_ref, memory_space=plgpu.GMEM)
    refs = jax.tree.map(new, state)
    update(refs)
    return jax.tree.map(jax.freeze, refs)
  return pl.run_state(update)(state)  # `vmap` can't have the other kind of Ref


def columns(interpret):
  """uint32[128]: the columns of a tile, one for each thread."""
  col = lax.broadcasted_iota(jnp.uint32, (COLS,), 0)
  if interpret:
    return col
  return plgpu.layout_cast(col, plgpu.Layout.WG_STRIDED((COLS,), vec_size=1))


class Part(NamedTuple):
  """Tiles of one height."""

  first: int  # row
  rows: int  # of a tile
  across: int  # tiles side by side
  tiles: int


def parts(shape) -> list[Part]:
  """Those of an array whose columns are padded."""
  rows, cols = shape
  across = cols // COLS
  whole = rows // signs.GROUP
  found = [
    Part(0, signs.GROUP, across, whole * across),
    Part(whole * signs.GROUP, rows % signs.GROUP, across, across),
  ]
  return [part for part in found if part.rows * part.tiles]


def fits(plan, shape) -> bool:
  """Whether the rectangles of a `tiles.Plan` are whole tiles of an array."""
  edges = [
    edge % COLS
    for (_, col), (_, width) in plan.rectangles
    for edge in (col, col + width)
    if edge != shape[1]
  ]
  return not any(edges)


def _owners(plan, part) -> np.ndarray:
  """int32[tiles]: the rectangle of every tile; len(rectangles) if none."""
  number = np.arange(part.tiles)
  row = number // part.across * signs.GROUP + part.first
  col = number % part.across * COLS
  owner = np.full(part.tiles, len(plan.rectangles), np.int32)
  for i, ((top, left), (height, width)) in enumerate(plan.rectangles):
    inside = (top <= row) & (row < top + height)
    owner[inside & (left <= col) & (col < left + width)] = i
  return owner


def _table(plan, *more):
  """int32[(rectangles + 1) * n]: the spans and more; nothing for no rectangle.

  A tile looks up what it needs. If XLA did, it might compute the table anew for
  every tile.
  """
  columns = [jnp.asarray(plan.spans, jnp.int32)]
  columns += [x.astype(jnp.int32)[:, None] for x in more]
  return jnp.pad(jnp.concatenate(columns, axis=1), ((0, 1), (0, 0))).reshape(-1)


class Tile:
  """Where a tile is: its rows, its columns and the words of its signs."""

  def __init__(self, number, offset, part: Part, interpret):
    self.row = number // part.across * part.rows + part.first
    self.left = number % part.across * COLS
    across = pl.ds(self.left, COLS)
    self.index = [(self.row + r, across) for r in range(part.rows)]
    first = offset[0] + self.row.astype(jnp.uint32)
    self.group = first // np.uint32(signs.GROUP)
    self.col = offset[1] + self.left.astype(jnp.uint32)
    self._cols = columns(interpret) + self.col

  def words(self, keys, at):
    """(word, shift) of every row under the key at keys[at]."""
    a, b = signs.sign_words((keys[at], keys[at + 1]), self.group, self._cols)
    return [
      ((a, b)[r // signs.WORD], np.uint32(31 - r % signs.WORD))
      for r in range(len(self.index))
    ]


def _steps(tile, keys, amounts, values, start, stop):
  """Values of a tile plus the directions from start to stop."""

  def step(k, values):
    amount = jnp.broadcast_to(amounts[k], (COLS,))
    if values[0].dtype != jnp.int32:
      amount = amount.astype(jnp.float32)  # of units that it holds
    amount = signs.bits(amount)
    return tuple(
      signs.add(x, amount, *word)
      for x, word in zip(values, tile.words(keys, 2 * k), strict=True)
    )

  return lax.fori_loop(start, stop, step, values)


def _add(number, offset, keys, amounts, table, owners, w, *, part, interpret):
  """Adds its directions to a tile."""
  tile = Tile(number, offset, part, interpret)
  values = tuple(w[index] for index in tile.index)
  at = 2 * owners[number]
  values = _steps(tile, keys, amounts, values, table[at], table[at + 1])
  for index, x in zip(tile.index, values, strict=True):
    w[index] = x


def whole(shape, count) -> tiles.Plan:
  """The plan of so many directions for a whole array."""
  return tiles.Plan([((0, 0), shape)], np.array([[0, count]]), False)


def add(w, keys, amounts, offset=(0, 0), *, plan=None, interpret=False):
  """`w + amounts[k] * z_k`, in order; in place if `w` is donated and C % 128.

  Args:
    w: float32[R, C] or bfloat16[R, C], not empty, to which float32 amounts are
      added; or int32[R, C], for int32 amounts.
    keys: uint32[K, 2], leaf keys; K > 0.
    amounts: float32[K] or int32[K].
    offset: first row, a multiple of 64, and column of `w` in the (R, C) view
      of the whole tensor; Python integers or uint32[] values.
    plan: a `tiles.Plan` of rectangles that `fits`; None for all directions
      everywhere.
    interpret: see above.

  Returns:
    An array like `w`, with the bits of K `xla.add` or `xla.add_units`.
  """
  plan = plan or whole(w.shape, len(keys))
  args = _offset(offset), keys.reshape(-1), amounts, _table(plan)

  def update(ref):
    for part in parts(ref.shape):
      body = functools.partial(_add, part=part, interpret=bool(interpret))
      more = _owners(plan, part), ref
      run(body, part.tiles, *args, *more, interpret=interpret)

  return in_place(update, pad(w), interpret)[:, : w.shape[1]]


def pad(x):
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % COLS)))


def _offset(offset):
  return jnp.stack([jnp.asarray(x, jnp.uint32) for x in offset])


def _count(*conditions):
  """float32[128]: how many of the conditions bool[128] do not hold."""
  one, zero = np.float32(1), np.float32(0)
  return sum(
    (jnp.where(c, zero, one) for c in conditions[1:]),
    jnp.where(conditions[0], zero, one),
  )


class Grid:
  """The weights of a tile in grid steps, and how many are not on the grid."""

  def __init__(self, tile, w, scale):
    self._tile, self._w = tile, w
    up, self._down = (jnp.broadcast_to(scale[i], (COLS,)) for i in range(2))
    self.floats = tuple(w[index] * up for index in tile.index)
    exact = [x.astype(jnp.int32).astype(jnp.float32) == x for x in self.floats]
    small = self.within(np.float32(tiles.LIMIT))
    self.off = _count(*exact, *small)

  def within(self, limit):
    return [jnp.abs(x) < limit for x in self.floats]

  def write(self, values, off, number):
    """New values, int32; counts those that have left the grid."""
    limit = np.int32(tiles.LIMIT)
    left = _count(*((x < limit) & (x > -limit) for x in values))
    off[number] = jnp.sum(self.off + left)
    for index, x in zip(self._tile.index, values, strict=True):
      self._w[index] = x.astype(jnp.float32) * self._down


def _add_units(
  number,
  offset,
  keys,
  units,
  table,
  owners,
  scale,
  w,
  off,
  *,
  part,
  interpret,
):
  """Adds its directions to a tile of grid weights.

  Where no sum on the way can reach 2**24 steps, float32 adds are exact, and
  there are fewer instructions to them.
  """
  tile = Tile(number, offset, part, interpret)
  grid = Grid(tile, w, scale)
  at = 3 * owners[number]
  start, stop, total = (table[at + i] for i in range(3))
  room = np.float32(tiles.LIMIT) - total.astype(jnp.float32)
  none = jnp.sum(_count(*grid.within(room))) == 0
  middle = jnp.where(none, stop, start)
  floats = _steps(tile, keys, units, grid.floats, start, middle)
  values = tuple(x.astype(jnp.int32) for x in floats)
  values = _steps(tile, keys, units, values, middle, stop)
  grid.write(values, off, number)


def update_grid(run_part, w, interpret):
  """Runs `run_part(part, w, off)` in place on weights, for their parts.

  Returns:
    An array like `w`, and bool[]: no entry was or is off the grid.
  """
  padded = pad(w)
  mine = parts(padded.shape)
  counts = [jnp.zeros(part.tiles, jnp.float32) for part in mine]

  def update(refs):
    for part, off in zip(mine, refs[1:], strict=True):
      run_part(part, refs[0], off)

  new, *off = in_place(update, (padded, *counts), interpret)
  good = [jnp.all(x == 0) for x in off]
  return new[:, : w.shape[1]], functools.reduce(jnp.logical_and, good)


def add_units(
  w, scale, keys, units, offset=(0, 0), *, plan=None, interpret=False
):
  """Grid weights plus `units[k] * Z_k` grid steps; one pass over memory.

  Args:
    w: float32[R, C], not empty, multiples of 1 / scale[0] below `tiles.LIMIT`.
    scale: a power of two and its inverse, float32[] each.
    keys: uint32[K, 2], leaf keys; K > 0.
    units: int32[K].
    offset: as for `add`.
    plan: as for `add`.
    interpret: see above.

  Returns:
    An array like `w`, and bool[], as `tiles.add_units` has them.
  """
  plan = plan or whole(w.shape, len(keys))
  table = _table(plan, tiles.span_totals(units, plan.spans))
  args = _offset(offset), keys.reshape(-1), units, table

  def run_part(part, ref, off):
    body = functools.partial(_add_units, part=part, interpret=bool(interpret))
    more = _owners(plan, part), jnp.stack(scale), ref, off
    run(body, part.tiles, *args, *more, interpret=interpret)

  return update_grid(run_part, w, interpret)


def _project(
  number, offset, keys, table, owners, base, x, out, *, part, size, interpret
):
  """Products of a tile with the directions from base on, at most `size`."""
  tile = Tile(number, offset, part, interpret)
  values = [x[index].astype(jnp.float32) for index in tile.index]
  first = base[0]

  def step(k, _):
    terms = [
      signs.flip(x, *word)
      for x, word in zip(values, tile.words(keys, 2 * (first + k)), strict=True)
    ]
    out[number, k] = jnp.sum(sum(terms[1:], terms[0]))
    return 0

  at = 2 * owners[number]
  stop = table[at + 1] - table[at] - first
  stop = jnp.minimum(stop, np.int32(size))
  lax.fori_loop(0, stop, step, 0)


def _by_rectangle(plan, part):
  """int[rectangles, tiles]: the tiles of each, filled up with `part.tiles`."""
  owner = _owners(plan, part)
  mine = [np.flatnonzero(owner == i) for i in range(len(plan.rectangles))]
  most = max(map(len, mine))
  fill = lambda n: np.pad(n, (0, most - len(n)), constant_values=part.tiles)
  return np.stack([fill(n) for n in mine])


def project(x, keys, offset=(0, 0), *, plan=None, interpret=False):
  """The inner products `<z_k, x>`, of all or of the rectangles of a plan.

  Every column sums its rows of a tile, a block its columns, and XLA the tiles.

  Args:
    x: float32[R, C] or bfloat16[R, C], not empty.
    keys: uint32[K, 2], leaf keys; K > 0. A rectangle uses the first of them.
    offset: as for `add`.
    plan: as for `add`; its spans say where the products go.
    interpret: see above.

  Returns:
    float32[K]; zero outside of the spans.
  """
  plan = plan or whole(x.shape, len(keys))
  spans = jnp.asarray(plan.spans, jnp.int32)
  counts = spans[:, 1] - spans[:, 0]
  x = pad(x)
  size = min(len(keys), _CHUNK)
  args = _offset(offset), keys.reshape(-1), _table(plan)

  def chunk(first):
    """float32[rectangles, size]"""
    total = jnp.zeros((len(counts), size), jnp.float32)
    for part in parts(x.shape):
      body = functools.partial(
        _project, part=part, size=size, interpret=bool(interpret)
      )
      owners = _owners(plan, part)
      out = run(
        body,
        part.tiles,
        *args,
        owners,
        first[None],
        x,
        out_type=jax.ShapeDtypeStruct((part.tiles, size), jnp.float32),
        interpret=interpret,
      )
      mine = jnp.pad(counts, (0, 1))[owners]
      done = (first + np.arange(size))[None] < mine[:, None]
      out = jnp.where(done, out, np.float32(0))
      if len(plan.rectangles) == 1:
        total += jnp.sum(out, axis=0)[None]
      else:
        out = jnp.concatenate([out, jnp.zeros((1, size), jnp.float32)])
        total += jnp.sum(out[_by_rectangle(plan, part)], axis=1)
    return total

  def place(n, y):
    """Adds a chunk's products where they go."""
    first = (n * size).astype(jnp.int32)
    found = chunk(first)
    index = first + np.arange(size)
    inside = index[None] < counts[:, None]
    at = jnp.where(inside, spans[:, :1] + index[None], len(keys))
    return y.at[at].set(found, mode='drop')

  y = jnp.zeros(len(keys), jnp.float32)
  chunks = -(-jnp.max(counts) // size)
  return lax.fori_loop(0, chunks, place, y)
