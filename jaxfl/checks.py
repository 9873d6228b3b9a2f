"""Checks of arguments that several modules share."""

from collections.abc import Collection

import jax
import jax.numpy as jnp

from jaxfl import keys
from jaxfl import typing as jt


def one_of(field: str, value: str, choices: Collection[str]) -> None:
  """Raises ValueError if a value is not among the choices."""
  if value not in choices:
    raise ValueError(
      f'{field} must be one of {", ".join(choices)}, got {value!r}'
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
  """The array, uint32 of a shape such as '[2]' or '[K, 2]'.

  Raises:
    ValueError: if the number of axes differs, or the last of them is not 2.
    TypeError: if it is not uint32.
  """
  array = jnp.asarray(array)
  if array.dtype != jnp.uint32:
    raise TypeError(f'{name} must be uint32, got {array.dtype}')
  if array.ndim != shape.count(',') + 1 or array.shape[-1] != 2:
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
