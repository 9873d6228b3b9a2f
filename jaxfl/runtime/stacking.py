"""Batches of a block of clients as one: widened with zeros where they differ.

Texts are padded to few lengths, client by client, so that clients that run
together may differ in length. Zeros are appended until they agree. A batch that
is widened must therefore have an array `mask` and a loss that leaves out what
the mask has as zero: zeros then add nothing but terms of zero to its sums. What
a client computes may still depend on its block in the last bits, as longer sums
are grouped otherwise; its message is logged as it was sent.
"""

from collections.abc import Sequence

import jax
import numpy as np

from jaxfl import keys
from jaxfl import typing as jt


def stack(
  batches: Sequence[jt.Batch], ids: Sequence[int] | np.ndarray
) -> jt.Batch:
  """Stacks batches along a new leading axis.

  Every array is widened to the largest extent of each of its axes, with zeros
  at the end.

  Args:
    batches: pytrees of arrays, one per client.
    ids: of the clients, for error messages.

  Returns:
    A pytree of NumPy arrays.

  Raises:
    ValueError: if the trees differ, or the numbers of axes of an array, or its
      shape and there is no `mask`; names the client and the array.
  """
  first, *_ = named = [dict(keys.named_leaves(batch)) for batch in batches]
  masked = any(path.split('/')[-1] == 'mask' for path in first)
  for id, batch, leaves in zip(ids, batches, named, strict=True):
    if jax.tree.structure(batch) != jax.tree.structure(batches[0]):
      raise ValueError(
        f'batches of client {id} have the arrays {", ".join(leaves)}; those of'
        f' client {ids[0]} in the same block have {", ".join(first)}'
      )
    for path, x in leaves.items():
      shape, other = np.shape(x), np.shape(first[path])
      if len(shape) != len(other) or (shape != other and not masked):
        need = 'can be widened only with an array `mask` beside them'
        raise ValueError(
          f'batches of client {id}: {path!r} has shape {shape}, that of client'
          f' {ids[0]} in the same block has {other}; such shapes'
          f' {need if len(shape) == len(other) else "can not be stacked"}'
        )
  return jax.tree.map(lambda *xs: np.stack(_widen(xs)), *batches)


def _widen(arrays):
  """Arrays of one rank, with zeros at the end of every axis that is short."""
  shapes = np.array([np.shape(x) for x in arrays], int)
  if (shapes == shapes[0]).all():
    return arrays
  missing = shapes.max(axis=0) - shapes
  return [
    np.pad(x, [(0, n) for n in more])
    for x, more in zip(arrays, missing, strict=True)
  ]
