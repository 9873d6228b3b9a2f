import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxfl.kernels import lowrank  # pyright: ignore[reportMissingImports]

from jaxfl import keys
from tests import reference

RANKS = [1, 4, 16]
SHAPES = [
  (), (1,), (129,), (1, 7), (64, 3), (100, 13), (3, 5, 7), (3, 64, 5),
  (2, 33, 31), (2, 3, 4, 5), (0,), (0, 5), (5, 0), (2, 0, 3), (0, 3, 2),
]  # fmt: skip
KEY = keys.leaf_key(keys.fold(keys.root(7), 1, 2), 'a')


@pytest.mark.parametrize('rank', RANKS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_factors_are_the_reference(shape, rank):
  u, v = lowrank.factors(KEY, shape, rank, dtype=jnp.int8)
  expected = reference.low_rank_factors(np.asarray(KEY), shape, rank)
  rows, cols = (1, 1, *shape)[-2:]
  assert (u.dtype, v.dtype) == (jnp.int8, jnp.int8)
  assert u.shape == (*shape[:-2], rows, rank)
  assert v.shape == (*shape[:-2], rank, cols)
  np.testing.assert_array_equal(u, expected[0].reshape(u.shape))
  np.testing.assert_array_equal(v, expected[1].reshape(v.shape))


@pytest.mark.parametrize('rank', RANKS)
@pytest.mark.parametrize('rows', [5, 33, 64])
def test_a_slice_of_a_stack_needs_its_number(rows, rank):
  u, v = lowrank.factors(KEY, (70, rows, 3), rank)
  traced = jax.jit(
    lambda first: lowrank.factors(KEY, (rows, 3), rank, first=first)
  )
  for n in (0, 1, 13, 69):
    for first, part in (
      (n, lowrank.factors(KEY, (rows, 3), rank, first=n)),
      (n, traced(jnp.int32(n))),
    ):
      np.testing.assert_array_equal(part[0], u[first])
      np.testing.assert_array_equal(part[1], v[first])
  some = lowrank.factors(KEY, (7, rows, 3), rank, first=np.int64(20))
  np.testing.assert_array_equal(some[0], u[20:27])
  np.testing.assert_array_equal(some[1], v[20:27])
