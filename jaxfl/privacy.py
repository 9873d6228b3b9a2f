"""Clipping: what one example can add to a sum, bounded before noise is added.

    total = sum_i clip(g_i(x), C)                         # DP-GD, DIFF2 restart
    total = sum_i clip(g_i(x) - g_i(x'), c)               # DIFF2 difference
    clip(g, C) = g min(1, C / |g|)        |g| over all tensors of the pytree

Gradients of single examples are made by `vmap` in microbatches, so that memory
is that of `microbatch_size` gradients, whatever the number of examples.

**The bound holds for the float32 numbers that are returned.** Rounding can push
a clipped gradient above C, and a rounded sum of n terms can move by more than
its largest term: of sums in order, by n 2**-24 times the sum (Casacuberta et
al., CCS 2022). So the clip is C (1 - `margin`), where the margin is a bound on
these errors, and microbatches are added with a second word that keeps what
rounding drops. Replacing one example moves `total` by at most 2 C and dropping
one by at most C, in exact arithmetic. The margin is below 0.2 % for 10,000
examples.

An example whose gradient is not finite, or 1e19 times its bound, adds zero: an
exploding example can't be told from one that is absent.

Everything here but the sum itself is private and gets no noise: a loss, the
share of clipped examples, a count of rejected ones. They may be looked at by
whoever holds the data, and must not be published.

References:
  Abadi et al., "Deep learning with differential privacy", CCS 2016,
    https://arxiv.org/abs/1607.00133.
  Murata and Suzuki, "DIFF2: differential private optimization via gradient
    differences for nonconvex distributed learning", ICML 2023,
    https://arxiv.org/abs/2302.03884.
  Casacuberta, Shoemate, Vadhan and Wagaman, "Widespread underestimation of
    sensitivity in differentially private libraries and how to fix it",
    CCS 2022, https://arxiv.org/abs/2207.10635.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import typing as jt

_ULP = 2.0**-24  # largest relative error of one float32 rounding
# XLA sums many entries in blocks or trees; an error of 1,024 roundings in a
# sum of squares is far beyond what it makes, at any size
_SUM_ROUNDINGS = 1024


class Clipped(NamedTuple):
  """The sum of clipped gradients, and what must not be published.

  Attributes:
    total: pytree of float32, the sum. Bounded; still without noise.
    loss: float32[], mean over the examples; infinite ones count as 0. Private.
    clipped: float32[], share of the examples that were clipped. Private.
    rejected: int32[], examples that added zero. Private.
  """

  total: jt.Params
  loss: jax.Array
  clipped: jax.Array
  rejected: jax.Array


def margin(num_entries: int, num_examples: int, microbatch_size: int) -> float:
  """By how much a clip is lowered so that float32 can't break its bound.

  Covers the norm, the scaling, the sum over a microbatch and over microbatches,
  and two roundings of the result, such as a division by a public number.

  Args:
    num_entries: of the pytree.
    num_examples: terms of the sum.
    microbatch_size: terms that are added at once.

  Returns:
    A number in (0, 1/2), to multiply the bound with one minus it.

  Raises:
    ValueError: if it would be 1/2 or more.
  """
  batches = math.ceil(num_examples / microbatch_size)
  roundings = (
    min(num_entries, _SUM_ROUNDINGS) / 2
    + 16
    + microbatch_size**2
    + 2 * num_examples
    + batches**2 * _ULP * num_examples
  )
  if roundings * _ULP >= 0.5:
    raise ValueError(
      f'float32 can not bound a sum of {num_examples} examples in microbatches'
      f' of {microbatch_size}: split them, and add the parts in float64'
    )
  return roundings * _ULP


def clip(
  tree: jt.Params, clip_norm: jt.Array | float, *, lower_by: float | None = None
) -> tuple[jt.Params, jax.Array]:
  """Scales a pytree down to a norm of at most `clip_norm`.

  For units larger than an example (a client's update) and for vectors other
  than gradients (coordinates, a sketch): clip what the noise is added to, not
  what it is computed from.

  Args:
    tree: pytree of floating-point arrays.
    clip_norm: float32[], the bound, on the norm over all entries; 0 gives exact
      zeros and infinity does not clip.
    lower_by: see `margin`; that of a sum of one term by default.

  Returns:
    Pytree of float32, zeros if an entry is not finite; and float32[], the norm
    before, over `clip_norm`: clipped if above 1, rejected if not finite.
  """
  tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  bound = jnp.asarray(clip_norm, jnp.float32)
  if lower_by is None:
    lower_by = margin(_num_entries(tree), 1, 1)
  # in units of the bound: squares of what matters neither vanish nor overflow
  per_bound = 1.0 / bound
  squares = [jnp.sum(jnp.square(x * per_bound)) for x in jax.tree.leaves(tree)]
  ratio = jnp.sqrt(sum(squares, jnp.float32(0.0)))
  factor = jnp.minimum(1.0, np.float32(1.0 - lower_by) / ratio)
  finite = jnp.isfinite(ratio)
  scaled = lambda x: jnp.where(finite, x * factor, 0.0)
  return jax.tree.map(scaled, tree), ratio


def clipped_sum(
  loss_fn: jt.LossFn,
  params: jt.Params,
  examples: jt.Batch,
  mask: jt.Array | None = None,
  *,
  clip_norm: jt.Array | float,
  microbatch_size: int,
) -> Clipped:
  """`sum_i clip(g_i, clip_norm)`, one gradient for every example.

  Args:
    loss_fn: params, batch -> float[]; gets batches of one example.
    params: pytree of floating-point arrays.
    examples: pytree of arrays with leading axis N.
    mask: bool[N], False for padding, which changes nothing; or None.
    clip_norm: float32[], see `clip`.
    microbatch_size: gradients that are held at once.

  Raises:
    ValueError: if there are no examples, they differ in number, a size is not
      positive or `clip_norm` is not.
  """
  _check_clip('clip_norm', clip_norm, zero=False)

  def grad_fn(batch):
    return jax.value_and_grad(loss_fn)(params, batch)

  return _sum(grad_fn, params, examples, mask, clip_norm, microbatch_size)


def clipped_difference_sum(
  loss_fn: jt.LossFn,
  params: jt.Params,
  old_params: jt.Params,
  examples: jt.Batch,
  mask: jt.Array | None = None,
  *,
  clip_norm: jt.Array | float,
  microbatch_size: int,
) -> Clipped:
  """`sum_i clip(g_i(params) - g_i(old_params), clip_norm)`.

  The difference is clipped, not its parts: that is what makes the sum as small
  as the step. DIFF2 sets `clip_norm` to `clip_norm_diff * |params -
  old_params|`, which everybody knows.

  Args:
    loss_fn: as for `clipped_sum`.
    params: pytree of floating-point arrays.
    old_params: likewise.
    examples: pytree of arrays with leading axis N.
    mask: bool[N] or None.
    clip_norm: float32[], see `clip`; 0 gives exact zeros. Noise is relative to
      this number, as float32 has it.
    microbatch_size: pairs of gradients that are held at once.

  Returns:
    As `clipped_sum`; the loss is that at `params`.

  Raises:
    ValueError: as `clipped_sum`, but `clip_norm` may be 0.
  """
  _check_clip('clip_norm', clip_norm, zero=True)

  def grad_fn(batch):
    loss, new = jax.value_and_grad(loss_fn)(params, batch)
    old = jax.grad(loss_fn)(old_params, batch)
    wide = lambda x: x.astype(jnp.float32)
    return loss, jax.tree.map(lambda a, b: wide(a) - wide(b), new, old)

  return _sum(grad_fn, params, examples, mask, clip_norm, microbatch_size)


def _sum(
  grad_fn: Callable[[jt.Batch], tuple[jax.Array, jt.Params]],
  params: jt.Params,
  examples: jt.Batch,
  mask: jt.Array | None,
  clip_norm: jt.Array | float,
  microbatch_size: int,
) -> Clipped:
  """Scans over microbatches of single-example gradients."""
  count = _num_examples(examples, mask)
  if microbatch_size < 1:
    raise ValueError(f'microbatch_size must be >= 1, got {microbatch_size}')
  size = min(microbatch_size, count)
  lower_by = margin(_num_entries(params), count, size)
  examples = jax.tree.map(jnp.asarray, examples)
  bound = jnp.asarray(clip_norm, jnp.float32)
  kept = jnp.ones(count, bool) if mask is None else jnp.asarray(mask) > 0
  rows = np.arange(math.ceil(count / size) * size).reshape(-1, size)

  def one(example, valid):
    batch = jax.tree.map(lambda x: x[None], example)
    loss, grads = grad_fn(batch)
    clipped, ratio = clip(grads, bound, lower_by=lower_by)
    finite = jnp.isfinite(ratio)
    rejected = valid & ~finite & (bound > 0)
    counts = (valid & finite & (ratio > 1.0), rejected)
    clipped = jax.tree.map(lambda x: jnp.where(valid, x, 0.0), clipped)
    return clipped, jnp.where(valid & jnp.isfinite(loss), loss, 0.0), counts

  def step(carry, row):
    total, rest, loss, counts = carry
    place = jnp.minimum(row, count - 1)
    batch = jax.tree.map(lambda x: x[place], examples)
    valid = kept[place] & (row < count)
    clipped, losses, flags = jax.vmap(one)(batch, valid)
    part = jax.tree.map(lambda x: jnp.sum(x, axis=0), clipped)
    added = jax.tree.map(jnp.add, total, part)
    rest = jax.tree.map(_rest, rest, total, part, added)
    counts = [c + jnp.sum(f) for c, f in zip(counts, flags, strict=True)]
    return (added, rest, loss + jnp.sum(losses), counts), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  none = [jnp.int32(0)] * 2
  start = (zeros, zeros, jnp.float32(0.0), none)
  (total, rest, loss, counts), _ = jax.lax.scan(step, start, jnp.asarray(rows))
  share = 1.0 / jnp.maximum(jnp.sum(kept), 1)
  total = jax.tree.map(jnp.add, total, rest)
  return Clipped(total, loss * share, counts[0] * share, counts[1])


def _rest(rest, total, part, added):
  """Adds what rounding dropped from `added = total + part` (Knuth's sum)."""
  from_part = added - total
  dropped = (total - (added - from_part)) + (part - from_part)
  return rest + dropped


def _num_entries(tree: Any) -> int:
  return sum(math.prod(np.shape(x)) for x in jax.tree.leaves(tree))


def _num_examples(examples: jt.Batch, mask: jt.Array | None) -> int:
  arrays = [*jax.tree.leaves(examples), *([] if mask is None else [mask])]
  counts = {np.shape(x)[0] if np.ndim(x) else None for x in arrays}
  if len(counts) != 1 or None in counts:
    raise ValueError(
      'all examples and the mask need one leading axis of equal length, got'
      f' lengths {sorted(map(str, counts))}'
    )
  (count,) = counts
  if not count:
    raise ValueError('there are no examples to sum over')
  return count


def _check_clip(field: str, value: jt.Array | float, *, zero: bool) -> None:
  if isinstance(value, jax.Array):
    return  # may be traced; a bound that is not a number gives zeros
  if not (float(value) >= 0 if zero else float(value) > 0):
    least = 'not negative' if zero else 'positive'
    raise ValueError(f'{field} must be {least}, got {value}')
