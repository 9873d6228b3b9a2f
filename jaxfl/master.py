"""The weights that every replica holds, and exact steps on them.

Two forms of float32 weights:

  * `grid` (see `jaxfl.grid`): updates are sums of integers, the same on every
    device and in any order.
  * `float32`: one add per direction, in the order that is given; the same on
    every device, too.

A method keeps the three fields of `Master` in its state and applies
coefficients along shared directions with `add`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import grid, keys, perturb
from jaxfl import typing as jt

WEIGHTS = ('grid', 'float32')


class Master(NamedTuple):
  """Weights that are stepped along directions."""

  params: Any  # pytree of float32, the weights
  exponents: Any  # pytree of int32[], the grid; unused by float32 weights
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor


def init(params: jt.Params, weights: str = 'grid') -> Master:
  """Master weights from parameters of any floating type.

  They have no -0.0, whose sign an add of 0.0 may change.

  Raises:
    TypeError: if a tensor is not of a floating type; names the tensor.
    ValueError: if a tensor has non-finite entries; names the tensor.
  """
  exponents = grid.exponents(params)
  return _init(params, exponents, weights)


@functools.partial(jax.jit, static_argnames='weights')
def _init(params, exponents, weights):
  """One program; op by op there would be one for each operation and shape."""
  if weights == 'grid':
    params = grid.snap(params, exponents)
  else:
    to_master = lambda x: grid.positive_zero(jnp.asarray(x, jnp.float32))
    params = jax.tree.map(to_master, params)
  overflow = jax.tree.map(lambda _: jnp.zeros((), bool), params)
  return Master(params, exponents, overflow)


def add(
  master: Master,
  directions: jax.Array,
  coefficients: jax.Array,
  *,
  distribution: str = 'rademacher',
  weights: str = 'grid',
) -> Master:
  """`w + sum_n c_n z_n`.

  Grid weights take integer sums, which have no order; for float32 weights, and
  for `gaussian` directions, which have no integers, the order is that of the
  arguments.

  Args:
    master: the weights.
    directions: uint32[N, 2].
    coefficients: float32[N], finite. On the grid they are rounded without bias,
      with a dither that their directions key.
    distribution: of the directions, see `perturb`.
    weights: one of `WEIGHTS`.
  """
  params, exponents, old = master
  if weights == 'grid' and distribution != 'gaussian':
    coefficients = coefficients * perturb.FIELD_UNIT[distribution]
    params, overflow = perturb.replay_int(
      params,
      directions,
      grid.to_units(coefficients, exponents, directions),
      exponents,
      distribution=distribution,
    )
  else:
    params = perturb.replay(
      params, directions, coefficients, distribution=distribution
    )
    if weights == 'grid':
      params = grid.snap(params, exponents)
      overflow = grid.out_of_range(params, exponents)
    else:
      overflow = jax.tree.map(lambda x: ~jnp.all(jnp.isfinite(x)), params)
  return Master(params, exponents, jax.tree.map(jnp.logical_or, old, overflow))


def step(master: Master, update: jt.Params, rate: jax.Array) -> Master:
  """`w - rate update` on the grid, the same bits on every device.

  Args:
    master: the weights.
    update: pytree of float32 like them.
    rate: float32[].
  """

  def leaf(x, v, e):
    # products only, each rounded once; a sum on the grid is exact
    units = jnp.rint((rate * v) * grid.power_of_two(e))
    return grid.positive_zero(x - units * grid.power_of_two(-e))

  params = jax.tree.map(leaf, master.params, update, master.exponents)
  left = grid.out_of_range(params, master.exponents)
  overflow = jax.tree.map(jnp.logical_or, master.overflow, left)
  return Master(params, master.exponents, overflow)


def decay(
  master: Master, rate: jax.Array, key: jax.Array, *, weights: str = 'grid'
) -> Master:
  """`w - rate w`, exact.

  Args:
    master: the weights.
    rate: float32[] in [0, 0.25).
    key: uint32[2] of the dither on the grid, fresh in every call.
    weights: one of `WEIGHTS`.
  """
  if weights == 'grid':
    params = grid.decay(master.params, master.exponents, rate, key)
  else:
    params = jax.tree.map(lambda x: grid.shrink(x, 1.0 - rate), master.params)
  return master._replace(params=params)


def decay_key(root: jax.Array, round: jax.Array) -> jax.Array:
  """The key of a round's `decay`, uint32[2]."""
  return keys.fold(keys.stream(root, 'decay'), round)


def check(overflow: Any) -> str | None:
  """What is wrong with weights that left their range, for people; or None."""
  flags = jax.device_get(overflow)
  names = [path for path, flag in keys.named_leaves(flags) if np.any(flag)]
  if not names:
    return None
  where = ', '.join(names)
  return f'weights left their range in: {where}; lower the learning rate'
