"""Frames: exact, canonical, safe on any input. Codecs: the stated errors."""

import hashlib
import math
import zlib
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxfl import keys, wire

FAST = hypothesis.settings(
  deadline=None, max_examples=60, derandomize=True, database=None
)
KEY = keys.root(7)
# sha256 of the tables as little-endian float32: part of the format
LOG8_SHA256 = '9a46068e7ee789f56354cbe9138eeb16eeba195cebf16b9dbd8bc5f3f96decb3'
LINEAR8_SHA256 = (
  '7c9bf6813f7f5dbc13b15030ad06d82ba86b92e3e4886dfd8da0eda8e08130de'
)
STOCHASTIC = [name for name in wire.CODECS if name.endswith('stochastic')]


class Pair(NamedTuple):
  b: Any
  a: Any


def _example(dtype, shape=(2, 3)):
  size = math.prod(shape)
  return (np.arange(size) % 2).astype(jnp.dtype(dtype)).reshape(shape)


def _crafted(body: bytes) -> bytes:
  """A frame with a correct magic and crc around any body."""
  magic = b'\xf1\x4a\x01'
  return magic + zlib.crc32(magic + body).to_bytes(4, 'little') + body


def _assert_equal(x, y):
  assert jax.tree.structure(x) == jax.tree.structure(y)
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Frames.


@pytest.mark.parametrize('dtype', wire.DTYPES)
@pytest.mark.parametrize('shape', [(), (0,), (1,), (2, 3), (3, 0, 2)])
def test_every_dtype_and_shape_round_trips(dtype, shape):
  x = _example(dtype, shape)
  frame = wire.to_bytes(x)
  _assert_equal(wire.from_bytes(frame), x)
  _assert_equal(wire.from_bytes(frame, x), x)


@FAST
@hypothesis.given(
  st.dictionaries(
    st.text(st.characters(exclude_categories=['Cs']), max_size=5),
    hnp.arrays(
      st.sampled_from([np.uint8, np.int32, np.float32, np.bool_]),
      hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    max_size=4,
  )
)
def test_flat_dicts_round_trip(message):
  frame = wire.to_bytes(message)
  _assert_equal(wire.from_bytes(frame, message), message)
  if list(message) != ['']:
    _assert_equal(wire.from_bytes(frame), message)
  assert wire.to_bytes(wire.from_bytes(frame)) == frame


def test_structures_come_back_through_like():
  message = {
    'z': [_example('uint8'), (jnp.ones(2), np.float32(3))],
    'a': Pair(b=_example('bfloat16'), a=np.arange(12, dtype=np.int64)),
  }
  frame = wire.to_bytes(message)
  _assert_equal(wire.from_bytes(frame, message), message)
  structs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    {'z': message['z'], 'a': message['a']._replace(a=np.zeros(12, np.int32))},
  )
  with pytest.raises(ValueError, match=r"'a/a': the frame has int64\[12\]"):
    wire.from_bytes(frame, structs)
  flat = wire.from_bytes(frame)
  assert sorted(flat) == ['a/a', 'a/b', 'z/0', 'z/1/0', 'z/1/1']
  assert wire.to_bytes(flat) == frame


def test_ten_list_entries_keep_their_order():
  message = [np.full(1, i, np.uint8) for i in range(12)]
  frame = wire.to_bytes(message)
  _assert_equal(wire.from_bytes(frame, message), message)
  assert wire.to_bytes(wire.from_bytes(frame)) == frame


def test_memory_layout_and_byte_order_do_not_matter():
  x = np.arange(24, dtype=np.float32).reshape(4, 6)
  frame = wire.to_bytes(x)
  assert wire.to_bytes(np.asfortranarray(x)) == frame
  assert wire.to_bytes(x.astype('>f4')) == frame
  assert wire.to_bytes(np.repeat(x, 2, axis=1)[:, ::2]) == frame
  assert wire.to_bytes(np.array([0, 2, 1], np.uint8).view(bool)) == (
    wire.to_bytes(np.array([False, True, True]))
  )
  assert wire.from_bytes(bytearray(frame)).tobytes() == x.tobytes()
  assert wire.from_bytes(memoryview(frame)).tobytes() == x.tobytes()
  wire.from_bytes(frame)[0, 0] = 1.0  # the result can be written to


def test_float_payloads_keep_their_bits():
  x = np.array([0x7FC12345, 0xFF800001, 0x80000000, 1], np.uint32)
  y = wire.from_bytes(wire.to_bytes(x.view(np.float32)))
  np.testing.assert_array_equal(y.view(np.uint32), x)


def test_golden_frame():
  message = {'q': np.array([1, 255], np.uint8), 'n': np.array(-2, np.int16)}
  assert wire.to_bytes(message).hex() == (
    'f14a01' + 'f2805d9a' + '02' + '016e0700' + '0171020102' + 'feff' + '01ff'
  )


def test_frames_are_small():
  assert len(wire.to_bytes(np.zeros(1, np.uint8))) == 13
  assert len(wire.to_bytes(np.zeros(256, np.uint8))) == 269
  assert len(wire.to_bytes(np.zeros(256, np.uint8))) / 256 <= 1.25
  assert len(wire.to_bytes(())) == 8


@pytest.mark.parametrize(
  'leaf',
  [
    *(3, 1.5, 'text', b'x', np.array('x'), np.array(1j), np.array([{}])),
    *(jax.random.key(0), np.zeros(1, jnp.float8_e4m3fn), np.longdouble(1)),
    *(jax.ShapeDtypeStruct((2,), np.float32), np.datetime64(1, 's')),
  ],
  ids=lambda leaf: type(leaf).__name__,
)
def test_other_leaves_are_refused_by_path(leaf):
  with pytest.raises(TypeError, match="'a/0'"):
    wire.to_bytes({'a': [leaf]})


def test_traced_leaves_are_refused_by_path():
  with pytest.raises(TypeError, match="'a'"):
    jax.jit(lambda x: len(wire.to_bytes({'a': x})))(jnp.ones(2))


def test_equal_paths_are_refused():
  with pytest.raises(ValueError, match='a/b'):
    wire.to_bytes({'a': {'b': np.ones(1)}, 'a/b': np.ones(1)})
  with pytest.raises(ValueError, match='not text'):
    wire.to_bytes({'\ud800': np.ones(1)})


@pytest.mark.parametrize(
  ('like', 'match'),
  [
    (
      {'a': np.zeros(3, np.uint8)},
      r"'a': .*has uint8\[2\], expected uint8\[3",
    ),
    ({'a': np.zeros(2, np.int8)}, r"'a': .*has uint8\[2\], expected int8\[2"),
    ({'b': np.zeros(2, np.uint8)}, r"'a': .*uint8\[2\], expected no such leaf"),
    ({'a': np.zeros(2, np.uint8), 'b': np.ones(1)}, "'b': .* has no such leaf"),
    (np.zeros(2, np.uint8), "'': the frame has no such leaf"),
    ((), "'a': .* expected no such leaf"),
  ],
)
def test_like_must_match(like, match):
  frame = wire.to_bytes({'a': np.zeros(2, np.uint8)})
  with pytest.raises(ValueError, match=match):
    wire.from_bytes(frame, like)


def test_every_mutation_and_truncation_is_refused():
  message = {'q': np.array([1, 255], np.uint8), 'n': np.array(-2, np.int16)}
  frame = wire.to_bytes(message)
  for i in range(len(frame)):
    with pytest.raises(ValueError):
      wire.from_bytes(frame[:i])
    for value in range(256):
      if value != frame[i]:
        with pytest.raises(ValueError):
          wire.from_bytes(frame[:i] + bytes([value]) + frame[i + 1 :])
  for rest in (b'\0', b'x', frame):
    with pytest.raises(ValueError):
      wire.from_bytes(frame + rest)


@FAST
@hypothesis.given(st.binary(max_size=60))
def test_random_bytes_give_value_errors(data):
  with pytest.raises(ValueError):
    wire.from_bytes(data)


@hypothesis.settings(FAST, max_examples=300)
@hypothesis.given(
  st.lists(
    st.one_of(st.integers(0, 13), st.integers(0, 255), st.just(1)), max_size=24
  )
)
def test_crafted_bodies_are_canonical_or_refused(body):
  frame = _crafted(bytes(body))
  try:
    message = wire.from_bytes(frame)
  except ValueError:
    return
  assert wire.to_bytes(message) == frame


@pytest.mark.parametrize(
  ('body', 'match'),
  [
    ('', 'ends in an integer'),
    ('8000', 'shortest form'),
    ('ffffffffffffffffff7f', 'too long'),
    ('ffffff7f', 'leaves, more than'),
    ('01ffffffff7f0201', 'ends in leaf 0'),
    ('01000e0000', 'dtype code 14'),
    ('01000000', 'dtype code 0'),
    ('01000221' + '01' * 33, 'rank 33'),
    ('010002' + '01' + 'ffffffffffffffff7f', 'bad shape'),
    ('010002' + '02' + 'ffffffff0f' * 2, 'elements'),
    ('010002' + '03' + '00' + 'ffffffff0f' * 2, 'elements'),
    ('010002' + '01' + 'ffffffff0f', 'declares 4294967295 bytes'),
    ('0100020102' + '0000' + '00', 'declares 2 bytes of payload and has 3'),
    ('0100010102' + '0002', 'neither 0 nor 1'),
    ('0101ff020100', 'utf-8'),
    ('02' + '0161020100' + '0161020100', 'not in order'),
    ('02' + '0162020100' + '0161020100', 'not in order'),
  ],
)
def test_hostile_bodies(body, match):
  with pytest.raises(ValueError, match=match):
    wire.from_bytes(_crafted(bytes.fromhex(body)))


def test_other_inputs_and_long_frames_are_refused():
  others: list[Any] = [None, 'text', 3, [1, 2]]
  for data in others:
    with pytest.raises(ValueError, match='a frame is bytes'):
      wire.from_bytes(data)
  frame = wire.to_bytes(np.zeros(100, np.uint8))
  with pytest.raises(ValueError, match='112 bytes, at most 111'):
    wire.from_bytes(frame, max_bytes=111)
  with pytest.raises(ValueError, match='version 1'):
    wire.from_bytes(frame[:2] + b'\x02' + frame[3:])


def test_payloads_of_known_spec():
  message = {'s': _float32([1.5, -2]), 'b': np.array([[True], [False]])}
  spec = wire.describe(message)
  assert spec == [['b', 'bool', [2, 1]], ['s', 'float32', [2]]]
  assert wire.payload_bytes(spec) == 10
  row = wire.pack(message, spec)
  assert row.tobytes().hex() == '0100' + '0000c03f' + '000000c0'
  _assert_equal(wire.unpack(row, spec, message), message)
  stacked = jax.tree.map(lambda x: np.stack([x, x[::-1], x]), message)
  rows = wire.pack(stacked, spec, lead=(3,))
  assert rows.shape == (3, 10)
  np.testing.assert_array_equal(rows[0], row)
  _assert_equal(wire.unpack(rows, spec, message), stacked)
  with pytest.raises(ValueError, match=r"'b': .* bool\[3, 2, 1\], expected"):
    wire.pack(stacked, spec, lead=(2,))


# Codecs.


def _float32(x) -> np.ndarray:
  return np.asarray(x, np.float32)


def _encode(codec, x, key=KEY):
  return np.asarray(jax.jit(codec.encode)(x, key))


def _decode(codec, code, num_values):
  return np.asarray(jax.jit(codec.decode, static_argnums=1)(code, num_values))


def _levels(name, scale=16.0):
  return wire.log8_levels() if 'log8' in name else wire.linear8_levels(scale)


def test_names():
  with pytest.raises(ValueError, match='log8, log8_stochastic, linear8'):
    wire.codec('log9')
  for scale in (0.0, -1.0, math.inf, math.nan, 1e-40):
    with pytest.raises(ValueError, match='scale'):
      wire.codec('linear8', scale)
  assert wire.codec('log8', scale=2.0) is wire.codec('log8', scale=2.0)


def test_round_significant():
  assert wire.round_significant(0.1, 4) == 0.1015625
  assert wire.round_significant(-3.0) == -3.0
  assert wire.round_significant(4097.0) == 4096.0  # ties to even
  assert wire.round_significant(4099.0) == 4100.0
  assert wire.round_significant(0.0) == 0.0
  with pytest.raises(ValueError, match='finite'):
    wire.round_significant(math.inf)


def test_tables_are_frozen():
  digest = lambda x: hashlib.sha256(x.astype('<f4').tobytes()).hexdigest()
  assert digest(wire.log8_levels()) == LOG8_SHA256
  assert digest(wire.linear8_levels(16.0)) == LINEAR8_SHA256


def test_log8_table_hides_the_math_library():
  for m in range(1, 128):
    scaled, _ = math.frexp(2.0 ** ((m - 64) / 5))
    distance = abs((scaled * 2**12) % 1 - 0.5)  # from the tie
    assert distance > 1e-6  # a library is wrong by 1e-12 of this unit
  levels = wire.log8_levels()
  assert levels[64] == 1.0
  ratio = levels[1:] / np.exp2((np.arange(1, 128) - 64) / 5)
  assert np.abs(ratio - 1).max() <= 2.0**-12


@pytest.mark.parametrize('name', ['log8', 'linear8'])
def test_tables_rise_and_have_twelve_bits_of_unit(name):
  levels = _levels(name)
  assert levels.shape == (128,)
  assert (np.diff(levels) > 0).all()
  for v in levels:
    unit = wire.round_significant(float(v), 12 if name == 'log8' else 19)
    assert unit == v


@pytest.mark.parametrize('name', ['log8', 'linear8'])
def test_every_code_decodes_to_its_level_and_back(name):
  codec = wire.codec(name, 16.0)
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
  codec, levels = wire.codec(name, 16.0), _levels(name).astype(np.float64)
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
  codec = wire.codec('log8')
  y = _decode(codec, _encode(codec, x), len(x))
  measured = math.sqrt(np.mean((np.float64(y) / x - 1) ** 2))
  assert measured == pytest.approx(expected, rel=0.005)
  assert expected == pytest.approx(0.04, abs=0.0005)


def test_linear8_error_is_the_derived_one():
  codec = wire.codec('linear8', 3.0)
  x = np.linspace(-3.0, 3.0, 100_001).astype(np.float32)
  error = _decode(codec, _encode(codec, x), len(x)) - x.astype(np.float64)
  step = wire.round_significant(3.0 / 127)
  assert np.sqrt(np.mean(error**2)) == pytest.approx(step / 12**0.5, rel=0.01)


@pytest.mark.parametrize('name', wire.CODECS[:4])
def test_edges(name):
  codec, levels = wire.codec(name, 16.0), _levels(name)
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
  codec, levels = wire.codec(name, 16.0), _levels(name).astype(np.float64)
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
    codec, levels = wire.codec(name, 16.0), _levels(name)
    y = _decode(codec, _encode(codec, levels), 128)
    np.testing.assert_array_equal(y, levels)
    x = np.full(64, 0.27, np.float32)
    assert len(np.unique(_encode(codec, x))) == 2
    other = _encode(codec, x, keys.fold(KEY, 1))
    assert not np.array_equal(_encode(codec, x), other)


@pytest.mark.parametrize('num_values', [1, 7, 8, 15, 16])
def test_sign1(num_values):
  codec = wire.codec('sign1', 0.1)
  x = _float32(np.random.default_rng(num_values).normal(size=num_values))
  x[0] = -0.0
  code = _encode(codec, x)
  assert code.nbytes == -(-(num_values + 1) // 8)
  y = _decode(codec, code, num_values)
  scale = _float32(wire.round_significant(0.1))
  np.testing.assert_array_equal(y, np.where(x < 0, -scale, scale))
  assert code[0] & 1
  x[-1] = np.inf
  rejected = _encode(codec, x)
  assert not rejected.any()
  assert np.isnan(_decode(codec, rejected, num_values)).all()


def test_float32_codec():
  codec = wire.codec('float32')
  x = _float32([1.1, -0.0, np.nan, np.inf, -np.inf, 1e-30])
  expected = _float32([1.1, -0.0, np.nan, np.nan, np.nan, 1e-30])
  for y in (_encode(codec, x), codec.decode(x, 6)):
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y[:2]), [False, True])


@pytest.mark.parametrize('name', wire.CODECS)
def test_vmap_and_jit_change_no_bits(name):
  codec = wire.codec(name, 16.0)
  x = _float32(np.random.default_rng(1).normal(size=(5, 13)) * 3)
  x[1, 2], x[2, 3] = np.nan, 0.0
  some_keys = keys.fold(KEY, np.arange(5, dtype=np.uint32))
  codes = jax.jit(jax.vmap(codec.encode))(x, some_keys)
  looped = [_encode(codec, *pair) for pair in zip(x, some_keys, strict=True)]
  np.testing.assert_array_equal(codes, np.stack(looped))
  assert codes.shape[1:] == codec.struct(13).shape
  assert codes.dtype == codec.struct(13).dtype
  decode = lambda code: codec.decode(code, 13)
  bits = lambda y: np.asarray(y).view(np.uint32)
  eager = np.stack([bits(decode(code)) for code in codes])
  np.testing.assert_array_equal(bits(jax.jit(jax.vmap(decode))(codes)), eager)
  np.testing.assert_array_equal(bits(jax.vmap(decode)(codes)), eager)


@pytest.mark.parametrize('name', wire.CODECS)
def test_wrong_arguments_are_refused(name):
  codec = wire.codec(name)
  with pytest.raises(ValueError, match='float32'):
    codec.encode(jnp.ones((2, 2)), KEY)
  with pytest.raises(ValueError, match='float32'):
    codec.encode(jnp.ones(2, jnp.bfloat16), KEY)
  with pytest.raises(ValueError, match='code must be'):
    codec.decode(np.zeros(9, codec.struct(1).dtype), 2)
  with pytest.raises(ValueError, match='code must be'):
    codec.decode(np.zeros(codec.struct(4).shape, np.int16), 4)


@pytest.mark.parametrize('name', wire.CODECS[:4])
def test_256_gradients_cost_at_most_a_quarter_more_than_a_byte(name):
  code = _encode(wire.codec(name), np.ones(256, np.float32))
  assert len(wire.to_bytes(code)) <= 1.25 * 256
