"""A private sketch: K noised coordinates of gradients, or of local updates.

Directions z_k are the same for all clients in a round, so that coordinates add
up and one noise hides them all:

    y_i = (<z_1, u_i>, ..., <z_K, u_i>) / sqrt(K)           |y_i| is about |u_i|
    c_i = clip(y_i, C) as integers                                      [K]
    message = sum_i c_i                                     to the aggregator
    release = sum of all messages + integer noise           what others see
    w <- w - lr sum_k (mean y)_k z_k / sqrt(K)

With the unit `record` u_i is the gradient of example i: DP-GD on a sketch, of
all examples of all clients. With the unit `client` u_i is what a client's local
steps changed, as in Ferret: the guarantee is then for everything that a client
has, and asks for many clients.

**What is clipped is the sketch**, the last that depends on data before noise. A
clip of u_i would bound no release: the sketch of a short vector can be long,
and whoever knows the directions can choose one for which it is. Integers are
rounded at random and their norm bounded again, by B; an example or client that
is replaced moves the sum by 2 B at most. Ferret's block norms, and an
allocation by them, would be data, too: there are none here.

Noise of variance s^2 in each of K coordinates is noise of d s^2 in the weights,
whatever K is: the same as DP-GD's. A sketch makes messages small, not the
noise, and adds what it loses of the gradient.

References:
  Shu et al., "Ferret", ICML 2025, https://arxiv.org/abs/2409.06277; the
    coordinates.
  Kairouz, Liu and Steinke, "The distributed discrete Gaussian mechanism for
    federated learning with secure aggregation", ICML 2021,
    https://arxiv.org/abs/2102.06387; rounding with a bounded norm.
  Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy",
    NeurIPS 2020, https://arxiv.org/abs/2004.00010; its divergence.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfl import (
  checks,
  keys,
  master,
  perturb,
  privacy,
  schedules,
)
from jaxfl import method as method_lib
from jaxfl import noise as noise_lib
from jaxfl import plan as plan_lib
from jaxfl import typing as jt
from jaxfl.data import batching

UNITS = ('record', 'client')
_WIDEST = 4000.0  # standard deviation of the noise; its table has 20 rows for 1


class SketchState(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of float32, the master weights, on the grid
  exponents: Any  # pytree of int32[], the grid
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor
  round: jax.Array  # int32[]


def levels_of(plan: plan_lib.SketchPlan) -> int:
  """How many integers make up `clip_norm`: as many as the noise allows."""
  return max(1, int(_WIDEST / (2.0 * plan.noise_multiplier)))


def bound_of(levels: int, coordinates: int) -> float:
  """B, the largest norm of a rounded vector.

  Rounding adds a variance of 1/4 to every entry at most; three levels more make
  it rare that a vector must be rounded towards zero instead.
  """
  return math.sqrt(levels**2 + coordinates / 4 + 3 * levels)


def dp_sketch(
  loss_fn: jt.LossFn,
  root: jax.Array,
  *,
  plan: plan_lib.SketchPlan,
  learning_rate: float | jt.Schedule,
  clip_norm: float,
  num_examples: Sequence[int] | np.ndarray | None,
  unit: str = 'record',
  client_optimizer: optax.GradientTransformation | None = None,
  local_steps: int = 1,
  batch_size: int = 32,
  distribution: str = 'rademacher',
  microbatch_size: int = 64,
) -> method_lib.Method:
  """Builds the private sketch.

  Args:
    loss_fn: params, batch -> float[], differentiable; a mean over examples.
    root: uint32[2], the run's key, from `keys.root(seed)`.
    plan: of the run, from `calibration.sketch`.
    learning_rate: of the mean sketch; a number or a function of the round.
    clip_norm: C, of the sketch of a gradient or update, scaled so that it is
      about as long as that.
    num_examples: of every client, which is public: releases are sums over all
      of them. None is for looking at a method before there are data.
    unit: what the guarantee is for, `record` or `client`.
    client_optimizer: of local steps, needed for the unit `client`.
    local_steps: of a client in a round; 1 for the unit `record`.
    batch_size: examples of a local step; not for the unit `record`, where all
      take part.
    distribution: of the directions; one that is exact, not `gaussian`.
    microbatch_size: gradients that a client holds at once.

  Returns:
    A `Method` with a `release`, int32[coordinates].

  Raises:
    ValueError: naming the argument that is out of range.
  """
  checks.one_of('unit', unit, UNITS)
  checks.one_of('distribution', distribution, perturb.FIELD_UNIT)
  coordinates, z = plan.coordinates, plan.noise_multiplier
  if not 1 <= coordinates < 2**20:
    raise ValueError(f'coordinates must be in [1, 2**20), got {coordinates}')
  if not 2.0**-50 <= clip_norm <= 2.0**50:
    raise ValueError(
      f'clip_norm must be positive and finite (in [2**-50, 2**50]) for a finite'
      f' epsilon_dp, got {clip_norm}'
    )
  if not z > 0:
    raise ValueError(f'noise_multiplier must be > 0, got {z}')
  for field, value in (
    ('local_steps', local_steps),
    ('batch_size', batch_size),
    ('microbatch_size', microbatch_size),
  ):
    if value < 1:
      raise ValueError(f'{field} must be >= 1, got {value}')
  if (unit == 'client') != (client_optimizer is not None):
    raise ValueError('client_optimizer is for the unit client, which needs it')
  if unit == 'record' and local_steps != 1:
    raise ValueError('local_steps mix records: 1 for the unit record')
  sizes = np.array([1] if num_examples is None else num_examples, np.int64)
  if not sizes.size or sizes.min() < 1:
    raise ValueError('num_examples: every client needs one example at least')
  lr_table = schedules.table(learning_rate, plan.num_rounds, 'learning_rate')
  units = sizes if unit == 'record' else np.ones_like(sizes)
  levels = levels_of(plan)
  bound = bound_of(levels, coordinates)
  if units.sum() * levels >= 2**31:
    raise ValueError(
      f'{units.sum()} units of {levels} levels do not fit 32 bits: raise'
      ' epsilon_dp, or train on fewer examples'
    )
  root_k = math.sqrt(coordinates)
  per_level = np.float32(clip_norm / (levels * int(units.sum()) * root_k))

  def directions_of(round):
    """uint32[K, 2], those of all clients."""
    return keys.fold(keys.fold(root, round), jnp.arange(coordinates))

  def integers(vector, directions, key):
    """c_i, int32[K], of a pytree."""
    y = perturb.project(vector, directions, distribution=distribution)
    y, _ = privacy.clip(y * np.float32(1.0 / root_k), clip_norm)
    x = y * np.float32(levels / clip_norm)
    dither = keys.uniform(keys.fold(key, jnp.arange(coordinates)))
    return rounded(x, dither, bound)

  def client(state, local, batches, party):
    directions = directions_of(state.round)
    key = keys.stream(keys.fold(root, party.id, state.round), 'rounding')
    given = jax.tree.map(lambda x: x[0], batches)
    if unit == 'client':
      delta, loss = _local(loss_fn, client_optimizer, state.params, given)
      return integers(delta, directions, key), local, {'loss': loss}
    mask = given.pop('example_weight') > 0

    def one(x):
      index, present, example = x
      batch = jax.tree.map(lambda leaf: leaf[None], example)
      loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
      found = integers(grads, directions, keys.fold(key, index))
      return jnp.where(present, found, 0), jnp.where(present, loss, 0.0)

    found, losses = jax.lax.map(
      one,
      (jnp.arange(len(mask)), mask, given),
      batch_size=min(microbatch_size, len(mask)),
    )
    loss = jnp.sum(losses) / jnp.sum(mask)
    return jnp.sum(found, axis=0), local, {'loss': loss}

  def release(state, messages, cohort, key):
    """The noised sum; on the host, by the aggregator."""
    noise_lib.check_key(key)
    round = int(state.round)
    method_lib.check_release(round, plan.num_rounds, cohort, len(sizes))
    total = np.zeros(coordinates, np.int64)
    for id, message in zip(cohort.id, np.asarray(messages), strict=True):
      message = message.astype(np.int64)
      if np.vdot(message, message) <= (bound * units[id]) ** 2:
        total += message  # what is longer is of no honest client
    noise = key.discrete_gaussian(
      total.shape, z * 2.0 * bound, round=round, name='release'
    )
    return np.clip(total + noise, -(2**31) + 1, 2**31 - 1).astype(np.int32)

  def server(state, releases, cohort):
    del cohort  # Unused: the release is the aggregator's.
    lr = schedules.at(lr_table, state.round)
    # products only, each rounded once: the same bits on every device
    moves = -((lr * per_level) * releases[0].astype(jnp.float32))
    held = master.Master(state.params, state.exponents, state.overflow)
    held = master.add(
      held, directions_of(state.round), moves, distribution=distribution
    )
    return SketchState(*held, state.round + 1)

  def prepare(params, examples, round, client, key):
    del params, key  # Unused: the aggregator draws the noise.
    examples = dict(examples)
    if unit == 'client':  # which examples are used is no secret then
      examples.pop('example_weight')
      rng = batching.generator(0, client, round)
      rows = np.stack(
        [
          batching.pick(rng, int(sizes[client]), batch_size)
          for _ in range(local_steps)
        ]
      )
      examples = {name: np.asarray(x)[rows] for name, x in examples.items()}
    return jax.tree.map(lambda x: np.asarray(x)[None], examples)

  def like(params):
    del params  # Unused: the size of a sketch does not depend on the model.
    return jax.ShapeDtypeStruct((coordinates,), jnp.int32)

  return method_lib.Method(
    init=lambda params: SketchState(*master.init(params), jnp.int32(0)),
    client=client,
    server=server,
    message=like,
    downlink=lambda state, releases, cohort: releases[0],
    receivers='everyone',
    follow=lambda state, down: server(state, down[None], None),
    num_batches=1,
    forwards=local_steps,
    backwards=local_steps,
    projected_grads=coordinates,
    check=lambda state: master.check(state.overflow),
    release=method_lib.Release(release, like),
    prepare=prepare,
  )


def rounded(x: jax.Array, dither: jax.Array, bound: float) -> jax.Array:
  """Integers near x whose norm is at most `bound`.

  Rounds without bias; towards zero, which never makes a vector longer, if the
  result would be too long.

  Args:
    x: float32[K], whose own norm is at most `bound`.
    dither: float32[K] in [0, 1), not computed from the data.
    bound: its square is below 2**31.

  Returns:
    int32[K].
  """
  near = jnp.floor(x).astype(jnp.int32)
  near += (dither < x - jnp.floor(x)).astype(jnp.int32)
  fits = jnp.sum(jnp.square(near)) <= int(bound**2)
  return jnp.where(fits, near, jnp.trunc(x).astype(jnp.int32))


def _local(loss_fn, optimizer, params, batches):
  """What local steps changed, old - new, and the mean of their losses."""

  def step(carry, batch):
    params, opt_state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  start = (params, optimizer.init(params))
  (last, _), losses = jax.lax.scan(step, start, batches)
  return jax.tree.map(jnp.subtract, params, last), jnp.mean(losses)
