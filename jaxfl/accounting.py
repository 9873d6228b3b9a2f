"""Accounting: what a run's releases cost, as epsilon at a given delta.

Of the events of `jaxfl.events`, by three accountants:

  * `gdp`: the closed form of `jaxfl.gdp`. Gaussian releases compose to one,
    `mu**2 = sum count / noise_multiplier**2`. Exact.
  * `pld`: the privacy loss distribution, discretised upwards; for everything.
  * `rdp`: Renyi divergences; an upper bound, looser by about 8 %.

`pld` and `rdp` are those of dp-accounting (the extra `dp`), always under its
add-or-remove relation: our multipliers are relative to the true sensitivity.
Under its replace-one relation its PLD accountant doubles the sensitivity of a
Gaussian event and its RDP accountant does not (google/differential-privacy
issue 378), so that one of them is wrong whatever the multiplier means.

References:
  Koskela, Jaelkoe and Honkela, "Computing tight differential privacy guarantees
    using FFT", AISTATS 2020, https://arxiv.org/abs/1906.03049.
  Mironov, "Renyi differential privacy", CSF 2017,
    https://arxiv.org/abs/1702.07476.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxfl import checks, discrete, gdp
from jaxfl.events import (
  Event,
  Gaussian,
  IntegerNoise,
  IntegerVector,
  PoissonGaussian,
  Round,
  add_to,
  counted,
)

ACCOUNTANTS = ('gdp', 'pld', 'rdp')
_STEP = 5e-4  # of discretised losses; a fifth of it changes epsilon by 1e-5


def epsilon(
  rounds: Iterable[Round], delta: float, accountant: str = 'pld'
) -> float:
  """Epsilon of all rounds together.

  Args:
    rounds: any list of events works: `[(Gaussian(2.0, count=10),)]`.
    delta: in (0, 1).
    accountant: `gdp`, `pld` or `rdp`.

  Raises:
    ValueError: if delta is not in (0, 1), the accountant is unknown, an event
      hides nothing, or the closed form has none of an event.
    ImportError: if dp-accounting is needed and not installed.
  """
  rounds = list(rounds)
  return float(spent(rounds, delta, accountant, after=[len(rounds)])[0])


def spent(
  rounds: Sequence[Round],
  delta: float,
  accountant: str = 'pld',
  *,
  after: Sequence[int] | None = None,
) -> np.ndarray:
  """Epsilon spent after rounds.

  Args:
    rounds: of the whole run.
    delta: in (0, 1).
    accountant: `gdp`, `pld` or `rdp`. An entry takes less than a millisecond
      with the closed form, up to a second with `pld`.
    after: ascending numbers of rounds; 0, 1, ... all of them by default.

  Returns:
    float64[len(after)].

  Raises:
    ValueError: as `epsilon`, or if `after` does not fit the rounds.
  """
  checks.one_of('accountant', accountant, ACCOUNTANTS)
  if delta is None or not 0 < delta < 1:
    raise ValueError(f'delta_dp must be in (0, 1), got {delta}')
  after = list(range(len(rounds) + 1) if after is None else after)
  if after != sorted(after) or not set(after) <= set(range(len(rounds) + 1)):
    raise ValueError(f'after must ascend in [0, {len(rounds)}], got {after}')
  compute = {'gdp': _gdp, 'pld': _pld, 'rdp': _rdp}[accountant]
  counts: dict[Event, int] = {}
  found, done = [], 0
  for number in after:
    for events in rounds[done:number]:
      add_to(counts, events)
    events, done = counted(counts), number
    found.append(compute(events, delta) if events else 0.0)
  return np.array(found)


def _mu(events: Iterable[Event]) -> float:
  total = 0.0
  for event in events:
    if not isinstance(event, Gaussian):
      raise ValueError(
        f'the closed form (gdp) has no {type(event).__name__}; use pld or rdp'
      )
    total += event.count / event.noise_multiplier**2
  return math.sqrt(total)


def _gdp(events: tuple[Event, ...], delta: float) -> float:
  return gdp.epsilon_of(_mu(events), delta)


def library() -> Any:
  """The module dp_accounting.

  Raises:
    ImportError: if it is not installed; says what to install.
  """
  try:
    import dp_accounting
    import dp_accounting.pld
    import dp_accounting.rdp
  except ImportError as error:
    raise ImportError(
      "privacy accounting needs dp-accounting: pip install 'jaxfl[dp]'"
    ) from error
  return dp_accounting


def _pld(events: tuple[Event, ...], delta: float) -> float:
  steps = [_STEP]
  for event in events:
    if isinstance(event, IntegerVector):
      raise ValueError(
        'the loss distribution of an IntegerVector is not known; use rdp'
      )
    if isinstance(event, IntegerNoise):
      std = event.scale**0.5 if event.law == 'skellam' else event.scale
      steps.append(0.05 * event.sensitivity / std)  # of a typical loss
  step = min(steps)
  parts = [_composed(e, step) for e in events if not isinstance(e, Gaussian)]
  gaussians = [e for e in events if isinstance(e, Gaussian)]
  if gaussians:
    parts.append(_pld_of(Gaussian(1.0 / _mu(gaussians)), step))
  total = parts[0]
  for part in parts[1:]:
    total = total.compose(part)
  return float(total.get_epsilon_for_delta(delta))


def _composed(event: Event, step: float) -> Any:
  return _pld_of(dataclasses.replace(event, count=1), step).self_compose(
    event.count
  )


@functools.lru_cache(maxsize=32)
def _pld_of(event: Event, step: float) -> Any:
  """The loss distribution of one release."""
  pld = library().pld.privacy_loss_distribution
  if isinstance(event, IntegerNoise):
    return pld.PrivacyLossDistribution.create_from_rounded_probability(
      *_integer_losses(event, step), step
    )
  rate = event.sampling_rate if isinstance(event, PoissonGaussian) else 1.0
  return pld.from_gaussian_mechanism(
    event.noise_multiplier,
    sampling_prob=rate,
    value_discretization_interval=step,
    neighboring_relation=library().NeighboringRelation.ADD_OR_REMOVE_ONE,
  )


def _integer_losses(
  event: IntegerNoise, step: float
) -> tuple[dict[int, float], float]:
  """Losses in steps with their probabilities, and that of an infinite one.

  The noise is symmetric and log-concave, so that the largest shift is the worst
  and both directions are alike. The mass p of a loss L between two steps is
  split so that the masses p and p exp(-L) under both laws are kept: upwards, as
  a hockey-stick divergence is convex in exp(-L), and nearly without error
  (Doroshenko et al., "Connect the dots", PETS 2022,
  https://arxiv.org/abs/2207.04380).
  """
  pmf = (
    discrete.gaussian_pmf(event.scale)
    if event.law == 'discrete_gaussian'
    else discrete.skellam_pmf(event.scale)
  )
  masses: dict[int, float] = {}
  infinite = 0.0
  for k, p in pmf.items():
    q = pmf.get(k - event.sensitivity, 0.0)
    if not q:
      infinite += p
      continue
    loss = math.log(p / q)
    below = math.floor(loss / step)
    up = math.expm1(below * step - loss) / math.expm1(-step)
    masses[below] = masses.get(below, 0.0) + p * (1.0 - up)
    masses[below + 1] = masses.get(below + 1, 0.0) + p * up
  return masses, infinite


def _rdp(events: tuple[Event, ...], delta: float) -> float:
  orders = library().rdp.RdpAccountant().orders
  total = sum(
    e.count * _rdp_of(dataclasses.replace(e, count=1)) for e in events
  )
  return float(library().rdp.compute_epsilon(orders, total, delta)[0])


@functools.lru_cache(maxsize=64)
def _rdp_of(event: Event) -> np.ndarray:
  """Renyi divergences of one release, at the library's orders."""
  dp = library()
  accountant = dp.rdp.RdpAccountant()
  if isinstance(event, IntegerNoise):
    return _rdp_of_integers(event, accountant.orders)
  if isinstance(event, IntegerVector):  # entries add up to that of a Gaussian
    return accountant.orders / (2 * event.noise_multiplier**2)
  release = dp.GaussianDpEvent(event.noise_multiplier)
  if isinstance(event, PoissonGaussian):
    release = dp.PoissonSampledDpEvent(event.sampling_rate, release)
  return accountant.compose(release).rdp


def _rdp_of_integers(event: IntegerNoise, orders: np.ndarray) -> np.ndarray:
  """Bounds: Canonne et al., theorem 4; Agarwal et al., theorem 3.5.

  They are of the untruncated laws, from which the tables differ by less than
  1e-15 in total variation: nothing beside any delta.
  """
  shift = event.sensitivity
  if event.law == 'discrete_gaussian':
    return orders * shift**2 / (2 * event.scale**2)
  variance = event.scale
  small = ((2 * orders - 1) * shift**2 + 6 * shift) / (4 * variance**2)
  return orders * shift**2 / (2 * variance) + np.minimum(
    small, 3 * shift / (2 * variance)
  )
