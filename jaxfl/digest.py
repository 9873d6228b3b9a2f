"""The digest of a pytree: one flipped bit anywhere changes it."""

import hashlib

import jax
import numpy as np

from jaxfl import keys
from jaxfl import typing as jt


def digest(tree: jt.Params) -> str:
  """sha256 over path, dtype, shape and raw bytes of every leaf, in path order.

  Args:
    tree: pytree of arrays.

  Returns:
    64 hexadecimal digits.
  """
  h = hashlib.sha256()
  for path, leaf in sorted(keys.named_leaves(tree), key=lambda item: item[0]):
    x = np.asarray(jax.device_get(leaf))
    h.update(f'{path}\n{x.dtype.name}\n{x.shape}\n'.encode())
    h.update(np.ascontiguousarray(x).tobytes())
  return h.hexdigest()
