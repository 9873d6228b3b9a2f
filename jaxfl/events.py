"""Events: what noise hides one example in what a run releases.

A run is a list of rounds, and a round a tuple of events, all fixed before the
run starts: multipliers or rounds that depend on what was released need other
accounting. Noise is relative to the query's **true sensitivity** under the
adjacency that is claimed:

    event              a release of               adjacency
    Gaussian           a sum over all examples    replaced (2 C) or dropped (C)
    PoissonGaussian    a sum over a secret        dropped (C)
                       Poisson sample
    IntegerNoise       one integer                replaced or dropped
    IntegerVector      a vector of integers       replaced or dropped

A replaced example is another one, a dropped one adds zero. One claim needs one
of the two, for all of its events.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxfl import checks

LAWS = ('discrete_gaussian', 'skellam')


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Continuous Gaussian noise on a query over all examples.

  Attributes:
    noise_multiplier: standard deviation over the true sensitivity, > 0.
    count: how often it is released.
  """

  noise_multiplier: float
  count: int = 1


@dataclasses.dataclass(frozen=True)
class PoissonGaussian:
  """Gaussian noise on a sum over a Poisson sample that nobody else knows.

  Every example is drawn on its own with the same probability, by a
  `NoiseKey.bernoulli`; the sum is divided by a public number. Samples of fixed
  size, shuffled epochs and samples from a shared key are not this event.

  Attributes:
    noise_multiplier: standard deviation over the bound of one example, > 0.
    sampling_rate: the probability, in (0, 1).
    count: how often it is released.
  """

  noise_multiplier: float
  sampling_rate: float
  count: int = 1


@dataclasses.dataclass(frozen=True)
class IntegerNoise:
  """Integer noise on one integer of bounded sensitivity.

  Modular arithmetic and whatever else happens afterwards is free.

  Attributes:
    law: `discrete_gaussian` or `skellam`.
    scale: sigma of the first, variance of the second (that of all shares).
    sensitivity: how far one example moves the integer, >= 1.
    count: how many such integers are released; K a round for K scalars.
  """

  law: str
  scale: float
  sensitivity: int
  count: int = 1


@dataclasses.dataclass(frozen=True)
class IntegerVector:
  """Discrete Gaussian noise on the entries of an integer vector.

  It has a bound on its Renyi divergence, that of the Gaussian; accountant
  `rdp`.

  Attributes:
    noise_multiplier: sigma of an entry over the sensitivity of the vector in
      the Euclidean norm, > 0.
    count: how often it is released.
  """

  noise_multiplier: float
  count: int = 1


Event = Gaussian | PoissonGaussian | IntegerNoise | IntegerVector
Round = tuple[Event, ...]


def merged(rounds: Iterable[Round]) -> tuple[Event, ...]:
  """All events of the rounds; those that are alike as one with a count.

  Raises:
    ValueError: for an event that hides nothing; names the field.
  """
  counts: dict[Event, int] = {}
  for events in rounds:
    add_to(counts, events)
  return counted(counts)


def add_to(counts: dict[Event, int], events: Round) -> None:
  """Counts the events of a round, alike ones together."""
  for event in events:
    if event.count < 0 or event.count != int(event.count):
      raise ValueError(f'count must be an integer >= 0, got {event}')
    one = dataclasses.replace(event, count=1)
    counts[one] = counts.get(one, 0) + event.count


def counted(counts: dict[Event, int]) -> tuple[Event, ...]:
  """The events with their counts.

  Raises:
    ValueError: for one that hides nothing; names the field.
  """
  for event in counts:
    _check(event)
  return tuple(
    dataclasses.replace(event, count=n) for event, n in counts.items() if n
  )


def _check(event: Event) -> None:
  """Raises ValueError for an event that hides nothing."""
  name = type(event).__name__
  if isinstance(event, IntegerNoise):
    checks.one_of('law', event.law, LAWS)
    if event.sensitivity < 1 or event.sensitivity != int(event.sensitivity):
      raise ValueError(
        f'sensitivity of {name} must be an integer >= 1, got'
        f' {event.sensitivity}'
      )
    noise, value = 'scale', event.scale
  else:
    noise, value = 'noise_multiplier', event.noise_multiplier
  if not 0 < value < math.inf:
    raise ValueError(f'{noise} of {name} must be positive, got {value}')
  if isinstance(event, PoissonGaussian) and not 0 < event.sampling_rate < 1:
    raise ValueError(
      f'sampling_rate of {name} must be in (0, 1), got {event.sampling_rate};'
      ' a query over all examples is Gaussian'
    )


def as_dicts(rounds: Iterable[Round]) -> list[dict[str, Any]]:
  """The merged events, as JSON keeps them beside a log."""
  return [
    {'event': type(event).__name__, **dataclasses.asdict(event)}
    for event in merged(rounds)
  ]


def from_dicts(found: Sequence[Mapping[str, Any]]) -> Round:
  """The events of `as_dicts`, as one round.

  Raises:
    ValueError: for an unknown event, or fields that do not fit it.
  """
  kinds: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Gaussian, PoissonGaussian, IntegerNoise, IntegerVector)
  }
  events = []
  for fields in found:
    fields = dict(fields)
    name = fields.pop('event', None)
    checks.one_of('event', name, kinds)
    try:
      events.append(kinds[name](**fields))
    except TypeError as error:
      raise ValueError(f'{name}: {error}') from error
  return merged([tuple(events)])
