"""The protocol: a method is pure functions, and only messages leave a client.

    message, local, metrics = client(state, local, batches, party)
    state = server(state, messages, cohort)

`state` is public: every replica holds it and the log can rebuild it. A message
is all that a client sends. Runtimes compile `client` and `server` apart: a
compiler that sees both rounds differently in every runtime.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import grid
from jaxfl import typing as jt


class Party(NamedTuple):
  """What everybody knows of one participant of a round; stacked, the cohort."""

  id: jt.Array  # int32[]; stable identity, >= 0
  round: jt.Array  # int32[]
  weight: jt.Array  # float32[]; a whole number < 2**24, 0 when absent


class Release(NamedTuple):
  """What a private method lets out, in place of its messages.

  Messages reach an aggregator that everybody trusts. Replicas, other clients
  and the log get its release only: `Method.server` and `Method.downlink` take
  releases with a leading axis of one in place of messages.

  Attributes:
    make: state, messages [C, ...], cohort [C], noise key -> release; on the
      host, see `jaxfl.noise.NoiseKey`. Clients that sent nothing are left out.
    like: params -> shape of a release, a pytree of `ShapeDtypeStruct`.
  """

  make: Callable[[Any, jt.Message, Party, Any], jt.Message]
  like: Callable[[jt.Params], jt.Message]


class Probe(NamedTuple):
  """How somebody with examples of their own checks what a client claims.

  Attributes:
    claims: state, message, party -> directions uint32[K, ...] and projected
      gradients float32[K] along them, as decoded; state is that of the round.
    slope: params, directions [N, ...], claims [N], minibatch, round ->
      float32[]: how the loss rises along them, see `estimators.slope`. They may
      be those of several messages.
    forwards: forward passes of `slope`, each over the minibatch.
  """

  claims: Callable[[Any, jt.Message, Party], tuple[jax.Array, jax.Array]]
  slope: Callable[..., jax.Array]
  forwards: int


class Method(NamedTuple):
  """Pure functions that make up a method, and what a round of it costs.

  Attributes:
    init: params -> state. The state has a field `params`.
    client: state, local, batches, party -> message, local, metrics. Every leaf
      of `batches` has a leading axis of `num_batches`; `metrics` is a dict of
      scalars with at least `loss`.
    server: state, messages, cohort -> state. Messages and cohort are stacked
      along a leading axis; parties of weight 0 are absent and change nothing.
    message: params -> shape of a message, a pytree of `ShapeDtypeStruct`.
    downlink: what a receiver gets in a round, as a pytree of arrays.
    receivers: who gets it, and what `downlink` is a function of:
      `everyone`: all replicas stay current; state, messages, cohort -> message,
        from the state before the round, without absent parties.
      `cohort`: the parties of the round, before it; the same arguments.
      `returning`: the parties of the round, before it; state, since -> message:
        what changed for a party that was current before round `since`, or holds
        nothing but the base (-1).
    follow: state, downlink -> state; what a replica does with a downlink. Its
      params are those of the replicas that applied the messages themselves.
    num_batches: minibatches that a client uses in a round.
    forwards: forward passes of a client in a round, each over one minibatch; a
      number or a function of the round.
    backwards: backward passes, likewise.
    projected_grads: scalars along shared directions in a message, if any.
    weight_limit: the largest sum of weights in one round.
    init_local: params -> private client state (residuals, control variates).
    check: state -> error text or None; runs on the host after every round.
    release: of a private method with an aggregator; None if messages go to
      everybody.
    prepare: of a private method; None for others. Params, a client's examples,
      round, party id, `noise.NoiseKey` -> its batches, on the host: they hold
      the noise and the samples that nobody else may know. Of the params, only
      shapes count; examples are all that the client has, arrays [N, ...] with
      `example_weight`, 0 for what fills up.
    values: message -> float32[K], what it says in numbers, for those that want
      to know whether it says anything; None if it says it itself.
    probe: of a method whose messages are projected gradients; see `probe`.
    turn: round, ids int32[C] -> the ids of those that act in it, all but for
      methods whose clients take turns.
  """

  init: Callable[[jt.Params], Any]
  client: Callable[..., tuple[jt.Message, Any, jt.Metrics]]
  server: Callable[[Any, jt.Message, Party], Any]
  message: Callable[[jt.Params], jt.Message]
  downlink: Callable[..., jt.Message]
  receivers: str
  follow: Callable[[Any, jt.Message], Any]
  num_batches: int
  forwards: int | Callable[[int], int]
  backwards: int | Callable[[int], int]
  projected_grads: int = 0
  weight_limit: int = 2**31 - 1
  init_local: Callable[[jt.Params], Any] = lambda params: ()
  check: Callable[[Any], str | None] = lambda state: None
  release: Release | None = None
  prepare: Callable[..., jt.Batch] | None = None
  values: Callable[[jt.Message], jax.Array] | None = None
  probe: Probe | None = None
  turn: Callable[[int, np.ndarray], np.ndarray] = lambda round, ids: ids

  @property
  def private(self) -> bool:
    """Whether the method hides what single examples are."""
    return self.prepare is not None

  def recorded(self, params: jt.Params) -> jt.Message:
    """The shape of what the log holds: of a message, or of a release."""
    return (self.message if self.release is None else self.release.like)(params)


def check_budget(round: int, num_rounds: int) -> None:
  """Raises ValueError for a round that the plan of a private run lacks."""
  if round >= num_rounds:
    raise ValueError(f'the budget is spent: the plan has {num_rounds} rounds')


def check_release(
  round: int, num_rounds: int, cohort: Party, num_clients: int
) -> None:
  """Checks that a release is one that its plan has.

  Raises:
    ValueError: if the rounds are over, or clients are absent.
  """
  check_budget(round, num_rounds)
  present = np.size(cohort.id)
  if present != num_clients:
    raise ValueError(
      f'{present} of {num_clients} clients take part: a mean over fewer'
      ' is not what the plan releases'
    )


def quotients(numerators: jax.Array, denominators: jax.Array) -> jax.Array:
  """`numerators / denominators`, the same bits on every device.

  Division is not correctly rounded everywhere, so that the quotient is found by
  long division in integers: 24 significant bits, rounded down.

  Args:
    numerators: uint32[...].
    denominators: uint32[...] of the same shape or a scalar; not below the
      numerators, and below 2**31.

  Returns:
    float32[...] in [0, 1]; zero for 0 / 0.
  """

  def divide(_, carry):
    remainder, quotient, exponent = carry
    more = (numerators > 0) & (quotient < 2**23)  # 24 bits are not yet there
    doubled = remainder << 1
    fits = (doubled >= denominators).astype(jnp.uint32)
    return (
      jnp.where(more, doubled - fits * denominators, remainder),
      jnp.where(more, (quotient << 1) | fits, quotient),
      jnp.where(more, exponent - 1, exponent),
    )

  whole = numerators == denominators
  start = (
    jnp.where(whole, jnp.uint32(0), numerators),
    whole.astype(jnp.uint32),
    jnp.zeros(numerators.shape, jnp.int32),
  )
  # at most 30 leading zeros and 24 bits
  _, quotient, exponent = jax.lax.fori_loop(0, 54, divide, start)
  quotient = jnp.where(numerators > 0, quotient, jnp.uint32(0))
  return quotient.astype(jnp.float32) * grid.power_of_two(exponent)


def fractions(weights: jax.Array) -> jax.Array:
  """`weights / sum(weights)`, the same bits on every device.

  Args:
    weights: float32[...], whole numbers; their sum is below 2**31.

  Returns:
    float32[...] of 24 significant bits, rounded down; zeros if all weights are
    zero.
  """
  weights = weights.astype(jnp.uint32)
  return quotients(weights, jnp.sum(weights))


def weighted_mean(
  messages: jt.Message, cohort: Party
) -> tuple[jt.Message, jax.Array]:
  """Mean of float messages by weight; a message that is not finite is left out.

  Contributions are added one by one in the order of party ids, whatever order
  they came in. Float sums: equal bits for the same compiled program, not across
  devices.

  Args:
    messages: pytree of floating-point arrays with leading axis C.
    cohort: `Party` with leading axis C.

  Returns:
    The mean (zeros if nobody contributed), and bool[]: somebody contributed.
  """
  order = jnp.argsort(jnp.asarray(cohort.id))
  finite = jnp.stack(
    [
      jnp.all(jnp.isfinite(m.reshape(m.shape[0], -1)), axis=1)
      for m in jax.tree.leaves(messages)
    ]
  ).all(0)
  part = fractions(finite * jnp.asarray(cohort.weight))

  def add(total, i):
    scaled = lambda m: part[i].astype(m.dtype) * jnp.where(part[i] > 0, m[i], 0)
    return jax.tree.map(lambda t, m: t + scaled(m), total, messages), None

  zeros = jax.tree.map(lambda m: jnp.zeros_like(m[0]), messages)
  return jax.lax.scan(add, zeros, order)[0], jnp.any(part > 0)


def all_messages(state: Any, messages: jt.Message, cohort: Party) -> jt.Message:
  """A downlink: the cohort and its messages, from which a replica steps on.

  Ids and weights travel in the narrowest unsigned type that holds them; equal
  weights travel once.
  """
  del state  # Unused: replicas hold it.
  weight = np.asarray(cohort.weight).astype(np.uint32)
  if weight.size and (weight == weight[0]).all():
    weight = weight[:1]
  narrow = lambda x: x.astype(np.min_scalar_type(x.max(initial=0)))
  ids = np.asarray(cohort.id).astype(np.uint32)
  return {'id': narrow(ids), 'weight': narrow(weight), 'message': messages}


def follow_messages(server: Callable[..., Any]) -> Callable[..., Any]:
  """`Method.follow` of a method whose downlink is `all_messages`.

  Args:
    server: of the method; its state has a field `round`.
  """

  def follow(state, down):
    num_parties = len(down['id'])
    cohort = Party(
      id=jnp.asarray(down['id']).astype(jnp.int32),
      round=jnp.full(num_parties, state.round),
      weight=jnp.broadcast_to(
        jnp.asarray(down['weight']).astype(jnp.float32), num_parties
      ),
    )
    return server(state, down['message'], cohort)

  return follow
