"""A small convolutional network for images of one channel.

Two convolutions of 5 x 5 (16 and 32 channels, zero padding, so that sizes
stay), each with a maximum over 2 x 2 and ReLU, and one linear layer. On images
of 28 x 28 with 10 classes it has 28,938 parameters: the MNIST model of DeComFL.

Weights and biases start as PyTorch's do, see `initializers.uniform`.

Shapes: B images, H x W pixels, C classes.

References:
  Li, Ying, Liu, Dong and Yang, "Achieving dimension-free communication in
    federated learning via zeroth-order optimization" (DeComFL), ICLR 2025,
    https://arxiv.org/abs/2405.15861; the sizes are those of its code,
    https://github.com/ZidongLiu/DeComFL (cnn_mnist.py).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxfl import typing as jt
from jaxfl.models import initializers

SMALLEST = 4  # pixels on a side; two halvings leave one


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Correlation with 5 x 5 weights, as matrix products.

  XLA's convolutions are slow inside loops on a CPU, and every method runs its
  forward and backward passes in loops.

  Args:
    x: float[B, H, W, I]; zeros are around it.
    kernel: float[5, 5, I, O].

  Returns:
    float[B, H, W, O].
  """
  _, height, width, channels = x.shape
  x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
  x = jnp.concatenate([x[:, :, j : j + width] for j in range(5)], axis=-1)
  rows = [x[:, i : i + height] for i in range(5)]  # [B, H, W, 5 I] each
  if channels == 1:  # one product of 25 terms, not five of 5
    return jnp.concatenate(rows, axis=-1) @ kernel.reshape(25, -1)
  bands = kernel.reshape(5, 5 * channels, -1)
  out = rows[0] @ bands[0]
  for i in range(1, 5):
    out += rows[i] @ bands[i]
  return out


def _halve(x: jax.Array) -> jax.Array:
  """Maxima over 2 x 2; odd last rows and columns are left out."""
  batch, height, width, channels = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  x = jnp.maximum(x[:, :, 0], x[:, :, 1])
  return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


class _Convolution(nn.Module):
  """A convolution, the maximum over 2 x 2, and ReLU."""

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    start = initializers.uniform(25 * x.shape[-1])
    shape = (5, 5, x.shape[-1], self.channels)
    kernel = self.param('kernel', start, shape)
    bias = self.param('bias', start, (self.channels,))
    x = _convolve(x, kernel.astype(x.dtype)) + bias.astype(x.dtype).reshape(
      1, 1, 1, -1
    )
    return nn.relu(_halve(x))


class _CNN(nn.Module):
  """float[B, H, W, 1] -> logits float[B, C], in the dtype of the images."""

  num_labels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _Convolution(16, name='conv1')(x)
    x = _Convolution(32, name='conv2')(x)
    x = x.reshape(x.shape[0], -1)
    start = initializers.uniform(x.shape[-1])
    return nn.Dense(
      self.num_labels,
      dtype=x.dtype,
      kernel_init=start,
      bias_init=start,
      name='out',
    )(x)


def init(
  key: jax.Array, image_shape: tuple[int, int], num_labels: int
) -> jt.Params:
  """Parameters by layer, `conv1`, `conv2` and `out`, float32.

  Args:
    key: typed.
    image_shape: H and W.
    num_labels: C.

  Raises:
    ValueError: if images are too small, or there are fewer than two labels.
  """
  if min(image_shape) < SMALLEST:
    raise ValueError(
      f'images of {image_shape[0]} x {image_shape[1]} are too small for the'
      f' network, which halves them twice; {SMALLEST} x {SMALLEST} would do'
    )
  if num_labels < 2:
    raise ValueError(f'needs 2 labels at least, got {num_labels}')
  images = jnp.zeros((1, *image_shape, 1), jnp.float32)
  return jax.jit(_CNN(num_labels).init)(key, images)['params']


def logits(params: jt.Params, images: jt.Array) -> jax.Array:
  """The scores of the classes.

  Args:
    params: as from `init`; the computation is in their dtype.
    images: float[B, H, W, 1].

  Returns:
    float32[B, C].
  """
  bias = params['out']['bias']
  x = jnp.asarray(images).astype(bias.dtype)
  out = _CNN(bias.shape[0]).apply({'params': params}, x)
  return jnp.asarray(out).astype(jnp.float32)
