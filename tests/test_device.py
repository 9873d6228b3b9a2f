"""The bits of the accelerator itself; skipped where there is none.

    JAX_PLATFORMS=cuda,cpu python -m pytest -n 0 tests/test_device.py

Everywhere else `test_kernels` runs the same kernels by JAX's interpreters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  api,
  mosaic_gpu,
  mosaic_tpu,
)

from jaxfl import perturb, pool
from jaxfl.master import Master
from tests import test_kernels as cases

pytestmark = pytest.mark.skipif(
  jax.default_backend() == 'cpu', reason='needs an accelerator'
)
KERNELS = {'gpu': mosaic_gpu, 'tpu': mosaic_tpu}
SHAPES = [(1, 1), (1, 77), (3, 300), (66, 5), (130, 200), (256, 384)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', cases.TYPES)
def test_kernels_have_the_bits_of_the_reference(shape, dtype):
  module = KERNELS[jax.default_backend()]
  keys = cases.random_keys(5)
  w, amounts = cases.random_case(shape, 5, dtype)
  row, col = cases.OFFSET
  add = jax.jit(lambda w, col: module.add(w, keys, amounts, (row, col)))
  new = add(w, jnp.uint32(col))
  cases.assert_same_bits(new, cases.expected_add(w, keys, amounts))
  if dtype == jnp.int32:
    x = np.asarray(w, np.float32)
    exact = jax.jit(lambda x: module.project(x, keys, cases.OFFSET))(x)
    np.testing.assert_array_equal(exact, cases.expected_project(x, keys))


def test_many_directions_and_many_tiles():
  """More directions than a chunk of `project` has."""
  keys = cases.random_keys(1500)
  w, amounts = cases.random_case((192, 640), 1500, jnp.float32)
  kind = {'distribution': 'rademacher'}
  results = [
    jax.jit(functools.partial(api.add, implementation=implementation, **kind))(
      w, keys, amounts
    )
    for implementation in ('xla', None)
  ]
  cases.assert_same_bits(*results)
  x = np.asarray(np.rint(w), np.float32)
  products = jax.jit(functools.partial(api.project, **kind))(x, keys)
  expected = cases.expected_project(x, keys, (0, 0))
  np.testing.assert_array_equal(products, expected)


SETS = {'empty': (0, 5), 'ragged': (2, 65, 130), 'vector': (77,), 'one': ()}


def updates(params, directions, scales, units, exponents, kind):
  """An update of every sort."""
  results = [
    perturb.perturb(params, directions[0], scales[0], distribution=kind),
    perturb.replay(params, directions, scales, distribution=kind),
  ]
  if kind in perturb.FIELD_UNIT:
    results.append(
      perturb.replay_int(
        params, directions, units, exponents, distribution=kind
      )
    )
  return results


@pytest.mark.parametrize(
  'kind', [name for name in perturb.DISTRIBUTIONS if name != 'gaussian']
)
@pytest.mark.parametrize('batched', [False, True])
def test_the_bits_of_a_cpu(kind, batched):
  rng = np.random.default_rng(0)
  params = {
    path: np.asarray(np.rint(rng.normal(size=shape) * 64) / 64, np.float32)
    for path, shape in SETS.items()
  }
  units = {path: rng.integers(-9, 9, 7, np.int32) for path in SETS}
  scales = np.linspace(-0.3, 0.7, 7).astype(np.float32)
  exponents = dict.fromkeys(SETS, np.int32(6))
  run = functools.partial(updates, exponents=exponents, kind=kind)
  args = params, cases.random_keys(7), scales, units
  if batched:
    args = jax.tree.map(lambda x: np.stack([x, x[::-1]]), args[1:3])
    run = jax.vmap(lambda d, s: updates(params, d, s, units, exponents, kind))
  here = jax.jit(run)(*args)
  with jax.default_device(jax.devices('cpu')[0]):
    there = jax.jit(run)(*args)
  jax.tree.map(cases.assert_same_bits, here, there)


def test_a_walsh_pool_has_the_bits_of_a_cpu():
  rng = np.random.default_rng(0)
  params = {
    'big': np.rint(rng.normal(size=(96, 300)) * 64).astype(np.float32) / 64,
    'small': np.zeros((3, 5), np.float32),
  }
  exponents = dict.fromkeys(params, np.int32(20))
  fits = dict.fromkeys(params, np.zeros((), bool))
  directions = pool.directions(
    jnp.asarray(cases.random_keys(1)[0]), jnp.arange(4096), 'walsh'
  )
  sums = rng.integers(-99, 99, 4096, np.int32)
  run = functools.partial(pool.rebuild, distribution='walsh')
  args = Master(params, exponents, fits), np.int32(pool.ONE), directions, sums
  here = jax.jit(run)(*args)
  with jax.default_device(jax.devices('cpu')[0]):
    there = jax.jit(run)(*args)
  jax.tree.map(cases.assert_same_bits, here, there)
