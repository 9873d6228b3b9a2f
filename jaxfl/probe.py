"""Trust in clients, from probes: do their claims hold on examples of our own?

Where every client has directions of its own, no message can be compared with
another, but each can be checked: it asks for an update, and along it the loss
on a trusted minibatch must fall. One probe is two forward passes for all the
scalars of a message (`estimators.slope`).

    slope  = (L(w + mu v) - L(w - mu v)) / (2 mu)    v: the message's direction
    x      = slope / rms of the slopes of all clients
    score  = sum decay**j x_j / sqrt(sum decay**2j)  over a client's probes
    trust  = whole levels 0 .. 8 of score / 2        no probe, no trust

Under a message that has nothing to do with the loss the score is about N(0, 1);
it grows with the number of probes for honest clients and falls for those that
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
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxfl import keys
from jaxfl import method as method_lib
from jaxfl import typing as jt

LEVELS = 8  # of trust
MOST = 8.0  # times the usual size of a claim
_SURE = 2.0  # the score of full trust
_SCALE_DECAY = 0.9  # per round, of the mean square of slopes


@dataclasses.dataclass
class Record:
  """What is known of a client: discounted sums over its probes."""

  total: float = 0.0  # of x
  variance: float = 0.0  # of the total, under no relation
  messages: int = 0

  @property
  def score(self) -> float:
    return self.total / self.variance**0.5 if self.variance else 0.0


class Trust:
  """Weights of the cohort by probes; the argument `trust` of `simulate`.

  Floats, which another device may round differently: the log holds the weights,
  and a replay takes them from there.

  Attributes:
    records: by client id.
    probes: messages that were probed so far.
    forwards: forward passes that probes took so far.
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
    burst: int = 8,
    decay: float = 0.97,
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
        chance; at most half of the budget.
      decay: weight of a probe after the next one.

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
    self._measure = jax.jit(method.probe.measure)
    self._cost = method.probe.forwards
    self._batch_fn = batch_fn
    self._key = keys.stream(root, 'probe')
    self._claims = jax.jit(jax.vmap(method.probe.claims))
    self._decay = decay
    self._budget = int(share * num_messages * method.forwards / self._cost)
    self._burst = min(burst, self._budget // (2 * num_clients))
    first = self._burst * num_clients
    self._rate = (self._budget - first) / max(num_messages - first, 1)
    self._squares = np.zeros(2)  # discounted sum of squares, and count
    self.records: dict[int, Record] = {}
    self.probes = 0

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
    draws = keys.uniform(keys.fold(self._key, round, digest, ids))
    chosen = np.asarray(draws) < self._rate
    seen = [self.records.get(i, Record()).messages for i in ids.tolist()]
    return chosen | (np.array(seen, int) < self._burst)

  def __call__(
    self, state: Any, messages: jt.Message, cohort: method_lib.Party
  ) -> np.ndarray:
    """Weights of a cohort, float32[C]: `cohort.weight` times a level of trust.

    Raises:
      ValueError: if a weight would be 2**24 or more.
    """
    ids, round = np.asarray(cohort.id), int(cohort.round)
    chosen = self.chosen(round, ids, messages) if len(ids) else []
    slopes = {}
    for i, client in enumerate(ids.tolist()):
      record = self.records.setdefault(client, Record())
      record.messages += 1
      if chosen[i] and self.probes < self._budget:
        slopes[client] = self._probe(state, messages, round, client, i)
    self._squares *= _SCALE_DECAY
    self._squares += sum(x * x for x in slopes.values()), len(slopes)
    scale = self._scale()
    for client, slope in slopes.items():
      record = self.records[client]
      # a slope of 0 is no evidence; falls along an update are positive
      record.total = self._decay * record.total + slope / scale
      record.variance = self._decay**2 * record.variance + 1.0
    levels = [_level(self.records[i].score) for i in ids.tolist()]
    levels = np.array(levels, np.float32) * self._usual(messages, len(ids))
    weights = np.asarray(cohort.weight) * levels
    if weights.size and weights.max() >= 2**24:
      raise ValueError(
        f'weights of trust must be below 2**24, got {weights.max():.0f}: lower'
        " the clients' weights"
      )
    return weights.astype(np.float32)

  def _usual(self, messages, count):
    """bool[C]: the claims are not much larger than slopes are."""
    if not count:
      return np.zeros(0, bool)
    claims = np.nan_to_num(jax.device_get(self._claims(messages)))
    sizes = np.sqrt(np.mean(np.square(claims, dtype=np.float64), axis=1))
    return sizes <= MOST * self._scale()

  def _probe(self, state, messages, round, client, i) -> float:
    message = jax.tree.map(lambda x: x[i], messages)
    party = method_lib.Party(np.int32(client), np.int32(round), np.float32(1))
    batch = self._batch_fn(round)
    slope = float(self._measure(state, message, batch, party))
    self.probes += 1
    return slope if np.isfinite(slope) else 0.0

  def _scale(self) -> float:
    squares, count = self._squares
    return float(np.sqrt(squares / count)) if squares > 0 else 1.0


def _level(score: float) -> int:
  return round(LEVELS * min(max(score / _SURE, 0.0), 1.0))
