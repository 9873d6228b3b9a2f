"""What guesses prove: lower bounds on the privacy that a mechanism loses.

A canary is in the data with sign +1 or -1, thrown by a fair coin for every
trial. An adversary gives the transcript of a trial a score, above zero if it
looks like +1, and guesses. Two statements can be refuted by its guesses:

    accuracy a            P(right) <= a = (1 + delta(0)) / 2; mu-GDP: Phi(mu/2)
    (epsilon, delta)-DP   P(right, sure) <= exp(epsilon) P(wrong, sure) + delta

where `sure` is a score far from zero. Both hold for every adversary, so that a
poor one makes a bound loose and never wrong. Counts are binomial, and bounds on
their rates are those of Clopper and Pearson, at a level that is divided by the
number of bounds that are looked at. The first needs no threshold. That of the
second is chosen on other trials than the bound is computed from.

The first is sharper; as an epsilon it is that of a Gaussian mechanism which is
as telling, at the delta of the claim. The second assumes no kind of mechanism.

References:
  Nasr et al., "Tight auditing of differentially private machine learning",
    USENIX Security 2023, https://arxiv.org/abs/2302.07956.
  Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run",
    NeurIPS 2023, https://arxiv.org/abs/2305.08846.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import special

from jaxfl import gdp

_PILOT = 5  # every fifth trial is for the choice of a threshold
_SHARES = np.geomspace(0.002, 1.0, 25)  # of trials with a sure guess


class Evidence(NamedTuple):
  """What the guesses of an adversary show; bounds hold with 1 - `alpha`.

  Attributes:
    num_trials: all of them.
    accuracy: share of right guesses.
    accuracy_lower: lower bound on the probability of one.
    epsilon_gaussian: lower bound on epsilon, of a Gaussian mechanism.
    epsilon_any: lower bound on epsilon, of any mechanism.
  """

  num_trials: int
  accuracy: float
  accuracy_lower: float
  epsilon_gaussian: float
  epsilon_any: float


def lower(count: int, total: int, alpha: float) -> float:
  """Clopper and Pearson's lower bound on a rate, right with 1 - `alpha`."""
  if not count:
    return 0.0
  return float(special.betaincinv(count, total - count + 1, alpha))


def upper(count: int, total: int, alpha: float) -> float:
  """Likewise the upper bound."""
  return 1.0 - lower(total - count, total, alpha)


def gaussian_epsilon(accuracy: float, delta: float) -> float:
  """Epsilon of the Gaussian mechanism that is guessed right so often, < 1."""
  mu = 2.0 * float(special.ndtri(accuracy))
  return gdp.epsilon_of(mu, delta) if mu > 0 else 0.0


def evidence(
  scores: np.ndarray, signs: np.ndarray, *, delta: float, alpha: float
) -> Evidence:
  """Counts guesses.

  Args:
    scores: float64[N], of the transcripts; not a function of `signs` otherwise.
    signs: int[N] of +1 and -1, from fair coins.
    delta: of the claim.
    alpha: probability that a bound is wrong; half of it for each of the two.

  Raises:
    ValueError: if there are fewer than 50 trials, or a score is not a number.
  """
  if len(scores) < 50:
    raise ValueError(f'an audit needs 50 trials at least, got {len(scores)}')
  if np.isnan(scores).any():
    raise ValueError('a score is not a number')
  right = (scores >= 0) == (signs > 0)
  count, total = int(right.sum()), len(scores)
  bound = lower(count, total, alpha / 2)
  pilot = np.arange(total) % _PILOT == 0
  sure = np.abs(scores)
  threshold = max(
    np.quantile(sure[pilot], 1.0 - _SHARES),
    key=lambda t: _epsilon(right[pilot], sure[pilot] >= t, delta, alpha / 2),
  )
  rest = ~pilot
  return Evidence(
    total,
    count / total,
    bound,
    gaussian_epsilon(bound, delta),
    _epsilon(right[rest], sure[rest] >= threshold, delta, alpha / 2),
  )


def _epsilon(
  right: np.ndarray, sure: np.ndarray, delta: float, alpha: float
) -> float:
  """Lower bound on epsilon from sure guesses, for any mechanism."""
  guesses, total = int(sure.sum()), len(sure)
  if not guesses:
    return 0.0
  # given their number, wrong ones among the sure guesses are binomial
  wrong = upper(int((sure & ~right).sum()), guesses, alpha / 2)
  gained = 1.0 - wrong - delta / lower(guesses, total, alpha / 2)
  return math.log(gained / wrong) if gained > wrong else 0.0
