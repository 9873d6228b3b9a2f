import hashlib
import math
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfl import keys, perturb
from tests import reference

EXACT = ['rademacher', 'popcount16']
ALL = [*EXACT, 'gaussian']
SHAPES = [
  (),
  (1,),
  (129,),
  (1, 7),
  (64, 3),
  (65, 1),
  (100, 13),
  (300, 129),
  (3, 5, 7),
  (2, 33, 31),
  (2, 3, 4, 5),
  (0,),
  (0, 5),
  (5, 0),
  (2, 0, 3),
]

# Jitted once, so that cases of equal shapes share a compilation.
step = jax.jit(perturb.perturb, static_argnames='distribution')
replay_int = jax.jit(perturb.replay_int, static_argnames='distribution')


def directions(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(2**32, size=(count, 2), dtype=np.uint32)


def weights(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def grid_weights(shape, e, seed=0):
  return np.round(weights(shape, seed) * 2**e).astype(np.float32) / 2**e + 0


def assert_same_bits(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def tree(seed=0):
  return {
    'embed': weights((40, 24), seed),
    'layers': [{'b': weights((9,), seed), 'w': weights((2, 70, 5), seed)}] * 2,
    'scale': weights((), seed),
  }


def test_golden_vector():
  direction = keys.fold(keys.root(42), 3, 1000)
  path = 'layers/0/mlp/w'
  assert keys.tensor_id(path) == 0xBE4B810D
  leaf = np.asarray(keys.leaf_key(direction, path))
  np.testing.assert_array_equal(leaf, [0x2C81EE86, 0x1249AA1A])
  z = np.asarray(perturb.field(direction, path, (300, 129)))
  np.testing.assert_array_equal(z[0, :8], [-1, 1, -1, -1, 1, -1, -1, -1])
  digest = hashlib.sha256(np.packbits(z < 0).tobytes()).hexdigest()
  assert digest == (
    'bf18130bbcad3f9599f1a2216db163d5706618cc71e15a4b5a1f2f08c5d42534'
  )


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_perturb_has_the_bits_of_the_reference(shape):
  direction, w = directions(1)[0], weights(shape)
  for distribution in EXACT:
    new = step({'a': w}, direction, 0.3, distribution=distribution)
    expected = reference.perturb(w, direction, 'a', 0.3, distribution)
    assert_same_bits(new['a'], np.asarray(expected))


@pytest.mark.parametrize('distribution', EXACT)
@hypothesis.given(
  rows=st.integers(1, 200),
  cols=st.integers(1, 40),
  scale=st.floats(-10, 10, width=32, allow_subnormal=False),
  seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=8, deadline=None)
def test_perturb_of_any_size(distribution, rows, cols, scale, seed):
  direction, w = directions(1, seed)[0], weights((rows, cols), seed)
  new = perturb.perturb({'a': w}, direction, scale, distribution=distribution)
  expected = reference.perturb(w, direction, 'a', scale, distribution)
  # The products of tiny scales can be subnormal.
  hypothesis.assume(scale == 0 or abs(scale) > 1e-30)
  assert_same_bits(new['a'], expected)


@pytest.mark.parametrize('distribution', ALL)
def test_a_rectangle_is_a_slice(distribution):
  direction = directions(1)[0]

  def field(shape, offset):
    return perturb.field(
      direction, 'a', shape, distribution=distribution, offset=offset
    )

  traced = jax.jit(field, static_argnums=0)
  whole = np.asarray(field((200, 50), (0, 0)))
  expected = reference.field(direction, 'a', (200, 50), distribution)
  assert_close(whole, expected)
  same = assert_same_bits if distribution in EXACT else assert_close
  for (row, col), (rows, cols) in [
    ((64, 0), (64, 50)),
    ((63, 7), (3, 9)),
    ((130, 3), (70, 47)),
  ]:
    part = whole[row : row + rows, col : col + cols]
    same(field((rows, cols), (row, col)), part)
    same(traced((rows, cols), (jnp.uint32(row), jnp.uint32(col))), part)
  same(field((2, 100, 50), (0, 0)).reshape(200, 50), whole)
  far = (2**32 - 70, 2**32 - 9)
  expected = reference.field(direction, 'a', (5, 3), distribution, far)
  assert_close(field((5, 3), far), expected)


def test_each_leaf_uses_its_own_path():
  params, direction = tree(), directions(1)[0]
  new = perturb.perturb(params, direction, 0.1)
  expected = {
    path: reference.perturb(w, direction, path, 0.1, 'rademacher')
    for path, w in keys.named_leaves(params)
  }
  for path, w in keys.named_leaves(new):
    assert_same_bits(w, np.asarray(expected[path]))


@pytest.mark.parametrize('distribution', ALL)
def test_replay_is_a_sequence_of_perturbs(distribution):
  params, ds = jax.tree.map(jnp.asarray, tree()), directions(5)
  coefficients = np.linspace(-0.3, 0.7, 5).astype(np.float32)
  expected = params
  for d, c in zip(ds, coefficients, strict=True):
    expected = step(expected, d, c, distribution=distribution)
  new = jax.jit(perturb.replay, static_argnames='distribution')(
    params, ds, coefficients, distribution=distribution
  )
  jax.tree.map(assert_same_bits, new, expected)


def test_replay_of_other_types_and_of_nothing():
  ds, coefficients = directions(3), np.array([0.1, 0.2, 0.3], np.float32)
  params = {
    'bfloat16': jnp.asarray(weights((70, 3)), jnp.bfloat16),
    'float16': jnp.asarray(weights((70,)), jnp.float16),
    'python': 0.5,
  }
  expected = params
  for d, c in zip(ds, coefficients, strict=True):
    wide = jax.tree.map(lambda w: np.asarray(w, np.float32), expected)
    expected = {
      path: np.asarray(reference.perturb(w, d, path, c, 'rademacher')).astype(
        jnp.asarray(params[path]).dtype
      )
      for path, w in wide.items()
    }
  new = jax.jit(perturb.replay)(params, ds, coefficients)
  jax.tree.map(assert_same_bits, new, expected)
  same = perturb.replay(new, ds[:0], coefficients[:0])
  jax.tree.map(assert_same_bits, same, new)
  assert perturb.perturb({}, ds[0], 1.0) == {}


@pytest.mark.parametrize('distribution', EXACT)
def test_replay_int_equals_int64_in_any_order(distribution):
  rng = np.random.default_rng(1)
  e = {'a': 12, 'b': -3, 'c': 24, 'd': 5}
  shapes = {'a': (70, 11), 'b': (5,), 'c': (), 'd': (0, 2)}
  params = {k: grid_weights(s, e[k]) for k, s in shapes.items()}
  params['c'] = np.float32(0.25)
  ds = directions(9)
  units = {k: rng.integers(-99, 99, 9, dtype=np.int32) for k in shapes}
  new, overflow = replay_int(params, ds, units, e, distribution=distribution)
  assert not any(jax.tree.leaves(overflow))
  for k, w in params.items():
    total = np.asarray(w, np.float64) * 2.0 ** e[k]
    for d, unit in zip(ds, units[k], strict=True):
      z = reference.integers(d, k, shapes[k], distribution)
      total = total + int(unit) * z
    expected = np.asarray(total * 2.0 ** -e[k]).astype(np.float32)
    assert_same_bits(new[k], expected)
  order = rng.permutation(9)
  shuffled = {k: v[order] for k, v in units.items()}
  again, _ = replay_int(
    params, ds[order], shuffled, e, distribution=distribution
  )
  jax.tree.map(assert_same_bits, again, new)
  back, _ = replay_int(
    new, ds, jax.tree.map(np.negative, units), e, distribution=distribution
  )
  jax.tree.map(assert_same_bits, back, params)


def test_replay_int_agrees_with_replay_on_the_grid():
  ds, units = directions(6), np.array([3, -5, 0, 127, -127, 1], np.int32)
  params = {'a': grid_weights((70, 9), 10)}
  new, _ = perturb.replay_int(params, ds, {'a': units}, {'a': 10})
  expected = perturb.replay(params, ds, units.astype(np.float32) / 2**10)
  assert_same_bits(new['a'], expected['a'])


TOP = 2**24 - 1


@pytest.mark.parametrize(
  ('w', 'units', 'e', 'distribution', 'expected'),
  [
    pytest.param(0, [TOP], 0, 'rademacher', False, id='largest'),
    pytest.param(0, [TOP + 1], 0, 'rademacher', True, id='sum'),
    pytest.param(0, [2**21 - 1], 3, 'popcount16', False, id='sum in range'),
    pytest.param(TOP, [1, 1], 0, 'rademacher', None, id='weight and sum'),
    pytest.param(0, [2**31 - 1] * 2, 0, 'rademacher', True, id='wraps to 0'),
    pytest.param(0, [-(2**31)] * 2, 0, 'rademacher', True, id='wraps'),
    pytest.param(0, [2**30] * 4, 0, 'rademacher', True, id='wraps evenly'),
    pytest.param(0, [2**28] * 32, 0, 'popcount16', True, id='wraps twice'),
    pytest.param(TOP + 1, [0], 0, 'rademacher', True, id='weight'),
    pytest.param(np.nan, [0], 0, 'rademacher', True, id='not a number'),
    pytest.param(np.inf, [0], 0, 'rademacher', True, id='infinite'),
    pytest.param(0.75, [0], 1, 'rademacher', True, id='off the grid'),
    pytest.param(0.75, [0], 2, 'rademacher', False, id='on the grid'),
    pytest.param(0, [0], 101, 'rademacher', True, id='exponent'),
    pytest.param(0, [0], -101, 'rademacher', True, id='negative exponent'),
    pytest.param(0, [], 0, 'rademacher', False, id='no directions'),
  ],
)
def test_overflow_is_flagged(w, units, e, distribution, expected):
  params = {'a': np.full((33, 2), w, np.float32), 'b': np.zeros(3, np.float32)}
  ds = directions(len(units))
  units = {
    'a': np.array(units, np.int32),
    'b': np.zeros(len(units), np.int32),
  }
  new, overflow = replay_int(
    params, ds, units, {'a': e, 'b': 0}, distribution=distribution
  )
  if expected is None:  # it depends on the signs: the maximum decides
    z = sum(reference.integers(d, 'a', (33, 2), distribution) for d in ds)
    expected = bool((w + z).max() > TOP)
    assert expected
  assert bool(overflow['a']) is expected
  assert not overflow['b']
  assert_same_bits(new['b'], params['b'])


def test_the_bound_on_the_scalars_is_exact():
  limit = 2**31 - 1 - 2**24
  zeros = np.zeros(1, np.float32)
  ds = np.repeat(directions(1), 3, axis=0)  # the same direction: cancels
  for extra in (0, 1):
    half = limit // 2
    units = np.array([half, -half, limit - 2 * half + extra], np.int32)
    _, overflow = replay_int({'a': zeros}, ds, {'a': units}, {'a': 0})
    assert bool(overflow['a']) is bool(extra)


def meshes():
  devices = np.array(jax.devices())
  for rows, cols in [
    (1, 1), (2, 1), (1, 4), (2, 2), (8, 1), (1, 8),
  ]:  # fmt: skip
    yield Mesh(devices[: rows * cols].reshape(rows, cols), ('r', 'c'))


@pytest.mark.parametrize(
  'shape',
  [
    (2, 64, 24),
    pytest.param((512, 16), marks=pytest.mark.slow),
    pytest.param((24, 40), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_sharding_does_not_change_the_bits(shape):
  ds = directions(2)
  w = grid_weights(shape, 10)
  units, exponents = {'a': np.array([5, -7], np.int32)}, {'a': np.int32(10)}

  def f(w):
    params = {'a': w}
    return {
      'perturb': perturb.perturb(params, ds[0], 0.3),
      'popcount16': perturb.perturb(
        params, ds[0], 0.3, distribution='popcount16'
      ),
      'replay': perturb.replay(params, ds, np.array([0.1, 0.2], np.float32)),
      'replay_int': perturb.replay_int(params, ds, units, exponents),
    }

  expected = jax.jit(f)(w)
  for mesh in meshes():
    if shape != (512, 16) and mesh.size < 4:
      continue
    spec = PartitionSpec(*[None] * (w.ndim - 2), 'r', 'c')
    if w.ndim == 3 and mesh.shape['r'] == 2:
      spec = PartitionSpec('r', None, 'c')
    placed = jax.device_put(w, NamedSharding(mesh, spec))
    compiled = jax.jit(f).lower(placed).compile()
    jax.tree.map(assert_same_bits, compiled(placed), expected)
    if shape == (512, 16):  # whole groups of 64 rows: no communication
      text = compiled.as_text() or ''
      assert 'all-gather' not in text
      assert 'all-to-all' not in text
      assert 'collective-permute' not in text


def test_vmap_over_clients():
  ds, scales = directions(4), np.linspace(0.1, 0.4, 4).astype(np.float32)
  params = {'a': weights((70, 6)), 'b': weights((3,))}
  for distribution in EXACT:
    one = lambda d, s, name=distribution: perturb.perturb(
      params, d, s, distribution=name
    )
    many = jax.jit(jax.vmap(one))(ds, scales)
    for i in range(4):
      expected = step(params, ds[i], scales[i], distribution=distribution)
      for k in params:
        assert_same_bits(many[k][i], expected[k])
  units = {'a': np.arange(8, dtype=np.int32).reshape(2, 4)}
  a = {'a': grid_weights((70, 6), 8)}
  both = jax.jit(jax.vmap(lambda u: perturb.replay_int(a, ds, u, {'a': 8})[0]))(
    units
  )
  for i in range(2):
    one = replay_int(a, ds, {'a': units['a'][i]}, {'a': 8})[0]
    assert_same_bits(both['a'][i], one['a'])


def kurtosis(distribution):
  return {'rademacher': 1.0, 'popcount16': 2.875, 'gaussian': 3.0}[distribution]


def eighth_moment(distribution):
  if distribution == 'gaussian':
    return 105.0
  if distribution == 'rademacher':
    return 1.0
  k = np.arange(17)
  chances = np.array([math.comb(16, i) for i in k]) / 2**16
  return float(np.sum(chances * ((k - 8) / 2) ** 8))


def moment_errors(z, distribution):
  """Deviations of the moments 1, 2, 4 in predicted standard errors."""
  z = np.asarray(z, np.float64).ravel()
  fourth, eighth = kurtosis(distribution), eighth_moment(distribution)
  tiny = 1e-12  # rademacher: the even moments have no variance
  spread = np.sqrt([1, fourth - 1 + tiny, eighth - fourth**2 + tiny])
  moments = [z.mean(), (z**2).mean(), (z**4).mean()]
  return (moments - np.array([0, 1, fourth])) / (spread / np.sqrt(z.size))


@pytest.mark.parametrize('distribution', ALL)
def test_moments(distribution):
  z = perturb.field(
    directions(1)[0], 'a', (500, 801), distribution=distribution
  )
  assert np.all(np.abs(moment_errors(z, distribution)) < 4.5)
  wrong = np.abs(moment_errors(1.01 * z, distribution))
  assert wrong[1] > 4.5
  assert wrong[2] > 4.5
  assert np.abs(moment_errors(z + np.float32(0.01), distribution))[0] > 4.5
  # neighbours in both axes, and rows that share a word, are uncorrelated
  z = np.asarray(z, np.float64)
  for lag in (1, 2, 3, 4, 32, 64):
    for x, y in [(z[lag:], z[:-lag]), (z[:, lag:], z[:, :-lag])]:
      assert abs(np.mean(x * y)) * np.sqrt(x.size) < 4.5


def test_gaussian_passes_kolmogorov_smirnov_and_a_wrong_scale_does_not():
  z = perturb.field(directions(1)[0], 'a', (400, 500), distribution='gaussian')

  def distance(x):
    x = np.sort(np.asarray(x, np.float64).ravel())
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    steps = np.arange(x.size + 1) / x.size
    return max(np.max(cdf - steps[:-1]), np.max(steps[1:] - cdf))

  critical = 1.95 / math.sqrt(z.size)  # level 0.001
  assert distance(z) < critical
  assert distance(1.03 * z) > critical


@pytest.mark.parametrize('distribution', ALL)
def test_directions_and_leaves_are_independent(distribution):
  direction = keys.fold(keys.root(1), 0, 0)
  other = keys.fold(keys.root(1), 0, 1)
  z = [
    np.asarray(perturb.field(d, p, (300, 200), distribution=distribution))
    for d, p in [(direction, 'a'), (other, 'a'), (direction, 'b')]
  ]
  for i, j in [(0, 1), (0, 2), (1, 2)]:
    assert abs(np.mean(z[i] * z[j])) * np.sqrt(z[i].size) < 4.5
  equal = perturb.perturb(
    {'a': jnp.zeros((300, 200)), 'b': jnp.zeros((300, 200))},
    direction,
    1.0,
    distribution=distribution,
  )
  assert_same_bits(equal['a'], z[0])
  assert_same_bits(equal['b'], z[2])


@pytest.mark.parametrize('platform', ['tpu', 'cuda', 'cpu'])
def test_lowers_for_every_platform(platform):
  params = {'a': jnp.zeros((100, 30)), 'b': jnp.zeros(3)}
  ds = jnp.asarray(directions(4))
  units = jax.tree.map(lambda w: jnp.zeros(4, jnp.int32), params)
  exponents = jax.tree.map(lambda w: jnp.int32(8), params)
  calls = [
    lambda name: perturb.replay(params, ds, jnp.zeros(4), distribution=name)
  ]
  for distribution in ALL:
    jax.jit(calls[0], static_argnums=0).trace(distribution).lower(
      lowering_platforms=(platform,)
    )
  for distribution in EXACT:
    jax.jit(perturb.replay_int, static_argnames='distribution').trace(
      params, ds, units, exponents, distribution=distribution
    ).lower(lowering_platforms=(platform,))


def test_errors_name_what_is_wrong():
  w, d = {'a': np.zeros(3, np.float32)}, directions(1)[0]
  ds, units, e = directions(2), {'a': np.zeros(2, np.int32)}, {'a': 0}
  with pytest.raises(ValueError, match="'rademacher', 'popcount16', 'gauss"):
    perturb.perturb(w, d, 1.0, distribution='cauchy')
  with pytest.raises(TypeError, match="'x/count'.*int32"):
    perturb.perturb({'x': {'count': np.int32(3)}}, d, 1.0)
  with pytest.raises(TypeError, match='direction must be uint32'):
    perturb.perturb(w, d.astype(np.int32), 1.0)
  with pytest.raises(ValueError, match=r'direction must be uint32\[2\]'):
    perturb.perturb(w, ds, 1.0)
  with pytest.raises(ValueError, match='scale must be a scalar'):
    perturb.perturb(w, d, np.zeros(2))
  with pytest.raises(ValueError, match='2 directions'):
    perturb.replay(w, ds, np.zeros(3))
  with pytest.raises(ValueError, match='no exact integer form'):
    perturb.replay_int(w, ds, units, e, distribution='gaussian')
  with pytest.raises(TypeError, match="'a' must be float32"):
    perturb.replay_int({'a': jnp.zeros(3, jnp.bfloat16)}, ds, units, e)
  with pytest.raises(TypeError, match='fit int32, got int64'):
    perturb.replay_int(w, ds, {'a': np.zeros(2, np.int64)}, e)
  with pytest.raises(ValueError, match=r"'a': expected units \[2\]"):
    perturb.replay_int(w, ds, {'a': np.zeros(3, np.int32)}, e)


@pytest.mark.parametrize(
  ('statement', 'error'),
  [
    ('from kernels import xla', 'import `jaxfl.kernels`'),
    ('import kernels.xla', 'No module named'),
    ('import kernels; assert not hasattr(kernels, "__version__")', None),
  ],
)
def test_kernels_answer_to_one_name_only(statement, error):
  run = subprocess.run(
    [sys.executable, '-c', statement],
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == (error is not None)
  assert (error or '') in run.stderr
