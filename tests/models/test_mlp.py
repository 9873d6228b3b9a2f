"""The network for tables, its losses and evaluation, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import keys, objectives
from jaxfl.models import mlp

KEY = jax.random.key(0, impl='threefry2x32')


def predict(params, batch):
  return mlp.outputs(params, batch['features'])[:, 0]


def numpy_outputs(params, features):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = features.astype(np.float64) @ p['hidden']['kernel'] + p['hidden']['bias']
  return np.log1p(np.exp(x)) @ p['out']['kernel'] + p['out']['bias']


@pytest.fixture(scope='module')
def params():
  return mlp.init(KEY, 8, 10, 3)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  return {
    'features': rng.normal(size=(6, 8)).astype(np.float32),
    'target': rng.normal(size=6).astype(np.float32),
    'example_weight': np.float32([1, 1, 0, 1, 0, 1]),
  }


def test_shapes(params):
  shapes = {path: x.shape for path, x in keys.named_leaves(params)}
  assert shapes == {
    'hidden/kernel': (8, 10),
    'hidden/bias': (10,),
    'out/kernel': (10, 3),
    'out/bias': (3,),
  }
  with pytest.raises(ValueError, match=r'must be positive, got \(8, 0, 1\)'):
    mlp.init(KEY, 8, 0, 1)


def test_weights_start_as_pytorchs_do(params):
  for name, fan_in in (('hidden', 8), ('out', 10)):
    bound = fan_in**-0.5
    x = np.concatenate([np.ravel(x) for x in params[name].values()])
    assert 0.9 * bound < np.abs(x).max() <= bound
    # standard error of the mean square b^2 / 3 is b^2 sqrt(4 / 45 / n)
    error = abs((x**2).mean() - bound**2 / 3)
    assert error < 4 * bound**2 * (4 / 45 / x.size) ** 0.5
  together = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
  assert np.unique(np.abs(together)).size == together.size  # none comes twice


def test_outputs_equal_numpy(params, batch):
  got = jax.jit(mlp.outputs)(params, batch['features'])
  assert (got.shape, got.dtype) == ((6, 3), jnp.float32)
  want = numpy_outputs(params, batch['features'])
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_computation_has_the_dtype_of_the_parameters(params, batch):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  text = str(jax.make_jaxpr(mlp.outputs)(half, batch['features']))
  products = [line for line in text.split('\n') if '= dot_general' in line]
  assert len(products) == 2
  assert all(':bf16[' in line for line in products)
  got = jax.eval_shape(mlp.outputs, half, batch['features'])
  assert got.dtype == jnp.float32


def test_the_loss_is_the_mean_squared_error(params, batch):
  loss_fn = jax.jit(objectives.regression_loss(predict))
  error = numpy_outputs(params, batch['features'])[:, 0] - batch['target']
  kept = error[[0, 1, 3, 5]]
  np.testing.assert_allclose(
    loss_fn(params, batch), (kept**2).mean(), rtol=1e-5
  )
  bare = {k: batch[k] for k in ('features', 'target')}
  np.testing.assert_allclose(
    loss_fn(params, bare), (error**2).mean(), rtol=1e-5
  )


def test_its_gradient_in_closed_form(params, batch):
  """One example: 2 e (1, h) for the last layer, 2 e w sigmoid(z) for z."""
  one = {k: batch[k][:1] for k in ('features', 'target')}
  grads = jax.jit(jax.grad(objectives.regression_loss(predict)))(params, one)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = one['features'][0].astype(np.float64)
  z = x @ p['hidden']['kernel'] + p['hidden']['bias']
  twice = 2 * (numpy_outputs(params, one['features'])[0, 0] - one['target'][0])
  slope = twice * p['out']['kernel'][:, 0] / (1 + np.exp(-z))
  close = lambda got, want: np.testing.assert_allclose(
    got, want, rtol=1e-4, atol=1e-6
  )
  close(grads['out']['bias'], [twice, 0, 0])
  close(grads['out']['kernel'][:, 0], twice * np.log1p(np.exp(z)))
  close(grads['hidden']['bias'], slope)
  close(grads['hidden']['kernel'], np.outer(x, slope))


def test_classes(params, batch):
  labelled = batch | {'label': np.int32([0, 1, 2, 0, 1, 2])}
  scores = lambda params, batch: mlp.outputs(params, batch['features'])
  got = jax.jit(objectives.classification_loss(scores))(params, labelled)
  values = numpy_outputs(params, batch['features'])
  losses = np.log(np.exp(values).sum(1))
  losses -= values[np.arange(6), labelled['label']]
  np.testing.assert_allclose(got, losses[[0, 1, 3, 5]].mean(), rtol=1e-5)


def test_evaluation_is_of_what_has_weight(params, batch):
  stack = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), batch)
  got = objectives.evaluate_regression(predict)(params, stack)
  rows = [0, 1, 3, 5]
  target = batch['target'][rows].astype(np.float64)
  error = numpy_outputs(params, batch['features'])[rows, 0] - target
  np.testing.assert_allclose(got['loss'], (error**2).mean(), rtol=1e-5)
  want = 1 - (error**2).sum() / ((target - target.mean()) ** 2).sum()
  np.testing.assert_allclose(got['r2'], want, rtol=1e-5)
  assert list(got) == ['loss', 'r2']


def test_r2_of_targets_far_from_zero(batch):
  """Sums of float32 squares would lose the variance."""
  stack = {'target': np.float32([[1e4, 1e4 + 1], [1e4 + 2, 1e4 + 3]])}
  mean = lambda params, batch: jnp.full((2,), 10001.5)
  got = objectives.evaluate_regression(mean)({}, stack)
  assert got == {'loss': 1.25, 'r2': 0.0}
  same = {'target': np.float32([[3, 3]])}
  assert objectives.evaluate_regression(mean)({}, same)['r2'] == 0.0
