"""The Pallas kernels, run by JAX's interpreters, against the NumPy reference.

What a device is needed for can't be tested here; see `jaxfl.kernels`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params as gpu_params
from jax.sharding import Mesh, PartitionSpec
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  api,
  arg_specs,
  mosaic_gpu,
  mosaic_tpu,
  signs,
  xla,
)

from jaxfl import perturb
from tests import reference

OFFSET = (128, 5)
TPU = {'interpret': True}
GPU = {'interpret': gpu_params.InterpretGPUParams()}
TYPES = [jnp.float32, jnp.bfloat16, jnp.int32]


def random_keys(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(2**32, size=(count, 2), dtype=np.uint32)


def random_case(shape, count, dtype, seed=0):
  """An array and as many amounts."""
  rng = np.random.default_rng(seed)
  w, amounts = rng.normal(size=shape), rng.normal(size=count)
  if dtype == jnp.int32:
    return np.int32(w * 100), np.int32(amounts * 100)
  return jnp.asarray(w, dtype), amounts.astype(np.float32)


def signed(key, shape, offset=OFFSET):
  """z: int64[R, C]."""
  return 1 - 2 * reference.sign_bits(key, shape, offset)


def expected_add(w, keys, amounts, offset=OFFSET):
  """One direction after the other, in float32 or int32."""
  w = np.asarray(w)
  wide = np.int32 if w.dtype == np.int32 else np.float32
  for key, amount in zip(keys, amounts, strict=True):
    step = amount * signed(key, w.shape, offset).astype(wide)
    w = (w.astype(wide) + step).astype(w.dtype)
  return w


def expected_project(x, keys, offset=OFFSET):
  x = np.asarray(x, np.float64)
  return np.array([np.sum(x * signed(key, x.shape, offset)) for key in keys])


def assert_same_bits(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


def test_sign_words_are_the_signs_of_32_rows():
  key, (row, col) = random_keys(1)[0], OFFSET
  group = np.full((1, 7), row // 64, np.uint32)
  words = signs.sign_words(
    key, group, np.arange(7, dtype=np.uint32)[None] + col
  )
  bits = reference.sign_bits(key, (64, 7), OFFSET)
  for r in range(64):
    np.testing.assert_array_equal(words[r // 32][0] >> (r % 32) & 1, bits[r])


@pytest.mark.parametrize(
  ('shape', 'block'),
  [
    ((1, 77), None),
    ((3, 300), (3, 128)),
    ((130, 200), (64, 128)),
    ((130, 200), (128, 256)),
  ],
)
def test_tpu_has_the_bits_of_the_reference(shape, block, monkeypatch):
  monkeypatch.setattr(mosaic_tpu, '_CHUNK', 2)
  keys = random_keys(3)
  cases = [random_case(shape, 3, dtype) for dtype in TYPES]
  add = functools.partial(mosaic_tpu.add, block=block, **TPU)
  row, col = OFFSET

  @jax.jit
  def run(cases, col):
    added = [add(w, keys, amounts, (row, col)) for w, amounts in cases]
    integers = cases[-1][0].astype(jnp.float32)
    products = [
      mosaic_tpu.project(x, keys, (row, col), block=block, **TPU)
      for x in (cases[0][0], integers)
    ]
    return added, products

  added, (products, exact) = run(cases, jnp.uint32(col))
  for new, (w, amounts) in zip(added, cases, strict=True):
    assert_same_bits(new, expected_add(w, keys, amounts))
  expected = expected_project(cases[0][0], keys)
  np.testing.assert_allclose(products, expected, atol=1e-3)
  np.testing.assert_array_equal(exact, expected_project(cases[-1][0], keys))


@pytest.mark.parametrize(
  ('shape', 'dtype'),
  [
    ((1, 130), jnp.float32),
    ((3, 5), jnp.bfloat16),
    ((3, 5), jnp.int32),
    ((66, 5), jnp.float32),
  ],
)
def test_gpu_has_the_bits_of_the_reference(shape, dtype):
  keys = random_keys(3)
  w, amounts = random_case(shape, 3, dtype)
  row, col = OFFSET
  new = jax.jit(
    lambda w, col: mosaic_gpu.add(w, keys, amounts, (row, col), **GPU)
  )(w, jnp.uint32(col))
  assert_same_bits(new, expected_add(w, keys, amounts))


def test_gpu_projects(monkeypatch):
  monkeypatch.setattr(mosaic_gpu, '_CHUNK', 2)
  keys = random_keys(3)
  x = random_case((66, 130), 0, jnp.int32)[0].astype(np.float32)
  y = jax.jit(lambda x: mosaic_gpu.project(x, keys, OFFSET, **GPU))(x)
  np.testing.assert_array_equal(y, expected_project(x, keys))
  x = random_case((2, 130), 0, jnp.bfloat16)[0]
  y = jax.jit(lambda x: mosaic_gpu.project(x, keys, OFFSET, **GPU))(x)
  np.testing.assert_allclose(y, expected_project(x, keys), atol=1e-4)


def test_shards_with_offsets_are_parts_of_the_whole():
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('r', 'c'))
  spec, none = PartitionSpec('r', 'c'), PartitionSpec()
  keys = random_keys(2)
  w, amounts = random_case((256, 60), 2, jnp.float32)

  def local(w, keys, amounts):
    offset = [
      jax.lax.axis_index(axis).astype(jnp.uint32) * np.uint32(size)
      for axis, size in zip(('r', 'c'), w.shape, strict=True)
    ]
    new = mosaic_tpu.add(w, keys, amounts, offset, **TPU)
    products = mosaic_tpu.project(w, keys, offset, **TPU)
    return new, jax.lax.psum(products, ('r', 'c'))

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(spec, none, none),
    out_specs=(spec, none),
    check_vma=False,
  )
  new, products = jax.jit(run)(w, keys, amounts)
  assert_same_bits(new, expected_add(w, keys, amounts, (0, 0)))
  expected = expected_project(w, keys, (0, 0))
  np.testing.assert_allclose(products, expected, atol=1e-3)


def lower(function, shape, platform, dtype, count):
  """Text of the program for a platform that is not there."""
  spec = jax.ShapeDtypeStruct
  arguments = [spec(xla.view(shape), dtype), spec((count, 2), jnp.uint32)]
  donated = function.__name__ == 'add'
  if donated:
    amounts = jnp.int32 if dtype == jnp.int32 else jnp.float32
    arguments.append(spec((count,), amounts))
  jitted = jax.jit(function, donate_argnums=0 if donated else ())
  traced = jitted.trace(*arguments)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('name', arg_specs.SHAPES)
def test_lowers_for_tpu(name):
  shape = arg_specs.SHAPES[name]
  types = TYPES if name in ('mlp', 'opt_1.3b_fc1') else TYPES[:1]
  for dtype in types:
    text = lower(mosaic_tpu.add, shape, 'tpu', dtype, 4096)
    assert 'output_operand_alias' in text
    if dtype != jnp.int32:
      lower(mosaic_tpu.project, shape, 'tpu', dtype, 5000)


@pytest.mark.parametrize(
  'name', ['opt_1.3b_fc1', 'opt_1.3b_norm_stacked', 'classifier']
)
def test_lowers_for_gpu(name):
  shape = arg_specs.SHAPES[name]
  for dtype in TYPES:
    text = lower(mosaic_gpu.add, shape, 'cuda', dtype, 4096)
    assert 'output_operand_alias' in text
    if dtype != jnp.int32:
      lower(mosaic_gpu.project, shape, 'cuda', dtype, 5000)


class Device(NamedTuple):
  platform: str
  compute_capability: str = ''


CPU, HOPPER = Device('cpu'), Device('gpu', '9.0')


@pytest.mark.parametrize(
  ('devices', 'expected'),
  [
    ([CPU], 'xla_tiles'),
    ([CPU] * 2, 'xla'),
    ([Device('tpu')], 'mosaic_tpu'),
    ([Device('tpu')] * 4, 'xla'),
    ([HOPPER], 'mosaic_gpu'),
    ([Device('gpu', '10.3')], 'mosaic_gpu'),
    ([HOPPER] * 2, 'xla'),
    ([Device('gpu', '8.0')], 'xla'),
    ([Device('gpu', '7.5')], 'xla'),
    ([Device('gpu', 'gfx942')], 'xla'),
    ([Device('other')], 'xla'),
  ],
)
def test_the_choice_for_a_device(devices, expected, monkeypatch):
  monkeypatch.setattr(api, '_devices', lambda: devices)
  assert api.choose(None, np.float32, 'rademacher') == expected
  assert api.choose(None, jnp.bfloat16.dtype, 'rademacher') == expected
  other = 'xla' if expected.startswith('mosaic') else expected
  assert api.choose(None, np.float16, 'rademacher') == other
  assert api.choose(None, np.float32, 'popcount16') == other


def test_a_name_insists_or_raises(monkeypatch):
  def error(name, dtype=np.float32, distribution='rademacher'):
    with pytest.raises(ValueError) as caught:
      api.choose(name, dtype, distribution)
    return str(caught.value)

  assert "must be one of ('xla', 'xla_tiles'" in error('pallas')
  assert "'mosaic_tpu': the default device must be a TPU" in error('mosaic_tpu')
  assert 'compute capability 9.0' in error('mosaic_gpu')
  monkeypatch.setattr(api, '_devices', lambda: [HOPPER] * 2)
  choose = lambda name: api.choose(name, np.float32, 'rademacher')
  assert [choose(name) for name in ('mosaic_gpu', 'xla', 'xla_tiles')] == [
    'mosaic_gpu', 'xla', 'xla_tiles',
  ]  # fmt: skip
  assert "be 'rademacher', got 'gaussian'" in error(
    'mosaic_gpu', distribution='gaussian'
  )
  assert 'float32 or bfloat16, got float16' in error(
    'mosaic_gpu', dtype=np.dtype(np.float16)
  )
  w, ds = {'a': np.zeros(3, np.float32)}, random_keys(2)
  with pytest.raises(ValueError, match='default device must be a TPU'):
    perturb.replay(w, ds, np.ones(2), implementation='mosaic_tpu')


def test_the_public_functions_use_the_kernels(monkeypatch):
  calls = []

  def interpreted(function):
    def run(x, *args):
      calls.append(function.__name__)
      return function(x, *args, **TPU)

    return run

  monkeypatch.setattr(mosaic_tpu, 'add', interpreted(mosaic_tpu.add))
  monkeypatch.setattr(mosaic_tpu, 'project', interpreted(mosaic_tpu.project))
  rng, ds = np.random.default_rng(0), random_keys(3)
  shapes = {'empty': (0, 5), 'ragged': (2, 5, 7), 'scalar': ()}
  params = {
    k: np.asarray(np.rint(rng.normal(size=shape) * 64) / 64, np.float32)
    for k, shape in shapes.items()
  }
  scales = np.linspace(-0.3, 0.7, 3).astype(np.float32)
  units = {k: np.array([5, -7, 1], np.int32) for k in shapes}
  units['scalar'] = np.array([2**24, 0, 0], np.int32)
  exponents = dict.fromkeys(shapes, 6)

  def f(params, ds, scales, implementation=None):
    kwargs = {'implementation': implementation}
    return (
      perturb.replay(params, ds, scales, **kwargs),
      perturb.replay_int(params, ds, units, exponents, **kwargs),
      perturb.project(params, ds, **kwargs),
    )

  expected = jax.jit(functools.partial(f, implementation='xla'))(
    params, ds, scales
  )
  assert not calls
  assert bool(expected[1][1]['scalar'])  # overflow
  monkeypatch.setattr(api, '_devices', lambda: [Device('tpu')])
  many = jax.jit(jax.vmap(f, (0, None, 0)))(
    jax.tree.map(lambda w: np.stack([w, w]), params),
    ds,
    np.stack([scales, scales]),
  )
  assert calls.count('add') == 2 * calls.count('project') > 0
  for i in range(2):
    new, (replayed, overflow), products = jax.tree.map(lambda x: x[i], many)
    jax.tree.map(assert_same_bits, new, expected[0])
    jax.tree.map(assert_same_bits, overflow, expected[1][1])
    del replayed['scalar']
    for k, w in replayed.items():
      assert_same_bits(w, expected[1][0][k])
    np.testing.assert_allclose(products, expected[2], atol=1e-4)
  nothing = perturb.replay(params, ds[:0], scales[:0])
  jax.tree.map(assert_same_bits, nothing, params)
  assert perturb.project(params, ds[:0]).shape == (0,)


@pytest.mark.parametrize(
  ('platform', 'device', 'call'),
  [
    ('tpu', Device('tpu'), '@tpu_custom_call'),
    ('cuda', HOPPER, '@mosaic_gpu'),
  ],
)
def test_public_functions_lower_alone_and_batched(
  platform, device, call, monkeypatch
):
  monkeypatch.setattr(api, '_devices', lambda: [device])
  units, exponents = {'a': np.ones(2, np.int32)}, {'a': 6}

  def f(params, ds, scales):
    return (
      perturb.replay(params, ds, scales),
      perturb.replay_int(params, ds, units, exponents),
      perturb.project(params, ds),
    )

  one = {'a': np.zeros((3, 7), np.float32)}, random_keys(2), np.ones(2)
  many = jax.tree.map(lambda x: np.stack([x, x]), one)
  for function, args in [(f, one), (jax.vmap(f), many)]:
    traced = jax.jit(function).trace(*args)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) >= 3
