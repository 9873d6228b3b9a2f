"""What DIFF2 releases in which round, and under how much noise.

    r % T == 0   v_r = mean clip(g(x_r), C1) + noise
    else         v_r = v_{r-1} + mean clip(g(x_r) - g(x_{r-1}), c_r) + noise
                 c_r = C2 |x_r - x_{r-1}|

with means over P clients and over the n_p examples of each. One example moves a
mean by at most 2 C / (P min n_p) if it is replaced and by half of that if it is
dropped; noise is a multiple of it: z1 and z2. T = 1 is DP-GD.

The local routine adds, in the round of a client, K - 1 differences of Poisson
minibatches of it, divided by a public number; their noise is relative to the
bound of one example. Sampling is analysed for dropped examples, so that all of
its multipliers are relative to those.

A plan is fixed before the run: multipliers, intervals or rounds that depend on
what was released need other accounting.

References:
  Murata and Suzuki, "DIFF2: differential private optimization via gradient
    differences for nonconvex distributed learning", ICML 2023,
    https://arxiv.org/abs/2302.03884.
"""

import math
from typing import NamedTuple

from jaxfl import events

ADJACENCIES = {
  'replace': 'one example is replaced by another',
  'drop': 'one example is replaced by one that adds zero',
}


class Plan(NamedTuple):
  """What DIFF2 releases, and under which noise; DP-GD if all rounds restart.

  Attributes:
    num_rounds: R.
    restart_interval: T >= 1; rounds 0, T, 2T ... release the gradient.
    noise_multiplier: z1, over the sensitivity of the gradient.
    noise_multiplier_diff: z2, over that of the difference; 0 if there is none.
    local_steps: K; 1 without the local routine.
    num_clients: P, whose turns it is.
    sampling_rate: of the local minibatches.
    noise_multiplier_local: z3, over the bound of one example.
  """

  num_rounds: int
  restart_interval: int
  noise_multiplier: float
  noise_multiplier_diff: float
  local_steps: int = 1
  num_clients: int = 1
  sampling_rate: float = 0.0
  noise_multiplier_local: float = 0.0

  @property
  def exchanges(self) -> int:
    """Exchanges of a round: two with the local routine."""
    return 1 if self.local_steps == 1 else 2

  @property
  def adjacency(self) -> str:
    """What the multipliers are relative to: a key of `ADJACENCIES`."""
    return 'replace' if self.local_steps == 1 else 'drop'

  def rounds(self) -> list[events.Round]:
    """The events of every round, for an example of the client of round 0."""
    local = events.PoissonGaussian(
      self.noise_multiplier_local, self.sampling_rate, self.local_steps - 1
    )
    found = []
    for r in range(self.num_rounds):
      full = r % self.restart_interval == 0
      z = self.noise_multiplier if full else self.noise_multiplier_diff
      turn = self.local_steps > 1 and r % self.num_clients == 0
      found.append((events.Gaussian(z), *([local] if turn else [])))
    return found


def noise_growth(
  plan: Plan,
  *,
  learning_rate: float,
  clip_norm_diff: float,
  num_params: int,
  num_examples: int,
) -> float:
  """By how much the noise of differences grows in a restart interval.

  The noise of a difference is proportional to the step, and the step to what it
  is added to: its square grows by `1 + rho**2` a round, with `rho = 2 z2
  learning_rate clip_norm_diff sqrt(num_params) / num_examples`. From
  `rho**2 T = 1` on a run can't be expected to follow its gradients; below, it
  may still fail to.

  Args:
    plan: of the run, for replaced examples; half the factor if dropped.
    learning_rate: the largest of the run.
    clip_norm_diff: the clip of a difference, over the length of the step.
    num_params: entries that are trained.
    num_examples: clients times the size of the smallest.

  Returns:
    `rho**2 T`; 0 without differences.
  """
  moved = 2.0 if plan.adjacency == 'replace' else 1.0
  step = learning_rate * clip_norm_diff / num_examples
  rho = moved * plan.noise_multiplier_diff * step * math.sqrt(num_params)
  return rho**2 * plan.restart_interval
