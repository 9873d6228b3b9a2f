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

'walsh' directions are those of one pool, in order: `directions[k]` is the pool
and k. All of a block's cost one pass over it. Blocks of tensors that have no
whole Walsh block, of 32 x 128 entries, have independent signs.

  * `partition`: the blocks of a pytree.
  * `norms`: those of a difference, by block.
  * `project`: the inner products of a difference with its blocks' directions.
  * `reconstruct`: the transpose of it, summed over parties.
  * `add_units`: the same on grid weights (`jaxfl.grid`), as exact integers.

Low-rank directions have no rectangles, and so none of these.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import checks, keys, perturb
from jaxfl import typing as jt
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  api,
  tiles,
  walsh,
  xla,
)

DISTRIBUTIONS = xla.DISTRIBUTIONS
_GROUP = 64  # rows that share a word of the field
_WALSH = walsh.COLUMNS


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


def partition(
  params: jt.Params, *, max_size: int, distribution: str = 'rademacher'
) -> tuple[Block, ...]:
  """Cuts every tensor into blocks of at most `max_size` entries.

  Larger tensors are cut between rows, at multiples of 64, into nearly equal
  parts; and between columns, if 64 rows (or all, if there are fewer) have more
  entries than that. For 'walsh' columns are cut at multiples of 128, so that a
  block may have 64 x 128 entries where `max_size` is smaller.

  Args:
    params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
    max_size: at least 64.
    distribution: of the directions.

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
    unit = _WALSH if distribution == 'walsh' else 1
    for row, h in _cuts(rows, max(groups, 1), _GROUP):
      for col, w in _cuts(cols, max(width // unit, 1), unit):
        blocks.append(Block(path, (row, col), (h, w)))
  return tuple(blocks)


def _cuts(length, limit, unit):
  """(start, length) of nearly equal parts of at most `limit` units each."""
  total = -(-length // unit)
  parts = -(-total // limit)
  edges = [min(length, i * total // parts * unit) for i in range(parts + 1)]
  return [(a, b - a) for a, b in itertools.pairwise(edges)]


def norms(delta: jt.Params, blocks: tuple[Block, ...]) -> jax.Array:
  """The Euclidean norms of the blocks.

  Args:
    delta: pytree of floating-point arrays.
    blocks: from `partition` of a pytree of the same paths and shapes.

  Returns:
    float32[L], summed in float32 over rows and then over columns.

  Raises:
    ValueError: if a block is wrong.
    TypeError: if `delta` is not floating-point (the path is named).
  """
  leaves = checks.named_arrays(delta)
  first = np.arange(len(blocks))
  spans = np.stack([first, first + 1], axis=1)  # one slot each
  squares = jnp.zeros(len(blocks), jnp.float32)
  for path, mine in _by_tensor(blocks, leaves).items():
    x = _view(leaves[path])

    def visit(squares, tile, x=x):
      part = jnp.square(tile.read(x).astype(jnp.float32))
      return squares.at[tile.span[0]].add(jnp.sum(jnp.sum(part, axis=0)))

    squares = tiles.fold(visit, squares, _plan(blocks, mine, spans))
  return jnp.sqrt(squares)


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
    directions: uint32[N, 2], or [N, 3] for 'walsh'.
    distribution: 'rademacher', 'popcount16', 'gaussian' or 'walsh'.

  Returns:
    float32[N], summed in float32 over rows and then over columns, whatever the
    type of `delta`; zero in slots that are not used.

  Raises:
    ValueError: if the distribution is unknown, or a block or a shape is wrong.
    TypeError: if `delta` is not floating-point (the path is named) or the
      directions are not uint32.
  """
  checks.distribution(
    distribution, DISTRIBUTIONS, 'is not a distribution of blocks'
  )
  directions = perturb.checked('directions', directions, distribution, 'N, ')
  counts = _counts(counts, (len(blocks),))
  leaves = checks.named_arrays(delta)
  ends = jnp.cumsum(counts)
  spans = jnp.stack([ends - counts, ends], axis=1)
  out = jnp.zeros(len(directions), jnp.float32)
  for path, mine in _by_tensor(blocks, leaves).items():
    x, plan = _view(leaves[path]), _plan(blocks, mine, spans)
    if _is_walsh(x, distribution):
      out += walsh.project_blocks(
        x,
        _pool_keys(directions, path),
        plan._replace(tiled=False),
        len(out),
        looped=plan.tiled,
      )
    else:
      field = _field(directions, path, x, distribution)
      out += api.project(
        x, field.keys, distribution=field.distribution, plan=plan
      )
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
    directions: uint32[C, N, 2], or [C, N, 3] for 'walsh'.
    coefficients: float32[C, N], in slots.
    distribution: 'rademacher', 'popcount16', 'gaussian' or 'walsh'.

  Returns:
    Pytree of float32. One float32 add per direction, parties in order and k
    ascending, starting from zero; for 'walsh' one per party, of the transformed
    coefficients. The same bits on every device, except for 'gaussian'.

  Raises:
    ValueError: if the distribution is unknown, or a block or a shape is wrong.
    TypeError: if the directions are not uint32.
  """
  checks.distribution(
    distribution, DISTRIBUTIONS, 'is not a distribution of blocks'
  )
  like = jax.tree.map(
    lambda x: jnp.zeros(np.shape(x), jnp.float32), params_like
  )
  coefficients = jnp.asarray(coefficients, jnp.float32)
  packed = _pack(blocks, counts, directions, coefficients, distribution)
  leaves = checks.named_arrays(like)
  for path, mine in _by_tensor(blocks, leaves).items():
    x = _view(leaves[path])
    if _is_walsh(x, distribution):
      new = walsh.add_parties(x, *packed.parties(path, blocks, mine))
    else:
      field = _field(packed.directions, path, x, distribution)
      plan = _plan(blocks, mine, packed.spans)
      new = api.add(
        x,
        field.keys,
        packed.values,
        distribution=field.distribution,
        plan=plan,
      )
    leaves[path] = new.reshape(leaves[path].shape)
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
    directions: uint32[C, N, 2], or [C, N, 3] for 'walsh'.
    units: int32[C, N], in slots: multiples of 2**-e of the block's tensor, and
      for 'popcount16' of half of that.
    distribution: 'rademacher', 'popcount16' or 'walsh'.

  Returns:
    (params, overflow) as `perturb.replay_int` has them. The sum over |units|
    that must not leave int32 is that of a block, over all parties.

  Raises:
    ValueError: if the distribution has no integer form or is unknown, or a
      block, a tree or a shape is wrong.
    TypeError: if a parameter is not float32 (the path is named), the units are
      not integers, or the directions are not uint32.
  """
  checks.distribution(
    distribution, xla.LARGEST, 'has no exact integer form on blocks'
  )
  leaves = checks.named_arrays(params)
  units = checks.as_int32('units', units)
  packed = _pack(blocks, counts, directions, units, distribution)
  treedef = jax.tree.structure(params)
  by_tensor = _by_tensor(blocks, leaves)
  # one block after the other: all at once would need L * C * N entries
  too_large = jax.lax.map(
    lambda i: tiles.sum_exceeds(
      jnp.where(packed.block == i, packed.values, 0),
      xla.LARGEST[distribution],
    ),
    jnp.arange(len(blocks)),
  )

  def leaf(path, w, e):
    *scale, overflow = checks.grid_scale(path, w, e)
    x, mine = _view(w), by_tensor.get(path, [])
    if _is_walsh(x, distribution):
      parties = packed.parties(path, blocks, mine)
      new, fits = walsh.add_parties_units(x, scale, *parties)
    else:
      field = _field(packed.directions, path, x, distribution)
      new, fits = api.add_units(
        x,
        scale,
        field.keys,
        packed.values,
        distribution=field.distribution,
        plan=_plan(blocks, mine, packed.spans),
      )
    overflow |= ~fits | jnp.any(too_large[np.array(mine, int)])
    return new.reshape(w.shape), overflow

  exponents = treedef.flatten_up_to(exponents)
  new = list(map(leaf, leaves, leaves.values(), exponents))
  return (
    treedef.unflatten([w for w, _ in new]),
    treedef.unflatten([overflow for _, overflow in new]),
  )


class _Packed(NamedTuple):
  """What all parties add, ordered by block, then party, then k."""

  block: jax.Array  # int32[C * N], L if not used
  directions: jax.Array  # uint32[C * N, 2 or 3]
  values: jax.Array  # [C * N]
  spans: jax.Array  # int32[L, 2]: where those of a block begin and end
  pools: jax.Array  # of Walsh directions: those of every party
  by_party: jax.Array  # [C, N], values in slots
  party_spans: jax.Array  # int32[L, C, 2]: where those of a party are

  def parties(self, path, blocks, mine):
    """For `walsh.add_parties`: the parties, and the plan of one tensor."""
    pool_keys = jax.vmap(lambda pool: _pool_keys(pool, path))(self.pools)
    plan = _plan(blocks, mine, self.party_spans)._replace(tiled=False)
    values = jnp.pad(self.by_party, ((0, 0), (0, walsh.SIZE)))
    return walsh.Parties(pool_keys, values), plan


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


def _pack(blocks, counts, directions, values, distribution) -> _Packed:
  directions = perturb.checked('directions', directions, distribution, 'C, N, ')
  num_parties, num_slots, words = directions.shape
  counts = _counts(counts, (num_parties, len(blocks)))
  if values.shape != (num_parties, num_slots):
    raise ValueError(
      f'expected a value for each of {num_slots} slots of {num_parties}'
      f' parties, got shape {values.shape}'
    )
  block, k = jax.vmap(slots, (0, None))(counts, num_slots)
  order = jnp.argsort(block.reshape(-1), stable=True)
  own = jnp.take_along_axis(directions, k[..., None], axis=1)
  spans_of = lambda counts: jnp.stack(
    [jnp.cumsum(counts) - counts, jnp.cumsum(counts)], axis=1
  )
  return _Packed(
    block=block.reshape(-1)[order],
    directions=own.reshape(-1, words)[order],
    values=values.reshape(-1)[order],
    spans=spans_of(jnp.sum(counts, axis=0)),
    pools=directions,
    by_party=values,
    party_spans=jax.vmap(spans_of, out_axes=1)(counts),
  )


def _pool_keys(directions, path):
  """uint32[P, 4], of the pools of directions (pool, 0), (pool, 1) ..."""
  numbers = np.arange(walsh.num_pools(len(directions)))
  return perturb.walsh_keys(directions[0, :2], numbers, path)


def _is_walsh(x, distribution):
  return distribution == 'walsh' and not walsh.is_small(x.shape)


def _field(directions, path, x, distribution):
  (field,) = perturb.leaf_fields(directions, {path: x}, distribution)
  return field


def _plan(blocks, mine, spans):
  """The plan for the blocks `mine`, which are those of one tensor."""
  rectangles = [(blocks[i].offset, blocks[i].shape) for i in mine]
  tiled = jax.default_backend() == 'cpu'
  return tiles.Plan(rectangles, spans[np.array(mine, int)], tiled)


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
