"""Low-rank sign directions, against NumPy and by their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxfl.kernels import lowrank  # pyright: ignore[reportMissingImports]

from jaxfl import blocks, keys, perturb
from tests import reference

NAMES = tuple(lowrank.RANKS)
BASES = pytest.mark.parametrize('name', NAMES)
ENDS = pytest.mark.parametrize('name', ['rank1', 'rank16'])
SHAPES = [
  (), (129,), (64, 3), (100, 13), (3, 5, 7), (2, 3, 4, 5), (0, 5), (5, 0),
  (0, 3, 2),
]  # fmt: skip
KEY = keys.leaf_key(keys.fold(keys.root(7), 1, 2), 'a')
replay_int = jax.jit(perturb.replay_int, static_argnames='distribution')


def directions(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(2**32, size=(count, 2), dtype=np.uint32)


def weights(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(key, shape, rank):
  u, v = reference.low_rank_factors(np.asarray(key), shape, rank)
  return (u @ v).reshape(shape)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_factors_field_and_step_are_the_reference(shape):
  w = weights(shape)

  @jax.jit
  def all(key, w):
    return {
      name: (
        lowrank.factors(key, shape, rank, dtype=jnp.int8),
        lowrank.field(key, shape, distribution=name),
        lowrank.add(w, key, np.float32(0.3), distribution=name),
      )
      for name, rank in lowrank.RANKS.items()
    }

  rows, cols = (1, 1, *shape)[-2:]
  for name, ((u, v), z, new) in all(KEY, w).items():
    rank = lowrank.RANKS[name]
    expected = reference.low_rank_factors(np.asarray(KEY), shape, rank)
    assert (u.dtype, v.dtype) == (jnp.int8, jnp.int8)
    assert u.shape == (*shape[:-2], rows, rank)
    assert v.shape == (*shape[:-2], rank, cols)
    np.testing.assert_array_equal(u, expected[0].reshape(u.shape))
    np.testing.assert_array_equal(v, expected[1].reshape(v.shape))
    field = (integers(KEY, shape, rank) / rank**0.5).astype(np.float32)
    np.testing.assert_array_equal(z, field)
    step = np.asarray(w + np.float32(0.3) * field)
    assert np.asarray(new).tobytes() == step.tobytes()


@pytest.mark.parametrize('rows', [5, 64])
def test_a_slice_of_a_stack_needs_its_number(rows):
  def factors(count, first):
    shape = (count, rows, 3)
    return [lowrank.factors(KEY, shape, r, first) for r in (1, 4, 16)]

  whole = jax.jit(factors, static_argnums=(0, 1))(70, 0)
  some = jax.jit(factors, static_argnums=0)
  known = jax.jit(factors, static_argnums=(0, 1))
  parts = [(n, some(2, jnp.int32(n))) for n in (0, 1, 13, 68)]
  for n, part in [*parts, (13, known(2, 13))]:
    expected = jax.tree.map(lambda x, n=n: x[n : n + 2], whole)
    jax.tree.map(np.testing.assert_array_equal, part, expected)


@ENDS
def test_replay_int_equals_int64_in_any_order(name):
  rank, count = lowrank.RANKS[name], 75  # two parts at rank 16
  shapes = {'a': (70, 11), 'b': (5,), 'c': (), 'd': (0, 2), 'e': (2, 3, 4, 5)}
  e = {'a': 12, 'b': -3, 'c': 24, 'd': 5, 'e': 0}
  rng, ds = np.random.default_rng(1), directions(count)
  units = {k: rng.integers(-(2**16), 2**16, count, np.int32) for k in shapes}
  units['b'] = rng.integers(-99, 99, count, np.int32)  # no high parts
  params = {
    k: np.asarray(rng.integers(-(2**12), 2**12, s) * 2.0 ** -e[k], np.float32)
    for k, s in shapes.items()
  }
  new, overflow = replay_int(params, ds, units, e, distribution=name)
  assert not any(jax.tree.leaves(overflow))
  for k, shape in shapes.items():
    total = params[k] * 2.0 ** e[k]
    for d, unit in zip(ds, units[k], strict=True):
      total = total + unit * integers(reference.leaf_key(d, k), shape, rank)
    np.testing.assert_array_equal(new[k] * np.float32(2.0 ** e[k]), total)
  order = rng.permutation(count)
  again, _ = replay_int(
    params, ds[order], {k: v[order] for k, v in units.items()}, e,
    distribution=name,
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, again, new)
  back, _ = replay_int(
    new, ds, jax.tree.map(np.negative, units), e, distribution=name
  )
  jax.tree.map(np.testing.assert_array_equal, back, params)


@BASES
def test_the_largest_sums_are_exact(name):
  """The same direction again and again: every sum is as large as can be."""
  rank, shape = lowrank.RANKS[name], (3, 5)
  count = 2 * lowrank.MOST_TERMS // rank
  many = np.tile(KEY, (count, 1))
  z = integers(KEY, shape, rank)
  add = jax.jit(lowrank.add_units, static_argnames='distribution')
  most = (2**31 - 1 - 2**24) // (rank * count)
  for unit in (2**14 - 1, -(2**14), 2**14, most, -most):
    for last in (0, 1):  # an odd sum needs all 24 bits
      units = np.full(count, unit, np.int32)
      units[-1] -= last * np.sign(unit)
      total = add(np.ones(shape, np.int32), many, units, distribution=name)
      np.testing.assert_array_equal(total, 1 + units.sum(dtype=np.int64) * z)


@BASES
def test_the_bound_on_the_scalars_is_exact(name):
  limit = (2**31 - 1 - 2**24) // lowrank.RANKS[name]
  ds = np.repeat(directions(1), 3, axis=0)  # the same direction: cancels
  zeros, half = {'a': np.zeros((2, 3), np.float32)}, limit // 2
  for extra in (0, 1):
    units = np.array([half, -half, limit - 2 * half + extra], np.int32)
    _, overflow = replay_int(
      zeros, ds, {'a': units}, {'a': 0}, distribution=name
    )
    assert bool(overflow['a']) is bool(extra)
  for bad in (
    {'a': np.full((2, 3), 2.0**24, np.float32)},
    {'a': zeros['a'] + 0.5},
  ):
    units = np.zeros(3, np.int32)
    _, overflow = replay_int(bad, ds, {'a': units}, {'a': 0}, distribution=name)
    assert overflow['a']


@ENDS
def test_replay_is_a_sequence_of_perturbs(name):
  params = {'a': jnp.asarray(weights((2, 9, 3)), jnp.bfloat16)}
  ds, scales = directions(4), np.array([0.1, -0.2, 0.3, 0.7], np.float32)
  step = jax.jit(lambda *a: perturb.perturb(*a, distribution=name))
  expected = params
  for d, c in zip(ds, scales, strict=True):
    expected = step(expected, d, c)
  replay = jax.jit(lambda *a: perturb.replay(*a, distribution=name))
  new = replay(params, ds, scales)
  np.testing.assert_array_equal(new['a'], expected['a'])
  many = jax.jit(jax.vmap(step, (None, 0, 0)))(params, ds, scales)
  for row, d, c in zip(many['a'], ds, scales, strict=True):
    np.testing.assert_array_equal(row, step(params, d, c)['a'])


@ENDS
def test_project_is_the_inner_product(name):
  rank, ds = lowrank.RANKS[name], directions(70)
  delta = {'a': weights((2, 9, 5)), 'b': weights((3,)), 'c': weights((0, 2))}
  project = jax.jit(lambda ds: perturb.project(delta, ds, distribution=name))
  found = project(ds)
  expected = np.zeros(70)
  for path, x in delta.items():
    for k, d in enumerate(ds):
      z = integers(reference.leaf_key(d, path), x.shape, rank) / rank**0.5
      expected[k] += np.sum(z * x)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert project(ds[:0]).shape == (0,)


@BASES
def test_entries_are_uncorrelated_with_variance_one(name):
  rank, shape, count = lowrank.RANKS[name], (2, 3, 4), 20_000
  field = lambda key: lowrank.field(key, shape, distribution=name)
  z = np.asarray(jax.jit(jax.vmap(field))(keys.fold(KEY, np.arange(count))))
  z = z.reshape(count, -1).astype(np.float64)
  x = weights(24)
  # pairs are independent: Var z_i z_j = 1, and Var z_i^2 = 2 - 2 / rank
  spread = np.sqrt(np.where(np.eye(24), 2 - 2 / rank, 1.0) / count)
  error = z.T @ z / count - np.eye(24)
  assert (np.abs(error) <= 4.5 * spread).all()
  assert (np.abs(z.mean(0)) < 4.5 / np.sqrt(count)).all()
  # E <z, x> z = x, with the variance of independent entries
  samples = (z @ x)[:, None] * z
  variance = np.sum(x**2) + (1 - 2 / rank) * x**2
  assert (np.abs(samples.mean(0) - x) < 4.5 * np.sqrt(variance / count)).all()
  np.testing.assert_allclose(samples.var(0), variance, rtol=0.15)
  # but of rank 1 the corners of a rectangle multiply to 1
  z = z.reshape(count, *shape)
  corners = z[:, 0, 0, 0] * z[:, 0, 0, 1] * z[:, 0, 1, 0] * z[:, 0, 1, 1]
  assert abs(corners.mean() - 1 / rank) <= 4.5 * corners.std() / np.sqrt(count)


def test_sharding_does_not_change_the_bits():
  ds, units = directions(3), np.array([5, -7, 2**20], np.int32)
  w = np.round(weights((4, 24, 8)) * 2**10).astype(np.float32)

  @jax.jit
  def f(w):
    kwargs = {'distribution': 'rank4'}
    return (
      perturb.perturb({'a': w}, ds[0], 0.3, **kwargs),
      perturb.replay_int({'a': w}, ds, {'a': units}, {'a': 0}, **kwargs),
    )

  expected = f(w)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ('n', 'r', 'c'))
  placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec('n', 'r', 'c')))
  jax.tree.map(np.testing.assert_array_equal, f(placed), expected)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_lowers_for_accelerators(platform):
  params, ds = {'a': jnp.zeros((3, 50, 30))}, jnp.asarray(directions(4))

  @jax.jit
  def f(params):
    kwargs = {'distribution': 'rank4'}
    units, e = {'a': np.zeros(4, np.int32)}, {'a': 8}
    return (
      perturb.replay(params, ds, jnp.zeros(4), **kwargs),
      perturb.replay_int(params, ds, units, e, **kwargs),
      perturb.project(params, ds, **kwargs),
    )

  f.trace(params).lower(lowering_platforms=(platform,))


def test_there_are_no_rectangles():
  d = directions(1)[0]
  with pytest.raises(ValueError, match="'rank4' has no rectangles"):
    perturb.field(d, 'a', (3, 5), distribution='rank4', offset=(64, 0))
  params = {'a': np.zeros((3, 5), np.float32)}
  cut = blocks.partition(params, max_size=64)
  with pytest.raises(
    ValueError, match="'rank1' is not a distribution of block"
  ):
    blocks.project(params, cut, np.array([1]), d[None], distribution='rank1')
