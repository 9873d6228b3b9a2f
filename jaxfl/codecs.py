"""Codecs: projected gradients as one byte or one bit each, and back.

A codec turns projected gradients, float32[K], into a small array and back.
Every replica applies what it decodes, so that decoding uses only table lookups:
the tables are made on the host and rounded to 12 significant bits, which hides
the last-bit differences of math libraries and keeps products with learning
rates of 12 bits exact in float32.

    name                  bytes     values
    log8                  K         +-2**((m - 64) / 5), m = 1..127, and 0
    linear8               K         q scale / 127, q = -127..127
    linear16              2 K       q scale / 32767, q = -32767..32767
    sign1                 (K+8)//8  +-scale
    bfloat16              2 K       the nearest of 8 significant bits
    float32               4 K       as they are

`log8`, `linear8` and `linear16` round to the nearest value; `log8_stochastic`
and `linear8_stochastic` round to one of the two neighbours without bias. One
byte per gradient: Zelikman et al., "Just One Byte (per gradient)",
arXiv:2306.10015, whose code has nine bits; one bit: Seide et al., "1-bit
stochastic gradient descent", Interspeech 2014.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import keys
from jaxfl import typing as jt

CODECS = (
  'log8',
  'log8_stochastic',
  'linear8',
  'linear8_stochastic',
  'linear16',
  'sign1',
  'bfloat16',
  'float32',
)


class Codec(NamedTuple):
  """Turns projected gradients into an array to send, and back.

  `encode` and `decode` can be jitted and vmapped; `decode` gives equal bits on
  every device. What is not finite decodes to NaN: a rejected contribution.

  Attributes:
    name: one of `CODECS`.
    encode: values float32[K], key uint32[2] -> code. The key is used by
      stochastic codecs only, one number per value.
    decode: code, K -> float32[K]. ValueError for a code of the wrong shape.
    struct: K -> shape and dtype of the code.
  """

  name: str
  encode: Callable[[jt.Array, Any], jax.Array]
  decode: Callable[[jt.Array, int], jax.Array]
  struct: Callable[[int], jax.ShapeDtypeStruct]


@functools.cache
def codec(name: str, scale: float = 1.0) -> Codec:
  """A codec by name; equal arguments give the same object.

  Args:
    name: one of `CODECS`.
    scale: largest value of `linear8` and `linear16`, magnitude of `sign1`;
      unused by others.

  Raises:
    ValueError: for an unknown name, or a scale outside [2**-100, 2**100].
  """
  if name not in CODECS:
    raise ValueError(f'codec must be one of {", ".join(CODECS)}, got {name!r}')
  if not 2.0**-100 <= scale <= 2.0**100:
    raise ValueError(f'scale must be in [2**-100, 2**100], got {scale}')
  if name in ('bfloat16', 'float32'):
    return _float_codec(name)
  if name == 'sign1':
    return _sign_codec(scale)
  if name == 'linear16':
    return _linear16_codec(scale)
  levels = log8_levels() if 'log8' in name else linear8_levels(scale)
  return _level_codec(name, levels)


def round_significant(x: float, bits: int = 12) -> float:
  """Rounds to `bits` significant bits, ties to even; computed on the host.

  Raises:
    ValueError: if x is not finite.
  """
  if not math.isfinite(x):
    raise ValueError(f'only finite numbers can be rounded, got {x}')
  mantissa, exponent = math.frexp(x)
  return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def log8_levels() -> np.ndarray:
  """Magnitudes of `log8`, float32[128]: 0, then 2**((m - 64) / 5)."""
  levels = [round_significant(2.0 ** ((m - 64) / 5)) for m in range(1, 128)]
  return np.array([0.0, *levels], np.float32)


def linear8_levels(scale: float) -> np.ndarray:
  """Magnitudes of `linear8`, float32[128]: multiples of about scale / 127."""
  step = round_significant(scale / 127)
  return np.array([q * step for q in range(128)], np.float32)


def _level_codec(name: str, levels: np.ndarray) -> Codec:
  """One byte per value: a sign and one of 128 ascending magnitudes."""
  middles = (levels[1:] + levels[:-1]) * np.float32(0.5)  # exact
  gaps = np.append(levels[1:] - levels[:-1], np.float32(0.0))
  signed = 'linear8' in name
  dtype = jnp.int8 if signed else jnp.uint8
  table = np.full(256, np.nan, np.float32)
  table[:128] = levels
  table[129:] = -(levels[:0:-1] if signed else levels[1:])

  def encode(values, key):
    x = jnp.abs(_vector(values))
    if name.endswith('stochastic'):
      # P(up) = (x - level) / gap, for a uniform number below 1
      below = jnp.searchsorted(jnp.asarray(levels), x, side='right') - 1
      u = keys.uniform(keys.fold(key, jnp.arange(x.shape[0])))
      up = u * jnp.asarray(gaps)[below] < x - jnp.asarray(levels)[below]
      level = jnp.minimum(below + up, 127)
    else:
      level = jnp.searchsorted(jnp.asarray(middles), x, side='right')
    negative = (values < 0) & (level > 0)
    opposite = 256 - level if signed else level + 128
    code = jnp.where(negative, opposite, level)
    code = jnp.where(jnp.isfinite(values), code, 128).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(code, dtype)

  def decode(code, num_values):
    code = _check_code(name, code, struct(num_values)).astype(jnp.int32)
    return jnp.take(jnp.asarray(table), code & 255, mode='clip')

  struct = lambda num_values: jax.ShapeDtypeStruct((num_values,), dtype)
  return Codec(name, encode, decode, struct)


def _linear16_codec(scale: float) -> Codec:
  """A multiple of a step, which has 8 bits: products are exact in float32."""
  step = round_significant(scale / 32767, 8)

  def encode(values, key):
    del key  # Unused.
    values = _vector(values)
    q = jnp.clip(jnp.rint(values * np.float32(1.0 / step)), -32767, 32767)
    return jnp.where(jnp.isfinite(values), q, -32768).astype(jnp.int16)

  def decode(code, num_values):
    code = _check_code('linear16', code, struct(num_values))
    value = code.astype(jnp.float32) * np.float32(step)
    return jnp.where(code == -32768, jnp.float32(jnp.nan), value)

  struct = lambda num_values: jax.ShapeDtypeStruct((num_values,), jnp.int16)
  return Codec('linear16', encode, decode, struct)


def _sign_codec(scale: float) -> Codec:
  """Bit 0 (lowest bit first): the message is valid; bit i + 1: value i < 0."""
  magnitude = round_significant(scale)
  table = np.array([magnitude, -magnitude], np.float32)

  def encode(values, key):
    del key  # Unused.
    valid = jnp.all(jnp.isfinite(_vector(values)))
    bits = jnp.append(valid[None], (values < 0) & valid)
    return jnp.packbits(bits, bitorder='little')

  def decode(code, num_values):
    code = _check_code('sign1', code, struct(num_values))
    bits = jnp.unpackbits(code, bitorder='little')[: num_values + 1]
    values = jnp.take(jnp.asarray(table), bits[1:].astype(jnp.int32))
    return jnp.where(bits[0] == 1, values, jnp.float32(jnp.nan))

  struct = lambda k: jax.ShapeDtypeStruct(((k + 8) // 8,), jnp.uint8)
  return Codec('sign1', encode, decode, struct)


def _float_codec(name: str) -> Codec:
  """A floating type; no table, as conversion to float32 is exact."""
  finite = lambda x: jnp.where(jnp.isfinite(x), x, jnp.nan)
  struct = lambda num_values: jax.ShapeDtypeStruct((num_values,), name)

  def encode(values, key):
    del key  # Unused.
    return finite(_vector(values).astype(name))

  def decode(code, num_values):
    code = _check_code(name, code, struct(num_values))
    return finite(code.astype(jnp.float32))

  return Codec(name, encode, decode, struct)


def _vector(values) -> jax.Array:
  values = jnp.asarray(values)
  if values.ndim != 1 or values.dtype != jnp.float32:
    raise ValueError(
      f'values must be float32[K], got {values.dtype}{list(values.shape)}'
    )
  return values


def _check_code(name, code, struct) -> jax.Array:
  code = jnp.asarray(code)
  if code.shape != struct.shape or code.dtype != struct.dtype:
    raise ValueError(
      f'{name} code must be {struct.dtype}{list(struct.shape)}, got'
      f' {code.dtype}{list(code.shape)}'
    )
  return code
