"""What the GPU's kernels do in one pass: grid weights, Walsh pools, blocks.

By JAX's interpreter, against plain XLA, which other tests hold to NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  api,
  mosaic_gpu,
  mosaic_gpu_walsh,
  tiles,
  walsh,
)

from tests import test_kernels as cases

SCALE = np.float32(2.0**10), np.float32(2.0**-10)
KIND = {'distribution': 'rademacher'}


def grid_weights(shape, largest=999, seed=0):
  rng = np.random.default_rng(seed)
  w = rng.integers(-largest, largest, shape) / 1024
  return w.astype(np.float32)


SHAPE, COUNT = (66, 130), 4
KEYS = cases.random_keys(COUNT)


def updates(function, **kwargs):
  return jax.jit(lambda w, units: function(w, SCALE, KEYS, units, **kwargs))


@functools.cache
def programs():
  """The kernel and what it is held to, compiled once."""
  plan = mosaic_gpu.whole(SHAPE, COUNT)
  return (
    updates(mosaic_gpu.add_units, **cases.GPU),
    updates(tiles.add_units, plan=plan, **KIND),
  )


def check_units(w, units):
  """The kernel's flag is XLA's, and its bits if nothing has left the grid."""
  units = np.array([*units, *[0] * (COUNT - len(units))], np.int32)
  (new, fits), (expected, fit) = (run(w, units) for run in programs())
  assert bool(fits) == bool(fit)
  if fit:
    cases.assert_same_bits(new, expected)
  return bool(fit)


@pytest.mark.parametrize(
  ('units', 'fits'),
  [
    ([5, -7, 2], True),  # by floats
    ([2**22, 2**22, 2**22 + 1, 3], True),  # by integers: odd, above 2**24 - 1
    ([2**30, 2**30, 2**30], False),
  ],
)
def test_grid_weights(units, fits):
  w = grid_weights(SHAPE)
  w[0, 0] = -0.0  # zero has one sign after it
  assert check_units(w, units) == fits


def test_a_weight_near_the_limit_takes_integers_and_one_beyond_is_told():
  w = grid_weights(SHAPE)
  w[65, 129] = (2**24 - 1) / 1024
  sign = cases.signed(KEYS[0], SHAPE, (0, 0))[65, 129]
  assert check_units(w, [-sign * 2])
  assert not check_units(w, [sign * 2])


@pytest.mark.parametrize('wrong', [1 / 3, np.nan, np.inf, 2.0**14])
def test_weights_off_the_grid_are_told(wrong):
  w = grid_weights(SHAPE)
  w[64, 129] = wrong
  assert not check_units(w, [1, 2])


def test_pools():
  rng = np.random.default_rng(1)
  keys = rng.integers(2**32, size=(2, 4), dtype=np.uint32)
  units = rng.integers(-9, 9, (2, walsh.SIZE), np.int32)
  w = grid_weights((97, 200))
  kernel = jax.jit(
    lambda w, units: mosaic_gpu_walsh.add_pools(
      w, SCALE, keys, units, **cases.GPU
    )
  )
  new, fits = kernel(w, units)
  expected, fit = jax.jit(
    lambda w: walsh.add_units(w, SCALE, keys, units, looped=False)
  )(w)
  assert fit
  assert fits
  cases.assert_same_bits(new, expected)
  _, fits = kernel(w, np.full_like(units, 1 << 16))
  assert not fits


RECTANGLES = [  # of (130, 300): whole tiles, two side by side; one is missing
  ((0, 0), (64, 128)),
  ((0, 128), (64, 172)),
  ((64, 0), (64, 300)),
]
SPANS = np.array([[0, 2], [2, 5], [5, 5]])


def test_blocks_have_directions_of_their_own(monkeypatch):
  monkeypatch.setattr(mosaic_gpu, '_CHUNK', 2)
  plan = tiles.Plan(RECTANGLES, SPANS, False)
  shape, keys = (130, 300), cases.random_keys(7)
  assert mosaic_gpu.fits(plan, shape)
  cut = plan._replace(rectangles=[((0, 0), (64, 127)), *RECTANGLES[1:]])
  assert not mosaic_gpu.fits(cut, shape)
  w, _ = cases.random_case(shape, 7, jnp.float32)
  x = np.rint(np.asarray(w) * 8)  # its sums are exact
  kernel = functools.partial(mosaic_gpu.project, plan=plan, **cases.GPU)
  cases.assert_same_bits(
    jax.jit(kernel)(x, keys),
    jax.jit(functools.partial(tiles.project, plan=plan, **KIND))(x, keys),
  )
  units = np.array([1, -2, 3, 2**23, 5, 6, 7], np.int32)
  args = grid_weights(shape), SCALE, keys, units
  kernel = functools.partial(mosaic_gpu.add_units, plan=plan, **cases.GPU)
  results = [
    jax.jit(kernel)(*args),
    jax.jit(functools.partial(tiles.add_units, plan=plan, **KIND))(*args),
  ]
  jax.tree.map(cases.assert_same_bits, *results)


def test_totals_of_spans():
  units = np.array([3, -5, 2**23, -(2**23), -(2**31), 2**31 - 1], np.int32)
  spans = np.array([[0, 2], [0, 3], [2, 4], [4, 5], [0, 6], [3, 3]])
  exact = [
    min(sum(abs(int(u)) for u in units[a:b]), tiles.LIMIT) for a, b in spans
  ]
  np.testing.assert_array_equal(tiles.span_totals(units, spans), exact)


def test_they_are_used_and_lower(monkeypatch):
  """By `api`, for a GPU that is not there."""
  monkeypatch.setattr(api, '_devices', lambda: [cases.HOPPER])
  w, keys = jnp.zeros((130, 300)), cases.random_keys(5)
  amounts = np.ones(5, np.int32)
  plan = tiles.Plan(RECTANGLES, SPANS, False)
  pool_keys = np.zeros((1, 4), np.uint32)
  coordinates = np.ones((1, walsh.SIZE), np.int32)

  def f(w, spans):
    mine = plan._replace(spans=spans)
    return (
      api.add(w, keys, amounts * 1.0, plan=mine, **KIND),
      api.project(w, keys, plan=mine, **KIND),
      api.add_units(w, SCALE, keys, amounts, plan=mine, **KIND),
      api.add_units(w, SCALE, keys, amounts, **KIND),
      api.add_pools(w, SCALE, pool_keys, coordinates),
    )

  batched = jnp.stack([w, w]), np.stack([SPANS, SPANS])
  traced = jax.jit(jax.vmap(f)).trace(*batched)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('@mosaic_gpu') == 10  # two heights of tiles each
