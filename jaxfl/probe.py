"""Trust in clients, from probes: do their claims hold on examples of our own?

Where every client has directions of its own, no message can be compared with
another, but each can be checked: along the update that it asks for, the loss on
a trusted minibatch must fall. One probe is two forward passes, however many
scalars it checks: those of all messages of a client since its last probe, at
most `WINDOW`, each scaled to length one (`estimators.slope`).

    slope = (L(w + mu v) - L(w - mu v)) / (2 mu)    v: what the client asks for
    x     = slope / rms of the slopes of all clients
    score = sum_j s_j decay**j x_j / sqrt(sum_j (s_j decay**j)**2)
    trust = whole levels, 0 at a score of 0.5 or below, 8 at 1.5; at first 0

over the probes of a client, j back from the last one. s_j, the mean of x over
trusted clients at that time, weighs probes by what they can tell, as slopes of
honest clients become noise near a minimum.

If messages have nothing to do with the loss, the score is about N(0, 1); it
grows with the number of probes for honest clients, and falls for those that
flip signs. v has a fixed length, so that no claim can inflate its own score or
the scale. A message whose claims are `MOST` times as large as slopes are weighs
nothing in its round, at no cost.

The first messages of every client are probed, then a share of them at random,
so that who is honest at first is found out and who was unlucky comes back. The
draw depends on the run's key and on all messages of the round: everybody with
the log can recompute who was probed, but nobody knows it before sending. Probes
never take more than `share` of the forward passes of all clients.

Majorities do not count here: a score compares a client with the trusted
examples alone. If clients' data differ from them, so do their slopes.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import estimators, keys
from jaxfl import method as method_lib
from jaxfl import typing as jt

LEVELS = 8  # of trust
MOST = 4.0  # times the usual size of a claim
WINDOW = 8  # messages of a probe
_NONE, _FULL = 0.5, 1.5  # scores of no trust and of full trust
_SIGNAL_RATE, _LEAST_SIGNAL = 0.1, 0.2
_SCALE_DECAY = 0.9  # per round, of the mean square of slopes


@dataclasses.dataclass
class Record:
  """What is known of a client: discounted sums over its probes."""

  total: float = 0.0  # of s x
  variance: float = 0.0  # of the total, if messages say nothing
  messages: int = 0
  waiting: list[Any] = dataclasses.field(default_factory=list)  # for a probe

  @property
  def score(self) -> float:
    return self.total / self.variance**0.5 if self.variance else 0.0

  @property
  def level(self) -> int:
    """Of trust, 0 .. `LEVELS`."""
    share = (self.score - _NONE) / (_FULL - _NONE)
    return round(LEVELS * min(max(share, 0.0), 1.0))


class Trust:
  """Weights of the cohort by probes; the argument `trust` of `simulate`.

  Floats, which another device may round differently: the log holds the weights,
  and a replay takes them from there.

  Attributes:
    records: by client id.
    probes: how many there were so far.
    forwards: forward passes that they took.
  """

  def __init__(
    self,
    method: method_lib.Method,
    batch_fn: Callable[[int], jt.Batch],
    root: jax.Array,
    *,
    num_messages: int,
    num_clients: int,
    share: float = 0.05,
    burst: int = 4,
    decay: float = 0.98,
    slope: Callable[..., jax.Array] | None = None,
  ):
    """Starts with no trust in anybody.

    Args:
      method: with a `probe`.
      batch_fn: round -> a trusted minibatch, as large as those of clients.
      root: uint32[2], the run's key.
      num_messages: of the whole run, for the budget.
      num_clients: in all.
      share: of the clients' forward passes, at most, that probes may take.
      burst: messages of a client that are probed before it is a matter of
        chance; at most half of the budget goes there.
      decay: weight of a probe after the next one.
      slope: compiled, in place of that of `method.probe`, whose loss may need
        arguments of its own.

    Raises:
      ValueError: naming the argument that is out of range, or for a method
        without a probe.
    """
    if method.probe is None:
      raise ValueError(
        'probes are for methods whose messages are projected gradients: spsa,'
        ' fedkseed, decomfl, without privacy'
      )
    if not 0 < share <= 1:
      raise ValueError(f'share must be in (0, 1], got {share}')
    if not 0 < decay <= 1:
      raise ValueError(f'decay must be in (0, 1], got {decay}')
    for name, value in (
      ('num_messages', num_messages),
      ('num_clients', num_clients),
    ):
      if value < 1:
        raise ValueError(f'{name} must be >= 1, got {value}')
    assert not callable(method.forwards)
    read = method.probe.claims

    def claims(state, message, party):
      directions, claimed = read(state, message, party)
      return directions, estimators.unit_length(claimed), claimed

    self._claims = jax.jit(jax.vmap(claims, (None, 0, 0)))
    self._slope = slope or jax.jit(method.probe.slope)
    self._cost = method.probe.forwards
    self._batch_fn = batch_fn
    key = keys.stream(root, 'probe')
    self._draw = jax.jit(lambda *data: keys.uniform(keys.fold(key, *data)))
    self._decay = decay
    self._budget = int(share * num_messages * method.forwards / self._cost)
    self._burst = min(burst, self._budget // (2 * num_clients))
    first = self._burst * num_clients
    self._rate = (self._budget - first) / max(num_messages - first, 1)
    self.reset()

  def reset(self) -> None:
    """Forgets everything, for another run with the same programs."""
    self._signal = 0.5  # the usual x of those that are trusted
    self._squares = np.zeros(2)  # discounted sum of squares, and count
    self.records: dict[int, Record] = {}
    self.probes = 0

  def saved(self) -> dict[str, Any]:
    """What it knows, for JSON and `restore`, but for messages that wait."""
    return {
      'signal': self._signal,
      'squares': self._squares.tolist(),
      'probes': self.probes,
      'records': {
        str(client): [record.total, record.variance, record.messages]
        for client, record in self.records.items()
      },
    }

  def restore(self, saved: Mapping[str, Any]) -> None:
    """Goes on from `saved`; of anything else it raises what Python does."""
    self.records = {
      int(client): Record(float(total), float(variance), int(messages))
      for client, (total, variance, messages) in saved['records'].items()
    }
    self._signal = float(saved['signal'])
    self._squares = np.array(saved['squares'], float).reshape(2)
    self.probes = int(saved['probes'])

  def levels(self, num_clients: int) -> bytes:
    """The level of every client, a byte each."""
    return bytes(
      self.records.get(i, Record()).level for i in range(num_clients)
    )

  @property
  def limit(self) -> float:
    """The largest claim that counts: root mean square of its scalars."""
    return MOST * self._scale

  @property
  def _scale(self) -> float:
    """The usual size of slopes; 1 before the first."""
    squares, count = self._squares
    return float(np.sqrt(squares / count)) if squares > 0 else 1.0

  @property
  def forwards(self) -> int:
    return self.probes * self._cost

  def chosen(
    self, round: int, ids: np.ndarray, messages: jt.Message
  ) -> np.ndarray:
    """bool[C]: whose messages are probed."""
    digest = 0
    for leaf in jax.tree.leaves(messages):
      digest = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), digest)
    draws = self._draw(np.uint32(round), np.uint32(digest), ids)
    seen = [self.records.get(i, Record()).messages for i in ids.tolist()]
    first = np.array(seen, int) < self._burst
    return first | (np.asarray(draws) < self._rate)

  def __call__(
    self, state: Any, messages: jt.Message, cohort: method_lib.Party
  ) -> np.ndarray:
    """Weights of a cohort, float32[C]: `cohort.weight` times a level of trust.

    Raises:
      ValueError: if a weight would be 2**24 or more.
    """
    ids, round = np.asarray(cohort.id), int(cohort.round)
    if not len(ids):
      return np.zeros(0, np.float32)
    cohort = cohort._replace(round=np.full(len(ids), round, np.int32))
    directions, units, claims = jax.device_get(
      self._claims(state, messages, cohort)
    )
    chosen = self.chosen(round, ids, messages)
    slopes = {}
    for i, client in enumerate(ids.tolist()):
      record = self.records.setdefault(client, Record())
      record.messages += 1
      record.waiting = [*record.waiting, (directions[i], units[i])][-WINDOW:]
      if chosen[i] and self.probes < self._budget:
        slopes[client] = self._probe(state, record, round)
    self._squares *= _SCALE_DECAY
    self._squares += sum(x * x for x in slopes.values()), len(slopes)
    scale = self._scale
    signal, trusted = max(self._signal, _LEAST_SIGNAL), []
    for client, slope in slopes.items():
      record = self.records[client]
      trusted.append((record.level, slope / scale))
      record.total = self._decay * record.total + signal * slope / scale
      record.variance = self._decay**2 * record.variance + signal**2
    if whole := sum(level for level, _ in trusted):
      found = sum(level * x for level, x in trusted) / whole
      self._signal += _SIGNAL_RATE * (found - self._signal)
    sizes = np.sqrt(np.mean(np.square(np.nan_to_num(claims), dtype=float), 1))
    levels = np.array([self.records[i].level for i in ids.tolist()])
    weights = np.asarray(cohort.weight) * levels * (sizes <= self.limit)
    if weights.max() >= 2**24:
      raise ValueError(
        f'weights of trust must be below 2**24, got {weights.max():.0f}: lower'
        " the clients' weights"
      )
    return weights.astype(np.float32)

  def _probe(self, state, record, round) -> float:
    """The slope of what waits in a record, which is then empty."""
    empty = jax.tree.map(np.zeros_like, record.waiting[0])
    filled = record.waiting + [empty] * (WINDOW - len(record.waiting))
    directions, units = (np.concatenate(x) for x in zip(*filled, strict=True))
    record.waiting = []
    self.probes += 1
    slope = self._slope(
      state.params, directions, units, self._batch_fn(round), jnp.int32(round)
    )
    return float(jnp.nan_to_num(slope))
