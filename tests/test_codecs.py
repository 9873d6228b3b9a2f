"""Codecs: exact decoding, and the stated errors."""

import hashlib
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import codecs, keys, wire

FAST = hypothesis.settings(
  deadline=None, max_examples=60, derandomize=True, database=None
)
KEY = keys.root(7)
# sha256 of the tables as little-endian float32: part of the format
LOG8_SHA256 = '9a46068e7ee789f56354cbe9138eeb16eeba195cebf16b9dbd8bc5f3f96decb3'
LINEAR8_SHA256 = (
  '7c9bf6813f7f5dbc13b15030ad06d82ba86b92e3e4886dfd8da0eda8e08130de'
)
STOCHASTIC = [name for name in codecs.CODECS if name.endswith('stochastic')]


def _float32(x) -> np.ndarray:
  return np.asarray(x, np.float32)


def _encode(codec, x, key=KEY):
  return np.asarray(jax.jit(codec.encode)(x, key))


def _decode(codec, code, num_values):
  return np.asarray(jax.jit(codec.decode, static_argnums=1)(code, num_values))


def _levels(name, scale=16.0):
  return (
    codecs.log8_levels() if 'log8' in name else codecs.linear8_levels(scale)
  )


def test_names():
  with pytest.raises(ValueError, match='log8, log8_stochastic, linear8'):
    codecs.codec('log9')
  for scale in (0.0, -1.0, math.inf, math.nan, 1e-40):
    with pytest.raises(ValueError, match='scale'):
      codecs.codec('linear8', scale)
  assert codecs.codec('log8', scale=2.0) is codecs.codec('log8', scale=2.0)


def test_round_significant():
  assert codecs.round_significant(0.1, 4) == 0.1015625
  assert codecs.round_significant(-3.0) == -3.0
  assert codecs.round_significant(4097.0) == 4096.0  # ties to even
  assert codecs.round_significant(4099.0) == 4100.0
  assert codecs.round_significant(0.0) == 0.0
  with pytest.raises(ValueError, match='finite'):
    codecs.round_significant(math.inf)


def test_tables_are_frozen():
  digest = lambda x: hashlib.sha256(x.astype('<f4').tobytes()).hexdigest()
  assert digest(codecs.log8_levels()) == LOG8_SHA256
  assert digest(codecs.linear8_levels(16.0)) == LINEAR8_SHA256


def test_log8_table_hides_the_math_library():
  for m in range(1, 128):
    scaled, _ = math.frexp(2.0 ** ((m - 64) / 5))
    distance = abs((scaled * 2**12) % 1 - 0.5)  # from the tie
    assert distance > 1e-6  # a library is wrong by 1e-12 of this unit
  levels = codecs.log8_levels()
  assert levels[64] == 1.0
  ratio = levels[1:] / np.exp2((np.arange(1, 128) - 64) / 5)
  assert np.abs(ratio - 1).max() <= 2.0**-12


@pytest.mark.parametrize('name', ['log8', 'linear8'])
def test_tables_rise_and_have_twelve_bits_of_unit(name):
  levels = _levels(name)
  assert levels.shape == (128,)
  assert (np.diff(levels) > 0).all()
  for v in levels:
    unit = codecs.round_significant(float(v), 12 if name == 'log8' else 19)
    assert unit == v


@pytest.mark.parametrize('name', ['log8', 'linear8'])
def test_every_code_decodes_to_its_level_and_back(name):
  codec = codecs.codec(name, 16.0)
  codes = np.arange(256).astype(np.uint8).view(codec.struct(1).dtype)
  values = _decode(codec, codes, 256)
  assert np.isnan(values[128])
  finite = np.delete(np.arange(256), 128)
  assert len(np.unique(values[finite])) == 255
  np.testing.assert_array_equal(_encode(codec, values), codes)
  sign = np.where(finite < 128, 1, -1)
  index = finite % 128 if name == 'log8' else np.minimum(finite, 256 - finite)
  np.testing.assert_array_equal(values[finite], sign * _levels(name)[index])


@pytest.mark.parametrize('name', ['log8', 'linear8'])
def test_nearest(name):
  codec, levels = codecs.codec(name, 16.0), _levels(name).astype(np.float64)
  x = _float32(np.random.default_rng(0).normal(size=4000) * 5)
  error = np.abs(
    _decode(codec, _encode(codec, x), len(x)) - x.astype(np.float64)
  )
  best = np.abs(np.abs(np.float64(x))[:, None] - levels[None, :]).min(axis=1)
  np.testing.assert_array_equal(error, best)


def test_log8_relative_error_is_the_derived_one():
  # x log-uniform in the cell of level 1 among levels r**m: u from (1 + 1/r) / 2
  # to (1 + r) / 2, and the integral of (1 - 1/u)**2 du / u is in closed form
  r = 2.0**0.2
  integral = lambda u: math.log(u) + 2 / u - 1 / (2 * u * u)
  cell = integral((1 + r) / 2) - integral((1 + 1 / r) / 2)
  expected = math.sqrt(cell / math.log(r))
  x = np.exp2(np.linspace(-12.0, 12.0, 120_001)).astype(np.float32)
  codec = codecs.codec('log8')
  y = _decode(codec, _encode(codec, x), len(x))
  measured = math.sqrt(np.mean((np.float64(y) / x - 1) ** 2))
  assert measured == pytest.approx(expected, rel=0.005)
  assert expected == pytest.approx(0.04, abs=0.0005)


def test_linear8_error_is_the_derived_one():
  codec = codecs.codec('linear8', 3.0)
  x = np.linspace(-3.0, 3.0, 100_001).astype(np.float32)
  error = _decode(codec, _encode(codec, x), len(x)) - x.astype(np.float64)
  step = codecs.round_significant(3.0 / 127)
  assert np.sqrt(np.mean(error**2)) == pytest.approx(step / 12**0.5, rel=0.01)


@pytest.mark.parametrize('name', codecs.CODECS[:4])
def test_edges(name):
  codec, levels = codecs.codec(name, 16.0), _levels(name)
  top, least = levels[-1], levels[1]
  x = [0.0, -0.0, top, -top, 1e30, -1e30, np.inf, -np.inf, np.nan, least / 4]
  y = _decode(codec, _encode(codec, _float32(x)), 10)
  expected = [0, 0, top, -top, top, -top, np.nan, np.nan, np.nan]
  np.testing.assert_array_equal(y[:9], _float32(expected))
  if name not in STOCHASTIC:
    assert y[9] == 0
    half = _float32([least / 2, np.nextafter(least / 2, 0, dtype=np.float32)])
    y = _decode(codec, _encode(codec, half), 2)
    np.testing.assert_array_equal(y, [least, 0])
  code = _encode(codec, _float32(x)).view(np.uint8)
  assert list(code[:2]) == [0, 0]
  assert set(code[6:9]) == {0x80}


@pytest.mark.parametrize('name', STOCHASTIC)
def test_stochastic_rounding_is_unbiased(name):
  codec, levels = codecs.codec(name, 16.0), _levels(name).astype(np.float64)
  x = _float32([0.00005, 0.001, 0.1, 0.27, -0.8, 1.1, -3.0, 7.7, 15.3])
  n = 20_000
  directions = keys.fold(KEY, np.arange(n, dtype=np.uint32))
  roundings = jax.vmap(
    lambda k: codec.decode(codec.encode(jnp.asarray(x), k), len(x))
  )
  y = np.asarray(jax.jit(roundings)(directions), np.float64)
  size = np.abs(np.float64(x))
  above = np.searchsorted(levels, size, side='right')
  low, high = levels[above - 1], levels[above]
  variance = (size - low) * (high - size)  # of one rounding
  score = lambda factor: np.sum((factor * y.mean(0) - x) ** 2 * n / variance)
  # the sum is chi-squared with 9 degrees of freedom: above 40 once in 10**5
  assert score(1.0) < 40
  assert score(1.01) > 40
  assert score(0.99) > 40
  np.testing.assert_allclose(y.var(0), variance, rtol=0.25)
  assert set(np.abs(y[:, 3])) <= {low[3], high[3]}


def test_stochastic_rounding_keeps_levels_and_differs_between_values():
  for name in STOCHASTIC:
    codec, levels = codecs.codec(name, 16.0), _levels(name)
    y = _decode(codec, _encode(codec, levels), 128)
    np.testing.assert_array_equal(y, levels)
    x = np.full(64, 0.27, np.float32)
    assert len(np.unique(_encode(codec, x))) == 2
    other = _encode(codec, x, keys.fold(KEY, 1))
    assert not np.array_equal(_encode(codec, x), other)


@pytest.mark.parametrize('num_values', [1, 7, 8, 15, 16])
def test_sign1(num_values):
  codec = codecs.codec('sign1', 0.1)
  x = _float32(np.random.default_rng(num_values).normal(size=num_values))
  x[0] = -0.0
  code = _encode(codec, x)
  assert code.nbytes == -(-(num_values + 1) // 8)
  y = _decode(codec, code, num_values)
  scale = _float32(codecs.round_significant(0.1))
  np.testing.assert_array_equal(y, np.where(x < 0, -scale, scale))
  assert code[0] & 1
  x[-1] = np.inf
  rejected = _encode(codec, x)
  assert not rejected.any()
  assert np.isnan(_decode(codec, rejected, num_values)).all()


def test_linear16_codec():
  codec = codecs.codec('linear16', 3.0)
  step = codecs.round_significant(3.0 / 32767, 8)
  values = np.array([0, 1.234, -1.234, 5, -5, step / 3, np.nan], np.float32)
  code = np.asarray(codec.encode(jnp.asarray(values), KEY))
  assert code.dtype == np.int16
  wanted = [0, round(1.234 / step), -round(1.234 / step), 32767, -32767, 0]
  np.testing.assert_array_equal(code[:-1], wanted)
  found = np.asarray(codec.decode(jnp.asarray(code), 7))
  # products of 15 and 8 bits: exact
  np.testing.assert_array_equal(found[:-1], np.array(wanted) * step)
  assert np.isnan(found[-1])


def test_bfloat16_codec():
  codec = codecs.codec('bfloat16')
  # ties to even, 3.4e38 is beyond the largest bfloat16
  x = _float32([1.0, -0.5, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.nan, -np.inf])
  expected = [1.0, -0.5, 1.0, 1 + 2**-6, np.nan, np.nan, np.nan]
  code = _encode(codec, x)
  assert code.dtype == 'bfloat16'
  assert code.nbytes == 14
  np.testing.assert_array_equal(_decode(codec, code, 7), _float32(expected))


def test_float32_codec():
  codec = codecs.codec('float32')
  x = _float32([1.1, -0.0, np.nan, np.inf, -np.inf, 1e-30])
  expected = _float32([1.1, -0.0, np.nan, np.nan, np.nan, 1e-30])
  for y in (_encode(codec, x), codec.decode(x, 6)):
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y[:2]), [False, True])


@pytest.mark.parametrize('name', codecs.CODECS)
def test_vmap_and_jit_change_no_bits(name):
  codec = codecs.codec(name, 16.0)
  x = _float32(np.random.default_rng(1).normal(size=(5, 13)) * 3)
  x[1, 2], x[2, 3] = np.nan, 0.0
  some_keys = keys.fold(KEY, np.arange(5, dtype=np.uint32))
  codes = jax.jit(jax.vmap(codec.encode))(x, some_keys)
  looped = [_encode(codec, *pair) for pair in zip(x, some_keys, strict=True)]
  raw = lambda x: np.asarray(x).view(np.uint8)  # a NaN equals itself
  np.testing.assert_array_equal(raw(codes), raw(np.stack(looped)))
  assert codes.shape[1:] == codec.struct(13).shape
  assert codes.dtype == codec.struct(13).dtype
  decode = lambda code: codec.decode(code, 13)
  bits = lambda y: np.asarray(y).view(np.uint32)
  eager = np.stack([bits(decode(code)) for code in codes])
  np.testing.assert_array_equal(bits(jax.jit(jax.vmap(decode))(codes)), eager)
  np.testing.assert_array_equal(bits(jax.vmap(decode)(codes)), eager)


@pytest.mark.parametrize('name', codecs.CODECS)
def test_wrong_arguments_are_refused(name):
  codec = codecs.codec(name)
  with pytest.raises(ValueError, match='float32'):
    codec.encode(jnp.ones((2, 2)), KEY)
  with pytest.raises(ValueError, match='float32'):
    codec.encode(jnp.ones(2, jnp.bfloat16), KEY)
  with pytest.raises(ValueError, match='code must be'):
    codec.decode(np.zeros(9, codec.struct(1).dtype), 2)
  with pytest.raises(ValueError, match='code must be'):
    codec.decode(np.zeros(codec.struct(4).shape, np.int32), 4)


@pytest.mark.parametrize('name', codecs.CODECS[:4])
def test_256_gradients_cost_at_most_a_quarter_more_than_a_byte(name):
  code = _encode(codecs.codec(name), np.ones(256, np.float32))
  assert len(wire.to_bytes(code)) <= 1.25 * 256
