"""Allocation of coordinates to blocks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import allocation

SIZES = [64, 4096, 1, 16384, 300]
counts = functools.partial(jax.jit, static_argnums=2)(
  lambda norms, factors, total: allocation.counts(norms, factors, total)
)


def bfloat16(x):
  return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def exactly(norms, factors, total):
  """The definition in Python's integers, of any size."""
  used = [n >= 2.0**-100 for n in norms]
  largest = max(n for n in norms)
  exponent = math.frexp(largest)[1]
  bits = min(24, 30 - (len(norms) - 1).bit_length())
  shares = [
    math.floor(math.ldexp(float(n) * float(f), bits - exponent)) * u
    for n, f, u in zip(norms, factors, used, strict=True)
  ]
  ends = np.cumsum(np.array(shares, object))
  whole = max(int(ends[-1]), 1)
  edges = [int(end) * (total - sum(used)) // whole for end in ends]
  return np.diff([0, *edges]) + used


@pytest.mark.parametrize('total', [5, 1000, 2**30 - 1])
@pytest.mark.parametrize('name', allocation.ALLOCATIONS)
def test_counts_add_up_and_are_in_proportion(name, total):
  factors = allocation.factors(name, SIZES, 'popcount16')
  for seed in range(5):
    rng = np.random.default_rng(seed)
    norms = bfloat16(np.exp(rng.normal(0, 3, 5)))
    found = np.asarray(counts(norms, factors, total))
    np.testing.assert_array_equal(found, exactly(norms, factors, total))
    assert found.sum() == total
    assert (found >= 1).all()
    share = norms.astype(float) * factors / np.dot(norms, factors)
    error = np.abs(found - 1 - (total - 5) * share)
    assert (error < 1 + 1e-5 * total).all()


def test_blocks_without_a_norm_get_nothing():
  factors = allocation.factors('compute', SIZES, 'rademacher')
  norms = np.float32([0, 2, 0, 2, 2.0**-120])
  np.testing.assert_array_equal(counts(norms, factors, 7), [0, 3, 0, 4, 0])
  np.testing.assert_array_equal(counts(norms * 0, factors, 7), [0] * 5)


@pytest.mark.parametrize('norm', [np.inf, np.nan, 1e38, -1.0])
def test_norms_that_are_not_allowed_count_as_zero(norm):
  norms = np.array([norm, 1.0, norm, 3.0, 0.0], np.float32)
  found = counts(norms, np.ones(5, np.float32), 8)
  np.testing.assert_array_equal(found, [0, 2, 0, 6, 0])


def test_a_sign_reconstructs_a_scalar_so_that_one_is_enough():
  factors = allocation.factors('bytes', [1, 2, 5], 'rademacher')
  np.testing.assert_array_equal(factors, [0, 0.5, 1])
  found = counts(np.float32([100, 1, 1]), factors, 33)
  np.testing.assert_array_equal(found, [1, 11, 21])
  # nothing else to share in
  factors = allocation.factors('bytes', [1, 1], 'rademacher')
  np.testing.assert_array_equal(counts(np.ones(2), factors, 9), [1, 1])


def test_norms_of_any_size():
  factors = allocation.factors('bytes', SIZES, 'gaussian')
  norms = np.float32([1, 3, 5, 7, 0.25])
  expected = counts(norms, factors, 999)
  for exponent in (-97, -30, 60, 97):
    scaled = norms * np.float32(2.0**exponent)
    np.testing.assert_array_equal(counts(scaled, factors, 999), expected)
  extreme = np.float32([2.0**-100, 2.0**100, 0, 1, 1])
  np.testing.assert_array_equal(counts(extreme, factors, 99), [1, 96, 0, 1, 1])


def test_many_blocks_at_once():
  sizes = np.random.default_rng(0).integers(1, 1 << 14, 3000)
  factors = allocation.factors('bytes', sizes.tolist(), 'rademacher')
  norms = bfloat16(np.random.default_rng(1).normal(1, 0.1, (3, 3000)))
  found = jax.vmap(lambda n: counts(n, factors, 4096))(norms)
  for mine, n in zip(found, norms, strict=True):
    np.testing.assert_array_equal(mine, exactly(n, factors, 4096))


def test_the_published_rule_is_compute_up_to_its_total():
  for distribution in allocation.KURTOSIS:
    np.testing.assert_array_equal(
      allocation.factors('paper', SIZES, distribution),
      allocation.factors('compute', SIZES, distribution),
    )
