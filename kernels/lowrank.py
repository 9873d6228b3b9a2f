"""Low-rank sign directions: z = u v / sqrt(r) with factors of signs.

A tensor of shape (*lead, R, C) is a stack of N = prod(lead) matrices; a vector
is (1, C) and a scalar (1, 1). Matrix n of the stack has factors of its own,

    z_n = u_n v_n / sqrt(r),    u_n [R, r] and v_n [r, C] of independent signs,

with r in {1, 4, 16}: 1 / sqrt(r) is a power of two, and z one times an integer
in [-r, r]. Entries have mean 0 and variance 1, and any two of them are
independent, but not any four: a matrix has (R + C) r random signs, not R C.

With (a, b) the two words of Threefry-2x32-20 under the leaf key, a sign is
1 - 2 bit, and the bits lie as in the sign field of `jaxfl.kernels.xla`:

    u_n[i, j]  row m = n R + i of the tensor's (N R, C) view:
               (a, b) of counter (m >> 6, j)
    v_n[j, c]  row m = n r + j of all right factors:
               (a, b) of counter (2**31 | m >> 6, c)
    bit        m & 31 of b if m & 32 else a

A slice of a stack thus needs nothing but the number of its first matrix. There
are no other rectangles: factors are small, and tiles have nothing to save.
Fields and steps are equal on every backend, and integer sums in every order.

Low-rank perturbations: Sarkar et al., "Evolution strategies at the
hyperscale", https://arxiv.org/abs/2511.16652.
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
# A sum of 1024 low parts, at most 2**14 each, is exact in float32.
_LOW_BITS = 15
MOST_TERMS = 1024
_ENTRIES = 1 << 24  # of the factors that are held at once: 64 MiB


def stack(shape: tuple[int, ...]) -> tuple[int, int, int]:
  """(N, R, C) of a tensor's shape, see the module."""
  rows, cols = (1, 1, *shape)[-2:]
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


def _integers(key, shape, rank):
  """u v, int32[N, R, C]: rank - 2 times the number of signs that differ."""
  count, rows, cols = stack(shape)
  u = _bits(key, 0, rows, (count * rows, rank), 0)
  v = _bits(key, 0, rank, (count * rank, cols), _RIGHT)
  shift = np.arange(31, 31 - rank, -1, dtype=np.uint32)
  u = u.reshape(count, rows, 1, rank) >> shift.reshape(1, 1, 1, rank)
  v = v.reshape(count, 1, rank, cols) >> shift.reshape(1, 1, rank, 1)
  differ = jnp.sum(u, axis=3) ^ jnp.sum(v, axis=2)
  differ = differ if rank == 1 else lax.population_count(differ)
  return np.int32(rank) - 2 * differ.astype(jnp.int32)


@functools.partial(
  jax.jit, static_argnames=('shape', 'distribution'), inline=True
)
def field(key, shape, *, distribution):
  """The field z of a tensor.

  Args:
    key: uint32[2], a leaf key.
    shape: of the tensor.
    distribution: a key of `RANKS`.

  Returns:
    float32[shape].
  """
  rank = RANKS[distribution]
  z = _integers(key, shape, rank).reshape(shape).astype(jnp.float32)
  return z * np.float32(rank**-0.5)


@functools.partial(jax.jit, static_argnames='distribution', inline=True)
def add(w, key, scale, *, distribution):
  """`w + scale * z`, rounded as `xla.add` does.

  Args:
    w: float[...]; types other than float32 are converted and cast back once.
    key: uint32[2], a leaf key.
    scale: float32[].
    distribution: a key of `RANKS`.

  Returns:
    An array like `w`.
  """
  if not w.size:
    return w
  step = xla.times(scale, field(key, w.shape, distribution=distribution))
  return (w.astype(jnp.float32) + step).astype(w.dtype)


def replay(w, keys, scales, *, distribution):
  """`w + scales[k] * z_k`, in the order of the list, with the bits of `add`.

  Args:
    w: float[...].
    keys: uint32[K, 2], leaf keys.
    scales: float32[K].
    distribution: a key of `RANKS`.

  Returns:
    An array like `w`.
  """

  def step(w, entry):
    return add(w, *entry, distribution=distribution), None

  return lax.scan(step, w, (keys, scales))[0]


def _parts(shape, rank, *arrays):
  """Arrays [K, ...] as [parts, k, ...], padded with zeros.

  The factors of k directions are at most `MOST_TERMS` terms of a sum, and
  `_ENTRIES` entries, unless one direction's are more.
  """
  count, rows, cols = stack(shape)
  held = max(1, count * (rows + cols))
  terms = min(MOST_TERMS, _ENTRIES // held)
  length = len(arrays[0])
  size = max(1, min(terms // rank, length))
  pad = -length % size
  return [
    jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(
      -1, size, *x.shape[1:]
    )
    for x in arrays
  ]


def _matmul(subscripts, x, y):
  return jnp.einsum(subscripts, x, y, precision=lax.Precision.HIGHEST)


def add_units(total, keys, units, *, distribution):
  """`total + sum_k units[k] Z_k` in int32, with the integer fields Z = u v.

  One product of matrices, in float32 and exact: a unit is a low part in
  [-2**14, 2**14) plus 2**15 times a high part, and no sum of either leaves the
  integers that float32 holds. (High parts: their sum is below 2**17 if the sum
  of all |units| is below 2**31.) Skips high parts if all of them are zero.

  Args:
    total: int32[...].
    keys: uint32[K, 2], leaf keys.
    units: int32[K].
    distribution: a key of `RANKS`.

  Returns:
    int32 like `total`; meaningless if `tiles.sum_exceeds`.
  """
  if not total.size:
    return total
  rank, shape = RANKS[distribution], stack(total.shape)

  def step(total, part):
    keys, units = part
    u, v = jax.vmap(lambda key: factors(key, shape, rank))(keys)
    half = 1 << (_LOW_BITS - 1)
    low = ((units + half) & ((1 << _LOW_BITS) - 1)) - half
    high = (units - low) >> _LOW_BITS

    def plus(total, digits, shift):
      digits = digits.astype(jnp.float32).reshape(-1, 1, 1, 1)
      product = _matmul('knrj,knjc->nrc', u, v * digits)
      return total + (product.astype(jnp.int32) << shift)

    total = plus(total, low, 0)
    total = lax.cond(
      jnp.any(high != 0),
      lambda total: plus(total, high, _LOW_BITS),
      lambda total: total,
      total,
    )
    return total, None

  parts = _parts(shape, rank, keys, units)
  return lax.scan(step, total.reshape(shape), parts)[0].reshape(total.shape)


def project(x, keys, *, distribution):
  """The inner products `<z_k, x>`: x times all left factors, then the right.

  Args:
    x: float[...]; types other than float32 are converted.
    keys: uint32[K, 2], leaf keys.
    distribution: a key of `RANKS`.

  Returns:
    float32[K], up to rounding: sums over rows, then columns.
  """
  rank, shape = RANKS[distribution], stack(x.shape)
  x = x.astype(jnp.float32).reshape(shape)

  def part(keys):
    u, v = jax.vmap(lambda key: factors(key, shape, rank))(keys)
    terms = _matmul('knrj,nrc->knjc', u, x) * v
    return jnp.sum(jnp.sum(terms, axis=(1, 2)), axis=1)

  (parts,) = _parts(shape, rank, keys)
  return lax.map(part, parts).ravel()[: len(keys)] * np.float32(rank**-0.5)
