"""All 4096 directions of a Walsh pool at once, whatever their number.

With d, g and the blocks of `jaxfl.kernels.xla`, direction k of a pool is

    z_k[r, c] = d[r, c] (-1)**|k & g|,    g = 128 ((r + t) & 31) + ((c + s) & 127)

so that each is a field of independent signs, and two of them are orthogonal over
every whole block. A sum over the pool is one transform of its coefficients and
one pass over the tensor, and the products with all directions are one pass and
one transform, because the transform is its own transpose:

    sum_k x_k z_k[r, c] = d[r, c] (H x)[g]
    <z_k, y> = (H a)_k,    a_g = sum of d y over the entries whose place is g

with (H x)_g = sum_k (-1)**|k & g| x_k (Sylvester's Hadamard matrix). Sums of
integers are exact. The key of a pool on a tensor is uint32[4]: a leaf key, and
that of the shifts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxfl.kernels import tiles, xla  # pyright: ignore[reportMissingImports]

SIZE = 4096  # directions under one key
_ROWS, _COLS = xla.BLOCK


def transform(x: jax.Array) -> jax.Array:
  """`H x` over the last axis, of 4096 entries; integers or floats.

  Twelve equal steps, each of one add per entry, in a fixed order.
  """

  def step(_, x):
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.concatenate([even + odd, even - odd], axis=-1)

  return lax.fori_loop(0, SIZE.bit_length() - 1, step, x)


def is_small(shape: tuple[int, ...]) -> bool:
  """Whether a tensor has no whole block, and so no Walsh directions."""
  rows, cols = xla.view(shape)
  return rows < _ROWS or cols < _COLS


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
  groups, width = -(-rows // 64), -(-cols // _COLS)
  group = row // np.uint32(64)
  words = xla.hashes(key[:2], groups, cols, group, col)
  minus = xla.expand_signs(words).reshape(-1, cols)[:rows] != 0
  t, s = _shifts(key, groups, width, row, col)
  place = lambda axis: lax.broadcasted_iota(
    jnp.uint32, (2 * groups, _ROWS, width, _COLS), axis
  )
  r = (place(1) + t[:, None, :, None]) & np.uint32(_ROWS - 1)
  c = (place(3) + s[:, None, :, None]) & np.uint32(_COLS - 1)
  g = (r * np.uint32(_COLS) + c).reshape(-1, width * _COLS)[:rows, :cols]
  # in bounds by construction: no check per entry
  value = table.at[g.astype(jnp.int32)].get(mode='promise_in_bounds')
  return jnp.where(minus, -value, value)


def _shifts(key, groups, width, row, col):
  first, left = row // np.uint32(_ROWS), col // np.uint32(_COLS)
  return xla.shifts(key[2:4], 2 * groups, width, first, left)


def add(w, key, coefficients, offset=(0, 0)):
  """`w + sum_k c_k z_k`, with one rounded add per entry; see `spread`.

  Args:
    w: float32[R, C].
    key: uint32[4].
    coefficients: float32[4096], summed in the order of `transform`.
    offset: as for `spread`.
  """
  return w + spread(transform(coefficients), key, w.shape, offset)


def add_units(w, scale, key, units, offset=(0, 0)):
  """`tiles.add_units` of the whole pool: exact.

  Args:
    w: float32[R, C], multiples of 1 / scale[0].
    scale: a power of two and its inverse, float32[] each.
    key: uint32[4].
    units: int32[4096]; ask `tiles.sum_exceeds`.
    offset: as for `spread`.

  Returns:
    An array like `w`, and bool[]: all entries were and are on the grid.
  """
  total = lambda old: old + spread(transform(units), key, w.shape, offset)
  return tiles.on_grid(w, scale, total)


def project(x, key, offset=(0, 0), *, looped: bool):
  """The products `<z_k, x>` with all directions: float32[4096].

  Args:
    x: float[R, C].
    key: uint32[4].
    offset: as for `spread`.
    looped: visit block after block, for a CPU, and not all at once.

  Returns:
    float32[4096], up to rounding.
  """
  x = x.astype(jnp.float32)
  x = jnp.pad(x, [(0, -n % m) for n, m in zip(x.shape, (64, _COLS), strict=True)])
  rows, cols = x.shape
  row, col = xla.position(offset)
  groups, width = rows // 64, cols // _COLS
  words = xla.hashes(key[:2], groups, cols, row // np.uint32(64), col)
  t, s = _shifts(key, groups, width, row, col)
  sums = _visit if looped else _gather
  return transform(sums(x, words.reshape(-1, cols), t, s).reshape(-1))


def _signed(x, words):
  """x with the signs of its rows: [..., 32, c] and words [..., 1, c]."""
  place = lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 2)
  return jnp.where((words >> place) & np.uint32(1) != 0, -x, x)


def _visit(x, words, t, s):
  """Adds every block to a table that is twice as high and wide."""
  height, width = t.shape
  t, s = t.astype(jnp.int32), s.astype(jnp.int32)

  def block(n, table):
    i, j = n // width, n % width
    part = lax.dynamic_slice(x, (i * _ROWS, j * _COLS), xla.BLOCK)
    word = lax.dynamic_slice(words, (i, j * _COLS), (1, _COLS))
    at = t[i, j], s[i, j]
    part = _signed(part, word) + lax.dynamic_slice(table, at, xla.BLOCK)
    return lax.dynamic_update_slice(table, part, at)

  table = jnp.zeros((2 * _ROWS, 2 * _COLS), jnp.float32)
  table = lax.fori_loop(0, height * width, block, table)
  table = table[:_ROWS] + table[_ROWS:]
  return table[:, :_COLS] + table[:, _COLS:]


def _gather(x, words, t, s):
  """Turns all blocks back, then adds them."""
  height, width = t.shape
  place = lambda axis: lax.broadcasted_iota(
    jnp.uint32, (height, width, _ROWS, _COLS), axis
  )
  r = (place(2) - t[:, :, None, None]) & np.uint32(_ROWS - 1)
  c = (place(3) - s[:, :, None, None]) & np.uint32(_COLS - 1)
  c = place(1) * np.uint32(_COLS) + c
  take = lambda a, row: a.at[
    row.astype(jnp.int32), c.astype(jnp.int32)
  ].get(mode='promise_in_bounds')
  value = take(x, place(0) * np.uint32(_ROWS) + r)
  minus = (take(words, place(0)) >> r) & np.uint32(1) != 0
  return jnp.sum(jnp.sum(jnp.where(minus, -value, value), axis=0), axis=0)
