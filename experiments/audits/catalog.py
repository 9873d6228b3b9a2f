"""The mechanisms that are audited, with what is claimed of each."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.audits import scalars, vector_bugs, vectors
from jaxfl import accounting, calibration, gdp


class Claim(NamedTuple):
  """What the accountant says of a run.

  Attributes:
    settings: what the pieces are built from: a plan or an event.
    epsilon: at the delta of the audit.
    accuracy: the largest probability of a right guess.
  """

  settings: Any
  epsilon: float
  accuracy: float


class Mechanism(NamedTuple):
  """A mechanism and its planted bugs.

  Attributes:
    title: for people.
    claim: epsilon, delta -> claim.
    shipped: settings of a claim -> pieces.
    bugs: likewise, each with a docstring that says what is wrong.
    player: pieces -> function of signs and a seed, with scores.
    times: trials for every one that is asked for; some are cheap.
  """

  title: str
  claim: Callable[[float, float], Claim]
  shipped: Callable[[Any], Any]
  bugs: Sequence[Callable[[Any], Any]]
  player: Callable[[Any], Callable[..., Any]]
  times: int = 1


def _gaussian(interval: int) -> Callable[[float, float], Claim]:
  def claim(epsilon, delta):
    plan = calibration.diff2(
      epsilon, delta, num_rounds=vectors.NUM_ROUNDS, restart_interval=interval
    )
    found = accounting.epsilon(plan.rounds(), delta, 'gdp')
    distance = gdp.delta_of(gdp.mu_of(found, delta), 0.0)
    return Claim(plan, found, (1.0 + distance) / 2)

  return claim


@functools.cache  # it takes seconds
def _integers(epsilon: float, delta: float) -> Claim:
  event = calibration.integer_noise(
    epsilon,
    delta,
    law='discrete_gaussian',
    sensitivity=scalars.SENSITIVITY,
    count=scalars.NUM_ROUNDS * scalars.NUM_SCALARS,
  )
  spent = lambda delta: accounting.epsilon([(event,)], delta)
  low, high = 0.0, 1.0  # the smallest delta at which epsilon is 0
  for _ in range(15):
    middle = (low + high) / 2
    low, high = (middle, high) if spent(middle) > 0 else (low, middle)
  return Claim(event, spent(delta), (1.0 + high) / 2)


MECHANISMS = {
  'dp_gd': Mechanism(
    'DP-GD',
    _gaussian(1),
    vectors.shipped,
    (),
    vectors.player,
  ),
  'diff2': Mechanism(
    'DIFF2',
    _gaussian(4),
    vectors.shipped,
    vector_bugs.BUGS,
    vectors.player,
  ),
  'private_byte': Mechanism(
    'private byte',
    _integers,
    scalars.shipped,
    scalars.BUGS,
    scalars.player,
    times=10,
  ),
}
