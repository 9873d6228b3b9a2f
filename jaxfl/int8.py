"""Frozen weights of eight bits, for runs that train a part of the model.

    W ~ scale * units,    units = round(W / scale) in [-127, 127]

with one scale for each output of a layer, the largest magnitude of its column
over 127, so that an entry is off by half a scale at most. A matrix is made
from its units where it is used, one layer at a time (see `jaxfl.lazy`);
activations are not rounded.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import keys, lazy
from jaxfl import typing as jt

LARGEST = 127


@lazy.register('casts')
@dataclasses.dataclass(frozen=True)
class Int8(lazy.Box):
  """A matrix, or a stack of them.

  Attributes:
    units: int8[..., D, F].
    scale: float32[..., 1, F].
    casts: see `lazy.Box`.
  """

  units: Any
  scale: Any
  casts: tuple[str, ...] = ()

  @property
  def shape(self):
    return self.units.shape

  @property
  def made_dtype(self):
    return self.scale.dtype

  def make(self):
    return self.units.astype(jnp.float32) * self.scale


def quantise(params: jt.Params) -> jt.Params:
  """The params with an `Int8` for every kernel of a layer.

  Args:
    params: pytree of arrays with the paths of a transformer's; empty arrays,
      which stand for what is trained, stay as they are.
  """
  new = []
  for path, leaf in keys.named_leaves(params):
    kernel = path.startswith(lazy.LAYERS) and path.endswith('/kernel')
    new.append(_quantised(leaf) if kernel and np.size(leaf) else leaf)
  return jax.tree.structure(params).unflatten(new)


def _quantised(leaf):
  w = np.asarray(leaf, np.float32)
  largest = np.abs(w).max(axis=-2, keepdims=True)
  scale = np.where(largest > 0, largest, 1.0) / np.float32(LARGEST)
  scale = scale.astype(np.float32)
  units = np.clip(np.rint(w / scale), -LARGEST, LARGEST).astype(np.int8)
  return Int8(jnp.asarray(units), jnp.asarray(scale))
