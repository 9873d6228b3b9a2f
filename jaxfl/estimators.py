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

from jaxfl import typing as jt

SIDES = ('two_sided', 'one_sided')  # names of functions

Perturb = Callable[[jax.Array, jax.Array], jt.Params]  # direction, scale


def cast(params: jt.Params, dtype: str | None) -> jt.Params:
  """The params in the dtype of a forward pass; as they are for None."""
  if dtype is None:
    return params
  return jax.tree.map(lambda x: x.astype(dtype), params)


def two_sided(
  loss_fn: jt.LossFn,
  perturbed: Perturb,
  directions: jax.Array,
  batches: jt.Batch,
  mu: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`(L(w + mu z) - L(w - mu z)) / (2 mu)`, each direction on its own batch.

  Args:
    loss_fn: params, batch -> float[]; need not be differentiable.
    perturbed: direction, scale -> params at w + scale z.
    directions: uint32[K, 2].
    batches: pytree of arrays with leading axis K.
    mu: float32[], perturbation radius.

  Returns:
    Projected gradients float32[K], and the mean of all losses float32[].
  """

  def estimate(args):
    direction, batch = args
    plus = loss_fn(perturbed(direction, mu), batch)
    minus = loss_fn(perturbed(direction, -mu), batch)
    return (plus - minus) / (2.0 * mu), 0.5 * (plus + minus)

  projected_grads, losses = jax.lax.map(estimate, (directions, batches))
  return projected_grads, losses.mean()


def one_sided(
  loss_fn: jt.LossFn,
  perturbed: Perturb,
  directions: jax.Array,
  batches: jt.Batch,
  mu: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`(L(w + mu z) - L(w)) / mu`, all directions on one batch.

  Args:
    loss_fn: params, batch -> float[].
    perturbed: direction, scale -> params at w + scale z.
    directions: uint32[K, 2].
    batches: pytree of arrays with leading axis 1.
    mu: float32[], perturbation radius.

  Returns:
    Projected gradients float32[K], and the loss at w, float32[].
  """
  batch = jax.tree.map(lambda x: x[0], batches)
  base = loss_fn(perturbed(directions[0], 0.0 * mu), batch)

  def estimate(direction):
    return (loss_fn(perturbed(direction, mu), batch) - base) / mu

  return jax.lax.map(estimate, directions), base
