"""DP-SGD: noised sums of clipped gradients over secret Poisson samples.

"Deep learning with differential privacy", Abadi et al., CCS 2016,
https://arxiv.org/abs/1607.00133, algorithm 1, with clients.

    I_p = every example of client p with probability q, secret
    message = sum_{I_p} clip(g_i(x), C)                     to the aggregator
    release = (sum of messages + N(0, (z C)^2 I)) / (q N)   what others see
    x <- x - lr release

N is the number of all clients' examples, which is public, as q N is: the size
of a sample is not. The guarantee is for a record that is dropped, which moves
the sum by at most C. Beside DIFF2 (`jaxfl.methods.diff2`) this is what
sampling, in place of differences, makes of the same budget.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import (
  calibration,
  checks,
  master,
  noise,
  poisson,
  privacy,
  schedules,
)
from jaxfl import method as method_lib
from jaxfl import plan as plan_lib
from jaxfl import typing as jt


class DpSgdState(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of float32, on the grid
  exponents: Any  # pytree of int32[], the grid
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor
  round: jax.Array  # int32[]


def dp_sgd(
  loss_fn: jt.LossFn,
  *,
  plan: plan_lib.SampledPlan,
  learning_rate: float | jt.Schedule,
  clip_norm: float,
  num_examples: Sequence[int] | np.ndarray | None,
  microbatch_size: int = 64,
  research_float_noise: bool = False,
) -> method_lib.Method:
  """Builds DP-SGD.

  Args:
    loss_fn: params, batch -> float[], differentiable; a mean over examples.
    plan: of the run, from `calibration.dp_sgd`: rounds, q and z.
    learning_rate: a number or a function of the round.
    clip_norm: C, of the gradient of an example.
    num_examples: of every client, which is public; None for a replica that has
      none of them and follows releases.
    microbatch_size: gradients that a client holds at once.
    research_float_noise: the only noise there is for vectors. Floats only
      resemble the mechanism that is accounted for; say that you know.

  Returns:
    A `Method` with a `release`. `batches` of a client are what `prepare` makes
    of its examples: `{'examples', 'mask'}`, with a leading axis of one.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  calibration.check_bound('clip_norm', clip_norm)
  if not plan.noise_multiplier > 0:
    raise ValueError(
      f'noise_multiplier must be > 0, got {plan.noise_multiplier}'
    )
  if not 0 < plan.sampling_rate < 1:
    raise ValueError(
      f'sampling_rate must be in (0, 1), got {plan.sampling_rate}; dp_gd takes'
      ' all examples'
    )
  if microbatch_size < 1:
    raise ValueError(f'microbatch_size must be >= 1, got {microbatch_size}')
  checks.float_noise(research_float_noise)
  sizes = np.array([1] if num_examples is None else num_examples, np.int64)
  if not sizes.size or sizes.min() < 1:
    raise ValueError('num_examples: every client needs one example at least')
  lr_table = schedules.table(learning_rate, plan.num_rounds, 'learning_rate')
  divisor = plan.sampling_rate * float(sizes.sum())

  def client(state, local, batches, party):
    del party  # Unused: all clients do the same.
    given = jax.tree.map(lambda x: x[0], batches)
    found = privacy.clipped_sum(
      loss_fn,
      state.params,
      given['examples'],
      given['mask'],
      clip_norm=clip_norm,
      microbatch_size=microbatch_size,
    )
    return found.total, local, {'loss': found.loss}

  def release(state, messages, cohort, key):
    """The noised sum over what a sample has on average; on the host."""
    round = int(state.round)
    method_lib.check_release(round, plan.num_rounds, cohort, len(sizes))
    total = jax.tree.map(lambda x: np.zeros(x.shape[1:], np.float64), messages)
    for i in np.argsort(cohort.id):
      one = jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), messages)
      if all(np.isfinite(x).all() for x in jax.tree.leaves(one)):
        total = jax.tree.map(np.add, total, one)
    mean = jax.tree.map(lambda t: t / divisor, total)
    std = plan.noise_multiplier * clip_norm / divisor
    return noise.add_gaussian(key, mean, std, round=round, name='release')

  def server(state, releases, cohort):
    del cohort  # Unused: the release is the aggregator's.
    held = master.Master(state.params, state.exponents, state.overflow)
    lr = schedules.at(lr_table, state.round)
    step = jax.tree.map(lambda x: x[0], releases)
    return DpSgdState(*master.step(held, step, lr), state.round + 1)

  def prepare(params, examples, round, client, key):
    del params  # Unused: the aggregator draws the noise.
    samples, mask = poisson.draw(
      examples, 1, plan.sampling_rate, key, round=round,
      name=f'sample of {client}',
    )  # fmt: skip
    return {'examples': samples, 'mask': mask}

  def like(params):
    as_float32 = lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32)
    return jax.tree.map(as_float32, params)

  return method_lib.Method(
    init=lambda params: DpSgdState(*master.init(params), jnp.int32(0)),
    client=client,
    server=server,
    message=like,
    downlink=lambda state, releases, cohort: jax.tree.map(
      lambda x: x[0], releases
    ),
    receivers='everyone',
    follow=lambda state, down: server(
      state, jax.tree.map(lambda x: x[None], down), None
    ),
    num_batches=1,
    forwards=1,
    backwards=1,
    check=lambda state: master.check(state.overflow),
    release=method_lib.Release(release, like),
    prepare=prepare,
  )
