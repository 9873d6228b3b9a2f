"""Forward passes one after the other and at once give the same estimates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import estimators, keys

MU = jnp.float32(1e-2)


def loss_fn(params, batch):
  return jnp.sum((batch @ params['w']) ** 2) + jnp.sum(params['b'] ** 3)


@pytest.mark.parametrize(
  ('sides', 'at_once'),
  [('two_sided', n) for n in (2, 4, 6)] + [('one_sided', n) for n in (2, 3)],
)
def test_passes_at_once(sides, at_once):
  """Three directions: 4 forward passes and one_sided 2 leave a rest."""
  rng = np.random.default_rng(0)
  params = {
    'w': rng.normal(size=(4, 3)).astype(np.float32),
    'b': rng.normal(size=3).astype(np.float32),
  }
  batches = rng.normal(size=(3 if sides == 'two_sided' else 1, 5, 4))
  moved = estimators.perturber(
    params, distribution='rademacher', dtype=None, in_layers=None
  )
  directions = keys.fold(keys.root(0), np.arange(3, dtype=np.uint32))

  @functools.partial(jax.jit, static_argnums=0)
  def run(passes):
    estimate = getattr(estimators, sides)
    x = batches.astype(np.float32)
    return estimate(loss_fn, moved, directions, x, MU, passes)

  run_of = lambda n: run(
    estimators.passes(None, n, num_perturbations=3, sides=sides)
  )
  expected, found = run_of(1), run_of(at_once)
  assert np.abs(expected[0]).min() > 0.1
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize(
  ('at_once', 'sides', 'message'),
  [
    (0, 'two_sided', r'must be in \[1, 4\], .* got 0'),
    (6, 'two_sided', r'must be in \[1, 4\], .* got 6'),
    (3, 'two_sided', 'must be 1 or even for two sides .* got 3'),
    (3, 'one_sided', r'must be in \[1, 2\], .* got 3'),
  ],
)
def test_wrong_counts(at_once, sides, message):
  with pytest.raises(ValueError, match=f'forwards_at_once {message}'):
    estimators.passes(None, at_once, num_perturbations=2, sides=sides)
