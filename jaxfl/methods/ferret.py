"""Ferret: local first-order training, sent as coordinates along directions.

"Ferret: federated full-parameter tuning at scale for large language models",
Shu et al., ICML 2025, https://arxiv.org/abs/2409.06277, algorithm 1.

    w_i <- local_steps steps of the client optimizer from w
    delta = w - w_i, cut into blocks delta_l of d_l entries
    K_l = allocation of the block norms n_l = |delta_l|; sum_l K_l = coordinates
    g_lk = <v_lk, delta_l> / n_l,  k < K_l             on the client
    message = n, encode(g)
    gamma_lk = n_l decode(g_lk) / K_l
    w <- w - server_lr mean_i sum_lk gamma_lk v_lk     on every replica

Directions v_lk have independent entries of variance 1, so that 1 / K_l makes
the reconstruction unbiased for each distribution. (The paper's entries are
truncated normals of variance 1 / (3 d) up to O(d**-2), hence its other
constant.) With the kurtosis kappa of the entries, the error is exactly

    E |rec_l - delta_l|^2 = (d_l - 2 + kappa) / K_l |delta_l|^2,

smallest for signs (kappa = 1), and cos(rec_l, delta_l) is about
sqrt(K_l / (K_l + d_l)). A step of the server is therefore mostly noise if K is
much below d / C, with C clients; the step that shortens the way to delta most
is K / (K + d / C) of it: choose `server_lr` by that, not near 1. Of coordinates
of one bit, as many as pi / 2 count as one.

No basis is ever stored: memory is that of the parameters and coordinates.
Directions are fresh for every round and client, and the parts of a direction in
different blocks are independent. Every receiver finds K_l from the norms.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfl import (
  aggregate,
  blocks,
  checks,
  codecs,
  grid,
  keys,
  master,
  perturb,
  pool,
  schedules,
)
from jaxfl import allocation as allocation_lib
from jaxfl import method as method_lib
from jaxfl import typing as jt

# Coordinates are nearly N(0, 1): E|g| makes signs unbiased, and one in 16,000
# is beyond the range of `linear8`.
_SIGN_SCALE, _RANGE = math.sqrt(math.pi / 2), 4.0


class FerretState(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of float32, the master weights
  exponents: Any  # pytree of int32[], the grid; unused by a server optimizer
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor
  opt_state: Any  # of the server optimizer; () without one
  round: jax.Array  # int32[]


def ferret(
  loss_fn: jt.LossFn,
  root: jax.Array,
  *,
  client_optimizer: optax.GradientTransformation,
  coordinates: int,
  local_steps: int = 1,
  server_lr: float | jt.Schedule = 1.0,
  server_optimizer: optax.GradientTransformation | None = None,
  allocation: str = 'bytes',
  codec: str = 'sign1',
  distribution: str = 'rademacher',
  max_block_size: int = 1 << 14,
  num_rounds: int | None = None,
  aggregator: aggregate.Aggregator | None = None,
) -> method_lib.Method:
  """Builds Ferret.

  Args:
    loss_fn: params, batch -> float[], differentiable.
    root: uint32[2], the run's key, from `keys.root(seed)`.
    client_optimizer: starts afresh in every round.
    coordinates: in a message; at least one per block of the parameters.
    local_steps: steps of a client in a round, each on its own minibatch.
    server_lr: a number or a function of the round; steps are sums of integers
      on grid weights, exact in any order (but not for `gaussian`).
    server_optimizer: in place of `server_lr`: takes the mean reconstruction as
      its gradient. Float arithmetic: equal bits for the same program only. Its
      steps are the rounds in which somebody contributed.
    allocation: of coordinates to blocks, one of `allocation.ALLOCATIONS`.
    codec: of coordinates in units of their block's norm, see `codecs.codec`.
      `sign1` has the smallest error at equal bytes, at the price of more
      coordinates to compute. It has no bias where coordinates are normal, as
      they are for blocks of many entries of like size.
    distribution: of the directions, see `perturb`. 'walsh': those of a message
      are a pool (`jaxfl.kernels.walsh`), orthogonal over 32 x 128 entries, and
      all of a block's together cost one pass over it.
    max_block_size: entries of a block; larger tensors are cut. A coordinate
      costs this much to compute, a block two bytes.
    num_rounds: length of the schedule, needed if there is one.
    aggregator: `mean`, with or without a `clip_value`, the bound of the norm of
      a block; coordinates in its units are then at most 4. See `aggregate`.

  Returns:
    A `Method`. Messages are `{'coordinates', 'norms'}`: codes, and one
    bfloat16 per block.

  Raises:
    ValueError: naming the argument that is out of range; for `coordinates`
      fewer than blocks, as soon as the method sees the parameters.
  """
  checks.one_of('allocation', allocation, allocation_lib.ALLOCATIONS)
  checks.one_of('distribution', distribution, blocks.DISTRIBUTIONS)
  if local_steps < 1:
    raise ValueError(f'local_steps must be >= 1, got {local_steps}')
  if not 1 <= coordinates < 2**30:
    raise ValueError(f'coordinates must be in [1, 2**30), got {coordinates}')
  if max_block_size < 64:
    raise ValueError(f'max_block_size must be >= 64, got {max_block_size}')
  if server_optimizer is not None and server_lr != 1.0:
    raise ValueError('server_lr does not apply to a server_optimizer')
  aggregator = aggregator or aggregate.Aggregator()
  aggregator.check_own_directions('ferret', signs=False)
  lr_table = schedules.table(server_lr, num_rounds, 'server_lr')
  if not (lr_table > 0).any():
    raise ValueError(f'server_lr must be > 0, got {lr_table.max()}')
  code = codecs.codec(codec, _SIGN_SCALE if codec == 'sign1' else _RANGE)

  def layout(params):
    """The blocks, and the factors of their norms."""
    parts = blocks.partition(
      params, max_size=max_block_size, distribution=distribution
    )
    if coordinates < len(parts):
      raise ValueError(
        f'coordinates must be >= {len(parts)}, one for every block, got'
        f' {coordinates}; or raise max_block_size'
      )
    sizes = [block.size for block in parts]
    return parts, allocation_lib.factors(allocation, sizes, distribution)

  def directions_of(party_id, round):
    """The chain of `keys` for every direction of a party: [..., K, 2 or 3]."""
    base = keys.fold(root, party_id, round)[..., None, :]
    return pool.directions(base, jnp.arange(coordinates), distribution)

  def init(params):
    layout(params)
    held = master.init(params, 'float32' if server_optimizer else 'grid')
    opt_state = server_optimizer.init(held.params) if server_optimizer else ()
    return FerretState(*held, opt_state, jnp.int32(0))

  def client(state, local, batches, party):
    def step(carry, batch):
      params, opt_state = carry
      loss, grads = jax.value_and_grad(loss_fn)(params, batch)
      updates, opt_state = client_optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), loss

    start = (state.params, client_optimizer.init(state.params))
    (params, _), losses = jax.lax.scan(step, start, batches)
    delta = jax.tree.map(jnp.subtract, state.params, params)

    parts, factors = layout(delta)
    sent = blocks.norms(delta, parts).astype(jnp.bfloat16)
    norms = sent.astype(jnp.float32)
    counts = allocation_lib.counts(norms, factors, coordinates)
    products = blocks.project(
      delta,
      parts,
      counts,
      directions_of(party.id, party.round),
      distribution=distribution,
    )
    n = _per_slot(norms, counts, coordinates)
    key = keys.stream(keys.fold(root, party.id, party.round), 'codec')
    g = code.encode(jnp.where(n > 0, products / n, 0.0), key)
    message = {'coordinates': g, 'norms': sent}
    return message, local, {'loss': losses.mean()}

  def decode(message, present, factors):
    """Whether a message counts, its K_l int32[L], and gamma float32[K]."""
    norms = message['norms'].astype(jnp.float32)
    g = code.decode(message['coordinates'], coordinates)
    in_range = (norms >= 0) & (norms <= allocation_lib.LARGEST)
    valid = present & jnp.all(in_range) & jnp.all(jnp.isfinite(g))
    norms = jnp.where(valid, norms, 0.0)
    counts = allocation_lib.counts(norms, factors, coordinates)
    if aggregator.clip_value is not None:
      norms = jnp.minimum(norms, np.float32(aggregator.clip_value))
      g = aggregate.clip_entries(g, _RANGE)
    # products only, each rounded once: the same bits on every device
    one_by_k = method_lib.quotients(
      jnp.minimum(counts, 1).astype(jnp.uint32), counts.astype(jnp.uint32)
    )
    scale = _per_slot(norms * one_by_k, counts, coordinates)
    gamma = jnp.where(valid, g, 0.0) * scale
    finite = jnp.all(jnp.isfinite(gamma))
    return valid & finite, counts, jnp.where(finite, gamma, 0.0)

  def server(state, messages, cohort):
    parts, factors = layout(state.params)
    order = jnp.argsort(cohort.id)  # integer sums have none; others need one
    messages, cohort = jax.tree.map(lambda x: x[order], (messages, cohort))
    accepted, counts, gamma = jax.vmap(decode, (0, 0, None))(
      messages, cohort.weight > 0, factors
    )
    part = method_lib.fractions(jnp.where(accepted, cohort.weight, 0.0))
    directions = directions_of(cohort.id, cohort.round)
    gamma = gamma * part[:, None]
    if server_optimizer is None:
      gamma = -(schedules.at(lr_table, state.round) * gamma)
      add = _add_floats if distribution == 'gaussian' else _add_units
      held = master.Master(state.params, state.exponents, state.overflow)
      held = add(held, parts, counts, directions, gamma, distribution)
      return FerretState(*held, state.opt_state, state.round + 1)

    mean = blocks.reconstruct(
      state.params, parts, counts, directions, gamma, distribution=distribution
    )
    updates, opt_state = server_optimizer.update(
      mean, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    # A round in which nobody contributed changes nothing but its number.
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(jnp.any(accepted), new, old),
      (params, opt_state),
      (state.params, state.opt_state),
    )
    overflow = jax.tree.map(
      lambda old, x: old | ~jnp.all(jnp.isfinite(x)), state.overflow, params
    )
    return FerretState(
      params, state.exponents, overflow, opt_state, state.round + 1
    )

  def message(params):
    norms = jax.ShapeDtypeStruct((len(layout(params)[0]),), jnp.bfloat16)
    return {'coordinates': code.struct(coordinates), 'norms': norms}

  return method_lib.Method(
    init=init,
    client=client,
    server=server,
    message=message,
    downlink=method_lib.all_messages,
    receivers='everyone',
    follow=method_lib.follow_messages(server),
    num_batches=local_steps,
    forwards=local_steps,
    backwards=local_steps,
    projected_grads=coordinates,
    check=lambda state: master.check(state.overflow),
  )


def _per_slot(values, counts, num_slots) -> jax.Array:
  """The values [L] of the slots' blocks, [K]; 0 for slots without one."""
  block, _ = blocks.slots(counts, num_slots)
  return values.at[block].get(mode='fill', fill_value=0)


def _add_units(held, parts, counts, directions, coefficients, distribution):
  """`w + sum_k c_k z_k` as a sum of integers, exact."""
  params, exponents, old = held
  by_path = dict(keys.named_leaves(exponents))
  e = jnp.stack([by_path[block.path] for block in parts])
  block, k = jax.vmap(blocks.slots, (0, None))(counts, coefficients.shape[1])
  own = jnp.take_along_axis(directions, k[..., None], axis=1)
  if distribution == 'walsh':  # the key of a pool, and a number
    own = keys.fold(own[..., :2], own[..., 2])
  # a direction of several blocks has a dither for each
  dither = keys.uniform(keys.fold(keys.stream(own, 'rounding'), block))
  scale = perturb.FIELD_UNIT[distribution] * grid.power_of_two(e)
  scale = scale.at[block].get(mode='fill', fill_value=0)
  params, overflow = blocks.add_units(
    params,
    exponents,
    parts,
    counts,
    directions,
    grid.round_units(coefficients * scale, dither),
    distribution=distribution,
  )
  overflow = jax.tree.map(jnp.logical_or, old, overflow)
  return master.Master(params, exponents, overflow)


def _add_floats(held, parts, counts, directions, coefficients, distribution):
  """The same for directions that have no integers, rounded to the grid."""
  params, exponents, old = held
  step = blocks.reconstruct(
    params, parts, counts, directions, coefficients, distribution=distribution
  )
  params = grid.snap(jax.tree.map(jnp.add, params, step), exponents)
  overflow = grid.out_of_range(params, exponents)
  overflow = jax.tree.map(jnp.logical_or, old, overflow)
  return master.Master(params, exponents, overflow)
