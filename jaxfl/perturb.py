"""Adds shared random directions to weights: the hot loop of the library.

A direction z is never stored. Entry (r, c) of the tensor at `path` is a
function of (r, c) and of the leaf key `keys.leaf_key(direction, path)` alone,
as defined in `jaxfl.kernels.xla`: the same under jit, vmap, sharding and
tiling, and on every machine. Three distributions of mean 0 and variance 1:

  * 'rademacher': signs. The default, and the fastest. Exact on every backend.
  * 'popcount16': 17 levels in [-4, 4], nearly Gaussian (kurtosis 2.875). Exact
    on every backend.
  * 'gaussian': for comparison with papers. Not bit-exact: the last bits may
    differ between backends, shardings and rectangles.

and three ways to apply it, from rounded to exact:

  * `perturb`: one direction, `w + scale * z`.
  * `replay`: many directions in order, the same bits as that many `perturb`s.
  * `replay_int`: many directions on grid weights (`jaxfl.grid`), as one exact
    integer sum; the order of the directions can't matter.

`project`, the transpose of `replay`, measures a difference along directions.

    direction = keys.fold(root, party, round, sample)  # uint32[2]
    up = perturb(params, direction, mu)
    down = perturb(params, direction, -mu)

"Exact" holds for normal float32 numbers: whether subnormal results are flushed
to zero depends on the backend.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import checks, keys
from jaxfl import typing as jt
from jaxfl.kernels import api, tiles, xla  # pyright: ignore[reportMissingImports]

DISTRIBUTIONS = xla.DISTRIBUTIONS
# z as a multiple of the integer field that `replay_int` adds
FIELD_UNIT = {'rademacher': np.float32(1.0), 'popcount16': np.float32(0.5)}


def _leaf_keys(directions: jax.Array, paths) -> list[jax.Array]:
  """`keys.leaf_key(directions, path)` of every path, from one hash."""
  ids = np.array([keys.tensor_id(path) for path in paths], np.uint32)
  ids = ids.reshape(-1, *(1,) * (directions.ndim - 1))
  return list(keys.fold(directions[None], ids))


def field(
  direction: jt.Array,
  path: str,
  shape: tuple[int, ...],
  *,
  distribution: str = 'rademacher',
  offset: tuple = (0, 0),
) -> jax.Array:
  """The direction itself: z of one tensor, or of a rectangle of it.

  For tests, statistics and tiles; `perturb` never stores it.

  Args:
    direction: uint32[2].
    path: the tensor's path in its pytree, as in `keys.path_str`.
    shape: shape of the result. Any rank; viewed as (rows, columns), columns
      being the last dimension, a vector one row and a scalar one entry.
    distribution: 'rademacher', 'popcount16' or 'gaussian'.
    offset: row and column of the rectangle in the tensor's (rows, columns)
      view. Python integers, or uint32[] values that may be traced.

  Returns:
    float32[shape], equal to the slice of the whole field (for 'gaussian', up
    to rounding).

  Raises:
    ValueError: if the distribution is unknown or the direction's shape wrong.
    TypeError: if the direction is not uint32.
  """
  checks.distribution(distribution, DISTRIBUTIONS)
  key = keys.leaf_key(checks.key('direction', direction, '[2]'), path)
  return xla.field(key, tuple(shape), offset, distribution=distribution)


def perturb(
  params: jt.Params,
  direction: jt.Array,
  scale: jax.typing.ArrayLike,
  *,
  distribution: str = 'rademacher',
) -> jt.Params:
  """`w + scale * z` for every tensor; the two-sided step calls it with +-mu.

  Args:
    params: pytree of floating-point arrays of any rank. float32 is used as it
      is; other types are computed in float32 and cast back once.
    direction: uint32[2].
    scale: float32[].
    distribution: 'rademacher', 'popcount16' or 'gaussian'.

  Returns:
    Pytree like `params`. One float32 rounding per entry for 'rademacher', one
    of the product and one of the sum for the others; never an FMA.

  Raises:
    ValueError: if the distribution is unknown, a shape is wrong, or two
      parameters have the same path.
    TypeError: if a parameter is not of a floating type (the path is named) or
      the direction is not uint32.
  """
  checks.distribution(distribution, DISTRIBUTIONS)
  direction = checks.key('direction', direction, '[2]')
  scale = jnp.asarray(scale, jnp.float32)
  if scale.ndim:
    raise ValueError(f'scale must be a scalar, got shape {scale.shape}')
  leaves = checks.named_arrays(params)
  new = [
    xla.add(w, key, scale, distribution=distribution)
    for w, key in zip(
      leaves.values(), _leaf_keys(direction, leaves), strict=True
    )
  ]
  return jax.tree.structure(params).unflatten(new)


def replay(
  params: jt.Params,
  directions: jt.Array,
  coefficients: jt.Array,
  *,
  distribution: str = 'rademacher',
  implementation: str | None = None,
) -> jt.Params:
  """Applies K directions in order, with the bits of K `perturb` calls.

  Args:
    params: pytree of floating-point arrays.
    directions: uint32[K, 2].
    coefficients: float32[K], the scales.
    distribution: 'rademacher', 'popcount16' or 'gaussian'.
    implementation: one of `jaxfl.kernels.api`, which differ in speed and, only
      for 'gaussian', in the last bits; None chooses for the default device.
      Only 'xla' is for sharded tensors.

  Returns:
    Pytree like `params`.

  Raises:
    ValueError: if the distribution is unknown, a shape is wrong, or two
      parameters have the same path.
    TypeError: if a parameter is not of a floating type (the path is named) or
      the directions are not uint32.
  """
  checks.distribution(distribution, DISTRIBUTIONS)
  directions = checks.key('directions', directions, '[K, 2]')
  coefficients = jnp.asarray(coefficients, jnp.float32)
  if coefficients.shape != directions.shape[:1]:
    raise ValueError(
      f'{directions.shape[0]} directions need as many coefficients, got '
      f'shape {coefficients.shape}'
    )
  leaves = checks.named_arrays(params)
  new = [
    api.add(
      w,
      leaf_keys,
      coefficients,
      distribution=distribution,
      implementation=implementation,
    )
    for w, leaf_keys in zip(
      leaves.values(), _leaf_keys(directions, leaves), strict=True
    )
  ]
  return jax.tree.structure(params).unflatten(new)


def replay_int(
  params: jt.Params,
  directions: jt.Array,
  units: jt.Params,
  exponents: jt.Params,
  *,
  distribution: str = 'rademacher',
  implementation: str | None = None,
) -> tuple[jt.Params, jt.Params]:
  """Applies K directions to grid weights, exactly and in no particular order.

  With e the tensor's exponent, W = w 2**e is an integer, and the update is

      W' = W + sum_k units_k Z_k,    w' = W' 2**-e

  where Z is z for 'rademacher' and 2 z, in [-8, 8], for 'popcount16' (so that a
  unit there is half of a coefficient in steps of 2**-e). Everything is int32.

  Args:
    params: pytree of float32 arrays on their grids: multiples of 2**-e of
      magnitude below 2**(24 - e).
    directions: uint32[K, 2].
    units: pytree like `params` of integers [K], at most int32.
    exponents: pytree like `params` of int32[]; |e| <= 100.
    distribution: 'rademacher' or 'popcount16'.
    implementation: as for `replay`.

  Returns:
    (params, overflow), the latter a pytree like `params` of bool[]. A flag is
    raised if a new weight leaves the range, if `sum_k |units_k|` times the
    largest |Z| could leave int32 on the way, if an old weight is not on its
    grid, or if |e| > 100. A tensor whose flag is raised is meaningless.

  Raises:
    ValueError: if the distribution has no integer form or is unknown, a shape
      or a tree is wrong, or two parameters have the same path.
    TypeError: if a parameter is not float32, units are not integers (the path
      is named), or directions are not uint32.
  """
  checks.distribution(distribution, xla.LARGEST, 'has no exact integer form')
  directions = checks.key('directions', directions, '[K, 2]')
  leaves = checks.named_arrays(params)
  treedef = jax.tree.structure(params)

  def leaf(path, w, leaf_keys, unit, e):
    unit = checks.as_int32(f'units of {path!r}', unit)
    if unit.shape != directions.shape[:1]:
      raise ValueError(
        f'{path!r}: expected units [{directions.shape[0]}], got {unit.shape}'
      )
    *scale, overflow = checks.grid_scale(path, w, e)
    new, fits = api.add_units(
      w,
      scale,
      leaf_keys,
      unit,
      distribution=distribution,
      implementation=implementation,
    )
    overflow |= ~fits | tiles.sum_exceeds(unit, distribution)
    return new, overflow

  results = [
    leaf(path, w, *rest)
    for (path, w), *rest in zip(
      leaves.items(),
      _leaf_keys(directions, leaves),
      treedef.flatten_up_to(units),
      treedef.flatten_up_to(exponents),
      strict=True,
    )
  ]
  return (
    treedef.unflatten([w for w, _ in results]),
    treedef.unflatten([overflow for _, overflow in results]),
  )


def project(
  delta: jt.Params,
  directions: jt.Array,
  *,
  distribution: str = 'rademacher',
  implementation: str | None = None,
) -> jax.Array:
  """The inner products `<z_k, delta>` over all tensors: `replay` transposed.

  Args:
    delta: pytree of floating-point arrays.
    directions: uint32[K, 2].
    distribution: 'rademacher', 'popcount16' or 'gaussian'.
    implementation: as for `replay`, but the sums are grouped otherwise.

  Returns:
    float32[K], whatever the type of `delta`. Sums in float32, over parts of a
    tensor first; the last bits may differ between backends and shardings.

  Raises:
    ValueError: if the distribution is unknown, a shape is wrong, or two
      parameters have the same path.
    TypeError: if an array is not of a floating type (the path is named) or the
      directions are not uint32.
  """
  checks.distribution(distribution, DISTRIBUTIONS)
  directions = checks.key('directions', directions, '[K, 2]')
  leaves = checks.named_arrays(delta)
  total = jnp.zeros(len(directions), jnp.float32)
  for x, leaf_keys in zip(
    leaves.values(), _leaf_keys(directions, leaves), strict=True
  ):
    total += api.project(
      x, leaf_keys, distribution=distribution, implementation=implementation
    )
  return total
