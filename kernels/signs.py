"""The sign field inside of a Pallas kernel.

The definition is that of 'rademacher' in `jaxfl.kernels.xla`: a word holds the
signs of 32 rows of one column, and one hash gives the words of 64 rows. These
functions use elementwise 32-bit operations alone, so that they mean the same on
NumPy arrays, in XLA, on the vector unit of a TPU and in the registers of a GPU.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfl import keys

GROUP = 64  # rows that share a hash
WORD = 32  # rows that share a word


def sign_words(key, group, col):
  """The packed words of a part of the sign field.

  Args:
    key: pair of uint32[], a leaf key.
    group: uint32[...], the row divided by 64.
    col: uint32[...], the column; broadcasts with `group`.

  Returns:
    Two arrays uint32[...]. Bit i of the first is 1 where z is -1 in row
    64 group + i, and bit i of the second in row 64 group + 32 + i.
  """
  return keys.threefry2x32(key[0], key[1], group, col)


def bits(amounts):
  """float32[...] or int32[...] as uint32[...], for the arguments below."""
  return lax.bitcast_convert_type(amounts, jnp.uint32)


def add(w, amount, word, shift):
  """`w + amount * z`, where z is the sign in bit 31 - shift of a word.

  Args:
    w: float32[...] or bfloat16[...], with one rounding to float32 and one cast
      back, as `xla.add` has them; or int32[...], which wraps modulo 2**32.
    amount: uint32[], the bits of float32[] or int32[].
    word: uint32[...] that broadcasts with `w`.
    shift: integer or uint32[...], 31 minus the row within the word.

  Returns:
    An array like `w`.
  """
  first = word << shift  # the sign is bit 31
  if w.dtype == jnp.int32:
    # -x is (x ^ -1) - (-1)
    minus = lax.bitcast_convert_type(first, jnp.int32) >> np.int32(31)
    unit = lax.bitcast_convert_type(amount, jnp.int32)
    return w + ((minus ^ unit) - minus)
  return (w.astype(jnp.float32) + _flip(amount, first)).astype(w.dtype)


def flip(x, word, shift):
  """`x * z` for float32[...] `x`; otherwise as `add`."""
  return _flip(lax.bitcast_convert_type(x, jnp.uint32), word << shift)


def _flip(pattern, word):
  sign = word & np.uint32(0x80000000)
  return lax.bitcast_convert_type(sign ^ pattern, jnp.float32)
