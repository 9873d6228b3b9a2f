"""Many directions on one rectangle of a tensor: loops over `jaxfl.kernels.xla`.

A rectangle is (row, column, rows, columns) of the (R, C) view; the row is a
multiple of 64. Row and column are integers or uint32[] values.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import custom_batching, lax
from jaxfl.kernels import xla  # pyright: ignore[reportMissingImports]


def _loop(step, state, keys, values, start, stop):
  """`state = step(state, keys[i], values[i])` for start <= i < stop.

  Key and value come with the carry: XLA of JAX 0.12 does not vectorise a hash
  whose key is sliced out in the same iteration (6 times slower).
  """
  if not len(keys):
    return state
  take = lambda i: tuple(
    lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (keys, values)
  )

  def body(i, carry):
    state, entry = carry
    return step(state, *entry), take(i + 1)

  return lax.fori_loop(start, stop, body, (state, take(start)))[0]


def _cut(view, rectangle):
  row, col, rows, cols = rectangle
  if (rows, cols) == view.shape:
    return view
  return lax.dynamic_slice(view, (row, col), (rows, cols))


def _paste(view, rectangle, part):
  if part.shape == view.shape:
    return part
  return lax.dynamic_update_slice(view, part, rectangle[:2])


def add(w, keys, scales, start, stop, *, rectangle, distribution):
  """`w + scales[i] * z_i` for start <= i < stop in order, in the rectangle.

  Args:
    w: float[R, C].
    keys: uint32[M, 2], leaf keys.
    scales: float32[M].
    start: int32[] or int.
    stop: int32[] or int, at most M.
    rectangle: see the module.
    distribution: one of `xla.DISTRIBUTIONS`.

  Returns:
    An array like `w`, with the bits of so many `xla.add`.
  """
  add_one = functools.partial(
    xla.add, distribution=distribution, offset=rectangle[:2]
  )
  part = _loop(add_one, _cut(w, rectangle), keys, scales, start, stop)
  return _paste(w, rectangle, part)


def add_units(total, keys, units, start, stop, *, rectangle, distribution):
  """`total + units[i] * Z_i` for start <= i < stop, in the rectangle.

  Args:
    total: int32[R, C].
    keys: uint32[M, 2], leaf keys.
    units: int32[M].
    start: int32[] or int.
    stop: int32[] or int, at most M.
    rectangle: see the module.
    distribution: a key of `xla.LARGEST`.

  Returns:
    int32[R, C]; wraps modulo 2**32.
  """
  add_one = functools.partial(
    xla.add_units, distribution=distribution, offset=rectangle[:2]
  )
  part = _loop(add_one, _cut(total, rectangle), keys, units, start, stop)
  return _paste(total, rectangle, part)


def _largest_of_batch(axis_size, in_batched, counts):
  del axis_size, in_batched  # Unused: called for a batched argument alone.
  return _largest(jnp.max(counts, axis=0)), False


# The count; under `vmap` the largest of all, so that a loop has one end.
_largest = custom_batching.custom_vmap(lambda count: count)
_largest.def_vmap(_largest_of_batch)


def project(x, keys, count, *, rectangle, distribution):
  """The inner products `<z_i, x>` over the rectangle for i < count.

  Args:
    x: float[R, C].
    keys: uint32[M, 2], leaf keys.
    count: int32[] or int, at most M.
    rectangle: see the module.
    distribution: one of `xla.DISTRIBUTIONS`.

  Returns:
    float32[M]; zeros from `count` on.
  """
  num = len(keys)
  part = _cut(x, rectangle).astype(jnp.float32)

  def step(y, key, i):
    dot = xla.dot(part, key, distribution=distribution, offset=rectangle[:2])
    return lax.dynamic_update_index_in_dim(y, dot, i, 0)

  y = jnp.zeros(num, jnp.float32)
  index = np.arange(num, dtype=np.int32)
  y = _loop(step, y, keys, index, 0, _largest(jnp.asarray(count)))
  return jnp.where(index < count, y, np.float32(0))
