import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import blocks, keys, perturb
from jaxfl.blocks import Block
from tests import reference

EXACT = ['rademacher', 'popcount16']
ALL = [*EXACT, 'gaussian']
SHAPES = {
  'a': (130, 4),
  'b': (400,),
  'c': (),
  'd': (0, 3),
  'e': {'f': (4, 16, 9)},
}
MAX_SIZE = 300
NUM_SLOTS, NUM_PARTIES = 60, 3

STATIC = ('blocks', 'distribution')
project = jax.jit(blocks.project, static_argnames=STATIC)
reconstruct = jax.jit(blocks.reconstruct, static_argnames=STATIC)
add_units = jax.jit(blocks.add_units, static_argnames=STATIC)


def is_shape(x):
  return isinstance(x, tuple)


def tree(make):
  return jax.tree.map(make, SHAPES, is_leaf=is_shape)


def normals(seed=0):
  rng = np.random.default_rng(seed)
  return tree(lambda shape: rng.normal(size=shape).astype(np.float32))


def problem(seed=1):
  """Blocks, counts [C, L] with empty blocks and parties, directions."""
  rng = np.random.default_rng(seed)
  cut = blocks.partition(normals(), max_size=MAX_SIZE)
  counts = np.zeros((NUM_PARTIES, len(cut)), np.int32)
  for party, num in enumerate([NUM_SLOTS, 47, 0]):
    np.add.at(counts[party], rng.integers(0, len(cut), num), 1)
  counts[1, :2] = 0
  shape = (NUM_PARTIES, NUM_SLOTS, 2)
  return cut, counts, rng.integers(2**32, size=shape, dtype=np.uint32)


def view(x):
  return np.asarray(x).reshape(-1, np.shape(x)[-1] if np.ndim(x) else 1)


def rectangle(tensors, block):
  """The block's part of a pytree, writable where the pytree is."""
  (row, col), (rows, cols) = block.offset, block.shape
  for key in block.path.split('/'):
    tensors = tensors[key]
  return view(tensors)[row : row + rows, col : col + cols]


def slots_of(counts):
  """Triples of slot, block and k."""
  pairs = [(i, k) for i, n in enumerate(counts) for k in range(n)]
  return [(slot, i, k) for slot, (i, k) in enumerate(pairs)]


def assert_same_bits(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize('max_size', [64, 129, 300, 10**6])
def test_every_entry_is_in_one_block(max_size):
  params = normals()
  cut = blocks.partition(params, max_size=max_size)
  seen = jax.tree.map(lambda x: np.zeros(x.shape, int), params)
  for block in cut:
    rectangle(seen, block)[...] += 1
    assert block.size == np.prod(block.shape) <= max_size
    assert block.offset[0] % 64 == 0
  assert all((leaf == 1).all() for leaf in jax.tree.leaves(seen))
  abstract = jax.eval_shape(lambda: params)
  assert blocks.partition(abstract, max_size=max_size) == cut
  if max_size == 10**6:
    assert [block.path for block in cut] == ['a', 'b', 'c', 'e/f']


def test_blocks_are_cut_by_rows_and_then_by_columns():
  cut = lambda shape, n: [
    (*b.offset, *b.shape)
    for b in blocks.partition({'w': np.zeros(shape)}, max_size=n)
  ]
  assert cut((300, 2), 256) == [
    (0, 0, 64, 2),
    (64, 0, 128, 2),
    (192, 0, 108, 2),
  ]
  assert cut((10, 100), 350) == [
    (0, 0, 10, 33),
    (0, 33, 10, 33),
    (0, 66, 10, 34),
  ]
  assert cut((7,), 64) == [(0, 0, 1, 7)]
  assert cut((130,), 65) == [(0, 0, 1, 65), (0, 65, 1, 65)]
  assert cut((65, 2), 64) == [
    (0, 0, 64, 1),
    (0, 1, 64, 1),
    (64, 0, 1, 1),
    (64, 1, 1, 1),
  ]


def test_slots():
  block, k = blocks.slots(jnp.array([2, 0, 3]), 7)
  np.testing.assert_array_equal(block, [0, 0, 2, 2, 2, 3, 3])
  np.testing.assert_array_equal(k[:5], [0, 1, 0, 1, 2])


def test_norms_are_those_of_the_blocks():
  delta = normals()
  cut = blocks.partition(delta, max_size=MAX_SIZE)
  found = jax.jit(blocks.norms, static_argnames='blocks')(delta, cut)
  leaves = dict(keys.named_leaves(delta))
  wanted = []
  for block in cut:
    (r, c), (h, w) = block.offset, block.shape
    x = leaves[block.path]
    x = x.reshape(-1, x.shape[-1] if x.ndim > 1 else x.size)
    wanted.append(np.linalg.norm(x[r : r + h, c : c + w].astype(float)))
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize('distribution', ALL)
def test_project_is_the_inner_product(distribution):
  delta = normals()
  cut, counts, directions = problem()
  for party in range(NUM_PARTIES):
    actual = project(
      delta, cut, counts[party], directions[party], distribution=distribution
    )
    expected = np.zeros(NUM_SLOTS)
    for slot, i, k in slots_of(counts[party]):
      z = reference.field(
        directions[party, k],
        cut[i].path,
        cut[i].shape,
        distribution,
        cut[i].offset,
      )
      expected[slot] = np.sum(z * rectangle(delta, cut[i]).astype(np.float64))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    unused = counts[party].sum()
    assert not np.any(actual[unused:])


def test_project_of_clients_at_once():
  cut, counts, directions = problem()
  deltas = [normals(seed) for seed in range(NUM_PARTIES)]
  stacked = jax.tree.map(lambda *xs: np.stack(xs), *deltas)
  over_clients = jax.vmap(lambda *args: blocks.project(args[0], cut, *args[1:]))
  many = jax.jit(over_clients)(stacked, counts, directions)
  for i, delta in enumerate(deltas):
    one = project(delta, cut, counts[i], directions[i])
    np.testing.assert_allclose(many[i], one, atol=1e-5)
    assert not np.any(many[i][counts[i].sum() :])


@pytest.mark.parametrize('distribution', ALL)
def test_reconstruct_is_a_sum_in_order(distribution):
  cut, counts, directions = problem()
  rng = np.random.default_rng(2)
  shape = (NUM_PARTIES, NUM_SLOTS)
  coefficients = rng.normal(size=shape).astype(np.float32)
  like = jax.eval_shape(normals)
  actual = reconstruct(
    like, cut, counts, directions, coefficients, distribution=distribution
  )
  expected = tree(lambda shape: np.zeros(shape, np.float32))
  for party in range(NUM_PARTIES):
    for slot, i, k in slots_of(counts[party]):
      z = reference.field(
        directions[party, k],
        cut[i].path,
        cut[i].shape,
        distribution,
        cut[i].offset,
      )
      rectangle(expected, cut[i])[...] += coefficients[party, slot] * z
  if distribution == 'gaussian':
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    jax.tree.map(close, actual, expected)
  else:
    jax.tree.map(assert_same_bits, actual, expected)
  # the coefficients of unused slots don't matter
  for party in range(NUM_PARTIES):
    coefficients[party, counts[party].sum() :] = np.nan
  again = reconstruct(
    like, cut, counts, directions, coefficients, distribution=distribution
  )
  jax.tree.map(assert_same_bits, again, actual)


@pytest.mark.parametrize('distribution', EXACT)
def test_add_units_is_exact_in_any_order_of_parties(distribution):
  cut, counts, directions = problem()
  rng = np.random.default_rng(3)
  shape = (NUM_PARTIES, NUM_SLOTS)
  units = rng.integers(-999, 999, shape, dtype=np.int32)
  exponents = tree(len)  # 0, 1, 2 or 3
  params = jax.tree.map(
    lambda x, e: np.asarray(np.rint(x * 2**e) / 2**e + 0, np.float32),
    normals(),
    exponents,
  )
  new, overflow = add_units(
    params, exponents, cut, counts, directions, units, distribution=distribution
  )
  assert not any(jax.tree.leaves(overflow))
  total = jax.tree.map(
    lambda x, e: np.asarray(x * 2.0**e, np.float64), params, exponents
  )
  for party in range(NUM_PARTIES):
    for slot, i, k in slots_of(counts[party]):
      block = cut[i]
      z = reference.integers(
        directions[party, k],
        block.path,
        block.shape,
        distribution,
        block.offset,
      )
      rectangle(total, block)[...] += int(units[party, slot]) * z
  expected = jax.tree.map(
    lambda x, e: np.asarray(x / 2**e, np.float32), total, exponents
  )
  jax.tree.map(assert_same_bits, new, expected)
  order = [2, 0, 1]
  again, _ = add_units(
    params,
    exponents,
    cut,
    counts[order],
    directions[order],
    units[order],
    distribution=distribution,
  )
  jax.tree.map(assert_same_bits, again, new)


def test_add_units_sums_over_parties_before_it_checks_the_range():
  top = 2**24 - 1
  params = {'a': np.full((3, 2), top, np.float32), 'b': np.zeros(4, np.float32)}
  cut = blocks.partition(params, max_size=64)
  direction = np.full((3, 1, 2), 7, np.uint32)
  counts = np.array([[1, 0], [1, 0], [0, 1]], np.int32)

  def flags(*units):
    units = np.array(units, np.int32)[:, None]
    new, overflow = add_units(
      params, {'a': 0, 'b': 0}, cut, counts, direction, units
    )
    return new, [bool(overflow['a']), bool(overflow['b'])]

  new, found = flags(100, -100, 0)
  assert found == [False, False]
  assert_same_bits(new['a'], params['a'])
  assert flags(1, 1, 0)[1] == [True, False]
  assert flags(0, 0, 2**24)[1] == [False, True]
  assert flags(0, 0, 2**24 - 1)[1] == [False, False]
  limit = 2**31 - 1 - 2**24
  assert flags(limit // 2, -(limit // 2), limit)[1] == [False, True]
  assert flags(limit // 2 + 1, -(limit // 2) - 1, 0)[1] == [True, False]
  assert flags(-(2**31), -(2**31), 0)[1] == [True, False]


def test_whole_tensors_agree_with_replay():
  params = {key: normals()[key] for key in 'ab'}
  cut = blocks.partition(params, max_size=10**6)
  directions = problem()[2][:1, :4]
  counts = np.full((1, len(cut)), 4, np.int32)
  coefficients = np.array([0.5, -1.0, 0.25, 3.0], np.float32)
  num_slots = 4 * len(cut)
  padded = np.zeros((1, num_slots, 2), np.uint32)
  padded[:, :4] = directions
  zeros = jax.tree.map(np.zeros_like, params)
  new = reconstruct(
    params, cut, counts, padded, np.tile(coefficients, len(cut))[None]
  )
  expected = jax.jit(perturb.replay)(zeros, directions[0], coefficients)
  jax.tree.map(assert_same_bits, new, expected)
  parts = project(params, cut, counts[0], padded[0])
  whole = jax.jit(perturb.project)(params, directions[0])
  np.testing.assert_allclose(parts.reshape(-1, 4).sum(0), whole, atol=1e-4)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_lowers_for_accelerators(platform):
  params = {'a': jnp.zeros((130, 30))}
  cut = blocks.partition(params, max_size=2000)
  counts = jnp.ones((2, len(cut)), jnp.int32)
  directions, values = jnp.zeros((2, 9, 2), jnp.uint32), jnp.zeros((2, 9))
  for name in ALL:
    for f, args in [
      (project, (params, cut, counts[0], directions[0])),
      (reconstruct, (params, cut, counts, directions, values)),
    ]:
      f.trace(*args, distribution=name).lower(lowering_platforms=(platform,))
  units = values.astype(jnp.int32)
  add_units.trace(
    params, {'a': jnp.int32(8)}, cut, counts, directions, units
  ).lower(lowering_platforms=(platform,))


def test_errors_name_what_is_wrong():
  params = {'a': np.zeros((3, 5), np.float32)}
  cut = blocks.partition(params, max_size=64)
  one, ds = np.ones((1, 1), np.int32), np.zeros((1, 4, 2), np.uint32)
  values, e = np.zeros((1, 4), np.float32), {'a': 0}
  with pytest.raises(ValueError, match='max_size must be >= 64, got 63'):
    blocks.partition(params, max_size=63)
  with pytest.raises(ValueError, match=r'counts must be .* \[1\], .*\[1, 1\]'):
    blocks.project(params, cut, one, ds[0])
  with pytest.raises(ValueError, match=r'counts must be integers.*float'):
    blocks.project(params, cut, np.ones(1), ds[0])
  with pytest.raises(ValueError, match=r'directions must be uint32\[N, 2\]'):
    blocks.project(params, cut, one[0], ds)
  with pytest.raises(ValueError, match="'cauchy' is not a distribution"):
    blocks.project(params, cut, one[0], ds[0], distribution='cauchy')
  with pytest.raises(TypeError, match="'a' must be of a floating type"):
    blocks.project({'a': np.zeros((3, 5), int)}, cut, one[0], ds[0])
  with pytest.raises(ValueError, match='4 slots of 1 parties'):
    blocks.reconstruct(params, cut, one, ds, values[:, :3])
  with pytest.raises(ValueError, match=r'directions must be uint32\[C, N, 2\]'):
    blocks.reconstruct(params, cut, one, ds[0], values)
  with pytest.raises(ValueError, match='no exact integer form'):
    blocks.add_units(
      params, e, cut, one, ds, values.astype(int), distribution='gaussian'
    )
  with pytest.raises(TypeError, match='units must fit int32, got float32'):
    blocks.add_units(params, e, cut, one, ds, values)
  with pytest.raises(ValueError, match="there is no parameter 'b'"):
    blocks.project(params, (Block('b', (0, 0), (1, 1)),), one[0], ds[0])
  with pytest.raises(ValueError, match=r"\[3, 6\], outside of 'a'"):
    blocks.project(params, (Block('a', (0, 1), (3, 5)),), one[0], ds[0])
