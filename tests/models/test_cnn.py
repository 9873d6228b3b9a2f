"""The small network for images against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import keys, objectives
from jaxfl.models import cnn, initializers

pytestmark = pytest.mark.fast_compile

KEY = jax.random.key(0, impl='threefry2x32')


def numpy_logits(params, images):
  """The same network by loops, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def layer(x, kernel, bias):
    height, width, _ = x.shape
    padded = np.pad(x, ((2, 2), (2, 2), (0, 0)))
    y = np.zeros((height, width, kernel.shape[-1]))
    for i in range(height):
      for j in range(width):
        window = padded[i : i + 5, j : j + 5]
        y[i, j] = np.tensordot(window, kernel, 3) + bias
    y = np.maximum(y, 0)
    out = np.zeros((height // 2, width // 2, y.shape[-1]))
    for i in range(height // 2):
      for j in range(width // 2):
        out[i, j] = y[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1))
    return out

  def one(x):
    for name in ('conv1', 'conv2'):
      x = layer(x, p[name]['kernel'], p[name]['bias'])
    return x.reshape(-1) @ p['out']['kernel'] + p['out']['bias']

  return np.stack([one(x) for x in np.asarray(images, np.float64)])


@pytest.fixture(scope='module')
def params():
  return cnn.init(KEY, (28, 28), 10)


def test_the_network_of_the_paper_has_28938_parameters(params):
  shapes = {path: x.shape for path, x in keys.named_leaves(params)}
  assert shapes == {
    'conv1/kernel': (5, 5, 1, 16),
    'conv1/bias': (16,),
    'conv2/kernel': (5, 5, 16, 32),
    'conv2/bias': (32,),
    'out/kernel': (32 * 7 * 7, 10),
    'out/bias': (10,),
  }
  assert sum(np.prod(shape) for shape in shapes.values()) == 28_938


@pytest.fixture(scope='module')
def small():
  return cnn.init(KEY, (9, 12), 3)


def test_logits_equal_numpy(small):
  images = np.random.default_rng(0).normal(size=(2, 9, 12, 1))
  images = images.astype(np.float32)
  logits = jax.jit(cnn.logits)(small, images)
  assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
  want = numpy_logits(small, images)
  np.testing.assert_allclose(logits, want, atol=1e-6, rtol=1e-5)


def test_gradients_equal_those_of_xlas_convolution(small):
  rng = np.random.default_rng(1)
  batch = {
    'images': rng.normal(size=(4, 9, 12, 1)).astype(np.float32),
    'label': np.array([0, 1, 2, 1]),
  }

  def reference(params, batch):
    x = batch['images']
    for name in ('conv1', 'conv2'):
      x = jax.lax.conv_general_dilated(
        x, params[name]['kernel'], (1, 1), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )  # fmt: skip
      x = jax.nn.relu(x + params[name]['bias'][None, None, None])
      x = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID'
      )
    return (
      x.reshape(4, -1) @ params['out']['kernel'] + params['out']['bias'][None]
    )

  scores = lambda params, batch: cnn.logits(params, batch['images'])
  ours, theirs = (
    jax.jit(jax.grad(objectives.classification_loss(f)))(small, batch)
    for f in (scores, reference)
  )
  assert max(np.abs(x).max() for x in jax.tree.leaves(theirs)) > 0.01
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ours, theirs
  )


def test_weights_start_as_pytorchs_do(params):
  for name, fan_in in (('conv1', 25), ('conv2', 400), ('out', 1568)):
    bound = fan_in**-0.5
    for part in ('kernel', 'bias'):
      x = np.asarray(params[name][part], np.float64).reshape(-1)
      assert np.abs(x).max() <= bound
      # standard error of the mean square b^2 / 3 is b^2 sqrt(4 / 45 / n)
      error = abs((x**2).mean() - bound**2 / 3)
      assert error < 4 * bound**2 * (4 / 45 / x.size) ** 0.5
    x = np.asarray(params[name]['kernel'], np.float64)
    assert np.abs(x).max() > 0.97 * bound


def test_the_start_is_exact(params):
  """Multiples of 2**-23 times b, rounded once: no device may differ."""
  draw = initializers.uniform(400)
  shaped = jax.jit(lambda key: draw(key, (5, 5, 16, 32)))
  np.testing.assert_array_equal(shaped(KEY), draw(KEY, (5, 5, 16, 32)))
  bound = np.float32(1 / 20)
  x = np.asarray(params['conv2']['kernel'])
  units = np.rint(x.astype(np.float64) * 20 * 2**23)
  assert np.unique(units % 2).size == 2
  signed = (units * 2.0**-23).astype(np.float32)
  np.testing.assert_array_equal(signed * bound, x)


def test_seeds_start_apart(small):
  other = cnn.init(jax.random.key(1, impl='threefry2x32'), (9, 12), 3)
  assert (other['out']['bias'] != small['out']['bias']).all()


def test_the_forward_pass_has_the_dtype_of_the_parameters(small):
  images = np.ones((1, 9, 12, 1), np.float32)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small)
  text = str(jax.make_jaxpr(cnn.logits)(half, images))
  products = [line for line in text.split('\n') if '= dot_general' in line]
  assert products
  assert all(':bf16[' in line for line in products)
  assert jax.eval_shape(cnn.logits, half, images).dtype == jnp.float32


def test_what_the_network_cannot_take():
  with pytest.raises(ValueError, match='28 x 3 are too small'):
    cnn.init(KEY, (28, 3), 10)
  with pytest.raises(ValueError, match='2 labels at least, got 1'):
    cnn.init(KEY, (28, 28), 1)
