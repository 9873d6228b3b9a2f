"""One-byte SPSA: a client sends one byte per projected gradient.

"Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language
Model Finetuning Using Shared Randomness", Zelikman et al., 2023,
https://arxiv.org/abs/2306.10015; the estimator is that of MeZO,
https://arxiv.org/abs/2305.17333.

    z = direction(run, party, round, sample)
    g = (L(w + mu z) - L(w - mu z)) / (2 mu)        on the client
    message = encode(g)                             one byte
    w <- w - lr (mean decode(message) z + weight_decay w)   on every replica

The sender, too, applies what the others decode. With grid weights (the
default) the update is a sum of integers: replicas agree to the last bit,
whatever the device and the order of the messages.

With `privacy`, g is a mean over all examples of the client, each clipped, and
the message is noised by its client: see `jaxfl.private_scalars`. Everything
after the message is the same.

A runnable toy:

    root = keys.root(0)
    method = spsa(loss_fn, root, learning_rate=0.1, mu=1e-3)
    state = method.init(params)
    message, _, metrics = method.client(state, (), batches, party)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import (
  aggregate,
  checks,
  codecs,
  estimators,
  keys,
  master,
  perturb,
  private_scalars,
  schedules,
)
from jaxfl import method as method_lib
from jaxfl import typing as jt

SCALINGS = ('mean', 'sum')


class SPSAState(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of float32, the master weights
  exponents: Any  # pytree of int32[], the grid; unused by float32 weights
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor
  round: jax.Array  # int32[]


def spsa(
  loss_fn: jt.LossFn,
  root: jax.Array,
  *,
  learning_rate: float | jt.Schedule,
  mu: float | jt.Schedule,
  num_perturbations: int = 1,
  codec: str = 'log8',
  codec_scale: float = 16.0,
  distribution: str = 'rademacher',
  sides: str = 'two_sided',
  scaling: str = 'mean',
  weight_decay: float = 0.0,
  weights: str = 'grid',
  forward_dtype: str | None = None,
  in_layers: str | None = None,
  forwards_at_once: int = 1,
  num_rounds: int | None = None,
  privacy: private_scalars.Settings | None = None,
  aggregator: aggregate.Aggregator | None = None,
) -> method_lib.Method:
  """Builds one-byte SPSA.

  Args:
    loss_fn: params, batch -> float[]; need not be differentiable.
    root: uint32[2], the run's key, from `keys.root(seed)`.
    learning_rate: a number or a function of the round.
    mu: perturbation radius, a number or a function of the round.
    num_perturbations: projected gradients per client and round. Two-sided
      estimates use a minibatch for each, one-sided ones share a minibatch.
    codec: name of a codec of `codecs.codec`.
    codec_scale: range of the codecs that have one.
    distribution: of the directions, see `perturb`.
    sides: `two_sided` or `one_sided`.
    scaling: `mean` by party weight, or `sum` over all projected gradients.
    weight_decay: decoupled; multiplied by the learning rate.
    weights: `grid` (exact, any order) or `float32` (no grid; adds in the order
      of party ids, equal on every device all the same).
    forward_dtype: dtype in which `loss_fn` sees the params, default float32.
    in_layers: None, or for the models of `jaxfl.models` a form of `jaxfl.lazy`:
      weights are perturbed layer by layer, see `estimators.perturber`.
    forwards_at_once: see `estimators.passes`.
    num_rounds: length of the schedules; needed with functions of the round.
    privacy: how clients hide their examples; `codec` is then one of
      `private_scalars.CODECS`, whose range follows from it, and `batches` are
      made by `Method.prepare`.
    aggregator: rules for one client at a time: `mean`, with or without
      `clip_value`, or `sign_vote`, one vote per client; see `aggregate`.

  Returns:
    A `Method`. Messages are integer or float32 arrays, see `codecs.codec`.

  Raises:
    ValueError: naming the argument that is out of range.
  """
  checks.one_of('sides', sides, estimators.SIDES)
  checks.one_of('scaling', scaling, SCALINGS)
  checks.one_of('weights', weights, master.WEIGHTS)
  checks.one_of('distribution', distribution, perturb.DISTRIBUTIONS)
  if num_perturbations < 1:
    raise ValueError(f'num_perturbations must be >= 1, got {num_perturbations}')
  aggregator = aggregator or aggregate.Aggregator()
  aggregator.check_own_directions('spsa')
  hide = None
  if privacy is None:
    code = codecs.codec(codec, scale=codec_scale)
  else:
    if sides != 'two_sided':
      raise ValueError(f'private scalars are two_sided, got sides={sides!r}')
    if forwards_at_once > 1:
      raise ValueError('forwards_at_once must be 1 for private scalars')
    private_scalars.check_count(privacy, num_perturbations)
    hide = private_scalars.mechanism(privacy, codec)
    code = hide.code
  passes = estimators.passes(
    in_layers,
    forwards_at_once,
    num_perturbations=num_perturbations,
    sides=sides,
  )
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
  rate_table = schedules.table(
    lambda r: float(lr_table[r]) * weight_decay, len(lr_table), 'weight_decay'
  )
  if not (rate_table < 0.25).all():
    raise ValueError(
      f'learning_rate * weight_decay must be < 0.25, got {rate_table.max():.3g}'
    )
  estimate = getattr(estimators, sides)
  num_batches = num_perturbations if sides == 'two_sided' else 1
  if hide is not None:
    num_batches = 1  # of everything

  def directions_of(party_id, round):
    """uint32[..., K, 2]: the chain of `keys` for every sample of a party."""
    sample = np.arange(num_perturbations, dtype=np.uint32)
    base = keys.fold(root, party_id, round)
    return keys.fold(base[..., None, :], sample)

  def init(params):
    return SPSAState(*master.init(params, weights), jnp.int32(0))

  def client(state, local, batches, party):
    directions = directions_of(party.id, party.round)
    radius = schedules.at(mu_table, party.round)
    key = keys.stream(keys.fold(root, party.id, party.round), 'codec')
    perturbed = moved_by(state.params)

    if hide is not None:
      measure, encode = hide.measure, hide.encode
      given = jax.tree.map(lambda x: x[0], batches)

      def hidden(x):
        direction, noise, key = x
        units, loss = measure(
          loss_fn,
          functools.partial(perturbed, direction),
          given['examples'],
          radius,
        )
        return encode(units, party.id, noise, key), loss

      dither = keys.fold(key, np.arange(num_perturbations, dtype=np.uint32))
      message, losses = jax.lax.map(
        hidden, (directions, given['noise'], dither)
      )
      return message, local, {'loss': losses.mean()}

    projected_grads, loss = estimate(
      loss_fn, perturbed, directions, batches, radius, passes
    )
    message = code.encode(projected_grads.astype(jnp.float32), key)
    return message, local, {'loss': loss}

  def claims(state, message, party):
    """See `method.Probe`."""
    del state  # Unused.
    return directions_of(party.id, party.round), code.decode(
      message, num_perturbations
    )

  def server(state, messages, cohort):
    decode = lambda m: code.decode(m, num_perturbations)
    g = jax.vmap(decode)(messages)  # float32[C, K]
    accepted = jnp.isfinite(g) & (cohort.weight > 0)[:, None]
    g, present = aggregator.limit(g, cohort.weight)
    weight = jnp.where(accepted, present[:, None], 0.0)
    if scaling == 'mean':
      part = method_lib.fractions(weight)
    else:
      part = accepted.astype(jnp.float32)
    lr = schedules.at(lr_table, state.round)
    # products only, each rounded once: the same bits on every device
    coefficients = -(lr * jnp.where(accepted, g, 0.0)) * part
    held = master.Master(state.params, state.exponents, state.overflow)
    if weight_decay:
      rate = schedules.at(rate_table, state.round)
      key = master.decay_key(root, state.round)
      held = master.decay(held, rate, key, weights=weights)
    order = jnp.argsort(cohort.id)  # integer sums have none; others need one
    held = master.add(
      held,
      directions_of(cohort.id, cohort.round)[order].reshape(-1, 2),
      coefficients[order].reshape(-1),
      distribution=distribution,
      weights=weights,
    )
    return SPSAState(*held, state.round + 1)

  return method_lib.Method(
    init=init,
    client=client,
    server=server,
    message=lambda params: code.struct(num_perturbations),
    downlink=method_lib.all_messages,
    receivers='everyone',
    follow=method_lib.follow_messages(server),
    num_batches=num_batches,
    forwards=num_perturbations
    + (num_perturbations if sides == 'two_sided' else 1),
    backwards=0,
    projected_grads=num_perturbations,
    weight_limit=(2**31 - 1) // num_perturbations,
    check=lambda state: master.check(state.overflow),
    values=lambda message: code.decode(message, num_perturbations),
    prepare=hide and hide.prepare,
    probe=None
    if hide
    else estimators.probe(
      loss_fn, claims, mu_table, distribution, forward_dtype
    ),
  )
