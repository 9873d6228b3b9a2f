"""Exact division of weights, and the mean of messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import method as method_lib


@pytest.mark.parametrize(
  'weights',
  [
    [1], [7, 0], [1, 1, 1, 0, 5], [1, 2**24 - 1, 2**24 - 1],
    [2**24 - 1] * 100, list(range(1000)), [3] * 65_537,
  ],
)  # fmt: skip
def test_fractions_are_quotients_to_24_bits_rounded_down(weights):
  weights = np.array(weights, np.float64)
  found = jax.jit(method_lib.fractions)(weights.astype(np.float32))
  found = np.asarray(found, np.float64)
  exact = weights / weights.sum()
  assert (found <= exact).all()
  assert (found >= exact * (1 - 2.0**-23)).all()


def test_fractions_of_nothing_are_nothing():
  np.testing.assert_array_equal(method_lib.fractions(jnp.zeros(3)), 0)


def test_mean_leaves_out_what_is_not_finite_and_adds_in_order_of_ids():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(5, 40)).astype(np.float32)
  x[3, 7] = np.inf
  weights = np.float32([1, 2, 3, 4, 0])
  ids = np.int32([4, 2, 9, 5, 7])
  mean = jax.jit(method_lib.weighted_mean)
  found, somebody = mean({'x': x}, method_lib.Party(ids, ids * 0, weights))
  assert bool(somebody)
  expected = (x[0] + 2 * x[1] + 3 * x[2]) / 6
  np.testing.assert_allclose(found['x'], expected, rtol=1e-5, atol=1e-6)
  order = [2, 0, 4, 1, 3]
  party = method_lib.Party(ids[order], ids * 0, weights[order])
  again, _ = mean({'x': x[order]}, party)
  np.testing.assert_array_equal(found['x'], again['x'])
  nothing, somebody = mean(
    {'x': x}, method_lib.Party(ids, ids * 0, weights * 0)
  )
  assert not bool(somebody)
  np.testing.assert_array_equal(nothing['x'], 0)
