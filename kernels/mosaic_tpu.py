"""Many directions on one tensor, for TPU (Pallas, Mosaic TPU). Rademacher.

The grid runs over tiles of the (R, C) view. A tile stays in VMEM while a loop
runs over the directions, whose keys and amounts come through SMEM in chunks,
the last and fastest axis of the grid of `add`: any number of directions is one
program and one pass through memory. Edges need no care in `add`, because what
lies beyond an array is never written; `project` replaces it by zeros.

All functions take `interpret`, to run on any backend, and `block`, the rows and
columns of a tile; neither changes the bits of `add`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxfl.kernels import signs  # pyright: ignore[reportMissingImports]

_ROWS = 512  # of a tile: its hashes fill 8 sublanes
_COLS = 256
_CHUNK = 1024  # directions
_SUBLANES, _LANES = 8, 128


def _iota(shape, axis):
  return lax.broadcasted_iota(jnp.uint32, shape, axis)


def _block(shape):
  """Rows and columns of a tile: multiples of (64, 128), or all of them."""
  height = min(shape[0], _ROWS)
  # rows that are not there leave room for columns
  width = _COLS * max(1, min(8, _ROWS // max(height, signs.WORD)))
  return height, min(shape[1], width)


def _words(key, offset, position, shape):
  """The words of a tile: two uint32[groups, cols]."""
  rows, cols = shape
  count = pl.cdiv(rows, signs.GROUP)
  row, col = (
    offset[axis] + position[axis].astype(jnp.uint32) for axis in range(2)
  )
  return signs.sign_words(
    key,
    _iota((count, cols), 0) + row // np.uint32(signs.GROUP),
    _iota((count, cols), 1) + col,
  )


def _strips(rows, height):
  """(first row, number of rows) of parts that lie within a word."""
  return [(i, min(height, rows - i)) for i in range(0, rows, height)]


def _word(words, row, shape):
  """The word of each entry from `row` on, and its shift."""
  group = row // signs.GROUP
  word = words[row % signs.GROUP // signs.WORD][group : group + 1]
  shift = np.uint32(31 - row % signs.WORD) - _iota(shape, 0)
  return jnp.broadcast_to(word, shape), shift


def _add(offset, scalars, w, out, *, count):
  """Adds the chunk's directions to a tile."""
  i, j, chunk = (pl.program_id(axis) for axis in range(3))
  position = i * out.shape[0], j * out.shape[1]

  @pl.when(chunk == 0)
  def _():
    out[...] = w[...]

  def step(k, _):
    key = scalars[0, k], scalars[1, k]
    words = _words(key, offset, position, out.shape)
    for row, height in _strips(out.shape[0], signs.WORD):
      part = pl.ds(row, height), slice(None)
      word, shift = _word(words, row, (height, out.shape[1]))
      out[part] = signs.add(out[part], scalars[2, k], word, shift)
    return 0

  size = scalars.shape[1]
  lax.fori_loop(0, jnp.minimum(size, count - chunk * size), step, 0)


def add(w, keys, amounts, offset=(0, 0), *, block=None, interpret=False):
  """`w + amounts[k] * z_k`, in order; in place if `w` is donated.

  Args:
    w: float32[R, C] or bfloat16[R, C], not empty, to which float32 amounts are
      added; or int32[R, C], for int32 amounts.
    keys: uint32[K, 2], leaf keys; K > 0.
    amounts: float32[K] or int32[K].
    offset: first row, a multiple of 64, and column of `w` in the (R, C) view
      of the whole tensor; Python integers or uint32[] values.
    block: rows and columns of a tile.
    interpret: run without a TPU.

  Returns:
    An array like `w`, with the bits of K `xla.add` or `xla.add_units`.
  """
  chunks = _chunks(keys[:, 0], keys[:, 1], signs.bits(amounts))
  height, width = block or _block(w.shape)
  tile = pl.BlockSpec((height, width), lambda i, j, k: (i, j))
  return pl.pallas_call(
    functools.partial(_add, count=len(keys)),
    grid=(*map(pl.cdiv, w.shape, (height, width)), len(chunks)),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), _scalars(chunks, 2), tile],
    out_specs=tile,
    out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype),
    input_output_aliases={2: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='jaxfl_add',
  )(_offset(offset), chunks, w)


def _chunks(*rows):
  """Scalars of the directions: uint32[chunks, len(rows), size of a chunk]."""
  x = jnp.stack(rows)
  size = min(x.shape[1], _CHUNK)
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))
  return jnp.moveaxis(x.reshape(len(rows), -1, size), 1, 0)


def _scalars(chunks, axis):
  """The chunk of the grid's axis, in SMEM."""
  index_map = lambda *position: (position[axis], 0, 0)
  return pl.BlockSpec(
    (None, *chunks.shape[1:]), index_map, memory_space=pltpu.SMEM
  )


def _offset(offset):
  return jnp.stack([jnp.asarray(x, jnp.uint32) for x in offset])


def _project(offset, scalars, x, out, tile, *, count, shape):
  """Adds the products of a tile to the chunk's sums."""
  chunk, i, j = (pl.program_id(axis) for axis in range(3))

  @pl.when((i == 0) & (j == 0))
  def _():
    out[...] = jnp.zeros(out.shape, out.dtype)

  rows, cols = x.shape
  position = i * rows, j * cols
  row, col = (
    lax.broadcasted_iota(jnp.int32, x.shape, axis) + position[axis]
    for axis in range(2)
  )
  inside = (row < shape[0]) & (col < shape[1])
  tile[...] = jnp.zeros(tile.shape, tile.dtype)
  tile[:rows, :cols] = jnp.where(inside, x[...].astype(jnp.float32), 0.0)

  def step(k, _):
    key = scalars[0, k], scalars[1, k]
    words = _words(key, offset, position, tile.shape)
    total = out[k]
    for row, height in _strips(tile.shape[0], _SUBLANES):
      word, shift = _word(words, row, (height, tile.shape[1]))
      part = signs.flip(tile[row : row + height, :], word, shift)
      for first in range(0, tile.shape[1], _LANES):
        total += part[:, first : first + _LANES]
    out[k] = total
    return 0

  size = out.shape[0]
  lax.fori_loop(0, jnp.minimum(size, count - chunk * size), step, 0)


def project(x, keys, offset=(0, 0), *, block=None, interpret=False):
  """The inner products `<z_k, x>`.

  Every lane sums its part of all tiles, in the order of the grid, and XLA sums
  the lanes.

  Args:
    x: float32[R, C] or bfloat16[R, C], not empty.
    keys: uint32[K, 2], leaf keys; K > 0.
    offset: as for `add`.
    block: rows and columns of a tile.
    interpret: run without a TPU.

  Returns:
    float32[K].
  """
  count, chunks = len(keys), _chunks(keys[:, 0], keys[:, 1])
  height, width = block or _block(x.shape)
  padded = (
    pl.cdiv(height, _SUBLANES) * _SUBLANES,
    pl.cdiv(width, _LANES) * _LANES,
  )
  lanes = (_SUBLANES, _LANES)
  sums = pl.pallas_call(
    functools.partial(_project, count=count, shape=x.shape),
    grid=(len(chunks), *map(pl.cdiv, x.shape, (height, width))),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      _scalars(chunks, 0),
      pl.BlockSpec((height, width), lambda k, i, j: (i, j)),
    ],
    out_specs=pl.BlockSpec(
      (chunks.shape[2], *lanes), lambda k, i, j: (k, 0, 0)
    ),
    out_shape=jax.ShapeDtypeStruct((count, *lanes), jnp.float32),
    scratch_shapes=[pltpu.VMEM(padded, jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary')
    ),
    interpret=interpret,
    name='jaxfl_project',
  )(_offset(offset), chunks, x)
  return jnp.sum(sums, axis=(1, 2))
