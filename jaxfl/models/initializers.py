"""How weights start."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def uniform(fan_in: int) -> Any:
  """An initializer of floats in [-b, b), b = 1 / sqrt(fan_in), rounded once.

  So do PyTorch's linear layers and convolutions start, weights and biases.
  These are bits of the key, times powers of two, times b: the same float32
  values on every device.
  """

  def draw(key, shape, dtype=jnp.float32):
    bits = jax.random.bits(key, shape, jnp.uint32) >> 8
    signed = bits.astype(jnp.float32) * 2.0**-23 - 1.0  # exact
    return (signed * (1 / math.sqrt(fan_in))).astype(dtype)

  return draw
