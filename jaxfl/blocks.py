"""Shared directions on blocks of the parameters, a number of them per block.

A block is a rectangle of the (rows, columns) view of one tensor. Direction k of
a block is the rectangle's part of the tensor's field under `directions[k]`, as
`jaxfl.perturb` defines it. A field is addressed by position under the tensor's
own key, so that the parts of different blocks are disjoint and independent, and
no block needs a key of its own.

Block l uses `counts[l]` directions. Coordinates lie in slots, block after
block: block l owns the slots from sum(counts[:l]) to sum(counts[:l + 1]), and
the k-th of them belongs to `directions[k]`. Slots beyond the last are zero in
results and ignored in arguments. Counts may be traced: one program serves all
of them.

  * `partition`: the blocks of a pytree.
  * `project`: the inner products of a difference with its blocks' directions.
  * `reconstruct`: the transpose of it, summed over parties.
  * `add_units`: the same on grid weights (`jaxfl.grid`), as exact integers.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import checks, keys, perturb
from jaxfl import typing as jt
from jaxfl.kernels import loops, xla  # pyright: ignore[reportMissingImports]

_GROUP = 64  # rows that share a word of the field


class Block(NamedTuple):
  """A rectangle of the (R, C) view of one tensor.

  C is the last dimension and R the product of the others; a vector is one row
  and a scalar one entry.
  """

  path: str
  offset: tuple[int, int]  # row and column
  shape: tuple[int, int]  # rows and columns

  @property
  def size(self) -> int:
    return math.prod(self.shape)


def partition(params: jt.Params, *, max_size: int) -> tuple[Block, ...]:
  """Cuts every tensor into blocks of at most `max_size` entries.

  Larger tensors are cut between rows, at multiples of 64, into nearly equal
  parts; and between columns, if 64 rows (or all, if there are fewer) have more
  entries than that.

  Args:
    params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
    max_size: at least 64.

  Returns:
    Blocks in the order of the leaves, then of rows, then of columns. Every
    entry is in exactly one; a tensor without entries has none.

  Raises:
    ValueError: if max_size is below 64, or two parameters have the same path.
  """
  if max_size < _GROUP:
    raise ValueError(f'max_size must be >= {_GROUP}, got {max_size}')
  blocks = []
  for path, leaf in keys.named_leaves(params):
    rows, cols = xla.view(np.shape(leaf))
    height = min(rows, _GROUP)
    if not rows * cols:
      continue
    groups = max_size // (height * cols)  # of 64 rows
    width = cols if groups else max_size // height
    for row, h in _cuts(rows, max(groups, 1), _GROUP):
      for col, w in _cuts(cols, width, 1):
        blocks.append(Block(path, (row, col), (h, w)))
  return tuple(blocks)


def _cuts(length, limit, unit):
  """(start, length) of nearly equal parts of at most `limit` units each."""
  total = -(-length // unit)
  parts = -(-total // limit)
  edges = [min(length, i * total // parts * unit) for i in range(parts + 1)]
  return [(a, b - a) for a, b in itertools.pairwise(edges)]


def project(
  delta: jt.Params,
  blocks: tuple[Block, ...],
  counts: jt.Array,
  directions: jt.Array,
  *,
  distribution: str = 'rademacher',
) -> jax.Array:
  """The inner products `<z_k, delta>` of every block with its directions.

  Args:
    delta: pytree of floating-point arrays.
    blocks: from `partition` of a pytree of the same paths and shapes.
    counts: int32[L], one per block; their sum is at most N.
    directions: uint32[N, 2].
    distribution: 'rademacher', 'popcount16' or 'gaussian'.

  Returns:
    float32[N], summed in float32 over rows and then over columns, whatever the
    type of `delta`; zero in slots that are not used.

  Raises:
    ValueError: if the distribution is unknown, or a block or a shape is wrong.
    TypeError: if `delta` is not floating-point (the path is named) or the
      directions are not uint32.
  """
  checks.distribution(distribution, xla.DISTRIBUTIONS)
  directions = checks.key('directions', directions, '[N, 2]')
  counts = _counts(counts, (len(blocks),))
  leaves = checks.named_arrays(delta)
  starts = jnp.cumsum(counts) - counts
  out = jnp.zeros(len(directions), jnp.float32)
  for path, mine in _by_tensor(blocks, leaves).items():
    leaf_keys = keys.leaf_key(directions, path)
    x = _view(leaves[path])

    def add(block, rectangle, out, x=x, leaf_keys=leaf_keys):
      y = loops.project(
        x,
        leaf_keys,
        counts[block],
        rectangle=rectangle,
        distribution=distribution,
      )
      return out + jnp.roll(y, starts[block])

    out = _loop(add, out, mine, blocks)
  return out


def reconstruct(
  params_like: jt.Params,
  blocks: tuple[Block, ...],
  counts: jt.Array,
  directions: jt.Array,
  coefficients: jt.Array,
  *,
  distribution: str = 'rademacher',
) -> jt.Params:
  """`sum_k c_k z_k` in every block, over the parties in the given order.

  Args:
    params_like: pytree of arrays or of `jax.ShapeDtypeStruct`, for its shapes.
    blocks: from `partition`.
    counts: int32[C, L], for each of C parties; sums are at most N.
    directions: uint32[C, N, 2].
    coefficients: float32[C, N], in slots.
    distribution: 'rademacher', 'popcount16' or 'gaussian'.

  Returns:
    Pytree of float32. One float32 add per direction, parties in order and k
    ascending, starting from zero: the same bits on every device, except for
    'gaussian'.

  Raises:
    ValueError: if the distribution is unknown, or a block or a shape is wrong.
    TypeError: if the directions are not uint32.
  """
  checks.distribution(distribution, xla.DISTRIBUTIONS)
  like = jax.tree.map(
    lambda x: jnp.zeros(np.shape(x), jnp.float32), params_like
  )
  coefficients = jnp.asarray(coefficients, jnp.float32)
  packed = _pack(blocks, counts, directions, coefficients)
  leaves = checks.named_arrays(like)
  add = functools.partial(loops.add, distribution=distribution)
  for path, mine in _by_tensor(blocks, leaves).items():
    leaves[path] = _apply(add, leaves[path], path, mine, blocks, packed)
  return jax.tree.structure(like).unflatten(leaves.values())


def add_units(
  params: jt.Params,
  exponents: jt.Params,
  blocks: tuple[Block, ...],
  counts: jt.Array,
  directions: jt.Array,
  units: jt.Array,
  *,
  distribution: str = 'rademacher',
) -> tuple[jt.Params, jt.Params]:
  """`perturb.replay_int` with directions of blocks and parties; exact.

  Args:
    params: pytree of float32 arrays on their grids.
    exponents: pytree like `params` of int32[]; |e| <= 100.
    blocks: from `partition`.
    counts: int32[C, L], for each of C parties; sums are at most N.
    directions: uint32[C, N, 2].
    units: int32[C, N], in slots: multiples of 2**-e of the block's tensor, and
      for 'popcount16' of half of that.
    distribution: 'rademacher' or 'popcount16'.

  Returns:
    (params, overflow) as `perturb.replay_int` has them. The sum over |units|
    that must not leave int32 is that of a block, over all parties.

  Raises:
    ValueError: if the distribution has no integer form or is unknown, or a
      block, a tree or a shape is wrong.
    TypeError: if a parameter is not float32 (the path is named), the units are
      not integers, or the directions are not uint32.
  """
  checks.distribution(distribution, xla.LARGEST, 'has no exact integer form')
  leaves = checks.named_arrays(params)
  units = perturb.as_int32('units', units)
  packed = _pack(blocks, counts, directions, units)
  treedef = jax.tree.structure(params)
  by_tensor = _by_tensor(blocks, leaves)
  # one block after the other: all at once would need L * C * N entries
  too_large = jax.lax.map(
    lambda i: perturb.sum_exceeds(
      jnp.where(packed.block == i, packed.values, 0), distribution
    ),
    jnp.arange(len(blocks)),
  )
  add = functools.partial(loops.add_units, distribution=distribution)
  new, overflow = [], []
  for (path, w), e in zip(
    leaves.items(), treedef.flatten_up_to(exponents), strict=True
  ):
    mine = by_tensor.get(path, [])
    update = lambda total, path=path, mine=mine: _apply(
      add, total, path, mine, blocks, packed
    )
    w, flag = perturb.on_grid(path, w, e, update)
    new.append(w)
    overflow.append(flag | jnp.any(too_large[np.array(mine, int)]))
  return treedef.unflatten(new), treedef.unflatten(overflow)


class _Packed(NamedTuple):
  """What all parties add, ordered by block, then party, then k."""

  block: jax.Array  # int32[C * N], L if not used
  directions: jax.Array  # uint32[C * N, 2]
  values: jax.Array  # [C * N]
  edges: jax.Array  # int32[L + 1]: those of block l begin at edges[l]


def slots(counts: jt.Array, num_slots: int) -> tuple[jax.Array, jax.Array]:
  """What every slot belongs to.

  Args:
    counts: int32[L].
    num_slots: N.

  Returns:
    int32[N], the block, L for a slot that is not used; and int32[N], the number
    k of its direction in the block.
  """
  ends = jnp.cumsum(jnp.asarray(counts))
  index = jnp.arange(num_slots, dtype=jnp.int32)
  block = jnp.searchsorted(ends, index, side='right').astype(jnp.int32)
  starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
  return block, index - starts[block]


def _pack(blocks, counts, directions, values) -> _Packed:
  directions = checks.key('directions', directions, '[C, N, 2]')
  num_parties, num_slots, _ = directions.shape
  counts = _counts(counts, (num_parties, len(blocks)))
  if values.shape != (num_parties, num_slots):
    raise ValueError(
      f'expected a value for each of {num_slots} slots of {num_parties}'
      f' parties, got shape {values.shape}'
    )
  block, k = jax.vmap(slots, (0, None))(counts, num_slots)
  order = jnp.argsort(block.reshape(-1), stable=True)
  directions = jnp.take_along_axis(directions, k[..., None], axis=1)
  ends = jnp.cumsum(jnp.sum(counts, axis=0))
  return _Packed(
    block=block.reshape(-1)[order],
    directions=directions.reshape(-1, 2)[order],
    values=values.reshape(-1)[order],
    edges=jnp.concatenate([jnp.zeros(1, ends.dtype), ends]),
  )


def _apply(add, w, path, mine, blocks, packed):
  """Adds what is packed for the blocks `mine` of one tensor."""
  leaf_keys = keys.leaf_key(packed.directions, path)

  def step(block, rectangle, x):
    edges = packed.edges[block], packed.edges[block + 1]
    return add(x, leaf_keys, packed.values, *edges, rectangle=rectangle)

  x = _loop(step, _view(w), mine, blocks)
  return x.reshape(w.shape)


def _loop(step, state, mine, blocks):
  """`state = step(i, rectangle, state)` for the blocks `mine` of one tensor.

  A loop for every shape, so that programs do not grow with the blocks.
  """
  by_shape: dict[tuple[int, int], list[int]] = {}
  for i in mine:
    by_shape.setdefault(blocks[i].shape, []).append(i)
  for shape, group in by_shape.items():
    if len(group) == 1:
      block = blocks[group[0]]
      state = step(group[0], block.offset + shape, state)
      continue
    index = jnp.array(group, jnp.int32)
    offsets = jnp.array([blocks[i].offset for i in group], jnp.uint32)
    body = lambda j, state, index=index, offsets=offsets, shape=shape: step(
      index[j], (offsets[j, 0], offsets[j, 1], *shape), state
    )
    state = jax.lax.fori_loop(0, len(group), body, state)
  return state


def _view(x):
  return x.reshape(xla.view(x.shape))


def _counts(counts, shape) -> jax.Array:
  counts = jnp.asarray(counts)
  if counts.shape != shape or not jnp.issubdtype(counts.dtype, jnp.integer):
    expected = ', '.join(map(str, shape))
    raise ValueError(
      f'counts must be integers of shape [{expected}], one per block, got'
      f' {counts.dtype}{list(counts.shape)}'
    )
  return counts.astype(jnp.int32)


def _by_tensor(blocks, leaves) -> dict[str, list[int]]:
  """Numbers of the blocks of every tensor that has some."""
  found: dict[str, list[int]] = {}
  for i, block in enumerate(blocks):
    if block.path not in leaves:
      raise ValueError(f'block {i}: there is no parameter {block.path!r}')
    shape = xla.view(leaves[block.path].shape)
    ends = [a + b for a, b in zip(block.offset, block.shape, strict=True)]
    if any(a > b for a, b in zip(ends, shape, strict=True)):
      raise ValueError(
        f'block {i} ends at {ends}, outside of {block.path!r}, which is'
        f' {shape} as (rows, columns)'
      )
    found.setdefault(block.path, []).append(i)
  return found
