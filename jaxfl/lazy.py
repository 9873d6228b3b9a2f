"""Weights that are made where they are used: one layer at a time.

A box stands in a tree of parameters for an array that is not there yet. Models
made for it (`jaxfl.models`) open a box where they use the parameter, inside of
the loop over their layers, so that no whole copy of the weights is made:

    params = perturbed(params, direction, mu)
    loss = loss_fn(params, batch)

Boxes are those of Flax: `self.param` opens them unasked, and the loop over the
layers cuts them like arrays, as they are pytrees whose arrays all have a layer
axis (but for parameters outside of the layers). There are three:

  * `Perturbed`: `w + scale * z`, with the bits of `perturb.perturb`.
  * `jaxfl.adapters.LowRank`: `W + alpha / rank * A B`.
  * `jaxfl.int8.Int8`: weights of eight bits.

A matrix in a box is multiplied in one of two forms, `FORMS`:

  * 'temporary': the matrix of the layer is made and used. The exact weights
    that the update moves, rounded to the type of the forward pass.
  * 'split': `x W + scale * (x z)`, and `x W + alpha / rank * (x A) B`. W is
    read as it is, whatever is batched: the two sides of a difference are one
    product with W, by `[x+; x-]`, and one with z. Sums are in float32, so that
    a small step is not lost in 16-bit weights; other last bits.
"""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxfl import checks, perturb
from jaxfl import typing as jt
from jaxfl.kernels import xla  # pyright: ignore[reportMissingImports]

FORMS = ('temporary', 'split')
LAYERS = 'layers/'  # the parameters that have a leading layer axis
# entries of a vocabulary's part that are made at once: 16 MiB of float32
PART = 1 << 22


class Box(nn.meta.AxisMetadata):
  """A parameter that is not there yet.

  Attributes:
    casts: dtypes that it is converted to in turn when it is made.
  """

  casts: tuple[str, ...]

  @abc.abstractmethod
  def make(self) -> jax.Array:
    """The array, before its casts."""

  @abc.abstractmethod
  def dot(self, x: jax.Array, axis: int = 0) -> jax.Array:
    """Contracts the last axis of `x` with an axis of this matrix."""

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """The array's."""

  @property
  @abc.abstractmethod
  def made_dtype(self) -> Any:
    """The array's dtype before its casts."""

  @property
  def dtype(self) -> Any:
    """The array's."""
    return jnp.dtype(self.casts[-1] if self.casts else self.made_dtype)

  def astype(self, dtype: Any) -> 'Box':
    """A box of the same array in another dtype."""
    casts = (*self.casts, jnp.dtype(dtype).name)
    return dataclasses.replace(self, casts=casts)  # pyright: ignore

  def unbox(self) -> jax.Array:
    """The array."""
    w = self.make()
    for dtype in self.casts:
      w = w.astype(dtype)
    return w

  def replace_boxed(self, val):
    raise TypeError('what is in a box of jaxfl.lazy cannot be replaced')

  def add_axis(self, index, params):
    del index, params  # Unused: axes have no names.
    return self

  remove_axis = add_axis


def is_box(x: Any) -> bool:
  """Whether a node of a tree is a box."""
  return isinstance(x, Box)


def register(*meta: str):
  """Makes a frozen dataclass a pytree; `meta` are its static fields."""

  def wrap(cls):
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    data = [name for name in names if name not in meta]
    return jax.tree_util.register_dataclass(cls, data, meta)

  return wrap


@register('distribution', 'form', 'aligned', 'casts')
class Perturbed(Box):
  """`base + scale * z`, of a tensor or of a rectangle of its (R, C) view.

  Attributes:
    base: float[...].
    key: the leaf key, uint32[2].
    scale: float32[].
    offset: row and column of the rectangle, uint32[2].
    distribution: of z.
    form: one of `FORMS`.
    aligned: whether the row is a multiple of 64.
    casts: see `Box`.
  """

  base: Any
  key: Any
  scale: Any
  offset: Any
  distribution: str
  form: str
  aligned: bool
  casts: tuple[str, ...] = ()

  @property
  def shape(self):
    return self.base.shape

  @property
  def made_dtype(self):
    return self.base.dtype

  def _where(self):
    return {
      'distribution': self.distribution,
      'offset': (self.offset[0], self.offset[1]),
      'aligned': self.aligned,
    }

  def make(self):
    return xla.add(self.base, self.key, self.scale, **self._where())

  def dot(self, x, axis=0):
    if self.form == 'temporary':
      return _dot(x, self.unbox(), axis)
    z = xla.field(self.key, self.shape, **self._where())
    total = _dot32(x, self.base, axis) + self.scale * _dot32(x, z, axis)
    return total.astype(x.dtype)

  def take(self, index: jax.Array) -> jax.Array:
    """Rows of this matrix, [..., C] at integers [...]; nan for none."""
    rows = jnp.where(index < 0, index + self.shape[0], index)
    rows = rows.astype(jnp.uint32) + self.offset[0]
    w = jnp.take(self.base, index, axis=0)
    w = xla.add_rows(
      w, self.key, self.scale, rows, distribution=self.distribution
    )
    for dtype in self.casts:
      w = w.astype(dtype)
    return w

  def part(self, start: Any, size: int, axis: int) -> 'Perturbed':
    """The box of a part of this matrix; a first row is a multiple of 64."""
    base = jax.lax.dynamic_slice_in_dim(self.base, start, size, axis)
    move = jnp.zeros(2, jnp.uint32).at[axis].set(jnp.uint32(start))
    return dataclasses.replace(self, base=base, offset=self.offset + move)


def _dot(x, w, axis):
  """The product in the dtype of x."""
  w = jnp.asarray(w, x.dtype)
  return jnp.dot(x, w if axis == 0 else w.T)


def _dot32(x, w, axis):
  """The product in float32, of factors in the dtype of x."""
  w = jnp.asarray(w, x.dtype)
  w = w if axis == 0 else w.T
  return jnp.dot(x, w, preferred_element_type=jnp.float32)


def dot(x: jax.Array, w: Any, axis: int = 0) -> jax.Array:
  """A linear layer, `x W` for an array or a box: perturbed_dense.

  Args:
    x: [..., D].
    w: [D, F], or [F, D] for axis 1.
    axis: of `w`, the one that is summed over.

  Returns:
    [..., F], of the dtype of `x`.
  """
  return w.dot(x, axis) if is_box(w) else _dot(x, w, axis)


def wide_dot(
  x: jax.Array, w: Any, axis: int = 0, *, entries: int | None = None
) -> jax.Array:
  """`dot` with many outputs, as many at once as a part of `w` allows.

  Parts of a tensor that is sharded would mean communication: by default, where
  there is more than one device, there is one part.

  Args:
    x: [..., D].
    w: as for `dot`, with F large.
    axis: as for `dot`.
    entries: of `w`, how many are made at once; at least 64 outputs' are.
  """
  if entries is None and jax.device_count() > 1:
    return dot(x, w, axis)
  other = 1 - axis
  total = w.shape[other]
  step = max(64, (entries or PART) // w.shape[axis] // 64 * 64)
  if not isinstance(w, Perturbed) or step >= total:
    return dot(x, w, axis)
  part = lambda start, size: w.part(start, size, other).dot(x, axis)

  def body(i, y):
    new = part(i * step, step)
    return jax.lax.dynamic_update_slice_in_dim(y, new, i * step, y.ndim - 1)

  whole, rest = divmod(total, step)
  y = jnp.zeros((*x.shape[:-1], total), x.dtype)
  y = jax.lax.fori_loop(0, whole, body, y)
  if rest:
    y = y.at[..., whole * step :].set(part(whole * step, rest))
  return y


def take(w: Any, index: jax.Array) -> jax.Array:
  """Rows of a table, an array or a box: [..., C] at integers [...].

  A table with fewer rows than are looked up is made whole.
  """
  if isinstance(w, Perturbed) and w.shape[0] > index.size:
    return w.take(index)
  return jnp.take(nn.meta.unbox(w), index, axis=0)


def cast(params: jt.Params, dtype: str | None) -> jt.Params:
  """The params in a dtype, arrays and boxes; as they are for None."""
  if dtype is None:
    return params
  return jax.tree.map(lambda x: x.astype(dtype), params, is_leaf=is_box)


def perturbed(
  params: jt.Params,
  direction: jt.Array,
  scale: jax.typing.ArrayLike,
  *,
  distribution: str = 'rademacher',
  form: str = 'temporary',
) -> jt.Params:
  """`perturb.perturb` of every tensor, in boxes.

  Args:
    params: pytree of floating-point arrays; those under `layers/` have a
      leading layer axis.
    direction: uint32[2].
    scale: float32[].
    distribution: see `perturb.perturb`.
    form: one of `FORMS`.

  Returns:
    Pytree like `params` with a `Perturbed` for every array. Opened, they have
    the bits of `perturb.perturb`; layer by layer under a loop over the layers.

  Raises:
    ValueError: if the distribution or the form is unknown, a shape is wrong, or
      two parameters have the same path.
    TypeError: if a parameter is not of a floating type (the path is named) or
      the direction is not uint32.
  """
  checks.distribution(distribution, perturb.DISTRIBUTIONS)
  checks.one_of('form', form, FORMS)
  direction = checks.key('direction', direction, '[2]')
  scale = jnp.asarray(scale, jnp.float32)
  if scale.ndim:
    raise ValueError(f'scale must be a scalar, got shape {scale.shape}')
  leaves = checks.named_arrays(params)
  boxes = []
  for (path, w), key in zip(
    leaves.items(), perturb._leaf_keys(direction, leaves), strict=True
  ):
    box = functools.partial(Perturbed, distribution=distribution, form=form)
    if not path.startswith(LAYERS):
      at = jnp.zeros(2, jnp.uint32)
      boxes.append(box(w, key, scale, at, aligned=True))
      continue
    count, (rows, _) = w.shape[0], xla.view(w.shape[1:])
    offset = np.zeros((count, 2), np.uint32)
    # the layers of scalars are the columns of one row
    offset[:, 0 if w.ndim > 1 else 1] = np.arange(count) * rows
    each = lambda x, n=count: jnp.broadcast_to(x, (n, *x.shape))
    boxes.append(
      box(
        w,
        each(key),
        each(scale),
        jnp.asarray(offset),
        aligned=w.ndim == 1 or rows % 64 == 0,
      )
    )
  return jax.tree.structure(params).unflatten(boxes)
