"""Calibration: the noise that a target (epsilon, delta) asks for.

DIFF2 releases the whole gradient every `restart_interval` rounds and a
difference of gradients in the others. Of the budget `mu**2` that epsilon and
delta allow, the share s goes to the former:

    z1 = sqrt(num_full / (s mu**2))
    z2 = sqrt(num_differences / ((1 - s) mu**2))

With a restart in every round it is DP-GD. The local routine also releases
`local_steps - 1` differences of the minibatches of one client a round, in turn;
they have noise z3, relative to the bound of one example, and no closed form.

References:
  Murata and Suzuki, "DIFF2: differential private optimization via gradient
    differences for nonconvex distributed learning", ICML 2023,
    https://arxiv.org/abs/2302.03884.
"""

import functools
import math
from collections.abc import Callable

from jaxfl import accounting, checks, events, gdp
from jaxfl import plan as plan_lib
from jaxfl.plan import Plan


def check_target(
  epsilon_dp: float | None,
  delta_dp: float | None,
  num_examples: int | None = None,
) -> tuple[float, float]:
  """The target, checked.

  Args:
    epsilon_dp: positive.
    delta_dp: in (0, 1), and below one over the number of examples.
    num_examples: that number, which is public; None skips its check.

  Raises:
    ValueError: for a target that is none; names the field.
  """
  if epsilon_dp is None or not 0 < epsilon_dp < math.inf:
    raise ValueError(
      f'epsilon_dp must be positive and finite, got {epsilon_dp}'
    )
  if not delta_dp:
    raise ValueError(
      'delta_dp is missing: Gaussian noise has no guarantee without it; below'
      ' one over the number of examples'
    )
  if not 0 < delta_dp < 1:
    raise ValueError(f'delta_dp must be in (0, 1), got {delta_dp}')
  if num_examples is not None and delta_dp * num_examples >= 1:
    raise ValueError(
      f'delta_dp is {delta_dp}, one over {num_examples} examples or more: a'
      ' mechanism that publishes an example at random would satisfy it'
    )
  return epsilon_dp, delta_dp


def check_bound(field: str, value: float) -> None:
  """Raises ValueError for a clip that bounds nothing, or leaves nothing."""
  if not 0 < value < math.inf:
    raise ValueError(
      f'{field} must be positive and finite for a finite epsilon_dp, got'
      f' {value}'
    )


def diff2(
  epsilon_dp: float,
  delta_dp: float,
  *,
  num_rounds: int,
  restart_interval: int = 1,
  budget_share: float = 0.5,
) -> Plan:
  """The multipliers of DIFF2, exactly at the target.

  Args:
    epsilon_dp: of the whole run.
    delta_dp: likewise.
    num_rounds: R.
    restart_interval: T; 1 is DP-GD.
    budget_share: s, of restarts; unused if all rounds restart.

  Raises:
    ValueError: for a target or a setting out of range; names the field.
  """
  check_target(epsilon_dp, delta_dp)
  _at_least('num_rounds', num_rounds, 1)
  _at_least('restart_interval', restart_interval, 1)
  _share('budget_share', budget_share)
  # an error of 1e-12 in the root must not exceed the target
  mu = gdp.mu_of(epsilon_dp, delta_dp) * (1.0 - 1e-9)
  return _split(mu, num_rounds, restart_interval, budget_share)


def _split(mu, num_rounds, restart_interval, budget_share) -> Plan:
  full = -(-num_rounds // restart_interval)
  rest = num_rounds - full
  if not rest:
    return Plan(num_rounds, restart_interval, math.sqrt(full) / mu, 0.0)
  return Plan(
    num_rounds,
    restart_interval,
    math.sqrt(full / budget_share) / mu,
    math.sqrt(rest / (1.0 - budget_share)) / mu,
  )


@functools.cache
def diff2_local(
  epsilon_dp: float,
  delta_dp: float,
  *,
  num_rounds: int,
  restart_interval: int,
  local_steps: int,
  num_clients: int,
  sampling_rate: float,
  budget_share: float = 0.5,
  local_share: float = 0.2,
) -> Plan:
  """The multipliers of the local routine, at most 0.1 % above what is needed.

  Args:
    epsilon_dp: of the whole run.
    delta_dp: likewise.
    num_rounds: R.
    restart_interval: T.
    local_steps: K >= 2.
    num_clients: P.
    sampling_rate: of the local minibatches.
    budget_share: s, of restarts, in what is left by the local steps.
    local_share: of `mu**2`, for the local steps.

  Raises:
    ValueError: for a target or a setting out of range; names the field.
  """
  check_target(epsilon_dp, delta_dp)
  _at_least('num_rounds', num_rounds, 1)
  _at_least('restart_interval', restart_interval, 1)
  _at_least('local_steps', local_steps, 2)
  _at_least('num_clients', num_clients, 1)
  _share('sampling_rate', sampling_rate)
  _share('budget_share', budget_share)
  _share('local_share', local_share)
  mu = gdp.mu_of(epsilon_dp, delta_dp) * math.sqrt(1.0 - local_share)
  plan = _split(mu, num_rounds, restart_interval, budget_share)._replace(
    local_steps=local_steps,
    num_clients=num_clients,
    sampling_rate=sampling_rate,
  )

  with_noise = lambda z: plan._replace(noise_multiplier_local=z)
  return with_noise(_smallest_sampled(with_noise, epsilon_dp, delta_dp))


def integer_noise(
  epsilon_dp: float,
  delta_dp: float,
  *,
  law: str,
  sensitivity: int,
  count: int,
) -> events.IntegerNoise:
  """The scale of integer noise, at most 0.1 % above what is needed.

  Args:
    epsilon_dp: of the whole run.
    delta_dp: likewise.
    law: of `events.LAWS`.
    sensitivity: of one integer, see `discrete.sensitivity`.
    count: integers in the whole run; rounds times scalars of a round.

  Returns:
    All integers of the run as one event.

  Raises:
    ValueError: for a target or a setting out of range; names the field.
  """
  check_target(epsilon_dp, delta_dp)
  _at_least('sensitivity', sensitivity, 1)
  _at_least('count', count, 1)

  def event(std):
    scale = std if law == 'discrete_gaussian' else std**2
    return events.IntegerNoise(law, scale, sensitivity, count)

  cost = lambda std: accounting.epsilon([(event(std),)], delta_dp)
  guess = sensitivity * math.sqrt(count) / gdp.mu_of(epsilon_dp, delta_dp)
  return event(_smallest(cost, epsilon_dp, guess))


@functools.cache
def scalars(
  epsilon_dp: float,
  delta_dp: float,
  *,
  num_rounds: int,
  num_scalars: int,
  law: str = 'discrete_gaussian',
) -> plan_lib.ScalarPlan:
  """The noise of private scalars, at most 0.1 % above what is needed.

  Args:
    epsilon_dp: of the whole run.
    delta_dp: likewise.
    num_rounds: R.
    num_scalars: of a client in a round.
    law: `discrete_gaussian`, or `gaussian` for floats.

  Raises:
    ValueError: for a target or a setting out of range; names the field.
  """
  check_target(epsilon_dp, delta_dp)
  _at_least('num_rounds', num_rounds, 1)
  _at_least('num_scalars', num_scalars, 1)
  checks.one_of('law', law, ('discrete_gaussian', 'gaussian'))
  count = num_rounds * num_scalars
  if law == 'gaussian':
    z = math.sqrt(count) / (gdp.mu_of(epsilon_dp, delta_dp) * (1.0 - 1e-9))
  else:
    z = integer_noise(
      epsilon_dp, delta_dp, law=law, sensitivity=1, count=count
    ).scale
  return plan_lib.ScalarPlan(num_rounds, num_scalars, z, law)


@functools.cache
def dp_sgd(
  epsilon_dp: float, delta_dp: float, *, num_rounds: int, sampling_rate: float
) -> plan_lib.SampledPlan:
  """The noise of DP-SGD, at most 0.1 % above what is needed.

  Args:
    epsilon_dp: of the whole run.
    delta_dp: likewise.
    num_rounds: R.
    sampling_rate: q, in (0, 1).

  Raises:
    ValueError: for a target or a setting out of range; names the field.
  """
  check_target(epsilon_dp, delta_dp)
  _at_least('num_rounds', num_rounds, 1)
  _share('sampling_rate', sampling_rate)
  plan = plan_lib.SampledPlan(num_rounds, sampling_rate, 0.0)

  with_noise = lambda z: plan._replace(noise_multiplier=z)
  return with_noise(_smallest_sampled(with_noise, epsilon_dp, delta_dp))


@functools.cache
def sketch(
  epsilon_dp: float, delta_dp: float, *, num_rounds: int, coordinates: int
) -> plan_lib.SketchPlan:
  """The noise of a private sketch, at most 0.1 % above what is needed.

  Args:
    epsilon_dp: of the whole run, by Renyi divergences.
    delta_dp: likewise.
    num_rounds: R.
    coordinates: of a release.

  Raises:
    ValueError: for a target or a setting out of range; names the field.
  """
  check_target(epsilon_dp, delta_dp)
  _at_least('num_rounds', num_rounds, 1)
  _at_least('coordinates', coordinates, 1)

  def cost(z):
    event = events.IntegerVector(z, num_rounds)
    return accounting.epsilon([(event,)], delta_dp, 'rdp')

  guess = 1.08 * math.sqrt(num_rounds) / gdp.mu_of(epsilon_dp, delta_dp)
  return plan_lib.SketchPlan(
    num_rounds, coordinates, _smallest(cost, epsilon_dp, guess)
  )


def _smallest_sampled(
  with_noise: Callable[[float], Plan | plan_lib.SampledPlan],
  epsilon_dp: float,
  delta_dp: float,
) -> float:
  """The smallest noise of a plan with samples, which has no good guess."""
  cost = lambda z: accounting.epsilon(with_noise(z).rounds(), delta_dp)
  return _smallest(cost, epsilon_dp, 1.0, step=0.4)


def _smallest(
  cost: Callable[[float], float],
  target: float,
  guess: float,
  step: float = 0.02,
) -> float:
  """The smallest noise, to 0.1 %, whose cost is at most the target."""
  from scipy import optimize  # half a second, for few runs only

  excess = functools.cache(lambda log: cost(math.exp(log)) - target)
  low = high = math.log(guess)
  while excess(high) > 0:
    low, high, step = high, high + step, 2 * step
  while excess(low) <= 0:
    low, high, step = low - step, low, 2 * step
  found = optimize.root_scalar(
    excess, bracket=(low, high), method='brentq', xtol=2e-4
  ).root
  while excess(found) > 0:
    found += 2e-4
  return math.exp(found)


def _at_least(field: str, value: int | None, least: int) -> None:
  if value is None or value < least:
    raise ValueError(f'{field} must be >= {least}, got {value}')


def _share(field: str, value: float | None) -> None:
  if value is None or not 0 < value < 1:
    raise ValueError(f'{field} must be in (0, 1), got {value}')
