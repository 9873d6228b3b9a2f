"""DIFF2 and DP-GD: private gradient descent by gradient differences.

"DIFF2: differential private optimization via gradient differences for
nonconvex distributed learning", Murata and Suzuki, ICML 2023,
https://arxiv.org/abs/2302.03884; the gradient-descent routine.

    r % T == 0   v_r = mean clip(g_i(x_r), C1) + noise
    else         v_r = v_{r-1} + mean clip(g_i(x_r) - g_i(x_{r-1}), c_r) + noise
                 c_r = C2 |x_r - x_{r-1}|
    x_{r+1} = x_r - lr v_r

`mean` is over P clients and the n_p examples of each; every client takes part
in every round, with all its examples. T = 1 is DP-GD. Clients send clipped
means to an aggregator that everybody trusts. It adds the noise, and its release
is all that others, and the log, ever see: weights are a function of releases.

Noise is relative to how far one unit moves the mean. For a record that is
replaced that is 2 C / (P min n_p), and for a client that is replaced 2 C / P.
What bounds it is the clip of examples; the aggregator clips every client's mean
again, so that a faulty client can't do more.

The server's arithmetic is exact: sums of released floats are rounded once,
steps are integers on the grid of `jaxfl.grid`, and c_r is found from integers.
Clients and aggregator agree on it to the last bit, on any device.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import (
  calibration,
  checks,
  grid,
  master,
  noise,
  privacy,
  schedules,
)
from jaxfl import method as method_lib
from jaxfl import plan as plan_lib
from jaxfl import typing as jt

UNITS = ('record', 'client')


class Diff2State(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of float32, x_r, on the grid
  exponents: Any  # pytree of int32[], the grid
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor
  previous: Any  # pytree of float32, x_{r-1}
  estimate: Any  # pytree of float32, v_{r-1}
  clip: jax.Array  # float32[], of what is released next: C1 or c_r
  round: jax.Array  # int32[]


def diff2(
  loss_fn: jt.LossFn,
  *,
  plan: plan_lib.Plan,
  learning_rate: float | jt.Schedule,
  clip_norm: float,
  clip_norm_diff: float = 1.0,
  num_examples: Sequence[int] | np.ndarray | None,
  unit: str = 'record',
  microbatch_size: int = 64,
  allow_unstable: bool = False,
  research_float_noise: bool = False,
) -> method_lib.Method:
  """Builds DIFF2, or DP-GD if the plan restarts in every round.

  Args:
    loss_fn: params, batch -> float[], differentiable; a mean over examples.
    plan: of the run, from `calibration.diff2`: rounds, T, z1 and z2.
    learning_rate: a number or a function of the round.
    clip_norm: C1, of the gradient of an example.
    clip_norm_diff: C2, of a difference, over the length of the step.
    num_examples: of every client, which is public; None for a replica that
      has none of them and follows releases.
    unit: what the guarantee is for, `record` or `client`.
    microbatch_size: gradients that a client holds at once.
    allow_unstable: run although the noise of differences grows without end, see
      `plan.noise_growth`.
    research_float_noise: the only noise there is for vectors. Floats only
      resemble the mechanism that is accounted for; say that you know.

  Returns:
    A `Method` with a `release`. `batches` of a client are all its examples and
    `example_weight`, 1 or 0 for padding, with a leading axis of one.

  Raises:
    ValueError: naming the argument that is out of range; for noise that grows,
      as soon as the method sees the parameters.
  """
  checks.one_of('unit', unit, UNITS)
  for field, value in (
    ('clip_norm', clip_norm),
    ('clip_norm_diff', clip_norm_diff),
  ):
    calibration.check_bound(field, value)
  if plan.local_steps != 1:
    raise ValueError(f'the plan has local_steps={plan.local_steps}, not 1')
  if not plan.noise_multiplier > 0:
    raise ValueError(
      f'noise_multiplier must be > 0, got {plan.noise_multiplier}'
    )
  if plan.restart_interval > 1 and not plan.noise_multiplier_diff > 0:
    raise ValueError(
      'noise_multiplier_diff must be > 0 between restarts, got'
      f' {plan.noise_multiplier_diff}'
    )
  if microbatch_size < 1:
    raise ValueError(f'microbatch_size must be >= 1, got {microbatch_size}')
  if not research_float_noise:
    raise ValueError(
      'research_float_noise must be set: the noise of a vector is made of'
      ' floats, whose gaps can tell neighbouring values apart'
    )
  # without clients, one that nobody asks for
  sizes = np.array([1] if num_examples is None else num_examples, np.int64)
  if not sizes.size or sizes.min() < 1:
    raise ValueError('num_examples: every client needs one example at least')
  lr_table = schedules.table(learning_rate, plan.num_rounds, 'learning_rate')
  num_clients = len(sizes)
  divisor = num_clients * (sizes.min() if unit == 'record' else 1)
  interval = plan.restart_interval

  def check(params):
    if interval == 1 or allow_unstable or num_examples is None:
      return
    growth = plan_lib.noise_growth(
      plan,
      learning_rate=float(lr_table.max()),
      clip_norm_diff=clip_norm_diff,
      num_params=sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params)),
      num_examples=int(divisor),
    )
    if growth >= 1:
      raise ValueError(
        f'the noise of differences would grow by a factor of e**{growth:.3g} in'
        ' a restart interval: lower learning_rate, clip_norm_diff or'
        ' restart_interval, or set allow_unstable'
      )

  def init(params):
    check(params)
    held = master.init(params)
    zeros = jax.tree.map(jnp.zeros_like, held.params)
    return Diff2State(
      *held, held.params, zeros, jnp.float32(clip_norm), jnp.int32(0)
    )

  def client(state, local, batches, party):
    examples = jax.tree.map(lambda x: x[0], batches)
    mask = examples.pop('example_weight')
    sized = {'microbatch_size': microbatch_size}

    def full(state):
      return privacy.clipped_sum(
        loss_fn, state.params, examples, mask, clip_norm=state.clip, **sized
      )

    def difference(state):
      return privacy.clipped_difference_sum(
        loss_fn,
        state.params,
        state.previous,
        examples,
        mask,
        clip_norm=state.clip,
        **sized,
      )

    if interval == 1:
      found = full(state)
    else:
      found = jax.lax.cond(state.round % interval == 0, full, difference, state)
    share = jnp.asarray(1.0 / sizes, jnp.float32)[party.id]
    message = jax.tree.map(lambda x: x * share, found.total)
    return message, local, {'loss': found.loss}

  def release(state, messages, cohort, key):
    """The noised mean; on the host, by the aggregator."""
    round = int(state.round)
    if round >= plan.num_rounds:
      raise ValueError(
        f'the budget is spent: the plan has {plan.num_rounds} rounds'
      )
    if len(cohort.id) != num_clients:
      raise ValueError(
        f'{len(cohort.id)} of {num_clients} clients take part: a mean over'
        ' fewer is not what the plan releases'
      )
    bound = float(state.clip)
    z = plan.noise_multiplier
    if round % interval:
      z = plan.noise_multiplier_diff
    order = np.argsort(cohort.id)
    total = jax.tree.map(lambda x: np.zeros(x.shape[1:], np.float64), messages)
    for i in order:
      one = jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), messages)
      factor = _factor(one, bound)
      if factor:
        total = jax.tree.map(lambda t, x, f=factor: t + f * x, total, one)
    mean = jax.tree.map(lambda t: t / num_clients, total)
    std = z * 2.0 * bound / divisor
    return noise.add_gaussian(key, mean, std, round=round, name='release')

  def server(state, releases, cohort):
    del cohort  # Unused: the release is the aggregator's.
    restart = state.round % interval == 0
    estimate = jax.tree.map(
      lambda old, new: jnp.where(restart, new[0], old + new[0]),
      state.estimate,
      releases,
    )
    lr = schedules.at(lr_table, state.round)

    def step(x, v, e):
      # products only, each rounded once; a sum on the grid is exact
      units = jnp.rint((lr * v) * grid.power_of_two(e))
      return grid.positive_zero(x - units * grid.power_of_two(-e))

    params = jax.tree.map(step, state.params, estimate, state.exponents)
    left = grid.out_of_range(params, state.exponents)
    next_round = state.round + 1
    moved = jax.tree.map(jnp.subtract, params, state.params)
    clip = np.float32(clip_norm_diff) * exact_norm(moved)
    return Diff2State(
      params=params,
      exponents=state.exponents,
      overflow=jax.tree.map(jnp.logical_or, state.overflow, left),
      previous=state.params,
      estimate=estimate,
      clip=jnp.where(next_round % interval == 0, np.float32(clip_norm), clip),
      round=next_round,
    )

  def like(params):
    check(params)
    as_float32 = lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32)
    return jax.tree.map(as_float32, params)

  def follow(state, down):
    return server(state, jax.tree.map(lambda x: x[None], down), None)

  return method_lib.Method(
    init=init,
    client=client,
    server=server,
    message=like,
    downlink=lambda state, releases, cohort: jax.tree.map(
      lambda x: x[0], releases
    ),
    receivers='everyone',
    follow=follow,
    num_batches=1,
    forwards=2 if interval > 1 else 1,  # one less in rounds that restart
    backwards=2 if interval > 1 else 1,
    check=lambda state: master.check(state.overflow),
    release=method_lib.Release(release, like),
  )


def _factor(tree: Any, bound: float) -> float:
  """What scales a float64 tree down to a norm of `bound`; 0 if not finite."""
  norm = math.sqrt(sum(float(np.vdot(x, x)) for x in jax.tree.leaves(tree)))
  if not math.isfinite(norm):
    return 0.0
  return min(1.0, bound / norm) if norm else 1.0


def exact_norm(tree: Any) -> jax.Array:
  """The norm of a pytree to about 12 bits, the same bits on every device.

  Entries are rounded to 11 bits of the largest; the rest is integers.

  Args:
    tree: pytree of float32, fewer than 2**32 entries.

  Returns:
    float32[].
  """
  leaves = [x.reshape(-1) for x in jax.tree.leaves(tree)]
  largest = functools.reduce(
    jnp.maximum, [jnp.max(jnp.abs(x), initial=0.0) for x in leaves]
  )
  _, exponent = jnp.frexp(largest)  # largest < 2**exponent
  exponent = jnp.clip(exponent, -100, 100)
  zero = np.uint32(0)
  high = low = jnp.uint32(0)
  for x in leaves:
    units = jnp.rint(jnp.abs(x) * grid.power_of_two(11 - exponent))
    squares = jnp.square(units.astype(jnp.uint32))  # at most 2**22
    words = (jnp.zeros_like(squares), squares)
    sums = jax.lax.reduce(words, (zero, zero), _add_words, (0,))
    high, low = _add_words((high, low), sums)
  return _root(high, low) * grid.power_of_two(exponent - 11)


def _add_words(x, y):
  """The sum of two numbers of 64 bits, as (high, low) words."""
  low = x[1] + y[1]
  return x[0] + y[0] + (low < x[1]).astype(jnp.uint32), low


def _root(high: jax.Array, low: jax.Array) -> jax.Array:
  """The square root of a 64-bit number to 15 bits, float32[]."""
  bits = 64 - jax.lax.clz(high).astype(jnp.int32)
  bits = jnp.where(high > 0, bits, 32 - jax.lax.clz(low).astype(jnp.int32))
  shift = jnp.maximum(bits - 29, 0) // 2 * 2  # even; 30 bits are left
  right = shift.astype(jnp.uint32)
  whole = (low >> right) | (high << (np.uint32(32) - right))
  whole = jnp.where(right < 32, whole, high >> (right - np.uint32(32)))

  def step(i, root):
    larger = root | (np.uint32(1 << 14) >> i.astype(jnp.uint32))
    return jnp.where(larger * larger <= whole, larger, root)

  root = jax.lax.fori_loop(0, 15, step, jnp.uint32(0))
  return root.astype(jnp.float32) * grid.power_of_two(shift // 2)
