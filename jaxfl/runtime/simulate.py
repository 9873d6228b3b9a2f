"""Many clients on one device: the runtime for research sweeps and for CI.

Clients run in blocks under `vmap`; their messages are encoded to frames,
counted, decoded, logged, and only then applied. The cohort has a fixed number
of slots, so that nothing is compiled again when clients come and go. A round
that the log already holds is taken from the log: resuming is running again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfl import keys, wire
from jaxfl import method as method_lib
from jaxfl import typing as jt
from jaxfl.runtime import stacking

# round, client id -> pytree of arrays with leading axis `method.num_batches`
BatchFn = Callable[[int, int], jt.Batch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
  """Who takes part.

  Attributes:
    num_clients: clients in all, with ids 0 .. num_clients - 1.
    participation_rate: share of the clients that is sampled in a round.
    dropout_rate: probability that a sampled client sends nothing.
    weights: whole numbers, one per client; None means 1 each.
    seed: of sampling and dropout.
  """

  num_clients: int
  participation_rate: float = 1.0
  dropout_rate: float = 0.0
  weights: tuple[int, ...] | None = None
  seed: int = 0

  def __post_init__(self):
    if self.num_clients < 1:
      raise ValueError(f'num_clients must be >= 1, got {self.num_clients}')
    if not 0 < self.participation_rate <= 1:
      raise ValueError(
        'participation_rate must be in (0, 1], got'
        f' {self.participation_rate}: no more clients can be sampled than'
        ' exist'
      )
    if not self.num_slots:
      raise ValueError(
        f'participation_rate {self.participation_rate} of {self.num_clients}'
        ' clients samples nobody; it must be more than'
        f' {0.5 / self.num_clients:.3g}'
      )
    if not 0 <= self.dropout_rate < 1:
      raise ValueError(
        f'dropout_rate must be in [0, 1), got {self.dropout_rate}'
      )
    if self.weights is not None:
      if len(self.weights) != self.num_clients:
        raise ValueError(
          f'weights must have {self.num_clients} entries, one per client,'
          f' got {len(self.weights)}'
        )
      for i, w in enumerate(self.weights):
        if not (w == int(w) and 1 <= w < 2**24):
          raise ValueError(
            f'weights must be whole numbers in [1, 2**24), got {w} for'
            f' client {i}'
          )

  @property
  def num_slots(self) -> int:
    """Clients sampled in every round."""
    return round(self.participation_rate * self.num_clients)

  def weight_of(self, ids: np.ndarray) -> np.ndarray:
    """float32[C]."""
    if self.weights is None:
      return np.ones(len(ids), np.float32)
    return np.asarray(self.weights, np.float32)[ids]

  def sample(self, round: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the sampled clients, and of those among them that answer.

    Returns:
      Two arrays int32, increasing; the second may be empty.
    """
    # the second word of the key is one that no client's batches use
    key = np.array([self.seed, 2**64 - 1], np.uint64)
    # rounds are 2**64 blocks apart, so that their numbers never overlap
    bits = np.random.Philox(key=key, counter=int(round) << 64)
    rng = np.random.Generator(bits)
    sampled = rng.choice(self.num_clients, self.num_slots, replace=False)
    sampled = np.sort(sampled).astype(np.int32)
    answers = rng.random(self.num_slots) >= self.dropout_rate
    return sampled, sampled[answers]


class Round(NamedTuple):
  """What a round did; yielded by `simulate` after the server step."""

  round: int  # rounds done, counted from 1
  state: Any
  local: Any  # private client states; the next round changes them in place
  loss: float | None  # mean over clients; None if from the log, or private
  bytes_up: int  # encoded frames of this round
  bytes_down: int
  forwards: int  # passes over a minibatch, over all clients
  backwards: int
  projected_grads: int


class Programs(NamedTuple):
  """The two compiled programs of a run, and who calls the first."""

  client: Any  # state, local[B], batches[B], party[B] -> message[B], ...
  server: Any  # state, messages[C], cohort[C] -> state
  run_clients: Any = None  # in place of `run_clients`, with its arguments


def compile_method(
  method: method_lib.Method,
  *,
  build: Callable[[Any], method_lib.Method] | None = None,
  frozen: Any = None,
  donate: bool = False,
) -> Programs:
  """Compiles client and server apart, as `jaxfl.method` asks.

  What a loss closes over becomes a constant of the client's program. For large
  tensors, such as the frozen part of an adapter, that is a large program and a
  second copy in memory. With `build` they are arguments:

      build = lambda frozen: spsa(
        lambda t, batch: loss_fn(adapter.merge(frozen, t), batch), root, ...
      )
      programs = compile_method(build(frozen), build=build, frozen=frozen)

  Args:
    method: the method; all of it but the client is used in any case.
    build: frozen -> the same method. It is called while the client is traced:
      what it computes with `jax.numpy` has no value there, so that schedules
      must be plain functions (`jaxfl.schedules`).
    frozen: pytree of arrays. They are put on the device once.
    donate: whether a round writes the new state over the old one, in place of a
      second copy of the weights: who holds a state of an earlier round then
      holds deleted arrays. Two leaves of a state must not be one array.

  Raises:
    ValueError: if only one of `build` and `frozen` is given.
  """
  check_frozen(build, frozen)
  over_clients = functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
  if build is None:
    client = jax.jit(over_clients(method.client))
  else:
    run = lambda frozen, *args: over_clients(build(frozen).client)(*args)
    client = functools.partial(jax.jit(run), jax.device_put(frozen))
  return Programs(client=client, server=jit_server(method.server, donate))


def shared_programs(
  build: Callable[[Any], method_lib.Method],
) -> Callable[[Any], Programs]:
  """Programs of a method that are compiled once for many seeds and data.

  Args:
    build: data -> method; `data` is a pytree of arrays. What the method closes
      over, such as the root key of a seed, is an argument of its programs.

  Returns:
    data -> programs, for `simulate` with the method of the same data.
  """
  over_clients = lambda data, *args: jax.vmap(
    build(data).client, (None, 0, 0, 0)
  )(*args)
  client = jax.jit(over_clients)
  server = jax.jit(lambda data, *args: build(data).server(*args))
  return lambda data: Programs(
    client=functools.partial(client, data),
    server=functools.partial(server, data),
  )


def jit_server(server: Callable[..., Any], donate: bool) -> Any:
  """The server's program; see `compile_method`."""
  return jax.jit(server, donate_argnums=0 if donate else ())


def check_frozen(build: Any, frozen: Any) -> None:
  """Raises ValueError if only one of `build` and `frozen` is given."""
  if (build is None) != (frozen is None):
    missing = 'build' if build is None else 'frozen'
    raise ValueError(f'build and frozen go together, {missing} is missing')


def pad(messages, ids, weights, round, num_slots):
  """A cohort in its canonical form: increasing ids, absent slots at the end.

  Args:
    messages: pytree of arrays with leading axis C <= num_slots.
    ids: int32[C], increasing.
    weights: float32[C].
    round: number of the round, from 0.
    num_slots: length of the result.

  Returns:
    Messages and `Party`, both with leading axis num_slots.
  """
  fill = num_slots - len(ids)
  widen = lambda x: np.concatenate(
    [x, np.zeros((fill, *np.shape(x)[1:]), np.asarray(x).dtype)]
  )
  absent = np.arange(fill, dtype=np.int32) + (2**31 - 1 - fill)
  cohort = method_lib.Party(
    id=np.concatenate([np.asarray(ids, np.int32), absent]),
    round=np.full(num_slots, round, np.int32),
    weight=widen(np.asarray(weights, np.float32)),
  )
  return jax.tree.map(widen, messages), cohort


def simulate(
  method: method_lib.Method,
  state: Any,
  batch_fn: BatchFn,
  population: Population,
  *,
  num_rounds: int,
  first_round: int = 0,
  local: Any = None,
  log: Any = None,
  block_size: int = 1,
  programs: Programs | None = None,
  noise: Any = None,
  tamper: Callable[..., jt.Message] | None = None,
  trust: Callable[..., np.ndarray] | None = None,
) -> Iterator[Round]:
  """Runs rounds `first_round .. num_rounds - 1` and yields after each.

  Args:
    method: the method.
    state: from `method.init(params)`, or of a snapshot.
    batch_fn: round, client id -> batches; must be deterministic, but for what
      `method.prepare` adds. Clients of one block may differ in shape, see
      `stacking`.
    population: who takes part.
    num_rounds: rounds of the whole run.
    first_round: rounds that `state` has behind it.
    local: private client states of a snapshot, leading axis num_clients.
    log: a `RoundLog` or `SharedLog`; rounds that it holds are replayed, new
      ones are appended to it before they are applied.
    block_size: clients that run at once under `vmap`, on every device.
    programs: from `compile_method(method)`, to share compiled programs, or
      from `mesh.compile_method(method, mesh)`, to run on a mesh.
    noise: a `jaxfl.noise.NoiseKey`, for a method with a release.
    tamper: round, ids, messages -> messages; what clients send in place of
      their messages, see `byzantine`.
    trust: state, messages, cohort -> weights, float32[C] of whole numbers, in
      place of the cohort's; they go to the log. See `probe`. It sees rounds
      from the log too, whose weights stand.

  Yields:
    A `Round` each.

  Raises:
    FloatingPointError: when `method.check` reports an error.
    ValueError: for a population that `check_population` refuses, for `trust` in
      a release, if a client's batches lack the leading axis, or those of a
      block can't be stacked.
  """
  check_population(method, population)
  if trust is not None and method.release is not None:
    raise ValueError('trust is for methods without a release')
  if block_size < 1:
    raise ValueError(f'block_size must be >= 1, got {block_size}')
  checked = lambda round, client: _check_batches(
    method, batch_fn(round, client), client
  )
  programs = programs or compile_method(method)
  like = method.message(state.params)
  recorded = method.recorded(state.params)
  slots = num_slots(method, population)
  if local is None:
    local = init_local(method, state.params, population.num_clients)
  stateful = bool(jax.tree.leaves(local))
  last_round: dict[int, int] = {}  # in which a client was sampled
  for round in range(first_round):
    last_round |= dict.fromkeys(population.sample(round)[0].tolist(), round)
  for round in range(first_round, num_rounds):
    sampled, ids = population.sample(round)
    ids = method.turn(round, ids)
    record = None
    if log is not None and round < log.num_rounds:
      record = log.read(round, recorded)
      if method.release is None:
        ids = record.ids
    if record is None or stateful:
      run = programs.run_clients or run_clients
      messages, local, loss = run(
        programs, state, local, checked, population, round, ids, block_size
      )
    elif method.release is None:
      messages, loss = record.messages, None
    else:  # nobody has them any more
      messages, loss = _zeros(like, len(ids)), None
    if tamper is not None and record is None:
      messages = tamper(round, ids, messages)
    senders = len(ids)
    messages, bytes_up = _transmit(messages, ids, like)
    weights = population.weight_of(ids)
    if method.private:
      loss = None
    if method.release is not None and record is None:
      parties = method_lib.Party(ids, np.int32(round), weights)
      released = method.release.make(state, messages, parties, noise)
      messages = jax.tree.map(lambda x: np.asarray(x)[None], released)
      ids, weights = np.zeros(1, np.int32), np.ones(1, np.float32)
    if record is not None:
      messages, ids, weights = record.messages, record.ids, record.weights
    if trust is not None:
      parties = method_lib.Party(ids, np.int32(round), weights)
      judged = trust(state, messages, parties)
      weights = judged if record is None else weights
    if log is not None and record is None:
      log.append(round, ids, weights, messages)
    cohort = method_lib.Party(ids, np.int32(round), weights)
    if method.receivers == 'returning':
      bytes_down = _catch_up(method, state, round, sampled, last_round)
    else:
      down = len(wire.to_bytes(method.downlink(state, messages, cohort)))
      everyone = method.receivers == 'everyone'
      bytes_down = down * (population.num_clients if everyone else len(sampled))
    padded = pad(messages, ids, weights, round, slots)
    state = programs.server(state, *padded)
    if error := method.check(state):
      raise FloatingPointError(f'round {round}: {error}')
    yield Round(
      round=round + 1,
      state=state,
      local=local,
      loss=loss,
      bytes_up=bytes_up,
      bytes_down=bytes_down,
      forwards=_at(method.forwards, round) * senders,
      backwards=_at(method.backwards, round) * senders,
      projected_grads=method.projected_grads * senders,
    )


def _at(passes, round):
  """A number of passes, or its function of the round."""
  return passes(round) if callable(passes) else passes


def num_slots(method: method_lib.Method, population: Population) -> int:
  """Slots of a cohort as the server sees it; a release is the only party."""
  return population.num_slots if method.release is None else 1


def _catch_up(method, state, round, sampled, last_round):
  """Bytes to bring every sampled client up to date; notes that it is."""
  sizes: dict[int, int] = {}  # by the round of last time
  total = 0
  for client in sampled.tolist():
    since = last_round.get(client, -1)
    if since not in sizes:
      sizes[since] = len(wire.to_bytes(method.downlink(state, since)))
    total += sizes[since]
    last_round[client] = round
  return total


def _check_batches(method, batches, client):
  """Batches with the leading axis that the method asks for."""
  for path, x in keys.named_leaves(batches):
    if np.shape(x)[:1] != (method.num_batches,):
      raise ValueError(
        f'batches of client {client}: {path!r} has shape {np.shape(x)}; the'
        f' method needs a leading axis of {method.num_batches} minibatches'
      )
  return batches


def check_population(method: method_lib.Method, population: Population) -> None:
  """Checks that a method can run with a population.

  Raises:
    ValueError: if a cohort may weigh more than the method can divide; if there
      is a release, which is a mean over all clients, and some may be absent or
      weigh more than others; or several processes, each with its own noise.
  """
  if method.release is not None:
    if population.num_slots < population.num_clients or population.dropout_rate:
      raise ValueError(
        'participation_rate must be 1 and dropout_rate 0 for a private method:'
        ' what it releases is a mean over all clients'
      )
    if population.weights is not None:
      raise ValueError(
        'weighting must be uniform for a private method: what it releases is'
        ' an even mean over clients'
      )
  if method.private and jax.process_count() > 1:
    raise ValueError(
      'a private method runs in one process: all would have noise of their own'
    )
  weights = population.weights or (1,) * population.num_clients
  total = sum(sorted(weights)[-population.num_slots :])
  if total > method.weight_limit:
    raise ValueError(
      f'the weights of a cohort may add up to {total:.0f}; this method needs'
      f' at most {method.weight_limit}'
    )


def init_local(
  method: method_lib.Method, params: jt.Params, num_clients: int
) -> Any:
  """Private states of all clients, NumPy arrays with axis num_clients."""
  one = method.init_local(params)
  return jax.tree.map(
    lambda x: np.repeat(np.asarray(x)[None], num_clients, axis=0), one
  )


class Block(NamedTuple):
  """Clients that run at once, with what they run on."""

  ids: np.ndarray  # int32[n], n <= B
  batches: jt.Batch  # leaves [B, ...]; copies from the n-th on
  party: method_lib.Party  # fields [B]


def blocks(
  batch_fn: BatchFn,
  population: Population,
  round: int,
  ids: np.ndarray,
  block_size: int,
) -> Iterator[Block]:
  """Blocks of `block_size` clients; the last is filled up with copies."""
  for start in range(0, len(ids), block_size):
    block = ids[start : start + block_size]
    filled = np.resize(block, block_size) if len(block) < block_size else block
    # once for every client: private noise can't be drawn again
    own = [batch_fn(round, int(i)) for i in block]
    batches = [own[i % len(own)] for i in range(block_size)]
    party = method_lib.Party(
      id=np.asarray(filled, np.int32),
      round=np.full(block_size, round, np.int32),
      weight=population.weight_of(filled),
    )
    yield Block(block, stacking.stack(batches, filled), party)


def run_clients(
  programs, state, local, batch_fn, population, round, ids, block_size
):
  """Messages [C, ...] of the clients `ids`, new local states, mean loss."""
  arrived, losses = [], []
  for block in blocks(batch_fn, population, round, ids, block_size):
    mine = jax.tree.map(lambda x, b=block: x[b.party.id], local)
    message, mine, metrics = programs.client(
      state, mine, block.batches, block.party
    )
    message, mine, loss = jax.device_get((message, mine, metrics['loss']))
    n = len(block.ids)
    arrived.append(jax.tree.map(lambda x, n=n: x[:n], message))
    losses.append(loss[:n])
    put_back(local, block.ids, mine)
  if not arrived:
    return (), local, None
  messages = jax.tree.map(lambda *xs: np.concatenate(xs), *arrived)
  return messages, local, float(np.concatenate(losses).mean())


def put_back(local: Any, ids: np.ndarray, mine: Any) -> None:
  """Writes new private states of clients, the first rows of `mine`."""
  n = len(ids)
  jax.tree.map(lambda all, new: all.__setitem__(ids, new[:n]), local, mine)


def _transmit(messages, ids, like):
  """Sends every message through its frame; returns what arrives, and bytes."""
  if not len(ids):
    return _zeros(like, 0), 0
  total, arrived = 0, []
  for i in range(len(ids)):
    frame = wire.to_bytes(jax.tree.map(lambda x: x[i], messages))
    total += len(frame)
    arrived.append(wire.from_bytes(frame, like))
  return jax.tree.map(lambda *xs: np.stack(xs), *arrived), total


def _zeros(like, count):
  """Messages [count, ...] of nothing."""
  return jax.tree.map(lambda x: np.zeros((count, *x.shape), x.dtype), like)
