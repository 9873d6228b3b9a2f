"""Calibration hits its target; targets that are none are refused."""

import math

import numpy as np
import pytest

from jaxfl import accounting, calibration, events, gdp
from jaxfl import plan as plan_lib

DELTA = 1e-5
DIFF2 = {'num_rounds': 100, 'restart_interval': 10}
LOCAL = DIFF2 | {'local_steps': 4, 'num_clients': 10, 'sampling_rate': 0.2}


@pytest.mark.parametrize('epsilon', [0.1, 3.0, 8.0])
@pytest.mark.parametrize('restart_interval', [1, 7, 100])
def test_diff2_spends_its_target(epsilon, restart_interval):
  plan = calibration.diff2(
    epsilon,
    DELTA,
    num_rounds=100,
    restart_interval=restart_interval,
    budget_share=0.3,
  )
  found = accounting.epsilon(plan.rounds(), DELTA, 'gdp')
  assert epsilon * (1 - 1e-6) < found <= epsilon
  full = math.ceil(100 / restart_interval)
  budget = gdp.mu_of(epsilon, DELTA) ** 2
  spent = full / plan.noise_multiplier**2
  if restart_interval == 1:
    assert spent == pytest.approx(budget)
    assert plan.noise_multiplier_diff == 0
    assert len(events.merged(plan.rounds())) == 1
  else:
    assert spent == pytest.approx(0.3 * budget)
    rest = (100 - full) / plan.noise_multiplier_diff**2
    assert rest == pytest.approx(0.7 * budget)
  assert plan.adjacency == 'replace'


def test_the_local_routine_spends_its_target():
  plan = calibration.diff2_local(3.0, DELTA, **LOCAL, local_share=0.1)
  found = accounting.epsilon(plan.rounds(), DELTA)
  assert 2.98 < found <= 3.0
  global_only = plan._replace(local_steps=1)
  mu = gdp.mu_of(3.0, DELTA) * math.sqrt(0.9)
  assert accounting.epsilon(global_only.rounds(), DELTA, 'gdp') == (
    pytest.approx(gdp.epsilon_of(mu, DELTA))
  )
  less = plan._replace(
    noise_multiplier_local=plan.noise_multiplier_local / 1.01
  )
  assert accounting.epsilon(less.rounds(), DELTA) > 3.0
  assert plan.adjacency == 'drop'
  # after r rounds nobody has had more than ceil(r / P) turns
  turns = [len(events) > 1 for events in plan.rounds()]
  assert [r for r, turn in enumerate(turns) if turn] == list(range(0, 100, 10))


@pytest.mark.parametrize('law', events.LAWS)
@pytest.mark.parametrize(('sensitivity', 'count'), [(1, 1), (2, 100)])
def test_integer_noise_spends_its_target(law, sensitivity, count):
  event = calibration.integer_noise(
    3.0, DELTA, law=law, sensitivity=sensitivity, count=count
  )
  assert (event.sensitivity, event.count) == (sensitivity, count)
  assert 2.98 < accounting.epsilon([(event,)], DELTA) <= 3.0
  if count > 1:
    std = event.scale if law == 'discrete_gaussian' else event.scale**0.5
    expected = sensitivity * math.sqrt(count) / gdp.mu_of(3.0, DELTA)
    assert std == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'epsilon_dp': 0.0}, 'epsilon_dp must be positive and finite, got 0.0'),
    ({'epsilon_dp': -1.0}, 'epsilon_dp must be positive and finite'),
    ({'epsilon_dp': math.inf}, 'epsilon_dp must be positive and finite'),
    ({'epsilon_dp': None}, 'epsilon_dp must be positive and finite'),
    ({'delta_dp': None}, 'delta_dp is missing'),
    ({'delta_dp': 0.0}, 'delta_dp is missing'),
    ({'delta_dp': 1.0}, 'delta_dp must be in (0, 1), got 1.0'),
    ({'delta_dp': -0.1}, 'delta_dp must be in (0, 1), got -0.1'),
    ({'num_rounds': 0}, 'num_rounds must be >= 1, got 0'),
    ({'num_rounds': None}, 'num_rounds must be >= 1, got None'),
    ({'restart_interval': 0}, 'restart_interval must be >= 1, got 0'),
    ({'budget_share': 0.0}, 'budget_share must be in (0, 1), got 0.0'),
    ({'budget_share': 1.0}, 'budget_share must be in (0, 1), got 1.0'),
    ({'local_steps': 1}, 'local_steps must be >= 2, got 1'),
    ({'num_clients': 0}, 'num_clients must be >= 1, got 0'),
    ({'sampling_rate': 1.0}, 'sampling_rate must be in (0, 1), got 1.0'),
    ({'sampling_rate': None}, 'sampling_rate must be in (0, 1), got None'),
    ({'local_share': 1.0}, 'local_share must be in (0, 1), got 1.0'),
  ],
)
def test_refusals(change, message):
  target = {'epsilon_dp': 3.0, 'delta_dp': DELTA}
  with pytest.raises(ValueError) as error:
    calibration.diff2_local(**(target | LOCAL | change))
  assert message in str(error.value)
  if set(change) <= {*target, *DIFF2, 'budget_share'}:
    with pytest.raises(ValueError) as error:
      calibration.diff2(**(target | DIFF2 | change))
    assert message in str(error.value)


def test_a_delta_that_publishing_an_example_satisfies():
  calibration.check_target(3.0, 1e-5, 99_999)
  with pytest.raises(ValueError, match='one over 100000 examples or more'):
    calibration.check_target(3.0, 1e-5, 100_000)


def test_bounds_that_bound_nothing():
  calibration.check_bound('clip_norm', 1.0)
  for value in (0.0, -1.0, math.inf, math.nan):
    with pytest.raises(ValueError, match='clip_norm_diff must be positive and'):
      calibration.check_bound('clip_norm_diff', value)


@pytest.mark.parametrize(
  ('sensitivity', 'count', 'field'), [(0, 1, 'sensitivity'), (1, 0, 'count')]
)
def test_counts_of_integers_are_checked(sensitivity, count, field):
  with pytest.raises(ValueError, match=f'{field} must be >= 1'):
    calibration.integer_noise(
      3.0, DELTA, law='skellam', sensitivity=sensitivity, count=count
    )


@pytest.mark.parametrize('local_steps', [1, 2])
def test_noise_of_differences_grows_as_predicted(local_steps):
  """Without gradients, v is moved by nothing but noise relative to its step."""
  plan = plan_lib.Plan(100, 10, 5.0, 50.0, local_steps, 1, 0.1, 1.0)
  eta, clip, size, examples, runs = 0.5, 2.0, 40, 1000, 4000
  found = plan_lib.noise_growth(
    plan,
    learning_rate=eta,
    clip_norm_diff=clip,
    num_params=size,
    num_examples=examples,
  )
  sensitivity = (2 if plan.adjacency == 'replace' else 1) / examples
  rng = np.random.default_rng(0)
  v = np.ones((runs, size))
  for _ in range(plan.restart_interval):
    bound = clip * eta * np.linalg.norm(v, axis=1, keepdims=True)
    std = plan.noise_multiplier_diff * sensitivity * bound
    v = v + std * rng.standard_normal(v.shape)
  grown = np.square(v).sum(1).mean() / size
  rho2 = found / plan.restart_interval
  assert rho2 == pytest.approx(0.4 if local_steps == 1 else 0.1)
  assert grown == pytest.approx((1 + rho2) ** plan.restart_interval, rel=0.1)
  dp_gd = calibration.diff2(3.0, DELTA, num_rounds=10)
  assert not plan_lib.noise_growth(
    dp_gd, learning_rate=1.0, clip_norm_diff=1.0, num_params=9, num_examples=1
  )
