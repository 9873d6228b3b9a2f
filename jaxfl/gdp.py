"""Gaussian differential privacy in closed form.

A release that is no more telling than a draw from N(0, 1) is about whether it
came from N(mu, 1) is mu-GDP. Noise of `z` times the sensitivity makes it
1/z-GDP, adaptive compositions add up squares of mu, and

    delta(eps) = Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu)

References:
  Dong, Roth and Su, "Gaussian differential privacy", JRSS B 2022,
    https://arxiv.org/abs/1905.02383, corollaries 1 and 2.
  Balle and Wang, "Improving the Gaussian mechanism for differential privacy",
    ICML 2018, https://arxiv.org/abs/1805.06530, theorem 8.
"""

from collections.abc import Callable

import numpy as np
from scipy import special


def delta_of(mu: float, epsilon: float) -> float:
  """The smallest delta of mu-GDP at an epsilon."""
  if mu == 0:
    return 0.0
  tail = epsilon + special.log_ndtr(-epsilon / mu - mu / 2)
  return float(special.ndtr(-epsilon / mu + mu / 2) - np.exp(tail))


def epsilon_of(mu: float, delta: float) -> float:
  """The smallest epsilon of mu-GDP at a delta in (0, 1)."""
  excess = lambda epsilon: delta_of(mu, epsilon) - delta
  if excess(0.0) <= 0:
    return 0.0
  high = 1.0
  while excess(high) > 0:
    high *= 2
  return _root(excess, high)


def mu_of(epsilon: float, delta: float) -> float:
  """The largest mu whose epsilon at this delta is `epsilon`, which is > 0."""
  excess = lambda mu: delta_of(mu, epsilon) - delta
  high = 1.0
  while excess(high) < 0:
    high *= 2
  return _root(excess, high)


def _root(function: Callable[[float], float], high: float) -> float:
  from scipy import optimize  # half a second, for few runs only

  result = optimize.root_scalar(
    function, bracket=(0.0, high), method='brentq', xtol=1e-14, rtol=1e-12
  )
  return float(result.root)
