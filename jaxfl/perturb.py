"""Adds shared random directions to weights: the hot loop of the library.

A direction z is never stored. Entry (r, c) of the tensor at `path` is a
function of (r, c) and of the leaf key `keys.leaf_key(direction, path)` alone,
as defined in `jaxfl.kernels.xla`: the same under jit, vmap, sharding and
tiling, and on every machine. Distributions of mean 0 and variance 1:

  * 'rademacher': signs. The default, and the fastest. Exact on every backend.
  * 'popcount16': 17 levels in [-4, 4], nearly Gaussian (kurtosis 2.875). Exact
    on every backend.
  * 'gaussian': for comparison with papers. Not bit-exact: the last bits may
    differ between backends, shardings and rectangles.
  * 'rank1', 'rank4', 'rank16': every matrix a product of two sign matrices of
    that inner dimension, as defined in `jaxfl.kernels.lowrank`. Exact on every
    backend; many directions are one product of matrices in `replay_int` and
    `project`. Two entries are independent, but not four.

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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import checks, keys
from jaxfl import typing as jt
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  api,
  lowrank,
  tiles,
  walsh,
  xla,
)

# of fields whose directions have nothing to do with each other
DISTRIBUTIONS = (
  *(name for name in xla.DISTRIBUTIONS if name != 'walsh'),
  *lowrank.RANKS,
)
# The largest magnitude of the integer field that `replay_int` adds, and z as a
# multiple of the field.
LARGEST = xla.LARGEST | lowrank.RANKS
FIELD_UNIT = {
  'rademacher': np.float32(1.0),
  'popcount16': np.float32(0.5),
  'walsh': np.float32(1.0),
} | {name: np.float32(rank**-0.5) for name, rank in lowrank.RANKS.items()}


def walsh_keys(pool: jax.Array, number: jt.Array, path: str) -> jax.Array:
  """The keys of a Walsh pool on a tensor, uint32[..., 4].

  Args:
    pool: uint32[..., 2].
    number: integers [...] that broadcast; every 4096 seeds have another.
    path: the tensor's.
  """
  of = lambda name: keys.fold(
    keys.stream(pool, name), number, keys.tensor_id(path)
  )
  return jnp.concatenate([of('walsh'), of('walsh shifts')], axis=-1)


class Leaf(NamedTuple):
  """The fields of some directions on one tensor."""

  distribution: str  # of `xla`
  keys: jax.Array  # uint32[..., 2 or 5]


def leaf_fields(
  directions: jax.Array, leaves: dict[str, Any], distribution: str
) -> list[Leaf]:
  """The fields of directions uint32[..., 2], or [..., 3], on every tensor.

  A 'walsh' direction is the key of its pool and its number k. Tensors without a
  whole Walsh block have signs, as the pool `keys.fold(pool, k)` would.
  """
  if distribution != 'walsh':
    leaf_keys = _leaf_keys(directions, leaves)
    return [Leaf(distribution, key) for key in leaf_keys]
  pool, seed = directions[..., :2], directions[..., 2]
  number, k = seed // np.uint32(walsh.SIZE), seed % np.uint32(walsh.SIZE)
  found = []
  for path, x in leaves.items():
    if walsh.is_small(x.shape):
      leaf = keys.leaf_key(keys.fold(pool, seed), path)
      found.append(Leaf('rademacher', leaf))
    else:
      words = [walsh_keys(pool, number, path), k[..., None]]
      found.append(Leaf('walsh', jnp.concatenate(words, axis=-1)))
  return found


def _leaf_keys(directions: jax.Array, paths) -> list[jax.Array]:
  """`keys.leaf_key(directions, path)` of every path, from one hash."""
  ids = np.array([keys.tensor_id(path) for path in paths], np.uint32)
  ids = ids.reshape(-1, *(1,) * (directions.ndim - 1))
  return list(keys.fold(directions[None], ids))


def checked(name: str, directions: jt.Array, distribution: str, axes: str):
  """The directions, if the distribution is known and their shape fits it."""
  checks.distribution(distribution, (*DISTRIBUTIONS, 'walsh'))
  words = 3 if distribution == 'walsh' else 2
  return checks.key(name, directions, f'[{axes}{words}]')


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
    distribution: one of `DISTRIBUTIONS`, or 'walsh'.
    offset: row and column of the rectangle in the tensor's (rows, columns)
      view. Python integers, or uint32[] values that may be traced. For 'walsh'
      the column is a multiple of 128, and a rectangle has 32 x 128 entries at
      least if its tensor has; low-rank directions have no rectangles.

  Returns:
    float32[shape], equal to the slice of the whole field (for 'gaussian', up
    to rounding).

  Raises:
    ValueError: if the distribution is unknown, the direction's shape wrong, or
      there is no such rectangle.
    TypeError: if the direction is not uint32.
  """
  direction = checked('direction', direction, distribution, '')
  like = {path: jax.ShapeDtypeStruct(shape, jnp.float32)}
  ((name, key),) = leaf_fields(direction, like, distribution)
  if name in lowrank.RANKS:
    if not all(isinstance(x, int) and x == 0 for x in offset):
      raise ValueError(f'{name!r} has no rectangles: offset {offset}')
    return lowrank.field(key, tuple(shape), distribution=name)
  return xla.field(key, tuple(shape), offset, distribution=name)


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
    distribution: one of `DISTRIBUTIONS`.

  Returns:
    Pytree like `params`. One float32 rounding per entry for 'rademacher', one
    of the product and one of the sum for the others; never an FMA.

  Raises:
    ValueError: if the distribution is unknown, a shape is wrong, or two
      parameters have the same path.
    TypeError: if a parameter is not of a floating type (the path is named) or
      the direction is not uint32.
  """
  direction = checked('direction', direction, distribution, '')
  scale = jnp.asarray(scale, jnp.float32)
  if scale.ndim:
    raise ValueError(f'scale must be a scalar, got shape {scale.shape}')
  leaves = checks.named_arrays(params)
  add = lowrank.add if distribution in lowrank.RANKS else xla.add
  fields = leaf_fields(direction, leaves, distribution)
  new = [
    add(w, field.keys, scale, distribution=field.distribution)
    for w, field in zip(leaves.values(), fields, strict=True)
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
    distribution: one of `DISTRIBUTIONS`.
    implementation: one of `jaxfl.kernels.api`, which differ in speed and, only
      for 'gaussian', in the last bits; None chooses for the default device.
      Only 'xla' is for sharded tensors, and for low-rank directions.

  Returns:
    Pytree like `params`.

  Raises:
    ValueError: if the distribution is unknown, a shape is wrong, or two
      parameters have the same path.
    TypeError: if a parameter is not of a floating type (the path is named) or
      the directions are not uint32.
  """
  directions = checked('directions', directions, distribution, 'K, ')
  coefficients = jnp.asarray(coefficients, jnp.float32)
  if coefficients.shape != directions.shape[:1]:
    raise ValueError(
      f'{directions.shape[0]} directions need as many coefficients, got '
      f'shape {coefficients.shape}'
    )
  leaves = checks.named_arrays(params)
  fields = leaf_fields(directions, leaves, distribution)
  new = [
    api.add(
      w,
      field.keys,
      coefficients,
      distribution=field.distribution,
      implementation=implementation,
    )
    for w, field in zip(leaves.values(), fields, strict=True)
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

  where Z is the integer field and z = `FIELD_UNIT` Z: z for 'rademacher', 2 z
  in [-8, 8] for 'popcount16' (so that a unit there is half of a coefficient in
  steps of 2**-e), and sqrt(r) z in [-r, r] for rank r. Everything is int32, or
  integers that float32 holds.

  Args:
    params: pytree of float32 arrays on their grids: multiples of 2**-e of
      magnitude below 2**(24 - e).
    directions: uint32[K, 2].
    units: pytree like `params` of integers [K], at most int32.
    exponents: pytree like `params` of int32[]; |e| <= 100.
    distribution: a key of `FIELD_UNIT`.
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
  checks.distribution(distribution, FIELD_UNIT, 'has no exact integer form')
  directions = checked('directions', directions, distribution, 'K, ')
  leaves = checks.named_arrays(params)
  treedef = jax.tree.structure(params)

  def leaf(path, w, field, unit, e):
    unit = checks.as_int32(f'units of {path!r}', unit)
    if unit.shape != directions.shape[:1]:
      raise ValueError(
        f'{path!r}: expected units [{directions.shape[0]}], got {unit.shape}'
      )
    *scale, overflow = checks.grid_scale(path, w, e)
    new, fits = api.add_units(
      w,
      scale,
      field.keys,
      unit,
      distribution=field.distribution,
      implementation=implementation,
    )
    overflow |= ~fits | tiles.sum_exceeds(unit, LARGEST[field.distribution])
    return new, overflow

  results = [
    leaf(path, w, *rest)
    for (path, w), *rest in zip(
      leaves.items(),
      leaf_fields(directions, leaves, distribution),
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
    distribution: one of `DISTRIBUTIONS`.
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
  directions = checked('directions', directions, distribution, 'K, ')
  leaves = checks.named_arrays(delta)
  total = jnp.zeros(len(directions), jnp.float32)
  fields = leaf_fields(directions, leaves, distribution)
  for x, field in zip(leaves.values(), fields, strict=True):
    total += api.project(
      x,
      field.keys,
      distribution=field.distribution,
      implementation=implementation,
    )
  return total


def replay_pool(
  params: jt.Params, pool: jax.Array, units: jt.Params, exponents: jt.Params
) -> tuple[jt.Params, jt.Params]:
  """`replay_int` with all seeds of a Walsh pool, in one pass whatever K is.

  Args:
    params: pytree of float32 arrays on their grids; none is small (as
      `is_small` says).
    pool: uint32[2].
    units: pytree like `params` of int32[K], of the directions (pool, k).
    exponents: pytree like `params` of int32[]; |e| <= 100.

  Returns:
    (params, overflow), as `replay_int`, with the same bits.
  """
  leaves = checks.named_arrays(params)
  treedef = jax.tree.structure(params)

  def leaf(path, w, unit, e):
    *scale, overflow = checks.grid_scale(path, w, e)
    numbers = np.arange(walsh.num_pools(len(unit)))
    new, fits = api.add_pools(
      w, scale, walsh_keys(pool, numbers, path), walsh.by_pool(unit)
    )
    overflow |= ~fits | tiles.sum_exceeds(unit, LARGEST['walsh'])
    return new, overflow

  units = treedef.flatten_up_to(units)
  exponents = treedef.flatten_up_to(exponents)
  new = list(map(leaf, leaves, leaves.values(), units, exponents))
  return (
    treedef.unflatten([w for w, _ in new]),
    treedef.unflatten([overflow for _, overflow in new]),
  )


def is_small(shape: tuple[int, ...]) -> bool:
  """Whether a tensor has no whole Walsh block, so that its fields are signs."""
  return walsh.is_small(shape)
