"""Checks of arguments that several modules share."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import grid, keys
from jaxfl import typing as jt

_MAX_EXPONENT = 100  # keeps 2**e, 2**-e and |W| 2**-e normal and finite


def one_of(field: str, value: str, choices: Collection[str]) -> None:
  """Raises ValueError if a value is not among the choices."""
  if value not in choices:
    raise ValueError(
      f'{field} must be one of {", ".join(choices)}, got {value!r}'
    )


def float_noise(research_float_noise: bool) -> None:
  """Raises ValueError if nobody has said to know what float noise is."""
  if not research_float_noise:
    raise ValueError(
      'research_float_noise must be set: the noise of a vector is made of'
      ' floats, whose gaps can tell neighbouring values apart'
    )


def distribution(
  name: str, known: Collection[str], problem: str = 'is not a distribution'
) -> None:
  """Raises ValueError if `name` is not one of `known`."""
  if name not in known:
    raise ValueError(
      f'{name!r} {problem}; choose one of {", ".join(map(repr, known))}'
    )


def key(name: str, array: jt.Array, shape: str) -> jax.Array:
  """The array, uint32 of a shape such as '[2]' or '[K, 3]'.

  Raises:
    ValueError: if the number of axes or the last of them differs.
    TypeError: if it is not uint32.
  """
  array = jnp.asarray(array)
  if array.dtype != jnp.uint32:
    raise TypeError(f'{name} must be uint32, got {array.dtype}')
  words = int(shape.strip('[]').split(',')[-1])
  if array.ndim != shape.count(',') + 1 or array.shape[-1] != words:
    raise ValueError(f'{name} must be uint32{shape}, got {array.shape}')
  return array


def named_arrays(params: jt.Params) -> dict[str, jax.Array]:
  """The leaves by path.

  Raises:
    TypeError: if one is not a floating array; names it.
    ValueError: if two have the same path.
  """
  leaves = {}
  for path, leaf in keys.named_leaves(params):
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(
        f'parameter {path!r} must be of a floating type, got {array.dtype}'
      )
    leaves[path] = array
  return leaves


def as_int32(name: str, units) -> jax.Array:
  """The integers as int32.

  Raises:
    TypeError: if they are not integers that fit whatever their values.
  """
  dtype = units.dtype  # before JAX truncates int64
  if dtype.kind not in 'iu' or not np.can_cast(dtype, np.int32):
    raise TypeError(f'{name} must fit int32, got {dtype}')
  return jnp.asarray(units, jnp.int32)


def grid_scale(path: str, w: jax.Array, e) -> tuple[jax.Array, ...]:
  """2**e and 2**-e of a tensor, and bool[]: the exponent e is out of range.

  Raises:
    TypeError: if the tensor is not float32; names it.
    ValueError: if the exponent is not a scalar; names the tensor.
  """
  if w.dtype != jnp.float32:
    raise TypeError(f'parameter {path!r} must be float32, got {w.dtype}')
  e = jnp.asarray(e, jnp.int32)
  if e.shape:
    raise ValueError(f'{path!r}: expected an exponent [], got {e.shape}')
  too_large = jnp.abs(e) > _MAX_EXPONENT
  return grid.power_of_two(e), grid.power_of_two(-e), too_large
