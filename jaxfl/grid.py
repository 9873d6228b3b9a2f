"""Grid weights: tensors on multiples of 2**-e, where every add is exact.

A tensor with exponent e holds multiples of 2**-e below 2**(24-e) in magnitude;
float32 represents all of them. Coefficients are rounded to the same grid once
(to integers, "units"), so that updates are integer sums: any order, any
grouping, any device gives the same bits, and adding then subtracting changes
nothing. Leaving the range is detected, never wrapped.

Rounding a coefficient is stochastic with a counter-based dither: unbiased, so
that learning rates far below the grid still make progress, and the same on
every replica.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import keys
from jaxfl import typing as jt

# clip of one coefficient, the largest float32 in int32: two of them overflow
_MAX_UNITS = 2147483520.0


def exponents(params: jt.Params, *, headroom: int = 2) -> jt.Params:
  """Chooses the grid of every tensor from its largest magnitude.

  Args:
    params: pytree of floating-point arrays.
    headroom: factors of two that weights may grow before they leave the range,
      which is at least (-1, 1).

  Returns:
    Pytree of int32[].

  Raises:
    TypeError: if a tensor is not of a floating type; names the tensor.
    ValueError: if a tensor has non-finite entries; names the tensor.
  """

  def exponent(path: str, x) -> np.int32:
    if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
      raise TypeError(
        f'parameter {path!r} must be of a floating type, got'
        f' {jnp.asarray(x).dtype}'
      )
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all():
      raise ValueError(f'parameter {path!r} has entries that are not finite')
    largest = np.max(np.abs(x), initial=0.0)
    bits = int(np.frexp(largest)[1]) + headroom  # largest < 2**(bits-headroom)
    return np.int32(24 - max(bits, 0))

  treedef = jax.tree.structure(params)
  return treedef.unflatten(
    [jnp.asarray(exponent(p, x)) for p, x in keys.named_leaves(params)]
  )


def power_of_two(e: jt.Array) -> jax.Array:
  """2**e as float32, built from bits; e is int32[...] in [-126, 127]."""
  bits = (jnp.asarray(e) + 127).astype(jnp.uint32) << 23
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def positive_zero(x: jax.Array) -> jax.Array:
  """x with 0.0 for -0.0; adding 0.0 would do, but compilers remove it."""
  return jnp.where(x == 0, jnp.zeros_like(x), x)


def shrink(x: jax.Array, factor: jt.Array) -> jax.Array:
  """`x * factor`, rounded once on every device, without -0.0.

  The product's sign is set by its bits, so that no compiler can contract the
  product and a following sum into one operation.

  Args:
    x: float32[...].
    factor: float32[] or [...], not negative.
  """
  as_bits = lambda v: jax.lax.bitcast_convert_type(v, jnp.uint32)
  factor = jnp.asarray(factor)
  sign = as_bits(x) & np.uint32(0x80000000)
  bits = as_bits(jnp.abs(x) * factor) | sign
  return positive_zero(jax.lax.bitcast_convert_type(bits, jnp.float32))


def snap(params: jt.Params, exponents: jt.Params) -> jt.Params:
  """Rounds every tensor to its grid; returns float32 tensors, without -0.0."""

  def leaf(x, e):
    units = jnp.rint(jnp.asarray(x, jnp.float32) * power_of_two(e))
    return positive_zero(units * power_of_two(-e))

  return jax.tree.map(leaf, params, exponents)


def out_of_range(params: jt.Params, exponents: jt.Params) -> jt.Params:
  """bool[] per tensor: some |w| is 2**(24-e) or more, or not finite."""
  return jax.tree.map(
    lambda x, e: ~jnp.all(jnp.abs(x) < power_of_two(24 - e)),
    params,
    exponents,
  )


def to_units(
  coefficients: jax.Array, exponents: jt.Params, directions: jax.Array
) -> jt.Params:
  """Rounds coefficients to every tensor's grid, without bias.

  Args:
    coefficients: float32[N], finite.
    exponents: pytree of int32[].
    directions: uint32[N, 2], the coefficients' directions; they key the dither.

  Returns:
    Pytree of int32[N] with expectation coefficient * 2**e, to 2**-24 of a unit.
    Coefficients beyond int32 become so large that `perturb.replay_int` reports
    an overflow.
  """
  paths = [path for path, _ in keys.named_leaves(exponents)]
  tensor_ids = np.array([keys.tensor_id(p) for p in paths], np.uint32)
  dither = keys.uniform(
    keys.fold(keys.stream(directions, 'rounding')[None], tensor_ids[:, None])
  )  # float32[T, N]
  leaves, treedef = jax.tree.flatten(exponents)
  leaf = lambda e, u: round_units(coefficients * power_of_two(e), u)
  return treedef.unflatten([leaf(e, dither[i]) for i, e in enumerate(leaves)])


def round_units(x: jax.Array, uniform: jax.Array) -> jax.Array:
  """Rounds to one of the two nearest integers, without bias.

  Args:
    x: float32[...], finite; clipped to int32.
    uniform: float32[...] in [0, 1), see `keys.uniform`.

  Returns:
    int32[...].
  """
  x = jnp.clip(x, -_MAX_UNITS, _MAX_UNITS)
  whole = jnp.floor(x)
  return whole.astype(jnp.int32) + (uniform < x - whole).astype(jnp.int32)


def decay(
  params: jt.Params, exponents: jt.Params, rate: jax.Array, key: jax.Array
) -> jt.Params:
  """`w - rate * w` on the grid, with a dither that all entries share.

  Args:
    params: pytree of float32 on the grid.
    exponents: pytree of int32[].
    rate: float32[] in [0, 0.25).
    key: uint32[2], fresh in every call.
  """

  def leaf(path, x, e):
    offset = keys.uniform(keys.leaf_key(key, path)) * 256.0
    # |x| 2**(e+8) rate < 2**30; one rounded product, then integers only
    step = jnp.rint(x * (rate * power_of_two(e + 8))).astype(jnp.int32)
    step = (step + offset.astype(jnp.int32)) >> 8
    return x - step.astype(jnp.float32) * power_of_two(-e)

  leaves, treedef = jax.tree.flatten(params)
  paths = [path for path, _ in keys.named_leaves(params)]
  return treedef.unflatten(
    [
      leaf(*args)
      for args in zip(paths, leaves, jax.tree.leaves(exponents), strict=True)
    ]
  )
