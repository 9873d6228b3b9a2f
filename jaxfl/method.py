"""The protocol: a method is three pure functions, and only messages leave a client.

    message, local, metrics = client(state, local, batches, party)
    state = server(state, messages, cohort)

`state` is public: every replica holds it and the log can rebuild it. A message
is all that a client sends. Runtimes compile `client` and `server` apart, because
a compiler that sees both rounds differently in every runtime.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfl import typing as jt


class Party(NamedTuple):
  """What everybody knows of one participant of a round; stacked, the cohort."""

  id: jax.Array  # int32[]; stable identity, >= 0
  round: jax.Array  # int32[]
  weight: jax.Array  # float32[]; a whole number < 2**24, 0 when absent


class Method(NamedTuple):
  """Pure functions that make up a method.

  Attributes:
    init: params -> state. The state has a field `params`.
    client: state, local, batches, party -> message, local, metrics. Every leaf
      of `batches` has a leading axis of `num_batches`. `metrics` holds scalars,
      among them `loss`, `forwards` and `backwards` (model passes over a batch).
    server: state, messages, cohort -> state. Messages and cohort are stacked
      along a leading axis; parties of weight 0 are absent and change nothing.
    num_batches: minibatches that a client uses in a round.
    init_local: params -> private client state (residuals, control variates).
    check: state -> error text or None; runs on the host after every round.
  """

  init: Callable[[jt.Params], Any]
  client: Callable[..., tuple[jt.Message, Any, jt.Metrics]]
  server: Callable[[Any, jt.Message, Party], Any]
  num_batches: int = 1
  init_local: Callable[[jt.Params], Any] = lambda params: ()
  check: Callable[[Any], str | None] = lambda state: None


def fractions(weights: jax.Array) -> jax.Array:
  """`weights / sum(weights)`, the same bits on every device.

  Division is not correctly rounded everywhere, so that the quotient is found by
  long division in integers, rounded down to a multiple of 2**-24.

  Args:
    weights: float32[...], whole numbers; their sum is below 2**31.

  Returns:
    float32[...]; zeros if all weights are zero.
  """
  remainder = weights.astype(jnp.uint32)
  total = jnp.sum(remainder)
  quotient = jnp.where(remainder == total, jnp.uint32(1), jnp.uint32(0))
  remainder = jnp.where(remainder == total, jnp.uint32(0), remainder)
  for _ in range(24):
    remainder = remainder << 1
    fits = (remainder >= total).astype(jnp.uint32)
    remainder = remainder - fits * total
    quotient = (quotient << 1) | fits
  scale = jnp.where(total > 0, jnp.float32(2.0**-24), jnp.float32(0.0))
  return quotient.astype(jnp.float32) * scale


def weighted_mean(messages: jt.Message, cohort: Party) -> jt.Message:
  """Mean of float messages by weight; a message that is not finite is left out.

  Contributions are added in the order of party ids, whatever order they came
  in. Float sums: equal bits for the same compiled program, not across devices.
  """
  order = jnp.argsort(cohort.id)
  finite = jnp.stack([
      jnp.all(jnp.isfinite(m.reshape(m.shape[0], -1)), axis=1)
      for m in jax.tree.leaves(messages)
  ]).all(0)
  part = fractions(jnp.where(finite, cohort.weight, 0.0))[order]

  def mean(m):
    m = m[order]
    shape = (-1,) + (1,) * (m.ndim - 1)
    m = jnp.where(part.reshape(shape) > 0, m, 0)
    return jnp.tensordot(part, m, axes=1)

  return jax.tree.map(mean, messages)
