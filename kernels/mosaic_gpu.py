"""Many directions on one tensor, for NVIDIA GPUs from Hopper on. Rademacher.

Pallas, Mosaic GPU. A thread block of 128 threads owns a tile of 64 rows (or
all, if there are fewer) and 128 columns of the (R, C) view, in registers: a row
of it is one register of every thread. A loop over the directions hashes once
per column and direction. Keys and amounts are read from global memory.

Columns are padded to a multiple of 128, and the rows that are left over by 64
are tiles of their own. The kernels run on any backend with `interpret`, an
instance of JAX's `InterpretGPUParams`; they are the same there but for the
layouts, which that mode does not know, and for how an array becomes a Ref.

The form of `pl.kernel` that updates a Ref in place is the same in JAX 0.10 and
0.11, so there is no other case; what may change with the next version of JAX is
in `_run`, `_in_place` and `_columns`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxfl.kernels import signs  # pyright: ignore[reportMissingImports]

_COLS = 128  # threads of a block
_CHUNK = 1024  # directions whose products are held for every tile at a time


def _run(body, tiles, *args, out_type=(), interpret=False) -> Any:
  """`body(tile, *args, *outs)`, arguments being Refs, for every tile.

  Arguments that are Refs already are updated in place.
  """

  def kernel(*refs):
    body(lax.axis_index('tile'), *refs)

  return pl.kernel(
    kernel,
    out_type,
    mesh=plgpu.Mesh(grid=(tiles,), grid_names=('tile',)),
    compiler_params=plgpu.CompilerParams(),
    interpret=interpret,
    name=body.func.__name__.strip('_'),
  )(*args)


def _in_place(update, x, interpret):
  """The array after `update(ref)`, without a copy if it is not used again."""
  if interpret:  # asks for the memory space, which `run_state` leaves open
    ref = jax.new_ref(x, memory_space=plgpu.GMEM)
    update(ref)
    return jax.freeze(ref)
  return pl.run_state(update)(x)  # `vmap` can't have a Ref of the other kind


def _columns(interpret):
  """uint32[128]: the columns of a tile, one for each thread."""
  col = lax.broadcasted_iota(jnp.uint32, (_COLS,), 0)
  if interpret:
    return col
  return plgpu.layout_cast(col, plgpu.Layout.WG_STRIDED((_COLS,), vec_size=1))


def _parts(shape):
  """(first row, rows of a tile, number of tiles) of the parts of an array."""
  rows, cols = shape
  across = cols // _COLS
  whole = rows // signs.GROUP
  parts = [
    (0, signs.GROUP, whole * across),
    (whole * signs.GROUP, rows % signs.GROUP, across),
  ]
  return [part for part in parts if part[1] * part[2]]


class _Tile:
  """Where a tile is: its rows, its columns and the words of its signs."""

  def __init__(self, tile, offset, ref, first, rows, interpret):
    across = ref.shape[1] // _COLS
    row, col = tile // across * rows + first, tile % across * _COLS
    self.index = [(row + r, pl.ds(col, _COLS)) for r in range(rows)]
    self._group = (offset[0] + row.astype(jnp.uint32)) // np.uint32(signs.GROUP)
    self._col = _columns(interpret) + (offset[1] + col.astype(jnp.uint32))

  def words(self, keys, k):
    """(word, shift) of every row under key k."""
    key = keys[2 * k], keys[2 * k + 1]
    a, b = signs.sign_words(key, self._group, self._col)
    return [
      ((a, b)[r // signs.WORD], np.uint32(31 - r % signs.WORD))
      for r in range(len(self.index))
    ]


def _add(tile, offset, keys, amounts, w, *, first, rows, count, interpret):
  """Adds all directions to a tile."""
  tile = _Tile(tile, offset, w, first, rows, interpret)

  def step(k, values):
    amount = jnp.broadcast_to(amounts[k], (_COLS,))
    return tuple(
      signs.add(x, amount, *word)
      for x, word in zip(values, tile.words(keys, k), strict=True)
    )

  values = tuple(w[index] for index in tile.index)
  values = lax.fori_loop(0, count, step, values)
  for index, x in zip(tile.index, values, strict=True):
    w[index] = x


def add(w, keys, amounts, offset=(0, 0), *, interpret=False):
  """`w + amounts[k] * z_k`, in order; in place if `w` is donated and C % 128.

  Args:
    w: float32[R, C] or bfloat16[R, C], not empty, to which float32 amounts are
      added; or int32[R, C], for int32 amounts.
    keys: uint32[K, 2], leaf keys; K > 0.
    amounts: float32[K] or int32[K].
    offset: first row, a multiple of 64, and column of `w` in the (R, C) view
      of the whole tensor; Python integers or uint32[] values.
    interpret: see above.

  Returns:
    An array like `w`, with the bits of K `xla.add` or `xla.add_units`.
  """
  args = _offset(offset), keys.reshape(-1), signs.bits(amounts)

  def update(ref):
    for first, rows, tiles in _parts(ref.shape):
      body = functools.partial(
        _add, first=first, rows=rows, count=len(keys), interpret=bool(interpret)
      )
      _run(body, tiles, *args, ref, interpret=interpret)

  return _in_place(update, _pad(w), interpret)[:, : w.shape[1]]


def _pad(x):
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _COLS)))


def _offset(offset):
  return jnp.stack([jnp.asarray(x, jnp.uint32) for x in offset])


def _project(number, offset, keys, x, out, *, first, rows, count, interpret):
  """Products of a tile with all directions."""
  tile = _Tile(number, offset, x, first, rows, interpret)
  values = [x[index].astype(jnp.float32) for index in tile.index]

  def step(k, _):
    terms = [
      signs.flip(x, *word)
      for x, word in zip(values, tile.words(keys, k), strict=True)
    ]
    out[number, k] = jnp.sum(sum(terms[1:], terms[0]))
    return 0

  lax.fori_loop(0, count, step, 0)


def project(x, keys, offset=(0, 0), *, interpret=False):
  """The inner products `<z_k, x>`.

  Every column sums its rows of a tile, a block its columns, and XLA the tiles.

  Args:
    x: float32[R, C] or bfloat16[R, C], not empty.
    keys: uint32[K, 2], leaf keys; K > 0.
    offset: as for `add`.
    interpret: see above.

  Returns:
    float32[K].
  """
  x = _pad(x)
  size = min(len(keys), _CHUNK)

  def chunk(keys):
    total = jnp.zeros(size, jnp.float32)
    for first, rows, tiles in _parts(x.shape):
      body = functools.partial(
        _project, first=first, rows=rows, count=size, interpret=bool(interpret)
      )
      out = jax.ShapeDtypeStruct((tiles, size), jnp.float32)
      args = _offset(offset), keys.reshape(-1), x
      total += jnp.sum(
        _run(body, tiles, *args, out_type=out, interpret=interpret), axis=0
      )
    return total

  if len(keys) == size:
    return chunk(keys)
  padded = jnp.pad(keys, ((0, -len(keys) % size), (0, 0)))
  return lax.map(chunk, padded.reshape(-1, size, 2)).reshape(-1)[: len(keys)]
