"""Weights that are made where they are used: one layer at a time.

A box stands in a tree of parameters for an array that is not there yet. Models
made for it (`jaxfl.models`) open a box where they use the parameter, inside of
the loop over their layers, so that no whole copy of the weights is made:

    params = perturbed(params, direction, mu)
    loss = loss_fn(params, batch)

Boxes are those of Flax: `self.param` opens them unasked, and the loop over the
layers cuts them like arrays, as they are pytrees whose arrays all have a layer
axis (but for parameters outside of the layers). There are

  * `Perturbed`, `Factored`: `w + scale * z`, as of `perturb.perturb`.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxfl import checks, perturb
from jaxfl import typing as jt
from jaxfl.kernels import lowrank, xla  # pyright: ignore[reportMissingImports]

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

  def dot(self, x: jax.Array, axis: int = 0) -> jax.Array:
    """Contracts the last axis of `x` with an axis of this matrix."""
    return _dot(x, self.unbox(), axis)

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
    return self.convert(self.make())

  def convert(self, w: jax.Array) -> jax.Array:
    """The array, or rows of it, after the casts."""
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
  """Makes a dataclass a pytree; `meta` are its static fields."""

  def wrap(cls):
    names = [f.name for f in dataclasses.fields(cls)]
    data = [name for name in names if name not in meta]
    return jax.tree_util.register_dataclass(cls, data, meta)

  return wrap


class Step(Box):
  """`base + scale * z`: what `Perturbed` and `Factored` share.

  Attributes:
    base: float[...].
    scale: float32[].
    form: one of `FORMS`.
  """

  base: Any
  scale: Any
  form: str

  @property
  def shape(self):
    return self.base.shape

  @property
  def made_dtype(self):
    return self.base.dtype

  @abc.abstractmethod
  def dot_z(self, x: jax.Array, axis: int) -> jax.Array:
    """`dot` with z instead, float32."""

  @abc.abstractmethod
  def rows_of_z(self, index: jax.Array) -> jax.Array:
    """z of the rows of a matrix, float32[..., C] at uint32[...]."""

  @abc.abstractmethod
  def part(self, start: Any, size: int, axis: int) -> 'Step':
    """The box of a part of a matrix; a first row is a multiple of 64."""

  def dot(self, x, axis=0):
    if self.form == 'temporary':
      return super().dot(x, axis)
    total = _dot32(x, self.base, axis) + self.scale * self.dot_z(x, axis)
    return total.astype(x.dtype)

  def take(self, index: jax.Array) -> jax.Array:
    """Rows of a matrix, [..., C] at integers [...]; nan for none."""
    rows = jnp.where(index < 0, index + self.shape[0], index)
    step = xla.times(self.scale, self.rows_of_z(rows.astype(jnp.uint32)))
    w = jnp.take(self.base, index, axis=0)
    return self.convert((w.astype(jnp.float32) + step).astype(w.dtype))


@register('distribution', 'form', 'aligned', 'casts')
@dataclasses.dataclass(frozen=True)
class Perturbed(Step):
  """A tensor, or a rectangle of its (R, C) view, along a field of `xla`.

  Attributes:
    base, scale, form, casts: see `Step` and `Box`.
    key: the leaf key, uint32[2]; uint32[5] for 'walsh'.
    offset: row and column of the rectangle, uint32[2].
    distribution: of z.
    aligned: whether the row is a multiple of 64.
  """

  base: Any
  scale: Any
  key: Any
  offset: Any
  distribution: str
  form: str
  aligned: bool
  casts: tuple[str, ...] = ()

  def _where(self):
    return {
      'distribution': self.distribution,
      'offset': (self.offset[0], self.offset[1]),
      'aligned': self.aligned,
    }

  def make(self):
    return xla.add(self.base, self.key, self.scale, **self._where())

  def dot_z(self, x, axis):
    z = xla.field(self.key, self.shape, **self._where())
    return _dot32(x, z, axis)

  def rows_of_z(self, index):
    return xla.field_rows(
      self.key,
      index + self.offset[0],
      self.shape[1],
      distribution=self.distribution,
    )

  def part(self, start, size, axis):
    base = jax.lax.dynamic_slice_in_dim(self.base, start, size, axis)
    move = jnp.zeros(2, jnp.uint32).at[axis].set(jnp.uint32(start))
    return dataclasses.replace(self, base=base, offset=self.offset + move)


@register('form', 'casts')
@dataclasses.dataclass(frozen=True)
class Factored(Step):
  """A tensor along a low-rank direction, z = u v / sqrt(r).

  Attributes:
    base, scale, form, casts: see `Step` and `Box`.
    u: signs, int8[..., R, r]; small enough to be held for all layers.
    v: signs, int8[..., r, C].
  """

  base: Any
  scale: Any
  u: Any
  v: Any
  form: str
  casts: tuple[str, ...] = ()

  def _unit(self):
    return np.float32(self.u.shape[-1] ** -0.5)

  def make(self):
    step = xla.times(self.scale, _z(self.u, self.v).reshape(self.shape))
    return (self.base.astype(jnp.float32) + step).astype(self.base.dtype)

  def dot_z(self, x, axis):
    u, v = (self.u, self.v) if axis == 0 else (self.v.T, self.u.T)
    inner = _dot32(x, u, 0) * self._unit()
    return jnp.dot(inner, v.astype(jnp.float32))

  def rows_of_z(self, index):
    return _z(self.u[index], self.v)

  def part(self, start, size, axis):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    if axis == 0:
      return dataclasses.replace(self, base=cut(self.base), u=cut(self.u))
    return dataclasses.replace(self, base=cut(self.base), v=cut(self.v))


def _z(u, v):
  """z from factors; exact, as its entries are integers over sqrt(r)."""
  z = jnp.matmul(
    u.astype(jnp.bfloat16),
    v.astype(jnp.bfloat16),
    preferred_element_type=jnp.float32,
  )
  return z * np.float32(u.shape[-1] ** -0.5)


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
    entries: of `w`, how many are made at once; at least 128 outputs' are.
  """
  if entries is None and jax.device_count() > 1:
    return dot(x, w, axis)
  other = 1 - axis
  total = w.shape[other]
  step = max(128, (entries or PART) // w.shape[axis] // 128 * 128)
  if not isinstance(w, Step) or step >= total:
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
  if isinstance(w, Step) and w.shape[0] > index.size:
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
    direction: uint32[2], or [3] for 'walsh'.
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
  checks.one_of('form', form, FORMS)
  direction = perturb.checked('direction', direction, distribution, '')
  scale = jnp.asarray(scale, jnp.float32)
  if scale.ndim:
    raise ValueError(f'scale must be a scalar, got shape {scale.shape}')
  leaves = checks.named_arrays(params)
  step = _factored if distribution in lowrank.RANKS else _field_step
  fields = perturb.leaf_fields(direction, leaves, distribution)
  boxes = [
    step(
      w, field.keys, scale, field.distribution, form, path.startswith(LAYERS)
    )
    for (path, w), field in zip(leaves.items(), fields, strict=True)
  ]
  return jax.tree.structure(params).unflatten(boxes)


def _each(x, count):
  """The same for all layers."""
  return jnp.broadcast_to(x, (count, *jnp.shape(x)))


def _field_step(w, key, scale, distribution, form, stacked):
  """A `Perturbed`, with a layer axis for a stacked tensor."""
  if not stacked:
    at = jnp.zeros(2, jnp.uint32)
    return Perturbed(w, scale, key, at, distribution, form, aligned=True)
  count, (rows, _) = w.shape[0], xla.view(w.shape[1:])
  offset = np.zeros((count, 2), np.uint32)
  # the layers of scalars are the columns of one row
  offset[:, 0 if w.ndim > 1 else 1] = np.arange(count) * rows
  aligned = w.ndim == 1 or rows % 64 == 0
  shared = _each(scale, count), _each(key, count), jnp.asarray(offset)
  return Perturbed(w, *shared, distribution, form, aligned)


def _factored(w, key, scale, distribution, form, stacked):
  """A `Factored`, with a layer axis for a stacked tensor."""
  rank = lowrank.RANKS[distribution]
  u, v = lowrank.factors(key, w.shape, rank, dtype=jnp.int8)
  if not stacked:
    return Factored(w, scale, u, v, form)
  count = w.shape[0]
  if w.ndim == 1:  # the layers are the columns of one matrix
    u, v = _each(u, count), v.T[:, :, None]
  elif w.ndim == 2:  # they are its rows
    u, v = u[:, None], _each(v, count)
  return Factored(w, _each(scale, count), u, v, form)
