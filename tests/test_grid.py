"""Grid weights: exact, unbiased, and never silently out of range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import grid, keys


def tree(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'big': rng.normal(0, 30, (7, 5)).astype(np.float32),
    'small': rng.normal(0, 0.02, (65, 3)).astype(np.float32),
    'zero': np.zeros(4, np.float32),
  }


def test_exponents_leave_headroom():
  found = jax.tree.map(int, grid.exponents({'w': np.float32([0.4, -3.0])}))
  assert found == {'w': 24 - 4}  # 3 < 4 = 2**2, two bits of headroom
  assert int(grid.exponents({'w': np.float32([0.0])})['w']) == 22
  exponents = grid.exponents(tree())
  flags = grid.out_of_range(tree(), exponents)
  assert not any(jax.tree.leaves(flags))


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_non_finite_weights_are_named(bad):
  params = tree() | {'zero': np.float32([0, bad])}
  with pytest.raises(ValueError, match="'zero'"):
    grid.exponents(params)


@pytest.mark.parametrize('leaf', [np.int32(7), np.array([True])])
def test_leaves_that_are_not_floats_are_named(leaf):
  with pytest.raises(TypeError, match="'step' must be of a floating type"):
    grid.exponents(tree() | {'step': leaf})


def test_snap_gives_no_negative_zero_under_jit():
  params, exponents = {'w': np.float32([-1e-12, -0.0])}, {'w': jnp.int32(22)}
  for snap in (grid.snap, jax.jit(grid.snap)):
    assert not np.signbit(snap(params, exponents)['w']).any()


def test_snap_is_idempotent_and_close():
  params = tree()
  exponents = grid.exponents(params)
  once = grid.snap(params, exponents)
  twice = grid.snap(once, exponents)
  for a, b, w, e in zip(
    *map(jax.tree.leaves, (once, twice, params, exponents)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
    assert np.abs(np.asarray(a) - w).max() <= 2.0 ** -(int(e) + 1)
    assert not np.signbit(np.asarray(a)[np.asarray(a) == 0]).any()


def test_power_of_two_is_exact():
  e = np.arange(-126, 128)
  np.testing.assert_array_equal(grid.power_of_two(e), np.ldexp(1.0, e))


def test_units_are_unbiased():
  n = 20_000
  value = np.float32(0.3 * 2.0**-22)  # a third of one unit
  directions = keys.fold(keys.root(1), np.arange(n))
  exponents = {'a': jnp.int32(22), 'b': jnp.int32(22)}
  units = grid.to_units(jnp.full(n, value), exponents, directions)
  for leaf in jax.tree.leaves(units):
    assert set(np.unique(leaf)) == {0, 1}
    assert abs(np.mean(leaf) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
  assert np.mean(np.asarray(units['a']) == np.asarray(units['b'])) < 0.7


def test_whole_units_have_no_noise():
  coefficients = np.float32([-5, 0, 3, 1000]) * 2.0**-20
  directions = keys.fold(keys.root(1), np.arange(4))
  units = grid.to_units(coefficients, {'w': jnp.int32(20)}, directions)
  np.testing.assert_array_equal(units['w'], [-5, 0, 3, 1000])


def test_huge_coefficients_stay_huge():
  directions = keys.fold(keys.root(1), np.arange(2))
  units = grid.to_units(
    jnp.float32([1e30, -1e30]), {'w': jnp.int32(22)}, directions
  )
  np.testing.assert_array_equal(units['w'], [2147483520, -2147483520])


def test_decay_shrinks_without_bias_and_stays_on_the_grid():
  params = grid.snap(tree(), exponents := grid.exponents(tree()))
  rate, rounds = 2.0**-18, 400  # small tensors decay by less than one unit
  decay = jax.jit(grid.decay)
  now = params
  for i in range(rounds):
    now = decay(now, exponents, jnp.float32(rate), keys.fold(keys.root(0), i))
  for before, after, e in zip(
    *map(jax.tree.leaves, (params, now, exponents)), strict=True
  ):
    units = np.asarray(after, np.float64) * 2.0 ** int(e)
    np.testing.assert_array_equal(units, np.round(units))
    expected = np.asarray(before, np.float64) * (1 - rate) ** rounds
    # entries share the dither: at most one unit of noise per round, averaged
    noise = 2.0 ** -int(e) * np.sqrt(rounds)
    assert np.abs(after - expected).max() < 4 * noise
  small = np.asarray(params['small'], np.float64)
  moved = np.vdot(small, small - np.asarray(now['small'])) / np.vdot(
    small, small
  )
  assert 0.8 < moved / (rate * rounds) < 1.2
