"""Walsh pools: the field, and all directions at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxfl.kernels import walsh  # pyright: ignore[reportMissingImports]

from jaxfl import blocks, keys, perturb, pool
from tests import reference

ROOT = keys.root(7)
SHAPES = {'ragged': (2, 70, 131), 'small': (31, 200), 'vector': (300,)}
LARGE = (96, 300)
SEEDS = [0, 1, 127, 128, 4095, 4096, 5000]


def seeds(indices):
  return pool.directions(ROOT, np.asarray(indices), 'walsh')


def stacked(path, shape, indices):
  """int64[K, R, C], from the reference."""
  return np.stack([reference.walsh(ROOT, k, path, shape) for k in indices])


def pool_keys(path, count):
  return perturb.walsh_keys(ROOT, np.arange(walsh.num_pools(count)), path)


@pytest.mark.parametrize('path', SHAPES)
def test_the_field_is_that_of_the_reference(path):
  shape = SHAPES[path]
  fields = jax.jit(
    lambda directions: jax.vmap(
      lambda d: perturb.field(d, path, shape, distribution='walsh')
    )(directions)
  )(seeds(SEEDS))
  expected = stacked(path, shape, SEEDS)
  np.testing.assert_array_equal(fields, expected.reshape(fields.shape))


def test_a_rectangle_is_a_slice():
  (direction,) = seeds([4321])
  part = lambda shape, offset: perturb.field(
    direction, 'a', shape, distribution='walsh', offset=offset
  )
  whole = np.asarray(part((200, 400), (0, 0)))
  for (row, col), (rows, cols) in [
    ((64, 128), (64, 200)),
    ((63, 0), (70, 140)),
    ((128, 256), (72, 144)),
  ]:
    expected = whole[row : row + rows, col : col + cols]
    np.testing.assert_array_equal(part((rows, cols), (row, col)), expected)
    traced = jnp.uint32(row), jnp.uint32(col)
    np.testing.assert_array_equal(part((rows, cols), traced), expected)


def test_directions_of_a_block_are_orthogonal():
  table = jnp.eye(walsh.SIZE, dtype=jnp.int32)[:: walsh.SIZE // 64]
  (key,) = pool_keys('a', 1)
  z = jax.jit(jax.vmap(lambda x: walsh.spread(x, key, (64, 256), (64, 128))))(
    walsh.transform(table)
  )
  z = np.asarray(z).reshape(64, -1)
  assert set(np.unique(z)) == {-1, 1}
  np.testing.assert_array_equal(z @ z.T, 64 * 256 * np.eye(64))


def test_the_transform_is_that_of_hadamard():
  x = np.random.default_rng(0).integers(-99, 99, walsh.SIZE, dtype=np.int32)
  k = np.arange(walsh.SIZE)
  odd = np.array([x.bit_count() % 2 for x in range(walsh.SIZE)])
  y = np.asarray(walsh.transform(x))
  for g in (0, 1, 77, 4095):
    assert y[g] == np.sum(x * (1 - 2 * odd[k & g]))
  np.testing.assert_array_equal(walsh.transform(y), walsh.SIZE * x)


@pytest.mark.parametrize('count', [3, 5000])
def test_the_whole_pool_is_the_sum_over_its_directions(count):
  rng = np.random.default_rng(1)
  units = rng.integers(-127, 128, count, dtype=np.int32)
  some = np.unique(rng.integers(0, count, 300))  # the reference is slow
  units = np.where(np.isin(np.arange(count), some), units, 0).astype(np.int32)
  w = {'a': np.round(rng.normal(size=LARGE) * 99).astype(np.float32) / 2**12}
  e = {'a': np.int32(12)}
  new, overflow = jax.jit(perturb.replay_pool)(w, ROOT, {'a': units}, e)
  total = np.tensordot(units[some], stacked('a', LARGE, some), 1)
  expected = w['a'] * 2**12 + total
  np.testing.assert_array_equal(np.asarray(new['a']) * 2**12, expected)
  assert not overflow['a']
  one_by_one, _ = jax.jit(perturb.replay_int, static_argnames='distribution')(
    w, seeds(some), {'a': units[some]}, e, distribution='walsh'
  )
  np.testing.assert_array_equal(new['a'], one_by_one['a'])


def test_what_leaves_the_range_is_reported():
  w, e = {'a': np.zeros((64, 128), np.float32)}, {'a': np.int32(0)}
  flag = lambda w, units, e: perturb.replay_pool(
    w, ROOT, {'a': np.array(units, np.int32)}, e
  )[1]['a']
  assert not flag(w, [2**23, 2**23 - 1], e)
  assert flag(w, [2**23, 2**23], e)
  assert flag(w, [2**30] * 4, e)  # wraps to zero
  assert flag({'a': w['a'] + np.float32(0.5)}, [1], e)  # is off the grid
  assert flag(w, [1], {'a': np.int32(101)})


@pytest.mark.parametrize('looped', [True, False])
def test_products_with_the_whole_pool(looped):
  x = np.random.default_rng(2).integers(-9, 9, LARGE).astype(np.float32)
  project = jax.jit(walsh.project, static_argnames='looped')
  y = project(x, pool_keys('a', 5000), looped=looped)
  some = [*SEEDS, 3, 1000, 2000, 8191]
  expected = stacked('a', LARGE, some).reshape(len(some), -1) @ x.reshape(-1)
  np.testing.assert_array_equal(np.asarray(y)[some], expected)


def test_statistics_are_those_of_independent_signs():
  """Each direction over pools: mean, pairs of entries, and projections."""
  pools, shape = 400, (64, 128)
  roots = keys.fold(ROOT, np.arange(pools))
  for k in (0, 1, 2049):
    directions = pool.directions(roots, np.int32(k), 'walsh')
    z = jax.jit(
      jax.vmap(lambda d: perturb.field(d, 'a', shape, distribution='walsh'))
    )(directions)
    z = np.asarray(z).reshape(pools, -1)
    n = z.size
    assert abs(z.mean()) * np.sqrt(n) < 4
    for step in (1, 32, 128, 128 * 32):  # along and across blocks
      pairs = z[:, step:] * z[:, :-step]
      assert abs(pairs.mean()) * np.sqrt(pairs.size) < 4
    # the sum of a row, which a pool without shifts sees in few directions
    row = z[:, :128].sum(1) / np.sqrt(128)
    assert abs(row.mean()) * np.sqrt(pools) < 4
    assert abs(row.var() - 1) * np.sqrt(pools / 2) < 4


def test_a_pool_gives_back_what_it_measured():
  """4096 directions of a 32 x 128 block are a basis of it."""
  x = np.random.default_rng(3).normal(size=(32, 128)).astype(np.float32)
  key = pool_keys('a', 1)
  y = walsh.project(x, key, looped=True) / walsh.SIZE
  table = walsh.transform(y)
  back = walsh.spread(table, key[0], x.shape, (0, 0))
  np.testing.assert_allclose(back, x, atol=1e-5)


BLOCKS = {'a': (64, 300), 'b': (40,)}


def of_blocks(parties, count, seed=4):
  """Blocks, counts, directions, and the reference's z by party and slot."""
  cut = blocks.partition(
    jax.tree.map(np.zeros, BLOCKS, is_leaf=lambda x: isinstance(x, tuple)),
    max_size=1 << 14,
    distribution='walsh',
  )
  rng = np.random.default_rng(seed)
  counts = rng.multinomial(
    count - 2, np.ones(len(cut)) / len(cut), size=parties
  ).astype(np.int32)
  bases = keys.fold(ROOT, np.arange(parties))
  directions = pool.directions(bases[:, None], np.arange(count), 'walsh')
  return cut, counts, bases, directions


def of_block(base, k, block):
  z = reference.walsh(base, k, block.path, BLOCKS[block.path])
  (row, col), (rows, cols) = block.offset, block.shape
  return z[row : row + rows, col : col + cols]


def test_blocks_are_cut_between_walsh_blocks():
  cut, *_ = of_blocks(1, 50)
  assert len(cut) == 3
  assert all(b.offset[0] % 64 == b.offset[1] % 128 == 0 for b in cut)


def test_products_of_blocks():
  cut, counts, bases, directions = of_blocks(2, 50)
  rng = np.random.default_rng(5)
  delta = {k: rng.integers(-9, 9, s) for k, s in BLOCKS.items()}
  delta = jax.tree.map(lambda x: x.astype(np.float32), delta)
  over_clients = jax.vmap(
    lambda counts, directions: blocks.project(
      delta, cut, counts, directions, distribution='walsh'
    )
  )
  y = np.asarray(jax.jit(over_clients)(counts, directions))
  for party in range(2):
    expected = []
    for block, count in zip(cut, counts[party], strict=True):
      (row, col), (rows, cols) = block.offset, block.shape
      x = delta[block.path].reshape(-1, BLOCKS[block.path][-1])
      x = x[row : row + rows, col : col + cols]
      for k in range(count):
        expected.append(np.sum(x * of_block(bases[party], k, block)))
    np.testing.assert_array_equal(y[party], [*expected, 0, 0])


def test_sums_of_blocks_are_exact_and_have_no_order():
  cut, counts, bases, directions = of_blocks(3, 50)
  rng = np.random.default_rng(6)
  units = rng.integers(-99, 99, (3, 50), dtype=np.int32)
  zeros = {k: np.zeros(s, np.float32) for k, s in BLOCKS.items()}
  e = dict.fromkeys(BLOCKS, np.int32(4))
  add = jax.jit(blocks.add_units, static_argnames=('blocks', 'distribution'))
  run = lambda at: add(
    zeros,
    e,
    cut,
    counts[at],
    directions[at],
    units[at],
    distribution='walsh',
  )
  new, overflow = run(np.arange(3))
  assert not any(jax.tree.leaves(overflow))
  expected = {k: np.zeros((np.prod(s[:-1], dtype=int), s[-1]))
              for k, s in BLOCKS.items()}  # fmt: skip
  for party in range(3):
    slot = 0
    for block, count in zip(cut, counts[party], strict=True):
      (row, col), (rows, cols) = block.offset, block.shape
      part = expected[block.path][row : row + rows, col : col + cols]
      for k in range(count):
        part += units[party, slot + k] * of_block(bases[party], k, block)
      slot += count
  for path, total in expected.items():
    np.testing.assert_array_equal(
      np.asarray(new[path]) * 16, total.reshape(BLOCKS[path])
    )
  jax.tree.map(np.testing.assert_array_equal, run(np.array([2, 0, 1]))[0], new)
  reconstruct = jax.jit(
    blocks.reconstruct, static_argnames=('blocks', 'distribution')
  )
  floats = reconstruct(
    zeros,
    cut,
    counts,
    directions,
    units.astype(np.float32) / 16,
    distribution='walsh',
  )
  jax.tree.map(np.testing.assert_array_equal, floats, new)


def test_what_does_not_fit_is_named():
  params = {'a': np.zeros(LARGE, np.float32)}
  with pytest.raises(ValueError, match=r'direction must be uint32\[3\]'):
    perturb.perturb(params, ROOT, 1.0, distribution='walsh')
  with pytest.raises(ValueError, match=r'directions must be uint32\[K, 3\]'):
    perturb.replay(params, ROOT[None], np.ones(1), distribution='walsh')
