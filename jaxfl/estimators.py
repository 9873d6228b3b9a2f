"""Gradient estimates from loss values along shared directions.

The parameters are never written: both sides of a difference start from the same
immutable tensors, so that nothing drifts.

References:
  Spall, "Multivariate stochastic approximation using a simultaneous
  perturbation gradient approximation", IEEE TAC 1992, eq. 2.2.
  Malladi et al., "Fine-tuning language models with just forward passes"
  (MeZO), NeurIPS 2023, arXiv:2305.17333, definition 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import checks, lazy, perturb, schedules
from jaxfl import method as method_lib
from jaxfl import typing as jt

SIDES = ('two_sided', 'one_sided')  # names of functions
_LARGEST = np.float32(2.0**100)  # whose inverse is a normal number

Perturb = Callable[[jax.Array, jax.Array], jt.Params]  # direction, scale


def perturber(
  params: jt.Params,
  *,
  distribution: str,
  dtype: str | None,
  in_layers: str | None,
) -> Perturb:
  """The function direction, scale -> params at w + scale z for a loss.

  Args:
    params: pytree of floating-point arrays.
    distribution: of the directions, see `perturb`.
    dtype: in which the loss sees the params; None for their own.
    in_layers: None for arrays, which any loss takes; a form of `jaxfl.lazy` for
      boxes, which a loss must be made for.
  """

  def perturbed(direction, scale):
    if in_layers is None:
      moved = perturb.perturb(
        params, direction, scale, distribution=distribution
      )
    else:
      moved = lazy.perturbed(
        params, direction, scale, distribution=distribution, form=in_layers
      )
    return lazy.cast(moved, dtype)

  return perturbed


class Passes(NamedTuple):
  """How the forward passes of a round follow each other; from `passes`.

  Attributes:
    shared: two programs for two sides, which share the direction that they add;
      or one program that runs twice, for boxes, which add it as they go.
    at_once: forward passes that are one batch.
  """

  shared: bool = True
  at_once: int = 1


def passes(
  in_layers: str | None,
  forwards_at_once: int,
  *,
  num_perturbations: int = 1,
  sides: str = 'two_sided',
) -> Passes:
  """Checks how a method wants its forward passes.

  Args:
    in_layers: see `perturber`.
    forwards_at_once: passes that run as one batch, with so many times the
      activations; every weight is read once for all of them, and with
      `in_layers='split'` is an operand of one product for all of them. Two are
      the sides of a direction, 2 n the sides of n directions.
    num_perturbations: directions that are evaluated at the same params.
    sides: one of `SIDES`.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  if in_layers is not None:
    checks.one_of('in_layers', in_layers, lazy.FORMS)
  each = 2 if sides == 'two_sided' else 1
  most = each * num_perturbations
  if not 1 <= forwards_at_once <= most:
    raise ValueError(
      f'forwards_at_once must be in [1, {most}], the forward passes at the same'
      f' params; got {forwards_at_once}'
    )
  if forwards_at_once > 1 and forwards_at_once % each:
    raise ValueError(
      'forwards_at_once must be 1 or even for two sides of every direction, got'
      f' {forwards_at_once}'
    )
  return Passes(in_layers is None, forwards_at_once)


def _both_sides(loss_at, mu, passes):
  """The losses at +mu and -mu, of a function scale -> loss."""
  if passes.at_once == 1 and passes.shared:
    return loss_at(mu), loss_at(-mu)
  plus, minus = _map(loss_at, jnp.stack([mu, -mu]), min(passes.at_once, 2))
  return plus, minus


def _map(function, xs, size):
  """`lax.map`, with `size` elements at once under `vmap`."""
  return jax.lax.map(function, xs, batch_size=size if size > 1 else None)


def two_sided(
  loss_fn: jt.LossFn,
  perturbed: Perturb,
  directions: jax.Array,
  batches: jt.Batch,
  mu: jax.Array,
  passes: Passes,
) -> tuple[jax.Array, jax.Array]:
  """`(L(w + mu z) - L(w - mu z)) / (2 mu)`, each direction on its own batch.

  Args:
    loss_fn: params, batch -> float[]; need not be differentiable.
    perturbed: direction, scale -> params at w + scale z.
    directions: uint32[K, 2].
    batches: pytree of arrays with leading axis K.
    mu: float32[], perturbation radius.
    passes: from the function `passes`.

  Returns:
    Projected gradients float32[K], and the mean of all losses float32[].
  """

  def estimate(args):
    direction, batch = args
    loss_at = lambda scale: loss_fn(perturbed(direction, scale), batch)
    plus, minus = _both_sides(loss_at, mu, passes)
    return (plus - minus) / (2.0 * mu), 0.5 * (plus + minus)

  projected_grads, losses = _map(
    estimate, (directions, batches), passes.at_once // 2
  )
  return projected_grads, losses.mean()


def one_sided(
  loss_fn: jt.LossFn,
  perturbed: Perturb,
  directions: jax.Array,
  batches: jt.Batch,
  mu: jax.Array,
  passes: Passes,
) -> tuple[jax.Array, jax.Array]:
  """`(L(w + mu z) - L(w)) / mu`, all directions on one batch.

  Args:
    loss_fn: params, batch -> float[].
    perturbed: direction, scale -> params at w + scale z.
    directions: uint32[K, 2].
    batches: pytree of arrays with leading axis 1.
    mu: float32[], perturbation radius.
    passes: from the function `passes`; the one at w runs on its own.

  Returns:
    Projected gradients float32[K], and the loss at w, float32[].
  """
  batch = jax.tree.map(lambda x: x[0], batches)
  base = loss_fn(perturbed(directions[0], 0.0 * mu), batch)

  def estimate(direction):
    return (loss_fn(perturbed(direction, mu), batch) - base) / mu

  return _map(estimate, directions, passes.at_once), base


def slope(
  loss_fn: jt.LossFn,
  params: jt.Params,
  directions: jax.Array,
  claims: jax.Array,
  batch: jt.Batch,
  mu: jax.Array,
  *,
  distribution: str,
  dtype: str | None,
) -> jax.Array:
  """Checks claimed projected gradients c_k all at once, by two forward passes.

  Along v = sum_k c_k z_k / |c| the loss rises by sum_k c_k g_k / |c|, where g_k
  are the projected gradients of this batch: |c| if they are those claimed, and
  as likely negative as positive if they have nothing to do with each other.

  Args:
    loss_fn: params, batch -> float[].
    params: pytree of floating-point arrays.
    directions: uint32[K, ...].
    claims: float32[K]; what is not finite counts as 0.
    batch: one minibatch.
    mu: float32[], perturbation radius.
    distribution: of the directions, see `perturb`.
    dtype: in which the loss sees the params; None for their own.

  Returns:
    (L(w + mu v) - L(w - mu v)) / (2 mu), float32[]; 0 if all claims are.
  """
  unit = unit_length(claims)

  def loss_at(radius):
    def move(params, x):
      direction, part = x
      moved = perturb.perturb(
        params, direction, radius * part, distribution=distribution
      )
      return moved, None

    moved = jax.lax.scan(move, params, (directions, unit))[0]
    return loss_fn(lazy.cast(moved, dtype), batch)

  plus, minus = loss_at(mu), loss_at(-mu)
  return (plus - minus) / (2.0 * mu)


def unit_length(claims: jax.Array) -> jax.Array:
  """c / |c|, float32[K], whatever their range; what is not finite is 0."""
  claims = jnp.where(jnp.isfinite(claims), claims, 0.0)
  claims = jnp.clip(claims, -_LARGEST, _LARGEST)
  largest = jnp.max(jnp.abs(claims))
  scaled = claims / jnp.where(largest > 0, largest, 1.0)
  length = jnp.sqrt(jnp.sum(jnp.square(scaled)))
  return scaled / jnp.where(length > 0, length, 1.0)


def probe(
  loss_fn: jt.LossFn,
  claims: Callable[..., tuple[jax.Array, jax.Array]],
  mu_table: np.ndarray,
  distribution: str,
  dtype: str | None,
) -> method_lib.Probe:
  """The probe of a method of projected gradients, from its `claims`."""

  def along(params, directions, claimed, batch, round):
    return slope(
      loss_fn,
      params,
      directions,
      claimed,
      batch,
      schedules.at(mu_table, round),
      distribution=distribution,
      dtype=dtype,
    )

  return method_lib.Probe(claims, along, forwards=2)
