"""Inverts a message: inputs that would have made the message that was seen.

The attacker knows the model, the method, all shared randomness, the labels, and
pictures of the same kind, from which it has a normal prior. It looks for

    x = argmin_x  mismatch(message of x, message seen) + |u|^2 / 2,
    x = mean + root u,   root root^T = covariance of the public pictures,

the likeliest inputs if the mismatch is a negative log-likelihood. Adam follows
the gradient through the message from several starts, drawn from the prior. The
mismatch is tempered: at first it tolerates differences as large as the message,
at last none but what is said of it. Of the ends the one of the least objective
is kept; the truth is not looked at.

References:
  Zhu, Liu and Han, "Deep leakage from gradients", NeurIPS 2019,
    https://arxiv.org/abs/1906.08935.
  Geiping, Bauermeister, Droege and Moeller, "Inverting gradients - how easy is
    it to break privacy in federated learning?", NeurIPS 2020,
    https://arxiv.org/abs/2003.14053.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from jaxfl import typing as jt

# evidence, params, x float[B, D], labels int[B], temper float[] -> float[]
Mismatch = Callable[..., jax.Array]
_FLOOR = 1e-4  # added to the variances of the prior, in pixels squared
_COLDEST = 1e-3  # the last temper but zero


class Prior(NamedTuple):
  """What inputs look like before a message is seen.

  Attributes:
    mean: float32[D].
    root: float32[D, D].
  """

  mean: np.ndarray
  root: np.ndarray


class Effort(NamedTuple):
  """How hard the attacker tries.

  Attributes:
    restarts: starts of the search.
    steps: of Adam, from every start.
    learning_rate: in standard deviations of the prior; decays to zero.
  """

  restarts: int = 4
  steps: int = 1000
  learning_rate: float = 0.1


def prior_of(examples: np.ndarray) -> Prior:
  """The normal law with the mean and covariance of examples [N, D]."""
  mean = examples.mean(0)
  covariance = np.cov(examples.T.astype(np.float64))
  root = np.linalg.cholesky(covariance + _FLOOR * np.eye(len(mean)))
  return Prior(mean.astype(np.float32), root.astype(np.float32))


def inputs(prior: Prior, u: jax.Array) -> jax.Array:
  """Inputs float32[B, D] of standard normal coordinates [B, D]."""
  return u @ prior.root.T + prior.mean[None]


def tempers(steps: int) -> np.ndarray:
  """float32[steps]: from 1 to `_COLDEST`, then zero in the last quarter."""
  falling = max(1, steps - steps // 4)
  temper = np.zeros(steps, np.float32)
  temper[:falling] = np.geomspace(1.0, _COLDEST, falling)
  return temper


def draw_starts(effort: Effort, batch: int, size: int, seed) -> np.ndarray:
  """float32[restarts, batch, size]: draws from the prior."""
  rng = np.random.default_rng(seed)
  shape = (effort.restarts, batch, size)
  return rng.standard_normal(shape, np.float32)


@functools.partial(jax.jit, static_argnames=('mismatch', 'effort'))
def reconstruct(
  mismatch: Mismatch,
  evidence: Any,
  params: jt.Params,
  labels: jax.Array,
  prior: Prior,
  starts: jax.Array,
  effort: Effort,
) -> tuple[jax.Array, jax.Array]:
  """The inputs that explain a message best.

  Args:
    mismatch: of a message and inputs, differentiable in the inputs; a negative
      log-likelihood at temper 0.
    evidence: pytree of arrays, what was seen of the message.
    params: at which the message was made.
    labels: int32[B].
    prior: of the inputs.
    starts: float32[S, B, D], of `draw_starts`.
    effort: static.

  Returns:
    float32[B, D], clipped to [0, 1]; and the objective of it, float32[].
  """

  def objective(u, temper):
    x = inputs(prior, u)
    fit = mismatch(evidence, params, x, labels, temper)
    return fit + 0.5 * jnp.sum(jnp.square(u))

  decay = optax.cosine_decay_schedule(effort.learning_rate, effort.steps)
  optimizer = optax.adam(decay, b2=0.99)

  def step(carry, temper):
    u, state = carry
    grads = jax.grad(objective)(u, temper)
    updates, state = optimizer.update(grads, state, u)
    return (optax.apply_updates(u, updates), state), None

  def search(u):
    start = (u, optimizer.init(u))
    end: Any = jax.lax.scan(step, start, tempers(effort.steps))[0][0]
    return inputs(prior, end), objective(end, jnp.float32(0.0))

  ends, values = jax.vmap(search)(starts)
  best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
  return jnp.clip(ends[best], 0.0, 1.0), values[best]


class Error(NamedTuple):
  """How far reconstructions are from the truth, at the best assignment.

  Attributes:
    relative: squared error over that of guessing `mean` for every input; 0 is
      exact, 1 is nothing learnt.
    psnr: peak signal-to-noise ratio of pixels in [0, 1], in dB.
  """

  relative: float
  psnr: float


def error(found: Any, truth: Any, mean: Any) -> Error:
  """Compares inputs [B, D] in any order with the truth.

  Raises:
    ValueError: if the shapes differ.
  """
  found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
  if found.shape != truth.shape:
    raise ValueError(f'shapes differ: {found.shape} and {truth.shape}')
  squares = np.square(found[:, None] - truth[None]).sum(-1)
  least = squares[optimize.linear_sum_assignment(squares)].sum()
  guess = np.square(truth - np.asarray(mean, np.float64)).sum()
  per_pixel = max(least / truth.size, 1e-12)
  return Error(float(least / guess), float(-10 * np.log10(per_pixel)))
