"""Tiles: many directions on a piece of a tensor while the cache holds it.

K directions over a tensor that the cache does not hold are K passes through
memory, unless all of them are applied to one tile before the next is read. A
tile's part of a field needs nothing else (see `jaxfl.kernels.xla`), so that
tiles change no bits of the integer fields.

A loop over tiles slices at traced positions. For a tensor that is sharded (by
GSPMD) that means communication, and on an accelerator many small launches:
tiles are for a CPU.

A rectangle is ((row, column), (rows, columns)) of the (R, C) view of a tensor;
its row is a multiple of 64. ((0, 0), shape) is a whole tensor, viewed or not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import custom_batching, lax
from jaxfl.kernels import xla  # pyright: ignore[reportMissingImports]

# Entries of the largest tile: 512 KiB of float32, for an L2 cache of 1 MiB.
# Smaller ones cost more in overhead per direction: 25 % at a quarter of it.
SIZE = 1 << 17
# Sign fields that a pass over a tile adds, of which it holds the words. 16 gain
# 2 %, and lose a third on tiles of 2048 columns.
TOGETHER = 8
LIMIT = 1 << 24  # float32 holds every integer of smaller magnitude
_GROUP = 64  # rows that share a word of the sign field


class Plan(NamedTuple):
  """Which directions go where.

  Those of rectangle i are the entries from spans[i, 0] to spans[i, 1] of a list
  of leaf keys and values.
  """

  rectangles: Sequence[tuple]  # static; no two of them overlap
  spans: Any  # int[n, 2], NumPy or traced
  tiled: bool  # cut the rectangles into tiles; otherwise each is a tile
  unit: int = 1  # columns of tiles start at multiples of it


class Tile(NamedTuple):
  """A piece of a tensor and its directions."""

  offset: tuple  # row and column, int or uint32[]
  shape: tuple[int, ...]  # static
  span: Any  # int[2]

  def read(self, x: jax.Array) -> jax.Array:
    """The tile's part of `x`."""
    if self.shape == x.shape:
      return x
    return lax.dynamic_slice(x, self.offset, self.shape)

  def write(self, x: jax.Array, part: jax.Array) -> jax.Array:
    """`x` with its part replaced."""
    if self.shape == x.shape:
      return part
    return lax.dynamic_update_slice(x, part, self.offset)


def _step(total, limit):
  """A length of parts of `total`: <= limit, and a divisor if one is near."""
  if total <= limit:
    return total
  near = [n for n in range(limit, limit // 2, -1) if total % n == 0]
  return near[0] if near else limit


def _cuts(total, step):
  """(start, length) of the parts of `total`."""
  return [(i, min(step, total - i)) for i in range(0, total, step)]


def cut(rectangle, unit: int = 1) -> list:
  """A rectangle as rectangles of at most `SIZE` entries, few shapes among them.

  Tiles are as wide as can be: long rows are read and written the fastest. Their
  columns start at multiples of `unit` from the rectangle's.
  """
  (row, col), (rows, cols) = rectangle
  if rows * cols <= SIZE:
    return [rectangle]
  most = max(1, SIZE // min(rows, _GROUP) // unit)
  width = min(cols, unit * _step(-(-cols // unit), most))
  height = _GROUP * _step(-(-rows // _GROUP), max(1, SIZE // width // _GROUP))
  return [
    ((row + i, col + j), (h, w))
    for i, h in _cuts(rows, height)
    for j, w in _cuts(cols, width)
  ]


def fold(visit: Callable[[Any, Tile], Any], carry: Any, plan: Plan) -> Any:
  """`carry = visit(carry, tile)` for all tiles.

  There is one loop for each shape of a tile, so that a program does not grow
  with the number of tiles or rectangles.
  """
  by_shape: dict[tuple[int, ...], list] = {}
  for i, rectangle in enumerate(plan.rectangles):
    for offset, shape in (
      cut(rectangle, plan.unit) if plan.tiled else [rectangle]
    ):
      by_shape.setdefault(shape, []).append((offset, i))
  for shape, tiles in by_shape.items():
    if len(tiles) == 1:
      (offset, i) = tiles[0]
      carry = visit(carry, Tile(offset, shape, plan.spans[i]))
      continue
    offsets = jnp.array([offset for offset, _ in tiles], jnp.uint32)
    spans = jnp.asarray(plan.spans)[np.array([i for _, i in tiles])]

    def body(n, carry, shape=shape, offsets=offsets, spans=spans):
      offset = (offsets[n, 0], offsets[n, 1])
      return visit(carry, Tile(offset, shape, spans[n]))

    carry = lax.fori_loop(0, len(tiles), body, carry)
  return carry


def _scan(step, state, keys, values, start, stop):
  """`state = step(state, keys[i], values[i])` for start <= i < stop.

  Key and value come with the carry: XLA of JAX 0.12 does not vectorise a hash
  whose key is sliced out in the same iteration (6 times slower).
  """
  if not len(keys):
    return state
  take = lambda i: tuple(
    lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (keys, values)
  )

  def body(i, carry):
    state, entry = carry
    return step(state, *entry), take(i + 1)

  return lax.fori_loop(start, stop, body, (state, take(start)))[0]


def _count(plan):
  """How many directions every rectangle has, if that is static and the same."""
  if not isinstance(plan.spans, np.ndarray):
    return None
  counts = {int(stop - start) for start, stop in plan.spans}
  return counts.pop() if len(counts) == 1 else None


def _add(state, keys, values, plan, tile, distribution):
  """`state` with a tile's directions, in order; int32 or of a floating type."""
  one = functools.partial(
    xla.add_units if state.dtype == jnp.int32 else xla.add,
    distribution=distribution,
    offset=tile.offset,
  )
  rest = functools.partial(_scan, one, keys=keys, values=values)
  start, stop = tile.span
  count = _count(plan)
  # Not on whole tensors: the words of the fields would take a quarter of their
  # memory or more. Not in 16 bits: a compiler may keep more between two adds.
  fit = plan.tiled and state.dtype in (jnp.float32, jnp.int32)
  if distribution != 'rademacher' or not fit or count in (0, 1):
    return rest(state, start=start, stop=stop)
  together = TOGETHER
  if count is not None:  # passes of equal numbers, and none is left
    together = -(-count // -(-count // TOGETHER))
  # so that no slice is moved to end within its array
  pad = lambda x: jnp.pad(x, [(0, TOGETHER)] + [(0, 0)] * (x.ndim - 1))
  ks, amounts = pad(keys), pad(values)
  take = lambda x, i: lax.dynamic_slice_in_dim(x, i, together)

  def body(n, carry):
    state, key = carry  # see `_scan`
    i = start + n * together
    some = take(amounts, i)
    state = xla.add_signs(state, key, some, stop - i, offset=tile.offset)
    return state, take(ks, i + together)

  passes = stop - start
  passes = (passes if count is None else passes + together - 1) // together
  state = lax.fori_loop(0, passes, body, (state, take(ks, start)))[0]
  if count is not None:
    return state
  return rest(state, start=start + passes * together, stop=stop)


def add(w, keys, scales, plan, *, distribution):
  """`w + scales[i] * z_i`, in the order of the list, in every rectangle.

  Args:
    w: float[...], a tensor or its (R, C) view.
    keys: uint32[M, 2], leaf keys.
    scales: float32[M].
    plan: a `Plan`.
    distribution: one of `xla.DISTRIBUTIONS`.

  Returns:
    An array like `w`, with the bits of so many `xla.add`.
  """

  def visit(w, tile):
    part = _add(tile.read(w), keys, scales, plan, tile, distribution)
    return tile.write(w, part)

  return fold(visit, w, plan)


def on_grid(w, scale, add: Callable[[jax.Array], jax.Array], tiled: bool):
  """Applies `add`, int32 to int32, to weights in grid steps.

  Args:
    w: float32[...], multiples of 1 / scale[0] below `LIMIT` of them.
    scale: a power of two and its inverse, float32[] each.
    add: the result may wrap modulo 2**32.
    tiled: whether `w` is a tile that is read from a tensor, and written back.

  Returns:
    An array like `w`, and bool[]: all old entries were as asked for, and the
    new ones are.
  """
  scaled = w * scale[0]
  old = scaled.astype(jnp.int32)
  was = jnp.all((jnp.abs(scaled) < LIMIT) & (old.astype(jnp.float32) == scaled))
  if tiled:
    # XLA on CPU would copy the whole tensor for each tile if a check needed the
    # old weights, or what is cheap to compute from them, after the write.
    off = lambda old: jnp.full_like(old, LIMIT)
    new = lax.cond(was, add, off, old)
  else:
    new = jnp.where(was, add(old), LIMIT)
  fits = jnp.all((new < LIMIT) & (new > -LIMIT))
  return new.astype(jnp.float32) * scale[1], fits


def add_units(w, scale, keys, units, plan, *, distribution):
  """Grid weights plus `units[i] * Z_i` grid steps in every rectangle, in int32.

  The sums wrap modulo 2**32: ask `sum_exceeds`.

  Args:
    w: float32[...], multiples of 1 / scale[0] below `LIMIT` of them.
    scale: a power of two and its inverse, float32[] each.
    keys: uint32[M, 2], leaf keys.
    units: int32[M].
    plan: a `Plan`.
    distribution: a key of `xla.LARGEST`.

  Returns:
    An array like `w`, and bool[]: all old entries of the rectangles were as
    asked for, and the new ones are.
  """

  def visit(carry, tile):
    w, fits = carry
    add = lambda old: _add(old, keys, units, plan, tile, distribution)
    part, fit = on_grid(tile.read(w), scale, add, plan.tiled)
    return tile.write(w, part), fits & fit

  return fold(visit, (w, jnp.ones((), bool)), plan)


def _magnitude(units):
  """uint32[...], of int32[...]."""
  bits = lax.bitcast_convert_type(units, jnp.uint32)
  return jnp.where(units < 0, ~bits + np.uint32(1), bits)


def span_totals(units: jax.Array, spans) -> jax.Array:
  """int32[n]: sums of |units| over spans; `LIMIT` stands for that and more.

  Args:
    units: int32[M].
    spans: int[n, 2], as those of a `Plan`.
  """

  top = np.uint32(LIMIT)
  index = np.arange(len(units))[None]
  inside = (spans[:, :1] <= index) & (index < spans[:, 1:])
  magnitude = jnp.minimum(_magnitude(units), top)[None]
  total = lax.reduce(
    jnp.where(inside, magnitude, np.uint32(0)),
    np.uint32(0),
    lambda x, y: jnp.minimum(x + y, top),
    (1,),
  )
  return total.astype(jnp.int32)


def sum_exceeds(units: jax.Array, largest: int) -> jax.Array:
  """bool[...]: a sum of such units and a weight might leave int32.

  A sum that saturates above the limit can't wrap in uint32, and is associative.

  Args:
    units: int32[..., K].
    largest: magnitude of the integer field.
  """
  limit = (2**31 - 1 - LIMIT) // largest
  top = np.uint32(limit + 1)
  total = lax.reduce(
    jnp.minimum(_magnitude(units), top),
    np.uint32(0),
    lambda x, y: jnp.minimum(x + y, top),
    (units.ndim - 1,),
  )
  return total > np.uint32(limit)


def _largest_of_batch(axis_size, in_batched, counts):
  del axis_size, in_batched  # Unused: called for a batched argument alone.
  return _largest(jnp.max(counts, axis=0)), False


# The count; under `vmap` the largest of all, so that a loop has one end.
_largest = custom_batching.custom_vmap(lambda count: count)
_largest.def_vmap(_largest_of_batch)


def project(x, keys, plan, *, distribution):
  """The inner products `<z_k, x>` over every rectangle.

  Args:
    x: float[...], a tensor or its (R, C) view.
    keys: uint32[M, 2], leaf keys. Every rectangle uses the first of them.
    plan: a `Plan`. Its spans say where the products go, and so how many.
    distribution: one of `xla.DISTRIBUTIONS`.

  Returns:
    float32[M], zero outside of the spans. Sums in float32: over rows, columns
    and then tiles.
  """
  index = np.arange(len(keys), dtype=np.int32)
  zeros = jnp.zeros(len(keys), jnp.float32)

  def visit(out, tile):
    start, stop = (jnp.asarray(i, jnp.int32) for i in tile.span)
    count = stop - start
    part = tile.read(x).astype(jnp.float32)

    def step(y, key, i):
      dot = xla.dot(part, key, distribution=distribution, offset=tile.offset)
      return lax.dynamic_update_index_in_dim(y, dot, i, 0)

    y = _scan(step, zeros, keys, index, 0, _largest(count))
    return out + jnp.roll(jnp.where(index < count, y, np.float32(0)), start)

  return fold(visit, zeros, plan)
