"""Frames: exact, canonical, safe on any input."""

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
  message = {'s': np.float32([1.5, -2]), 'b': np.array([[True], [False]])}
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
