"""The norm of a pytree, the same bits on every device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import grid


def exact_norm(tree: Any) -> jax.Array:
  """The norm of a pytree to about 12 bits, the same bits on every device.

  Entries are rounded to 11 bits of the largest; the rest is integers.

  Args:
    tree: pytree of float32, fewer than 2**32 entries.

  Returns:
    float32[].
  """
  leaves = [x.reshape(-1) for x in jax.tree.leaves(tree)]
  largest = functools.reduce(
    jnp.maximum, [jnp.max(jnp.abs(x), initial=0.0) for x in leaves]
  )
  _, exponent = jnp.frexp(largest)  # largest < 2**exponent
  exponent = jnp.clip(exponent, -100, 100)
  zero = np.uint32(0)
  high = low = jnp.uint32(0)
  for x in leaves:
    units = jnp.rint(jnp.abs(x) * grid.power_of_two(11 - exponent))
    squares = jnp.square(units.astype(jnp.uint32))  # at most 2**22
    words = (jnp.zeros_like(squares), squares)
    sums = jax.lax.reduce(words, (zero, zero), _add_words, (0,))
    high, low = _add_words((high, low), sums)
  return _root(high, low) * grid.power_of_two(exponent - 11)


def _add_words(x, y):
  """The sum of two numbers of 64 bits, as (high, low) words."""
  low = x[1] + y[1]
  return x[0] + y[0] + (low < x[1]).astype(jnp.uint32), low


def _root(high: jax.Array, low: jax.Array) -> jax.Array:
  """The square root of a 64-bit number to 15 bits, float32[]."""
  bits = 64 - jax.lax.clz(high).astype(jnp.int32)
  bits = jnp.where(high > 0, bits, 32 - jax.lax.clz(low).astype(jnp.int32))
  shift = jnp.maximum(bits - 29, 0) // 2 * 2  # even; 30 bits are left
  right = shift.astype(jnp.uint32)
  whole = (low >> right) | (high << (np.uint32(32) - right))
  whole = jnp.where(right < 32, whole, high >> (right - np.uint32(32)))

  def step(i, root):
    larger = root | (np.uint32(1 << 14) >> i.astype(jnp.uint32))
    return jnp.where(larger * larger <= whole, larger, root)

  root = jax.lax.fori_loop(0, 15, step, jnp.uint32(0))
  return root.astype(jnp.float32) * grid.power_of_two(shift // 2)
