"""FedKSeed and FedKSeed-Pro: a seed pool, and one coordinate per seed.

"Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes", Qin et al., ICML 2024,
https://arxiv.org/abs/2312.06353, algorithm 1.

A pool of K directions z_k is fixed for the run. A client takes `local_steps`
steps from the shared w, each along a direction that it draws from the pool:

    k ~ p                                                        eq. 11, or 1/K
    g = (L(w + mu z_k) - L(w - mu z_k)) / (2 mu)
    w <- w - lr (g z_k + weight_decay w)
    message = (k, encode(g)) of every step

and every replica adds up coordinates, from which it rebuilds the weights:

    A_k <- A_k - sum_i rho_i lr g        over the steps i of all clients along k
    w = w_0 + sum_k A_k z_k                                      eq. 7-8

The learning rate is part of A, so that any schedule is right. A is integers
(see `jaxfl.pool`): the weights after any sequence of rounds are those of one
pass over the pool, bit for bit. Indices follow from the shared randomness and
are not sent unless `send_indices` is set; they are the same.

FedKSeed-Pro draws seeds by their past projected gradients (eq. 10-11):

    a_k = mean |clip(g, +-1000)| over the history of k, which starts with a zero
    p = softmax((a - min a) / (max a - min a))

so that p_max / p_min <= e. Exponents are rounded to 256 levels, the same on
every device. `importance_weight` weighs a step by 1 / (K p_k), which makes it
an unbiased estimate over the pool; the paper has no such weight.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import (
  aggregate,
  codecs,
  estimators,
  grid,
  keys,
  master,
  perturb,
  pool,
  private_scalars,
  schedules,
)
from jaxfl import method as method_lib
from jaxfl import typing as jt

_LARGEST_GRAD = np.float32(1000.0)  # in a history
_LEVELS = 256
_MAX_TOTAL = 1 << 24  # of the weights of all seeds: float32 holds integers


class FedKSeedState(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of float32, the master weights, on the grid
  exponents: Any  # pytree of int32[], the grid
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor
  base: Any  # pytree like params, w_0; () without weight decay
  base_scale: jax.Array  # int32[], in units of 1 / pool.ONE
  coordinates: jax.Array  # int32[K], A
  out_of_range: jax.Array  # bool[]: a coordinate has left its range
  changed: (
    jax.Array
  )  # int32[K], the last round that changed a coordinate, or -1
  levels: Any  # Pro: uint8[K], from which seeds are drawn; else ()
  history: Any  # Pro: sums |g| float32[K] and counts uint32[K]; else ()
  round: jax.Array  # int32[]


def fedkseed(
  loss_fn: jt.LossFn,
  root: jax.Array,
  *,
  learning_rate: float | jt.Schedule,
  mu: float | jt.Schedule,
  num_seeds: int = 4096,
  local_steps: int = 200,
  codec: str = 'log8',
  codec_scale: float = 16.0,
  send_indices: bool = False,
  pro: bool = False,
  importance_weight: bool = False,
  distribution: str = 'rademacher',
  weight_decay: float = 0.0,
  forward_dtype: str | None = None,
  in_layers: str | None = None,
  forwards_at_once: int = 1,
  num_rounds: int | None = None,
  privacy: private_scalars.Settings | None = None,
  aggregator: aggregate.Aggregator | None = None,
) -> method_lib.Method:
  """Builds FedKSeed, or FedKSeed-Pro.

  Args:
    loss_fn: params, batch -> float[]; need not be differentiable.
    root: uint32[2], the run's key, from `keys.root(seed)`.
    learning_rate: a number or a function of the round.
    mu: perturbation radius, a number or a function of the round.
    num_seeds: K, the size of the pool.
    local_steps: steps of a client in a round, each on its own minibatch.
    codec: name of a codec of `codecs.codec`: a byte, 16 bits or a float.
    codec_scale: range of the codecs that have one.
    send_indices: whether messages carry the seeds' indices, as the paper's do.
    pro: FedKSeed-Pro.
    importance_weight: weigh the steps of Pro by 1 / (K p_k).
    distribution: of the directions, one of `pool.DISTRIBUTIONS`. With 'walsh'
      the server and a rebuild cost one pass, whatever `num_seeds` is.
    weight_decay: decoupled; multiplied by the learning rate, in every step. A
      replica then keeps its base and rebuilds from it in every round, which is
      one pass over all directions.
    forward_dtype: dtype in which `loss_fn` sees the params, default float32.
    in_layers: None, or for the models of `jaxfl.models` a form of `jaxfl.lazy`:
      weights are perturbed layer by layer, see `estimators.perturber`.
    forwards_at_once: see `estimators.passes`.
    num_rounds: length of the schedules; needed with functions of the round.
    privacy: how clients hide their examples; `codec` is then one of
      `private_scalars.CODECS`, whose range follows from it, and `batches` are
      made by `Method.prepare`. Every local step is over all examples.
    aggregator: rules for one client at a time: `mean`, with or without
      `clip_value`, or `sign_vote`, one vote per client; see `aggregate`.

  Returns:
    A `Method`. A message is the code of float32[local_steps], or {'indices':
    uint8 or uint16[local_steps], 'projected_grads': code}.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  if local_steps < 1:
    raise ValueError(f'local_steps must be >= 1, got {local_steps}')
  if not 1 <= num_seeds <= pool.MAX_SEEDS:
    raise ValueError(
      f'num_seeds must be in [1, {pool.MAX_SEEDS}], as an index is sent in two'
      f' bytes at most; got {num_seeds}'
    )
  if distribution not in pool.DISTRIBUTIONS:
    raise ValueError(
      f'distribution of a pool must be one of {", ".join(pool.DISTRIBUTIONS)},'
      f' which have an integer form; got {distribution!r}'
    )
  if importance_weight and not pro:
    raise ValueError(
      'importance_weight is for FedKSeed-Pro: others draw evenly'
    )
  aggregator = aggregator or aggregate.Aggregator()
  aggregator.check_own_directions('fedkseed')
  hide = None
  if privacy is None:
    code = codecs.codec(codec, scale=codec_scale)
  else:
    if forwards_at_once > 1:
      raise ValueError('forwards_at_once must be 1 for private scalars')
    private_scalars.check_count(privacy, local_steps)
    hide = private_scalars.mechanism(privacy, codec)
    code = hide.code
  passes = estimators.passes(in_layers, forwards_at_once)
  moved_by = functools.partial(
    estimators.perturber,
    distribution=distribution,
    dtype=forward_dtype,
    in_layers=in_layers,
  )
  lr_table = schedules.table(learning_rate, num_rounds, 'learning_rate')
  mu_table = schedules.table(mu, num_rounds, 'mu')
  if not (mu_table > 0).all():
    raise ValueError(f'mu must be > 0, got {mu_table.min()}')
  lost_table = _lost(lr_table, weight_decay, local_steps)
  all_directions = pool.directions(root, np.arange(num_seeds), distribution)
  draw_weights = _draw_weights(num_seeds)

  def init(params):
    held = master.init(params)
    return FedKSeedState(
      *held,
      base=held.params if weight_decay else (),
      base_scale=jnp.int32(pool.ONE),
      coordinates=jnp.zeros(num_seeds, jnp.int32),
      out_of_range=jnp.zeros((), bool),
      changed=jnp.full(num_seeds, -1, jnp.int32),
      levels=jnp.zeros(num_seeds, jnp.uint8) if pro else (),
      history=_no_history(num_seeds) if pro else (),
      round=jnp.int32(0),
    )

  def seed_weights(state):
    """uint32[K]: seeds are drawn in proportion to them."""
    if pro:
      return jnp.asarray(draw_weights)[state.levels.astype(jnp.int32)]
    return jnp.ones(num_seeds, jnp.uint32)

  def draw(state, party_id, round):
    """int32[..., local_steps]: the seeds of a party's steps."""
    ends = jnp.cumsum(seed_weights(state))
    key = keys.stream(keys.fold(root, party_id, round), 'seeds')
    steps = np.arange(local_steps, dtype=np.uint32)
    u = keys.uniform(keys.fold(key[..., None, :], steps))
    at = jnp.floor(u * ends[-1].astype(jnp.float32)).astype(jnp.uint32)
    drawn = jnp.searchsorted(ends, at, side='right')
    return jnp.minimum(drawn, num_seeds - 1).astype(jnp.int32)

  def step_weight(state, indices):
    """1 / (K p_k) of the drawn seeds, float32; or ones."""
    if not importance_weight:
      return jnp.ones(indices.shape, jnp.float32)
    weights = seed_weights(state)
    # the quotient is below 4, as p is within a factor e of 1 / K
    below_one = method_lib.quotients(
      jnp.broadcast_to(jnp.sum(weights), indices.shape),
      weights[indices] * np.uint32(4 * num_seeds),
    )
    return 4.0 * below_one

  def client(state, local, batches, party):
    indices = draw(state, party.id, party.round)
    lr = schedules.at(lr_table, party.round)
    radius = schedules.at(mu_table, party.round)
    key = keys.stream(keys.fold(root, party.id, party.round), 'codec')

    def measured(perturbed, direction, batch):
      """What is sent of a step, what its client makes of it, and the loss."""
      one = jax.tree.map(lambda leaf: leaf[None], batch)
      g, loss = estimators.two_sided(
        loss_fn, perturbed, direction[None], one, radius, passes
      )
      g = g[0].astype(jnp.float32)
      return g, g, loss

    if hide is not None:
      measure, encode = hide.measure, hide.encode
      examples = jax.tree.map(lambda x: x[0], batches['examples'])
      steps = np.arange(local_steps, dtype=np.uint32)
      batches = batches['noise'][0], keys.fold(key, steps)

      def measured(perturbed, direction, batch):
        """The same; all go on from what others decode."""
        noise, dither = batch
        units, loss = measure(
          loss_fn, functools.partial(perturbed, direction), examples, radius
        )
        sent = encode(units, party.id, noise, dither)
        return sent, code.decode(sent[None], 1)[0], loss

    def step(params, x):
      direction, weight, batch = x
      sent, g, loss = measured(moved_by(params), direction, batch)
      # others leave out a step without a finite g, and so does its client
      move = jnp.where(jnp.isfinite(g), -(lr * g) * weight, 0.0)
      if weight_decay:
        kept = 1.0 - lr * np.float32(weight_decay)
        params = jax.tree.map(lambda leaf: leaf * kept, params)
      params = perturb.perturb(
        params, direction, move, distribution=distribution
      )
      return params, (sent, loss)

    directions = pool.directions(root, indices, distribution)
    steps = (directions, step_weight(state, indices))
    _, (sent, losses) = jax.lax.scan(step, state.params, (*steps, batches))
    message = code.encode(sent, key) if hide is None else sent
    if send_indices:
      indices = indices.astype(pool.index_dtype(num_seeds))
      message = {'indices': indices, 'projected_grads': message}
    return message, local, {'loss': losses.mean()}

  def claims(state, message, party):
    """See `method.Probe`; as if all were measured where the steps start."""
    indices = draw(state, party.id, party.round)
    if send_indices:
      indices = message['indices'].astype(jnp.int32)
      message = message['projected_grads']
    g = code.decode(message, local_steps)
    return pool.directions(root, indices, distribution), g

  def server(state, messages, cohort):
    if send_indices:
      indices = messages['indices'].astype(jnp.int32)
      messages = messages['projected_grads']
    else:
      indices = draw(state, cohort.id, cohort.round)
    decode = lambda m: code.decode(m, local_steps)
    g = jax.vmap(decode)(messages)  # float32[C, local_steps]
    accepted = jnp.isfinite(g) & (cohort.weight > 0)[:, None]
    accepted &= indices < num_seeds
    indices = jnp.minimum(indices, num_seeds - 1)
    g, present = aggregator.limit(g, cohort.weight)
    rho = method_lib.fractions(jnp.where(accepted.any(1), present, 0.0))
    # products only, each rounded once: the same bits on every device
    lr = schedules.at(lr_table, state.round)
    moves = -(lr * jnp.where(accepted, g, 0.0)) * rho[:, None]
    moves *= step_weight(state, indices)
    now = jnp.minimum(state.round, len(lost_table) - 1)
    lost = jnp.asarray(lost_table)[now]
    if weight_decay:  # of the steps that follow
      moves *= 1.0 - lost[None, local_steps - 1 :: -1]
    amounts = grid.to_units(
      moves.reshape(-1),
      pool.exponent(state.exponents),
      _dither_keys(root, cohort, local_steps),
    )
    old, base_scale = state.coordinates, state.base_scale
    if weight_decay:
      key = master.decay_key(root, state.round)
      old, base_scale = pool.decay(old, base_scale, lost[-1], key)
    new, left = pool.add_coordinates(old, indices.reshape(-1), amounts)
    state = state._replace(
      base_scale=base_scale,
      coordinates=new,
      out_of_range=state.out_of_range | left,
      changed=jnp.where(new != old, state.round, state.changed),
    )
    held = moved_to(state, amounts.size, before=old)
    if pro:
      history = _remember(state.history, cohort.id, indices, g, accepted)
      state = state._replace(history=history, levels=_levels(*history))
    return state._replace(**held._asdict(), round=state.round + 1)

  def moved_to(state, max_changes, before):
    """The weights at the state's coordinates, whose params are at `before`."""
    held = master.Master(state.params, state.exponents, state.overflow)
    if weight_decay:  # everything changes
      return pool.rebuild(
        held._replace(params=state.base),
        state.base_scale,
        all_directions,
        state.coordinates,
        distribution=distribution,
      )
    return pool.step(
      held,
      all_directions,
      before,
      state.coordinates,
      max_changes=max_changes,
      distribution=distribution,
    )

  def downlink(state, since):
    """The coordinates that changed, by index or by a mask; or all of them."""
    changed = np.asarray(state.changed) >= max(since, 0)
    mask = np.packbits(changed, bitorder='little')
    indices = np.flatnonzero(changed).astype(pool.index_dtype(num_seeds))
    which = {'mask': mask}
    if indices.nbytes < mask.nbytes:
      which = {'indices': indices}
    elif 4 * np.sum(~changed) < mask.nbytes:
      which, changed = {}, np.full(num_seeds, True)
    return (
      which
      | {
        'round': np.asarray(state.round),
        'coordinates': np.asarray(state.coordinates)[changed],
      }
      | ({'levels': np.asarray(state.levels)} if pro else {})
    )

  def follow(state, down):
    """The state of a replica that had no part in the rounds between."""
    if 'mask' in down:
      (which,) = np.nonzero(np.unpackbits(down['mask'], bitorder='little'))
    else:
      which = down.get('indices', np.arange(num_seeds)).astype(np.int32)
    before = coordinates = state.coordinates
    for round in range(int(state.round), int(down['round'])):
      if weight_decay:
        lost = lost_table[min(round, len(lost_table) - 1), -1]
        coordinates, base_scale = pool.decay(
          coordinates,
          state.base_scale,
          lost,
          master.decay_key(root, jnp.int32(round)),
        )
        state = state._replace(base_scale=base_scale)
    state = state._replace(
      coordinates=coordinates.at[which].set(down['coordinates']),
      levels=jnp.asarray(down['levels']) if pro else (),
      round=jnp.asarray(down['round']),
    )
    held = moved_to(state, num_seeds, before=before)
    return state._replace(**held._asdict())

  def message(params):
    del params  # Unused: the size of a message does not depend on the model.
    grads = code.struct(local_steps)
    if not send_indices:
      return grads
    dtype = pool.index_dtype(num_seeds)
    indices = jax.ShapeDtypeStruct((local_steps,), dtype)
    return {'indices': indices, 'projected_grads': grads}

  def check(state):
    if bool(state.out_of_range):
      return 'a coordinate of the pool left its range; lower the learning rate'
    return master.check(state.overflow)

  return method_lib.Method(
    init=init,
    client=client,
    server=server,
    message=message,
    downlink=downlink,
    receivers='returning',
    follow=follow,
    num_batches=local_steps if hide is None else 1,
    forwards=2 * local_steps,
    backwards=0,
    projected_grads=local_steps,
    check=check,
    prepare=hide and hide.prepare,
    values=lambda message: code.decode(
      message['projected_grads'] if send_indices else message, local_steps
    ),
    probe=None
    if hide
    else estimators.probe(
      loss_fn, claims, mu_table, distribution, forward_dtype
    ),
  )


fedkseed_pro = functools.partial(fedkseed, pro=True)


def _lost(lr_table, weight_decay, local_steps) -> np.ndarray:
  """1 - (1 - lr wd)**j for j = 0 .. local_steps, float32[R, local_steps + 1].

  Raises:
    ValueError: if the decay is negative, or a round would lose half of the
      weights or more.
  """
  if not weight_decay >= 0:
    raise ValueError(f'weight_decay must be >= 0, got {weight_decay}')
  if not weight_decay:
    return np.zeros((1, local_steps + 1), np.float32)
  rows = []
  for lr in lr_table:
    rate = float(lr) * weight_decay
    if not rate < 1 or not -math.expm1(local_steps * math.log1p(-rate)) < 0.5:
      raise ValueError(
        f'learning_rate * weight_decay is {rate:.3g}: {local_steps} local_steps'
        ' must not decay half of the weights'
      )
    powers = np.arange(local_steps + 1) * math.log1p(-rate)
    rows.append([codecs.round_significant(x) for x in -np.expm1(powers)])
  return np.array(rows, np.float32)


def _dither_keys(root, cohort, local_steps) -> jax.Array:
  """uint32[C local_steps, 2]: a key of its own for every step that is sent."""
  key = keys.fold(keys.stream(root, 'coordinates'), cohort.id, cohort.round)
  steps = np.arange(local_steps, dtype=np.uint32)
  return keys.fold(key[:, None, :], steps).reshape(-1, 2)


def _draw_weights(num_seeds: int) -> np.ndarray:
  """exp(level / 255) as integers, uint32[256]."""
  least = min(1024, int(_MAX_TOTAL / (math.e * num_seeds)))
  exponents = np.arange(_LEVELS) / (_LEVELS - 1)
  return np.floor(least * np.exp(exponents)).astype(np.uint32)


def _no_history(num_seeds):
  return jnp.zeros(num_seeds), jnp.zeros(num_seeds, jnp.uint32)


def _remember(history, ids, indices, g, accepted):
  """Adds |g| of the accepted steps [C, local_steps], in the order of ids."""
  order = jnp.argsort(ids)
  amplitudes = jnp.where(accepted, jnp.minimum(jnp.abs(g), _LARGEST_GRAD), 0.0)
  steps = tuple(x[order].reshape(-1) for x in (indices, amplitudes, accepted))

  def add(history, x):
    k, amplitude, count = x
    sums, counts = history
    return (sums.at[k].add(amplitude), counts.at[k].add(count)), None

  steps = (*steps[:2], steps[2].astype(jnp.uint32))
  return jax.lax.scan(add, history, steps)[0]


def _levels(sums, counts):
  """255 times the mean amplitude, scaled to [0, 1] over the pool, uint8[K]."""
  ones = jnp.ones_like(counts)
  # and the first zero; no product that a compiler may join with the difference
  mean = grid.shrink(sums, method_lib.quotients(ones, counts + 1))
  above = mean - mean.min()
  # middles between levels; products only, so that no device differs
  middles = (np.arange(_LEVELS - 1) + 0.5) / (_LEVELS - 1)
  middles = jnp.asarray(middles.astype(np.float32)) * above.max()
  return jnp.searchsorted(middles, above, side='right').astype(jnp.uint8)
