"""Low-rank sign directions: z = u v / sqrt(r) with factors of signs.

A tensor of shape (*lead, R, C) is a stack of N = prod(lead) matrices; a vector
is (1, C) and a scalar (1, 1). Matrix n of the stack has factors of its own,

    z_n = u_n v_n / sqrt(r),    u_n [R, r] and v_n [r, C] of independent signs,

with r in {1, 4, 16}: 1 / sqrt(r) is a power of two, and z one times an integer
in [-r, r]. Entries have mean 0 and variance 1 and are uncorrelated, but not
independent: a matrix of them has R + C random signs per rank, not R C.

With (a, b) the two words of Threefry-2x32-20 under the leaf key, a sign is
1 - 2 bit, and the bits lie as in the sign field of `jaxfl.kernels.xla`:

    u_n[i, j]  row m = n R + i of the tensor's (N R, C) view:
               (a, b) of counter (m >> 6, j)
    v_n[j, c]  row m = n r + j of all right factors:
               (a, b) of counter (2**31 | m >> 6, c)
    bit        m & 31 of b if m & 32 else a

A slice of a stack thus needs nothing but the number of its first matrix. There
are no other rectangles: factors are small, and tiles have nothing to save. All
of it are sums of integers, equal on every backend.

Low-rank perturbations: Sarkar et al., "Evolution strategies at the
hyperscale", https://arxiv.org/abs/2511.16652 (there with Gaussian factors).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxfl.kernels import xla  # pyright: ignore[reportMissingImports]

RANKS = {'rank1': 1, 'rank4': 4, 'rank16': 16}
_GROUP = 64  # rows that share a word
_RIGHT = 1 << 31  # the first group of the right factors


def stack(shape: tuple[int, ...]) -> tuple[int, int, int]:
  """(N, R, C) of a tensor's shape, see the module."""
  rows, cols = ((1, 1) + tuple(shape))[-2:]
  return math.prod(shape[:-2]), rows, cols


def _bits(key, start, step, shape, group):
  """Rows of a sign field: uint32[shape], the bit in bit 31.

  Args:
    key: uint32[2], a leaf key.
    start: the first row, a multiple of `step`; integer or uint32[].
    step: static.
    shape: rows and columns.
    group: number of the field's first group of rows.
  """
  known = isinstance(start, int)
  # rows of the first group that may have to be skipped
  skip = start % _GROUP if known else _GROUP - math.gcd(step, _GROUP)
  start = np.uint32(start) if known else start
  return _rows(key, start, skip=skip, shape=shape, group=group)


@functools.partial(
  jax.jit, static_argnames=('skip', 'shape', 'group'), inline=True
)
def _rows(key, start, *, skip, shape, group):
  rows, cols = shape
  count = -(-(skip + rows) // _GROUP)
  first = np.uint32(group) + start // np.uint32(_GROUP)
  words = xla.hashes(key, count, cols, first, np.uint32(0))
  whole = xla.expand_signs(words).reshape(count * _GROUP, cols)
  return lax.dynamic_slice(whole, (start % _GROUP, np.uint32(0)), shape)


def factors(key, shape, rank, first=0, *, dtype=jnp.float32):
  """The factors of a tensor's direction, z = u v / sqrt(rank).

  Args:
    key: uint32[2], a leaf key.
    shape: of the tensor, or of a slice of its stack: (*lead, R, C).
    rank: a value of `RANKS`.
    first: number of the slice's first matrix in the stack; an integer or
      uint32[], which may be traced. For layer i of a tensor [L, R, C] it is i;
      with further axes before R, matrices are numbered in row-major order.
    dtype: of the signs; any type that has 1 and -1.

  Returns:
    u [*lead, R, rank] and v [*lead, rank, C]; (1, rank) and (rank, C) for a
    vector. A stack's rows, N R, must be fewer than 2**32.
  """
  lead, (count, rows, cols) = shape[:-2], stack(shape)
  static = isinstance(first, (int, np.integer))
  first = int(first) if static else jnp.asarray(first).astype(jnp.uint32)
  u = _bits(key, first * rows, rows, (count * rows, rank), 0)
  v = _bits(key, first * rank, rank, (count * rank, cols), _RIGHT)
  as_signs = lambda bits: jnp.where(bits == 0, 1, -1).astype(dtype)
  return (
    as_signs(u).reshape(*lead, rows, rank),
    as_signs(v).reshape(*lead, rank, cols),
  )
