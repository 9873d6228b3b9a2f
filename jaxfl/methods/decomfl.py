"""DeComFL: the cohort shares its directions; a few scalars go up and down.

"Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order
Optimization", Li et al., ICLR 2025, https://arxiv.org/abs/2405.15861,
algorithms 1-4.

A round has K local steps of P directions each, shared by all its clients:

    z_kp = direction(run, round, k, p)
    g_kp = (L(w + mu z_kp) - L(w - mu z_kp)) / (2 mu)  on the client
    w <- w - lr / P sum_p g_kp z_kp                    locally, for the next k
    message = encode(g), K P scalars
    down = mean of the messages, K P scalars, whatever the number of clients
    w <- w - lr / P sum_kp down_kp z_kp                on every replica

The other estimate is (L(w + mu z_kp) - L(w)) / mu, `one_sided`. As directions
are shared, what a replica needs of a round is the mean alone. A client that was
away applies the means that it missed in order, each with the learning rate of
its own round. Scalars are averaged with one rounded product and one rounded sum
per client, in the order of ids: exact on every device.
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
  schedules,
)
from jaxfl import method as method_lib
from jaxfl import typing as jt


class DeComFLState(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of float32, the master weights
  exponents: Any  # pytree of int32[], the grid
  overflow: Any  # pytree of bool[]: a weight has left the range of its tensor
  round: jax.Array  # int32[]


def decomfl(
  loss_fn: jt.LossFn,
  root: jax.Array,
  *,
  learning_rate: float | jt.Schedule,
  mu: float | jt.Schedule,
  local_steps: int = 1,
  num_perturbations: int = 10,
  codec: str = 'float32',
  codec_scale: float = 16.0,
  sides: str = 'two_sided',
  distribution: str = 'rademacher',
  weights: str = 'grid',
  forward_dtype: str | None = None,
  in_layers: str | None = None,
  forwards_at_once: int = 1,
  num_rounds: int | None = None,
  aggregator: aggregate.Aggregator | None = None,
) -> method_lib.Method:
  """Builds DeComFL.

  Args:
    loss_fn: params, batch -> float[]; need not be differentiable.
    root: uint32[2], the run's key, from `keys.root(seed)`.
    learning_rate: a number or a function of the round.
    mu: perturbation radius, a number or a function of the round.
    local_steps: K.
    num_perturbations: P. All directions of a local step share its minibatch.
    codec: name of a codec of `codecs.codec`, for the way up.
    codec_scale: range of the codecs that have one.
    sides: `two_sided` or `one_sided`.
    distribution: of the directions, see `perturb`.
    weights: `grid` or `float32`, see `master`.
    forward_dtype: dtype in which `loss_fn` sees the params, default float32.
    in_layers: None, or for the models of `jaxfl.models` a form of `jaxfl.lazy`:
      weights are perturbed layer by layer, see `estimators.perturber`.
    forwards_at_once: see `estimators.passes`.
    num_rounds: length of the schedules; needed with functions of the round.
    aggregator: how scalars of clients are merged, see `aggregate`; the mean.

  Returns:
    A `Method`. A message is the code of float32[K P]; down go float32[K P].

  Raises:
    ValueError: naming the argument that is out of range.
  """
  checks.one_of('sides', sides, estimators.SIDES)
  checks.one_of('distribution', distribution, perturb.DISTRIBUTIONS)
  checks.one_of('weights', weights, master.WEIGHTS)
  for name, value in (
    ('local_steps', local_steps),
    ('num_perturbations', num_perturbations),
  ):
    if value < 1:
      raise ValueError(f'{name} must be >= 1, got {value}')
  num_scalars = local_steps * num_perturbations
  code = codecs.codec(codec, scale=codec_scale)
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
  step_table = schedules.table(
    lambda r: float(lr_table[r]) / num_perturbations,
    len(lr_table),
    'learning_rate / num_perturbations',
  )
  merge = (aggregator or aggregate.Aggregator()).merge
  estimate = getattr(estimators, sides)

  def directions_of(round):
    """uint32[K P, 2], the same for every party of a round."""
    sample = np.arange(num_scalars, dtype=np.uint32)
    return keys.fold(keys.stream(root, 'cohort'), round, sample)

  def init(params):
    return DeComFLState(*master.init(params, weights), jnp.int32(0))

  def client(state, local, batches, party):
    rate = schedules.at(step_table, party.round)
    radius = schedules.at(mu_table, party.round)
    # a minibatch for every local step, whatever the number of directions
    copies = num_perturbations if sides == 'two_sided' else 1

    def step(params, x):
      directions, batch = x
      perturbed = moved_by(params)
      shared = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (copies, *leaf.shape)), batch
      )
      g, loss = estimate(loss_fn, perturbed, directions, shared, radius, passes)
      g = g.astype(jnp.float32)
      moves = jnp.where(jnp.isfinite(g), -(rate * g), 0.0)
      params = perturb.replay(
        params, directions, moves, distribution=distribution
      )
      return params, (g, loss)

    directions = directions_of(party.round)
    directions = directions.reshape(local_steps, num_perturbations, 2)
    _, (g, losses) = jax.lax.scan(step, state.params, (directions, batches))
    key = keys.stream(keys.fold(root, party.id, party.round), 'codec')
    return code.encode(g.reshape(-1), key), local, {'loss': losses.mean()}

  def claims(state, message, party):
    """See `method.Probe`."""
    del state  # Unused.
    return directions_of(party.round), code.decode(message, num_scalars)

  @jax.jit
  def mean(messages, cohort):
    """float32[K P]: the mean, or what the aggregator makes of them."""
    g = jax.vmap(lambda m: code.decode(m, num_scalars))(messages)
    return merge(g, cohort.weight, cohort.id)

  def follow(state, down):
    held = master.Master(state.params, state.exponents, state.overflow)
    held = master.add(
      held,
      directions_of(state.round),
      -(schedules.at(step_table, state.round) * down),
      distribution=distribution,
      weights=weights,
    )
    return DeComFLState(*held, state.round + 1)

  def downlink(state, messages, cohort):
    del state  # Unused: replicas hold it.
    return mean(messages, cohort)

  return method_lib.Method(
    init=init,
    client=client,
    server=lambda state, *round: follow(state, mean(*round)),
    message=lambda params: code.struct(num_scalars),
    downlink=downlink,
    receivers='everyone',
    follow=follow,
    num_batches=local_steps,
    forwards=local_steps
    * (
      2 * num_perturbations if sides == 'two_sided' else num_perturbations + 1
    ),
    backwards=0,
    projected_grads=num_scalars,
    check=lambda state: master.check(state.overflow),
    values=lambda message: code.decode(message, num_scalars),
    probe=estimators.probe(
      loss_fn, claims, mu_table, distribution, forward_dtype
    ),
  )
