"""DIFF2 and DP-GD: private gradient descent by gradient differences.

"DIFF2: differential private optimization via gradient differences for
nonconvex distributed learning", Murata and Suzuki, ICML 2023,
https://arxiv.org/abs/2302.03884; the gradient-descent routine, and one of local
steps (BVR-L-SGD).

    r % T == 0   v_r = mean clip(g_i(x_r), C1) + noise
    else         v_r = v_{r-1} + mean clip(g_i(x_r) - g_i(x_{r-1}), c_r) + noise
                 c_r = C2 |x_r - x_{r-1}|
    x_{r+1} = x_r - lr v_r

`mean` is over P clients and the n_p examples of each; every client takes part
in every round, with all its examples. T = 1 is DP-GD. Clients send clipped
means to an aggregator that everybody trusts. It adds the noise, and its release
is all that others, and the log, ever see: weights are a function of releases.

With K = `local_steps` > 1, v_r goes to one client, in turn, which steps on by
itself, with differences over secret Poisson samples I_k of its examples:

    y_0 = x_r,  w_0 = v_r,  y_1 = y_0 - lr w_0
    w_k = w_{k-1} + (sum_{I_k} clip(g_i(y_k) - g_i(y_{k-1}), c_k) + noise) / b
    y_{k+1} = y_k - lr w_k,  c_k = C2 |y_k - y_{k-1}|,  k < K
    x_{r+1} = y_K

with b = q n_p, which is public. A round is then two exchanges, one of all
clients and the aggregator, and one with the client whose turn it is; it adds
the noise of its local steps itself. (The paper's text of this routine was not
at hand: the form above is ours, after its description.)

Noise is relative to how far one unit moves the mean. For a record that is
replaced that is 2 C / (P min n_p), and for a client that is replaced 2 C / P;
with local steps it is for a record that is dropped, and half of that.
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
  exact_norm,
  master,
  noise,
  privacy,
  schedules,
)
from jaxfl import method as method_lib
from jaxfl import plan as plan_lib
from jaxfl import typing as jt
from jaxfl.methods import diff2_local

UNITS = ('record', 'client')


class Diff2State(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of float32, x_r, on the grid
  exponents: Any  # pytree of int32[], the grid
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor
  previous: Any  # pytree of float32, x_{r-1}
  estimate: Any  # pytree of float32, v_{r-1}
  clip: jax.Array  # float32[], of what is released next: C1 or c_r
  round: jax.Array  # int32[], exchanges done: two of a round with local steps


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
    plan: of the run, from `calibration.diff2` or `calibration.diff2_local`.
    learning_rate: a number or a function of the exchange.
    clip_norm: C1, of the gradient of an example. If a restart clips much, the
      differences that follow are taken from too small a v: the run may stand
      still, or go back, until the next restart.
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
    A `Method` with a `release`. `batches` of a client are what `prepare` makes:
    all its examples and `example_weight`, 1 or 0 for padding, with a leading
    axis of one; or samples and noise, when it is its turn.

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
  local_routine = plan.local_steps > 1
  if local_routine and unit != 'record':
    raise ValueError(f'local_steps hide records, not the unit {unit}')
  if not plan.noise_multiplier > 0:
    raise ValueError(
      f'noise_multiplier must be > 0, got {plan.noise_multiplier}'
    )
  differences = min(plan.restart_interval, plan.num_rounds) > 1
  if differences and not plan.noise_multiplier_diff > 0:
    raise ValueError(
      'noise_multiplier_diff must be > 0 between restarts, got'
      f' {plan.noise_multiplier_diff}'
    )
  if microbatch_size < 1:
    raise ValueError(f'microbatch_size must be >= 1, got {microbatch_size}')
  checks.float_noise(research_float_noise)
  # without clients, one that nobody asks for
  sizes = np.array([1] if num_examples is None else num_examples, np.int64)
  if not sizes.size or sizes.min() < 1:
    raise ValueError('num_examples: every client needs one example at least')
  num_exchanges = plan.num_rounds * plan.exchanges
  lr_table = schedules.table(learning_rate, num_exchanges, 'learning_rate')
  num_clients = len(sizes)
  if local_routine and num_examples is not None:
    diff2_local.check(plan, num_clients)
  divisor = num_clients * (sizes.min() if unit == 'record' else 1)
  interval = plan.restart_interval

  def check(params):
    if interval == 1 or allow_unstable or num_examples is None:
      return
    growth = plan_lib.noise_growth(
      plan,
      learning_rate=float(lr_table.max()) * plan.local_steps,
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

  def restarts(exchange):
    """Whether the round of an exchange releases a whole gradient."""
    return exchange // plan.exchanges % interval == 0

  def turns(exchange):
    """Whether an exchange is with the client whose turn it is."""
    return exchange % plan.exchanges == 1

  def init(params):
    check(params)
    held = master.init(params)
    zeros = jax.tree.map(jnp.zeros_like, held.params)
    return Diff2State(
      *held, held.params, zeros, jnp.float32(clip_norm), jnp.int32(0)
    )

  def client(state, local, batches, party):
    examples = jax.tree.map(lambda x: x[0], batches)
    if diff2_local.NOISE in examples:
      message, loss = diff2_local.steps(
        loss_fn,
        state.params,
        state.estimate,
        examples,
        plan=plan,
        learning_rate=schedules.at(lr_table, state.round),
        clip_norm_diff=clip_norm_diff,
        batch_size=jnp.asarray(sizes * plan.sampling_rate, jnp.float32)[
          party.id
        ],
        microbatch_size=microbatch_size,
      )
      return message, local, {'loss': loss}
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
      found = jax.lax.cond(restarts(state.round), full, difference, state)
    share = jnp.asarray(1.0 / sizes, jnp.float32)[party.id]
    message = jax.tree.map(lambda x: x * share, found.total)
    return message, local, {'loss': found.loss}

  def release(state, messages, cohort, key):
    """The noised mean; on the host, by the aggregator."""
    round = int(state.round)
    who = 1 if turns(round) else num_clients
    method_lib.check_release(round, num_exchanges, cohort, who)
    if turns(round):  # noised by its client
      return jax.tree.map(lambda x: np.asarray(x[0]), messages)
    bound = float(state.clip)
    z = plan.noise_multiplier
    if not restarts(round):
      z = plan.noise_multiplier_diff
    order = np.argsort(cohort.id)
    total = jax.tree.map(lambda x: np.zeros(x.shape[1:], np.float64), messages)
    for i in order:
      one = jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), messages)
      factor = _factor(one, bound)
      if factor:
        total = jax.tree.map(lambda t, x, f=factor: t + f * x, total, one)
    mean = jax.tree.map(lambda t: t / num_clients, total)
    moved = 2.0 if plan.adjacency == 'replace' else 1.0
    std = z * moved * bound / divisor
    return noise.add_gaussian(key, mean, std, round=round, name='release')

  def server(state, releases, cohort):
    del cohort  # Unused: the release is the aggregator's.
    release = jax.tree.map(lambda x: x[0], releases)
    restart = restarts(state.round)
    estimate = jax.tree.map(
      lambda old, new: jnp.where(restart, new, old + new),
      state.estimate,
      release,
    )
    if not local_routine:
      return moved_by(state, estimate, schedules.at(lr_table, state.round))
    # a client's steps that went astray count as none
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(release)]
    step = jax.tree.map(
      lambda x: jnp.where(jnp.stack(finite).all(), x, 0.0), release
    )
    return jax.tree.map(
      functools.partial(jnp.where, turns(state.round)),
      moved_by(state, step, jnp.float32(1.0))._replace(estimate=state.estimate),
      state._replace(estimate=estimate, round=state.round + 1),
    )

  def moved_by(state, estimate, lr):
    """The state after a step of `lr * estimate`, which it keeps."""

    held = master.Master(state.params, state.exponents, state.overflow)
    held = master.step(held, estimate, lr)
    next_exchange = state.round + 1
    moved = jax.tree.map(jnp.subtract, held.params, state.params)
    clip = np.float32(clip_norm_diff) * exact_norm.exact_norm(moved)
    return Diff2State(
      *held,
      previous=state.params,
      estimate=estimate,
      clip=jnp.where(restarts(next_exchange), np.float32(clip_norm), clip),
      round=next_exchange,
    )

  def like(params):
    check(params)
    as_float32 = lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32)
    return jax.tree.map(as_float32, params)

  def follow(state, down):
    return server(state, jax.tree.map(lambda x: x[None], down), None)

  def prepare(params, examples, round, client, key):
    if turns(round):
      return diff2_local.prepare(plan, params, examples, round, client, key)
    return jax.tree.map(lambda x: np.asarray(x)[None], dict(examples))

  def turn(round, ids):
    if not turns(round):
      return ids
    at = round // plan.exchanges % num_clients
    return ids[at : at + 1]

  def passes(round):
    """Forward passes of a client, and as many backward: over all examples."""
    if turns(round):
      return 2 * (plan.local_steps - 1)  # over minibatches
    return 1 if restarts(round) else 2

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
    forwards=passes,
    backwards=passes,
    check=lambda state: master.check(state.overflow),
    release=method_lib.Release(release, like),
    prepare=prepare,
    turn=turn,
  )


def _factor(tree: Any, bound: float) -> float:
  """What scales a float64 tree down to a norm of `bound`; 0 if not finite."""
  norm = math.sqrt(sum(float(np.vdot(x, x)) for x in jax.tree.leaves(tree)))
  if not math.isfinite(norm):
    return 0.0
  return min(1.0, bound / norm) if norm else 1.0
