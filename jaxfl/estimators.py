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

import jax
import jax.numpy as jnp

from jaxfl import checks, lazy, perturb
from jaxfl import typing as jt

SIDES = ('two_sided', 'one_sided')  # names of functions
# Of the two sides: two programs, which share the directions that they add; one
# program that runs twice; or one batch, which reads every weight once.
ORDERS = ('unrolled', 'loop', 'batch')

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


def order_of(in_layers: str | None, sides_at_once: bool) -> str:
  """How the two sides are evaluated best, one of `ORDERS`.

  Raises:
    ValueError: for a form `in_layers` that `perturber` does not know.
  """
  if in_layers is not None:
    checks.one_of('in_layers', in_layers, lazy.FORMS)
  if sides_at_once:
    return 'batch'
  return 'unrolled' if in_layers is None else 'loop'


def _both_sides(loss_at, mu, order):
  """The losses at +mu and -mu, of a function scale -> loss."""
  if order == 'unrolled':
    return loss_at(mu), loss_at(-mu)
  scales = jnp.stack([mu, -mu])
  if order == 'batch':
    plus, minus = jax.vmap(loss_at)(scales)
  else:
    plus, minus = jax.lax.map(loss_at, scales)
  return plus, minus


def two_sided(
  loss_fn: jt.LossFn,
  perturbed: Perturb,
  directions: jax.Array,
  batches: jt.Batch,
  mu: jax.Array,
  *,
  order: str = 'unrolled',
) -> tuple[jax.Array, jax.Array]:
  """`(L(w + mu z) - L(w - mu z)) / (2 mu)`, each direction on its own batch.

  Args:
    loss_fn: params, batch -> float[]; need not be differentiable.
    perturbed: direction, scale -> params at w + scale z.
    directions: uint32[K, 2].
    batches: pytree of arrays with leading axis K.
    mu: float32[], perturbation radius.
    order: one of `ORDERS`.

  Returns:
    Projected gradients float32[K], and the mean of all losses float32[].
  """

  def estimate(args):
    direction, batch = args
    loss_at = lambda scale: loss_fn(perturbed(direction, scale), batch)
    plus, minus = _both_sides(loss_at, mu, order)
    return (plus - minus) / (2.0 * mu), 0.5 * (plus + minus)

  projected_grads, losses = jax.lax.map(estimate, (directions, batches))
  return projected_grads, losses.mean()


def one_sided(
  loss_fn: jt.LossFn,
  perturbed: Perturb,
  directions: jax.Array,
  batches: jt.Batch,
  mu: jax.Array,
  *,
  order: str = 'unrolled',
) -> tuple[jax.Array, jax.Array]:
  """`(L(w + mu z) - L(w)) / mu`, all directions on one batch.

  Args:
    loss_fn: params, batch -> float[].
    perturbed: direction, scale -> params at w + scale z.
    directions: uint32[K, 2].
    batches: pytree of arrays with leading axis 1.
    mu: float32[], perturbation radius.
    order: unused: directions are evaluated one after the other.

  Returns:
    Projected gradients float32[K], and the loss at w, float32[].
  """
  del order  # Unused.
  batch = jax.tree.map(lambda x: x[0], batches)
  base = loss_fn(perturbed(directions[0], 0.0 * mu), batch)

  def estimate(direction):
    return (loss_fn(perturbed(direction, mu), batch) - base) / mu

  return jax.lax.map(estimate, directions), base
