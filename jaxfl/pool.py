"""Weights as a base and one coordinate per seed of a fixed pool.

    w = base_scale * base + sum_k coordinates_k z_k

(FedKSeed, Qin et al., ICML 2024, https://arxiv.org/abs/2312.06353, eq. 7-8.)
Coordinates are integers in units of 2**-q, q finer than the grid of every
tensor by `_FINER` bits, so that their sums have no order. A tensor takes each
coordinate rounded to its own grid, to nearest. The weights are then a function
of the coordinates alone: a rebuild in one pass from the base, and the sequence
of all steps since, give the same bits. (A sum in one pass can leave int32 where
the steps one by one don't; that is reported, never silent.)

A pool is independent directions of one distribution, or 'walsh': orthogonal
signs (`jaxfl.kernels.walsh`), all 4096 of which cost one pass over a tensor,
where the others cost one for each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import checks, grid, keys, perturb
from jaxfl import typing as jt
from jaxfl.master import Master

MAX_SEEDS = 65536  # an index is sent in two bytes at most
DISTRIBUTIONS = tuple(perturb.FIELD_UNIT)  # those with an integer field

_FINER = 6
_LIMIT = 1 << 30  # of a coordinate: the range of the finest tensor
ONE = 1 << 30  # the base scale is an integer in units of 1 / ONE


def index_dtype(num_seeds: int) -> np.dtype:
  """The unsigned type in which an index is sent."""
  return np.min_scalar_type(num_seeds - 1)


def directions(
  root: jax.Array, indices: jt.Array, distribution: str
) -> jax.Array:
  """The directions of seeds of a pool, for `jaxfl.perturb` and `blocks`.

  Args:
    root: uint32[..., 2].
    indices: integers [...] that broadcast with `root[..., 0]`.
    distribution: of the directions.

  Returns:
    uint32[..., 2], or for 'walsh' uint32[..., 3]: the root and the index.
  """
  if distribution != 'walsh':
    return keys.fold(root, indices)
  indices = jnp.asarray(indices).astype(jnp.uint32)
  shape = np.broadcast_shapes(root.shape[:-1], indices.shape)
  index = jnp.broadcast_to(indices, shape)[..., None]
  return jnp.concatenate([jnp.broadcast_to(root, (*shape, 2)), index], axis=-1)


def exponent(exponents: jt.Params) -> jax.Array:
  """q, int32[], from the exponents of the tensors."""
  return jnp.stack(jax.tree.leaves(exponents)).max() + _FINER


def units(
  coordinates: jax.Array,
  exponents: jt.Params,
  distribution: str,
  q: jax.Array | None = None,
) -> jt.Params:
  """What the coordinates are on the grid of every tensor, for `replay_int`.

  Args:
    coordinates: int32[K], below 2**30 in magnitude.
    exponents: pytree of int32[].
    distribution: one of `DISTRIBUTIONS`.
    q: `exponent` of all tensors of a model, if these are some of them.

  Returns:
    Pytree of int32[K].
  """
  q = exponent(exponents) if q is None else q
  finer = int(-np.log2(perturb.FIELD_UNIT[distribution]))  # its field is larger

  def leaf(e):
    shift = jnp.minimum(q - e + finer, 31)
    return (coordinates + (1 << (shift - 1))) >> shift

  return jax.tree.map(leaf, exponents)


def add_coordinates(
  coordinates: jax.Array, indices: jax.Array, amounts: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Adds amounts to the coordinates of seeds; exact, in any order.

  Args:
    coordinates: int32[K].
    indices: int32[N] in [0, K); one may occur several times.
    amounts: int32[N].

  Returns:
    int32[K], and bool[]: a coordinate left its range (the sum is meaningless).
  """
  # by how much each may have moved at most, in units so large that it fits
  shift = max(1, len(amounts).bit_length() - 1)
  sizes = jnp.minimum(jnp.abs(amounts).astype(jnp.uint32), _LIMIT)
  sizes = (sizes + np.uint32((1 << shift) - 1)) >> np.uint32(shift)
  moved = jnp.zeros(coordinates.shape, jnp.uint32).at[indices].add(sizes)
  new = coordinates.at[indices].add(amounts)
  left = (moved > _LIMIT >> shift) | (jnp.abs(new) >= _LIMIT)
  return new, jnp.any(left)


def step(
  master: Master,
  pool: jax.Array,
  old: jax.Array,
  new: jax.Array,
  *,
  max_changes: int,
  distribution: str,
  q: jax.Array | None = None,
) -> Master:
  """The weights at the coordinates `new`, from those at `old`.

  Args:
    master: grid weights at `old`.
    pool: the directions of the seeds 0 to K, see `directions`.
    old: int32[K].
    new: int32[K]; at most `max_changes` entries differ from `old`.
    max_changes: the cost is that of so many directions, at most K; or of one
      for the tensors that have Walsh blocks.
    distribution: one of `DISTRIBUTIONS`.
    q: as for `units`.
  """
  params, exponents, overflow = master
  before, after = (units(x, exponents, distribution, q) for x in (old, new))
  leaves = checks.named_arrays(params)
  flat = lambda tree: dict(zip(leaves, jax.tree.leaves(tree), strict=True))
  change = flat(jax.tree.map(jnp.subtract, after, before))
  exponents, overflow = flat(exponents), flat(overflow)

  def apply(replay, pool, chosen, of_seeds):
    """Steps the tensors `chosen`."""
    some = lambda flat: {path: flat[path] for path in chosen}
    moved, left = replay(
      some(leaves),
      pool,
      jax.tree.map(of_seeds, some(change)),
      some(exponents),
    )
    for path in chosen:
      leaves[path] = moved[path]
      overflow[path] |= left[path]

  at_once = [
    path
    for path, w in leaves.items()
    if distribution == 'walsh' and not perturb.is_small(w.shape)
  ]
  one_by_one = [path for path in leaves if path not in at_once]
  if at_once:
    apply(perturb.replay_pool, pool[0, :2], at_once, lambda unit: unit)
  if one_by_one:
    changed = jnp.arange(len(pool))
    if max_changes < len(pool):
      (changed,) = jnp.nonzero(
        new != old, size=max_changes, fill_value=len(pool)
      )
    apply(
      functools.partial(perturb.replay_int, distribution=distribution),
      pool.at[changed].get(mode='clip'),
      one_by_one,
      lambda unit: unit.at[changed].get(mode='fill', fill_value=0),
    )
  unflatten = jax.tree.structure(params).unflatten
  return Master(
    unflatten(leaves.values()), master.exponents, unflatten(overflow.values())
  )


def rebuild(
  base: Master,
  base_scale: jax.Array,
  pool: jax.Array,
  coordinates: jax.Array,
  *,
  distribution: str,
  q: jax.Array | None = None,
) -> Master:
  """The weights at the coordinates, from the base in one pass.

  Args:
    base: grid weights at coordinates of zero.
    base_scale: int32[], what weight decay has left of the base; `ONE` is all.
    pool: uint32[K, 2].
    coordinates: int32[K].
    distribution: one of `DISTRIBUTIONS`.
    q: as for `units`; tensors can be rebuilt one by one.
  """
  factor = base_scale.astype(jnp.float32) * np.float32(1 / ONE)
  shrunk = jax.tree.map(lambda x: grid.shrink(x, factor), base.params)
  return step(
    base._replace(params=grid.snap(shrunk, base.exponents)),
    pool,
    jnp.zeros_like(coordinates),
    coordinates,
    max_changes=len(pool),
    distribution=distribution,
    q=q,
  )


def decay(
  coordinates: jax.Array, base_scale: jax.Array, lost: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Weight decay: coordinates and base lose the share `lost`, without bias.

  Args:
    coordinates: int32[K].
    base_scale: int32[].
    lost: float32[] in [0, 0.5].
    key: uint32[2] of the dither, fresh in every call.
  """
  all = jnp.append(coordinates, base_scale)
  rows = keys.fold(key, jnp.arange(len(all)))
  amounts = grid.to_units(all.astype(jnp.float32) * lost, jnp.int32(0), rows)
  all = all - amounts
  return all[:-1], all[-1]
