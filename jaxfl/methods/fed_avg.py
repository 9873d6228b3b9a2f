"""FedAvg and FedOpt: the first-order reference behind the same protocol.

"Communication-efficient learning of deep networks from decentralized data",
McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629, algorithm 1;
server optimizers: "Adaptive federated optimization", Reddi et al., ICLR 2021,
https://arxiv.org/abs/2003.00295, algorithm 1.

    w_i <- local_steps steps of the client optimizer from w
    message = delta_i = w - w_i
    w <- server optimizer step along the weighted mean of delta_i

FedSGD is one local step with sgd. Updates are float sums: bit-equal for the
same program on the same kind of device only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfl import aggregate
from jaxfl import method as method_lib
from jaxfl import typing as jt


class FedAvgState(NamedTuple):
  """What every replica holds."""

  params: Any  # pytree of floating-point arrays
  opt_state: Any  # of the server optimizer
  round: jax.Array  # int32[]


def fed_avg(
  loss_fn: jt.LossFn,
  *,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation | None = None,
  local_steps: int = 1,
  aggregator: aggregate.Aggregator | None = None,
) -> method_lib.Method:
  """Builds FedAvg with any optax optimizers.

  Args:
    loss_fn: params, batch -> float[], differentiable.
    client_optimizer: starts afresh in every round.
    server_optimizer: takes the mean delta as its gradient; default sgd(1.0).
    local_steps: steps of a client in a round, each on its own minibatch.
    aggregator: how deltas are merged, entry by entry, or by `krum` as vectors;
      default their mean. `clip_value` bounds the norm of a delta.

  Returns:
    A `Method` whose message is a pytree like the parameters.

  Raises:
    ValueError: if `local_steps` is below 1.
  """
  if local_steps < 1:
    raise ValueError(f'local_steps must be >= 1, got {local_steps}')
  server_opt = server_optimizer or optax.sgd(1.0)
  aggregator = aggregator or aggregate.Aggregator()

  def init(params):
    params = jax.tree.map(jnp.asarray, params)
    return FedAvgState(params, server_opt.init(params), jnp.int32(0))

  def client(state, local, batches, party):
    del party  # Unused: no shared randomness.

    def step(carry, batch):
      params, opt_state = carry
      loss, grads = jax.value_and_grad(loss_fn)(params, batch)
      updates, opt_state = client_optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), loss

    start = (state.params, client_optimizer.init(state.params))
    (params, _), losses = jax.lax.scan(step, start, batches)
    delta = jax.tree.map(jnp.subtract, state.params, params)
    return delta, local, {'loss': losses.mean()}

  def robust(messages, cohort):
    """As `weighted_mean`, by the aggregator; all entries are one vector."""
    leaves, treedef = jax.tree.flatten(messages)
    rows = [x.reshape(len(x), -1).astype(jnp.float32) for x in leaves]
    values = jnp.concatenate(rows, axis=1)
    finite = jnp.all(jnp.isfinite(values), axis=1)
    weight = jnp.where(finite, jnp.asarray(cohort.weight), 0.0)
    merged = aggregator.merge(values, weight, cohort.id, vectors=True)
    ends = np.cumsum([row.shape[1] for row in rows])[:-1]
    parts = [
      part.reshape(x.shape[1:]).astype(x.dtype)
      for part, x in zip(jnp.split(merged, ends), leaves, strict=True)
    ]
    return treedef.unflatten(parts), jnp.any(weight > 0)

  def server(state, messages, cohort):
    merge = method_lib.weighted_mean if aggregator.plain else robust
    delta, accepted = merge(messages, cohort)
    updates, opt_state = server_opt.update(delta, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # A round in which nobody contributed changes nothing but its number.
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(accepted, new, old),
      (params, opt_state),
      (state.params, state.opt_state),
    )
    return FedAvgState(params, opt_state, state.round + 1)

  return method_lib.Method(
    init=init,
    client=client,
    server=server,
    message=lambda params: jax.eval_shape(lambda: params),
    downlink=lambda state, messages, cohort: state.params,
    receivers='cohort',
    follow=lambda state, params: state._replace(params=params),
    num_batches=local_steps,
    forwards=local_steps,
    backwards=local_steps,
  )
