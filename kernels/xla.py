"""Counter-based fields and their updates, in plain XLA.

A tensor is viewed as (R, C): C is the last dimension and R the product of the
others; a vector is (1, C) and a scalar (1, 1). Every field is a function of a
leaf key and of the position (r, c) alone, so a rectangle of it needs no other
part, and neither tiles nor shards can change it. With (a, b) the two words of
Threefry-2x32-20 under the leaf key (Salmon et al., SC 2011):

    rademacher  (a, b) of counter (r >> 6, c); word = b if r & 32 else a
                z = 1 - 2 ((word >> (r & 31)) & 1)
    popcount16  (a, b) of counter (r >> 2, c); half r & 3 of (a low, a high,
                b low, b high); z = (popcount(half) - 8) / 2
    gaussian    (a, b) of counter (r >> 1, c); Box-Muller:
                u = (a + 1/2) 2**-32, t = 2 pi b 2**-32,
                z = sqrt(-2 log u) (sin t if r & 1 else cos t)

The first two are integers up to a power of two and equal on every backend. The
third depends on the backend's `log` and use of FMA, in the last bits: it may
differ between backends, and between the layouts of one backend.

    walsh       z = d h_k; d is the rademacher field, h_k a Walsh function on
                blocks b of 32 x 128 entries, shifted by (t, s) in each:
                h_k = (-1)**|k & g|,  g = 128 ((r + t) & 31) + ((c + s) & 127)
                where |.| counts bits, k < 4096, and t & 31 and s & 127 are from
                the words of counter (r >> 5, c >> 7) under a key of its own

is the direction k of a pool (see `jaxfl.kernels.walsh`). Its key is uint32[5]:
leaf key, key of the shifts, and k; all others are uint32[2].

A word serves many elements. XLA on CPU would fuse the hash into its consumers
and evaluate it once per element; `optimization_barrier` does not prevent that
and a loop of one iteration is inlined. It never duplicates a reduction, so
`hashes` returns its two words from one variadic reduction. (An integer division
is kept apart too, but then each word costs a hash of its own.)

Under GSPMD a tensor is updated without communication if every shard holds whole
groups of 64 rows of the (R, C) view; other layouts exchange bits of the field.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfl import keys

_SIGN = np.uint32(0x80000000)
# Taylor coefficients of cos(pi x / 2) and sin(pi x / 2) / x in x * x; the first
# omitted term is below 2**-29 on |x| <= 1/2.
_COS = [
  (-1) ** (i // 2) * (math.pi / 2) ** i / math.factorial(i)
  for i in range(0, 12, 2)
]
_SIN = [
  (-1) ** (i // 2) * (math.pi / 2) ** i / math.factorial(i)
  for i in range(1, 10, 2)
]

# Rows that share one evaluation of the hash.
_ROWS = {'rademacher': 64, 'popcount16': 4, 'gaussian': 2, 'walsh': 64}

DISTRIBUTIONS = tuple(_ROWS)
# The largest magnitude of the integer fields, see `add_units`.
LARGEST = {'rademacher': 1, 'popcount16': 8, 'walsh': 1}
SIGNS = ('rademacher', 'walsh')  # distributions of +-1
BLOCK = (32, 128)  # of the Walsh functions, rows and columns
# of the rows of Walsh functions: bit r of word k is |k & r| mod 2
_WALSH_ROWS = np.array(
  [sum((k & r).bit_count() % 2 << r for r in range(32)) for k in range(32)],
  np.uint32,
)


def view(shape: tuple[int, ...]) -> tuple[int, int]:
  """The (R, C) view of a tensor's shape."""
  return math.prod(shape[:-1]), (shape[-1] if shape else 1)


def position(offset):
  """Row and column as uint32[], from integers or uint32[]."""
  return tuple(np.uint32(x) if isinstance(x, int) else x for x in offset)


def _iota(shape, axis):
  return lax.broadcasted_iota(jnp.uint32, shape, axis)


def _flip(x, sign):
  """Flips the sign of float32 `x` where bit 31 of uint32 `sign` is set."""
  bits = lax.bitcast_convert_type(x, jnp.uint32) ^ sign
  return lax.bitcast_convert_type(bits, jnp.float32)


def hashes(key, count, cols, first, col, flips=None):
  """Words of the counters (first + i, col + c): uint32[count, 2, ..., cols].

  The reduction runs over a leading axis of two entries, the second of which is
  zero: that is what keeps XLA from simplifying it away.

  Args:
    key: uint32[..., 2].
    count: number of counters' first words.
    cols: number of their second words.
    first: uint32[].
    col: uint32[].
    flips: uint32[count, 2, cols], bits that are flipped; for one key alone.
  """
  shape = (2, count, *key.shape[:-1], cols)
  pair = keys.hash_words(
    key[None, None, ..., 0, None],
    key[None, None, ..., 1, None],
    _iota(shape, 1) + first,
    _iota(shape, len(shape) - 1) + col,
  )
  if flips is not None:
    pair = tuple(word ^ flips[None, :, i] for i, word in enumerate(pair))
  zero = np.uint32(0)
  once = _iota(shape, 0) == zero
  a, b = lax.reduce(
    tuple(jnp.where(once, word, zero) for word in pair),
    (zero, zero),
    lambda x, y: (x[0] | y[0], x[1] | y[1]),
    (0,),
  )
  return jnp.stack([a, b], axis=1)


def shifts(key, count, cols, first, col):
  """Those of the blocks (first + i, col + j): t and s, uint32[count, cols]."""
  pair = hashes(key, count, cols, first, col)
  return pair[:, 0] & np.uint32(31), pair[:, 1] & np.uint32(127)


def _walsh_flips(key, k, count, cols, first, col):
  """The bits of a Walsh function, as `hashes` orders them."""
  height, width = count * 2, -(-cols // BLOCK[1])
  t, s = shifts(key, height, width, first * np.uint32(2), col // BLOCK[1])
  # bit r of a word is |k & (r + t)|: the bits of t = 0, turned by t
  row = jnp.asarray(_WALSH_ROWS)[k >> np.uint32(7)]
  left = (np.uint32(32) - t) & np.uint32(31)
  row = (row >> t) | jnp.where(t == 0, row, row << left)
  shape = (height, width, BLOCK[1])
  x = (s[..., None] + _iota(shape, 2)) & k & np.uint32(127)
  odd = lax.population_count(x) & np.uint32(1)
  flips = row[..., None] ^ (np.uint32(0) - odd)
  return flips.reshape(count, 2, -1)[..., :cols]


def _words(key, count, cols, first, col):
  """The words of the sign field, or of a Walsh direction if the key has 5."""
  flips = None
  if key.shape[-1] == 5:
    flips = _walsh_flips(key[2:4], key[4], count, cols, first, col)
  return hashes(key[:2], count, cols, first, col, flips)


def _polynomial(coefficients, x):
  value = jnp.full_like(x, coefficients[-1])
  for c in reversed(coefficients[:-1]):
    value = value * x + np.float32(c)
  return value


def _is_minus(words):
  """Where z is -1: bool[groups, 2, 32, cols], of uint32[groups, 2, cols].

  A bit is tested where it stands: XLA guards a shift by a traced number, which
  costs more than the rest of an update.
  """
  groups, _, cols = words.shape
  bit = np.uint32(1) << _iota((groups, 2, 32, cols), 2)
  return words[:, :, None, :] & bit != 0


def expand_signs(words):
  return jnp.where(_is_minus(words), _SIGN, np.uint32(0))


def _expand_popcounts(words):
  count, _, cols = words.shape
  shift = np.uint32(16) * _iota((count, 2, 2, cols), 2)
  half = (words[:, :, None, :] >> shift) & np.uint32(0xFFFF)
  return lax.population_count(half).astype(jnp.int32) - np.int32(8)


def _expand_normals(words):
  count, _, cols = words.shape
  uniform = words[:, 0, :].astype(jnp.float32) + np.float32(0.5)
  radius = jnp.sqrt(np.float32(-2) * jnp.log(uniform * np.float32(2.0**-32)))
  # The angle is pi / 2 times (quarter + x), with x in [-1/2, 1/2).
  angle = words[:, 1, :]
  x = lax.bitcast_convert_type(angle << np.uint32(2), jnp.int32) >> np.int32(2)
  x = x.astype(jnp.float32) * np.float32(2.0**-30)
  cosine, sine = _polynomial(_COS, x * x), x * _polynomial(_SIN, x * x)
  quarter = ((angle + np.uint32(1 << 29)) >> np.uint32(30))[:, None, :]
  odd_row = _iota((count, 2, cols), 1)
  # cos(pi / 2 (n + x)) is cos, -sin, -cos, sin for n = 0, 1, 2, 3 mod 4; the
  # odd row is the sine, a quarter turn back.
  n = quarter - odd_row
  unsigned = jnp.where(
    (n & np.uint32(1)) == 0, cosine[:, None, :], sine[:, None, :]
  )
  sign = (n + np.uint32(1)) << np.uint32(30)
  return _flip(radius[:, None, :] * unsigned, sign & _SIGN)


_EXPAND = {
  'rademacher': expand_signs,
  'walsh': expand_signs,
  'popcount16': _expand_popcounts,
  'gaussian': _expand_normals,
}


def _rectangle(key, shape, offset, distribution, aligned):
  """A rectangle of a raw field: sign bits, integers or normals."""
  rows, cols = shape
  row, col = offset
  group = _ROWS[distribution]
  count = -(-(rows + (0 if aligned else group - 1)) // group)
  words = _words(key, count, cols, row // np.uint32(group), col)
  whole = _EXPAND[distribution](words).reshape(count * group, cols)
  if aligned:
    return whole[:rows]
  start = (row % np.uint32(group), np.uint32(0))
  return lax.dynamic_slice(whole, start, shape)


def _raw(key, shape, distribution, offset, aligned=True):
  """The raw field in the shape of a tensor or rectangle; see `add`."""
  raw = _rectangle(key, view(shape), position(offset), distribution, aligned)
  return raw.reshape(shape)


def _as_field(raw, distribution):
  """Turns a raw field into float32 z."""
  if distribution in SIGNS:
    return _flip(jnp.ones((), jnp.float32), raw)
  if distribution == 'popcount16':
    return raw.astype(jnp.float32) * np.float32(0.5)
  return raw


def field(key, shape, offset, *, distribution, aligned=False):
  """The field z of a tensor, or of a rectangle of its (R, C) view.

  Args:
    key: uint32[2], a leaf key; uint32[5] for 'walsh'.
    shape: shape of the result; viewed as (rows, cols).
    offset: (row, column) of the rectangle; Python integers or uint32[] values.
    distribution: one of `DISTRIBUTIONS`.
    aligned: whether a row that is traced is known to be a multiple of 64.

  Returns:
    float32[shape].
  """
  row = offset[0]
  if isinstance(row, int):
    aligned = row % _ROWS[distribution] == 0
  return _field(
    key,
    position(offset),
    shape=shape,
    distribution=distribution,
    aligned=aligned,
  )


@functools.partial(
  jax.jit, static_argnames=('shape', 'distribution', 'aligned'), inline=True
)
def _field(key, offset, *, shape, distribution, aligned):
  raw = _rectangle(key, view(shape), offset, distribution, aligned)
  return _as_field(raw, distribution).reshape(shape)


def _walsh_signs(key, row):
  """Those of a Walsh function in bit 31, at rows uint32[n, C] of any places."""
  height, width = (np.uint32(n) for n in BLOCK)
  first = row[:, :: BLOCK[1]]  # one of every block
  t, s = keys.hash_words(key[2], key[3], first // height, _iota(first.shape, 1))
  t, s = (jnp.repeat(x, BLOCK[1], axis=1)[:, : row.shape[1]] for x in (t, s))
  r, c = (row + t) % height, (_iota(row.shape, 1) + s) % width
  odd = lax.population_count((r * width + c) & key[4])
  return odd << np.uint32(31)


def field_rows(key, rows, cols, *, distribution):
  """The field z of whole rows at any places: of a table that is looked up.

  Args:
    key: uint32[2], a leaf key; uint32[5] for 'walsh'.
    rows: uint32[...], numbers of rows of the (R, C) view.
    cols: C.
    distribution: one of `DISTRIBUTIONS`.

  Returns:
    float32[..., C].
  """
  group = _ROWS[distribution]
  row = jnp.broadcast_to(rows.reshape(-1, 1), (rows.size, cols))
  counter, place = row // np.uint32(group), row % np.uint32(group)
  a, b = keys.hash_words(key[0], key[1], counter, _iota(row.shape, 1))
  if distribution == 'gaussian':
    both = _expand_normals(jnp.stack([a, b], axis=1))
    raw = jnp.where(place == 0, both[:, 0], both[:, 1])
  else:
    half = np.uint32(group // 2)
    word = jnp.where(place < half, a, b)
    if distribution in SIGNS:
      raw = (word << (np.uint32(31) - place % half)) & _SIGN
      if distribution == 'walsh':
        raw ^= _walsh_signs(key, row)
    else:
      bits = (word >> (np.uint32(16) * (place % half))) & np.uint32(0xFFFF)
      raw = lax.population_count(bits).astype(jnp.int32) - np.int32(8)
  return _as_field(raw, distribution).reshape(*rows.shape, cols)


def times(scale, z):
  """`scale * z`, float32.

  The sign of z is applied to the bits of the product, so that no compiler can
  contract the product and a sum into one FMA.
  """
  sign = lax.bitcast_convert_type(z, jnp.uint32) & _SIGN
  return _flip(scale * jnp.abs(z), sign)


@functools.partial(
  jax.jit, static_argnames=('distribution', 'aligned'), inline=True
)
def add(w, key, scale, *, distribution, offset=(0, 0), aligned=True):
  """`w + scale * z`, rounded once per operation in float32.

  Rademacher needs no product; for the others, see `times`.

  Args:
    w: float[...]; types other than float32 are converted and cast back once.
    key: uint32[2], a leaf key; uint32[5] for 'walsh'.
    scale: float32[].
    distribution: one of `DISTRIBUTIONS`.
    offset: if `w` is a rectangle of the (R, C) view of a tensor, its first row,
      a multiple of 64 if `aligned`, and column, one of 128 for 'walsh'; Python
      integers or uint32[] values.
    aligned: false for a first row at any place.

  Returns:
    An array like `w`.
  """
  if not w.size:
    return w
  raw = _raw(key, w.shape, distribution, offset, aligned)
  if distribution in SIGNS:
    step = _flip(scale, raw)
  else:
    step = times(scale, _as_field(raw, distribution))
  return (w.astype(jnp.float32) + step).astype(w.dtype)


@functools.partial(jax.jit, static_argnames='distribution', inline=True)
def add_units(total, key, unit, *, distribution, offset=(0, 0)):
  """`total + unit * Z` in int32, with the integer field Z.

  Z is z for rademacher and 2 z, in [-8, 8], for popcount16.

  Args:
    total: int32[...].
    key: uint32[2], a leaf key; uint32[5] for 'walsh'.
    unit: int32[].
    distribution: a key of `LARGEST`.
    offset: as for `add`.

  Returns:
    int32 like `total`; wraps modulo 2**32.
  """
  if not total.size:
    return total
  raw = _raw(key, total.shape, distribution, offset)
  if distribution in SIGNS:
    return total + jnp.where(raw != 0, -unit, unit)
  return total + unit * raw


@jax.jit  # not inlined: its steps are traced once for their shapes
def add_signs(w, leaf_keys, amounts, count, *, offset=(0, 0)):
  """`w + amounts[n] * z_n` for n < count, in order: many sign fields in a pass.

  The bits are those of as many `add` or `add_units`, in half of the time on a
  CPU: `w` is read once.

  Args:
    w: float32[...], or int32[...], which wraps.
    leaf_keys: uint32[N, 2].
    amounts: [N], of the type of `w`.
    count: int32[].
    offset: as for `add`; aligned.

  Returns:
    An array like `w`.
  """
  if not w.size:
    return w
  rows, cols = view(w.shape)
  row, col = position(offset)
  groups = -(-rows // 64)
  words = hashes(leaf_keys, groups, cols, row // np.uint32(64), col)
  mine = np.arange(len(leaf_keys), dtype=np.int32) < count
  whole = w.dtype == jnp.int32
  if whole:
    # u z = u - 2 u where z is -1
    amounts = jnp.where(mine, amounts, 0)
    w = w + jnp.sum(amounts, dtype=jnp.int32)
    changes = -2 * amounts
  else:
    # -0.0 changes nothing that it is added to
    amounts = jnp.where(mine, amounts, np.float32(-0.0))
    changes = jnp.where(mine, _SIGN, np.uint32(0))
  for n in range(len(leaf_keys)):
    minus = _is_minus(words[:, :, n]).reshape(groups * 64, cols)[:rows]
    change = -minus.reshape(w.shape).astype(changes.dtype) & changes[n]
    w = w + (change if whole else _flip(amounts[n], change))
  return w


def _signed_sums(x, key, offset):
  """Sums of x * z, rademacher, over every 8th row of 32: [G, 2, 4, cols].

  A sum of so many slices is faster on CPU than an array of all products.
  """
  rows, cols = x.shape
  count, parts = rows // 64, 8
  x = x.reshape(count, 2, parts, 32 // parts, cols)
  words = _words(key, count, cols, offset[0] // np.uint32(64), offset[1])
  shape = (count, 2, 32 // parts, cols)
  words = jnp.broadcast_to(words[:, :, None, :], shape)
  total = jnp.zeros(shape, jnp.float32)
  for part in range(parts):
    row = _iota(shape, 2) + np.uint32(part * (32 // parts))
    minus = words & (np.uint32(1) << row) != 0
    total = jnp.where(minus, total - x[:, :, part], total + x[:, :, part])
  return total


@functools.partial(jax.jit, static_argnames='distribution', inline=True)
def dot(x, key, *, distribution, offset=(0, 0)):
  """`sum(x * z)`: first over rows, then over columns.

  Args:
    x: float[...]; types other than float32 are converted.
    key: uint32[2], a leaf key; uint32[5] for 'walsh'.
    distribution: one of `DISTRIBUTIONS`.
    offset: as for `add`.

  Returns:
    float32[], up to rounding: the order of the sums is the backend's.
  """
  x = x.astype(jnp.float32).reshape(view(x.shape))
  offset = position(offset)
  if distribution in SIGNS and len(x) % 64 == 0:
    terms = _signed_sums(x, key, offset)
  else:
    z = _as_field(_raw(key, x.shape, distribution, offset), distribution)
    terms = x * z
  return jnp.sum(jnp.sum(terms, axis=range(terms.ndim - 1)))
