"""The local steps of DIFF2: what one client does with a released gradient.

The equations are in `jaxfl.methods.diff2`. Samples and noise are drawn by the
client on its host; nobody else knows them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import keys, privacy
from jaxfl import noise as noise_lib
from jaxfl import plan as plan_lib
from jaxfl import typing as jt

NOISE = 'noise'  # in the batches of a client whose turn it is


def check(plan: plan_lib.Plan, num_clients: int) -> None:
  """Checks the part of a plan that local steps need.

  Raises:
    ValueError: naming the field.
  """
  if plan.num_clients != num_clients:
    raise ValueError(
      f'the plan is for turns of {plan.num_clients} clients, there are'
      f' {num_clients}'
    )
  if not 0 < plan.sampling_rate < 1:
    raise ValueError(
      f'sampling_rate must be in (0, 1), got {plan.sampling_rate}'
    )
  if not plan.noise_multiplier_local > 0:
    raise ValueError(
      'noise_multiplier_local must be > 0 with local steps, got'
      f' {plan.noise_multiplier_local}'
    )


def prepare(
  plan: plan_lib.Plan,
  params: jt.Params,
  examples: jt.Batch,
  round: int,
  client: int,
  key: noise_lib.NoiseKey,
) -> jt.Batch:
  """The samples and the noise of a client's local steps.

  Args:
    plan: of the run.
    params: pytree of the shapes that are trained.
    examples: all of the client's, see `Method.prepare`.
    round: of the exchange.
    client: its id.
    key: private.

  Returns:
    `{'examples', 'mask', 'noise'}` with a leading axis of one: arrays
    [K - 1, S, ...], bool[K - 1, S], and standard normal noise, a pytree like
    params with a leading axis of K - 1. S is large enough for all samples but
    one in 10**12; what is more is left out.
  """
  noise_lib.check_key(key)
  examples = dict(examples)
  present = np.flatnonzero(examples.pop('example_weight') > 0)
  steps, rate = plan.local_steps - 1, plan.sampling_rate
  chosen = key.bernoulli(
    (steps, len(present)), rate, round=round, name=f'samples of {client}'
  )
  # one size for all clients: the arrays are as long as the largest's
  longest = len(next(iter(examples.values())))
  size = min(longest, _most(rate * longest))
  rows = np.zeros((steps, size), np.int64)
  mask = np.zeros((steps, size), bool)
  for step, flags in enumerate(chosen):
    found = present[flags][:size]
    rows[step, : len(found)], mask[step, : len(found)] = found, True
  noise = [
    key.gaussian(
      (steps, *np.shape(x)), 1.0, round=round, name=f'steps of {client}/{path}'
    ).astype(np.float32)
    for path, x in keys.named_leaves(params)
  ]
  made = {
    'examples': {name: np.asarray(x)[rows] for name, x in examples.items()},
    'mask': mask,
    NOISE: jax.tree.structure(params).unflatten(noise),
  }
  return jax.tree.map(lambda x: x[None], made)


def _most(mean: float) -> int:
  """A number that a sum of coins with this mean exceeds once in 10**12."""
  return math.ceil(mean + 8.0 * math.sqrt(mean) + 20.0)


def steps(
  loss_fn: jt.LossFn,
  params: jt.Params,
  estimate: jt.Params,
  given: dict[str, Any],
  *,
  plan: plan_lib.Plan,
  learning_rate: jax.Array,
  clip_norm_diff: float,
  batch_size: jax.Array,
  microbatch_size: int,
) -> tuple[jt.Params, jax.Array]:
  """K steps from a released gradient.

  Args:
    loss_fn: params, batch -> float[].
    params: pytree of float32, x_r.
    estimate: likewise, v_r.
    given: what `prepare` made, without its leading axis.
    plan: of the run.
    learning_rate: float32[].
    clip_norm_diff: C2.
    batch_size: float32[], b: the mean number of examples of a sample.
    microbatch_size: gradients that are held at once.

  Returns:
    y_0 - y_K, a pytree of float32 that is private by its noise, and float32[],
    the mean loss at the steps, which is not.
  """
  z = np.float32(plan.noise_multiplier_local)
  move = lambda y, w: jax.tree.map(lambda a, b: a - learning_rate * b, y, w)

  def step(carry, x):
    old, y, w = carry
    examples, mask, noise = x
    moved = jax.tree.map(jnp.subtract, y, old)
    clip = np.float32(clip_norm_diff) * _norm(moved)
    found = privacy.clipped_difference_sum(
      loss_fn,
      y,
      old,
      examples,
      mask,
      clip_norm=clip,
      microbatch_size=microbatch_size,
    )
    w = jax.tree.map(
      lambda a, total, n: a + (total + z * clip * n) / batch_size,
      w,
      found.total,
      noise,
    )
    return (y, move(y, w), w), found.loss

  start = (params, move(params, estimate), estimate)
  samples = (given['examples'], given['mask'], given[NOISE])
  (_, last, _), losses = jax.lax.scan(step, start, samples)
  return jax.tree.map(jnp.subtract, params, last), jnp.mean(losses)


def _norm(tree: jt.Params) -> jax.Array:
  squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares, jnp.float32(0.0)))
