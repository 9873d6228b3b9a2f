"""Accountants against closed forms, each other, and known mistakes."""

import builtins
import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld_lib
from scipy import stats

from jaxfl import accounting, calibration, discrete, events, gdp
from jaxfl import plan as plan_lib

DELTA = 1e-5


def test_the_closed_form_is_the_definition():
  """The best test of N(0, 1) against N(mu, 1) is a threshold on the ratio."""
  for mu, epsilon in ((0.3, 1.0), (1.0, 2.0), (2.5, 0.1), (3.0, 40.0)):
    threshold = epsilon / mu + mu / 2
    delta = stats.norm.sf(threshold - mu) - math.exp(epsilon) * stats.norm.sf(
      threshold
    )
    assert gdp.delta_of(mu, epsilon) == pytest.approx(
      delta, rel=1e-9, abs=1e-16
    )
    assert gdp.delta_of(mu, gdp.epsilon_of(mu, DELTA)) == pytest.approx(DELTA)
  assert gdp.delta_of(0.0, 1.0) == 0
  assert gdp.epsilon_of(1e-6, DELTA) == 0
  for epsilon, mu in ((1, 0.2681), (3, 0.7191), (5, 1.1212), (8, 1.6660)):
    assert gdp.mu_of(epsilon, DELTA) == pytest.approx(mu, abs=6e-5)


def test_accountants_agree_with_the_closed_form():
  for plan in (
    calibration.diff2(3.0, DELTA, num_rounds=2000, restart_interval=20),
    calibration.diff2(1.0, DELTA, num_rounds=500),
    calibration.diff2(
      8.0, 1e-6, num_rounds=50, restart_interval=100, budget_share=0.1
    ),
  ):
    delta = 1e-6 if plan.num_rounds == 50 else DELTA
    exact = accounting.epsilon(plan.rounds(), delta, 'gdp')
    pld = accounting.epsilon(plan.rounds(), delta, 'pld')
    rdp = accounting.epsilon(plan.rounds(), delta, 'rdp')
    assert exact * (1 - 1e-8) <= pld <= exact * 1.01
    assert exact < rdp < 1.12 * exact


def test_the_relation_of_dp_accounting_matters():
  """z1 = 20, z2 = 60, R = 2000, T = 20: exact 3.787."""
  plan = plan_lib.Plan(2000, 20, 20.0, 60.0)
  for accountant, expected in (('gdp', 3.787), ('pld', 3.787), ('rdp', 4.095)):
    found = accounting.epsilon(plan.rounds(), DELTA, accountant)
    assert found == pytest.approx(expected, abs=6e-4)
  # replace-one doubles a Gaussian event in one of its accountants only
  relation = dp_accounting.NeighboringRelation.REPLACE_ONE
  pld = dp_accounting.pld.PLDAccountant(relation)
  rdp = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
  for z, count in ((20.0, 100), (60.0, 1900)):
    pld.compose(dp_accounting.GaussianDpEvent(z), count)
    rdp.compose(dp_accounting.GaussianDpEvent(z), count)
  assert pld.get_epsilon(DELTA) == pytest.approx(8.573, abs=2e-3)
  assert rdp.get_epsilon(DELTA) == pytest.approx(4.095, abs=6e-4)


def test_the_local_routine():
  """z = (20, 60, 1.5), R = 400, T = 20, P = 10, K = 8, q = 64 / 1651."""
  plan = plan_lib.Plan(400, 20, 20.0, 60.0, 8, 10, 64 / 1651, 1.5)
  assert set(events.merged(plan.rounds())) == {
    events.Gaussian(20.0, 20),
    events.Gaussian(60.0, 380),
    events.PoissonGaussian(1.5, 64 / 1651, 280),
  }
  found = [accounting.epsilon(plan.rounds(), DELTA, a) for a in ('pld', 'rdp')]
  np.testing.assert_allclose(found, [2.674, 2.927], atol=6e-4)
  # the same from the library's own accountant
  pld = dp_accounting.pld.PLDAccountant()
  release = dp_accounting.GaussianDpEvent(1.5)
  pld.compose(dp_accounting.PoissonSampledDpEvent(64 / 1651, release), 280)
  pld.compose(dp_accounting.GaussianDpEvent(20.0), 20)
  pld.compose(dp_accounting.GaussianDpEvent(60.0), 380)
  assert found[0] == pytest.approx(pld.get_epsilon(DELTA), rel=1e-4)
  with pytest.raises(ValueError, match='no PoissonGaussian; use pld or rdp'):
    accounting.epsilon(plan.rounds(), DELTA, 'gdp')


def hockey_stick(pmf, shift, epsilon):
  """The delta of one release, by its definition."""
  support = range(min(pmf) - abs(shift), max(pmf) + abs(shift) + 1)
  excess = lambda k: (
    pmf.get(k, 0.0) - math.exp(epsilon) * pmf.get(k - shift, 0.0)
  )
  return math.fsum(max(0.0, excess(k)) for k in support)


@pytest.mark.parametrize(
  ('law', 'scale', 'sensitivity'),
  [
    ('discrete_gaussian', 1.3, 1),
    ('discrete_gaussian', 15.0, 16),
    ('skellam', 2.0, 1),
    ('skellam', 300.0, 7),
  ],
)
def test_one_release_of_integers_is_accounted_exactly(law, scale, sensitivity):
  event = events.IntegerNoise(law, scale, sensitivity)
  pmf = (
    discrete.gaussian_pmf(scale)
    if law == 'discrete_gaussian'
    else discrete.skellam_pmf(scale)
  )
  found = accounting.epsilon([(event,)], DELTA)
  exact = hockey_stick(pmf, sensitivity, found)
  assert DELTA * 0.999 < exact <= DELTA * (1 + 1e-9)
  # smaller moves and the other direction cost no more
  for shift in range(-sensitivity, sensitivity):
    assert hockey_stick(pmf, shift, found) <= DELTA * (1 + 1e-9)
  # nor does what is sent modulo 256
  wrapped = dict.fromkeys(range(256), 0.0)
  for k, p in pmf.items():
    wrapped[discrete.wrap(k, 8)] += p
  for shift in (-sensitivity, 1, sensitivity):
    moved = {discrete.wrap(k + shift, 8): p for k, p in wrapped.items()}
    assert sum(
      max(0.0, p - math.exp(found) * moved[k]) for k, p in wrapped.items()
    ) <= DELTA * (1 + 1e-9)
  bound = accounting.epsilon([(event,)], DELTA, 'rdp')
  assert found < bound


def test_integer_noise_over_rounds():
  """sigma 15, D 1, R 100: little above the continuous Gaussian."""
  rounds = [(events.IntegerNoise('discrete_gaussian', 15.0, 1),)] * 100
  found = accounting.epsilon(rounds, DELTA)
  continuous = accounting.epsilon([(events.Gaussian(15.0, 100),)], DELTA, 'gdp')
  assert continuous == pytest.approx(2.7534, abs=6e-5)
  assert continuous - 1e-4 <= found <= continuous * 1.001
  # the library rounds every loss up by half a step on average: 100 steps
  pmf = discrete.gaussian_pmf(15.0)
  logs = {k: math.log(p) for k, p in pmf.items()}
  rounded = pld_lib.from_two_probability_mass_functions(
    logs, {k + 1: p for k, p in logs.items()}
  ).self_compose(100)
  assert rounded.get_epsilon_for_delta(DELTA) == pytest.approx(2.7583, abs=6e-5)
  skellam = events.IntegerNoise('skellam', 225.0, 1, 100)
  assert accounting.epsilon([(skellam,)], DELTA) == pytest.approx(
    continuous, rel=2e-3
  )
  # ten thousand releases cost no accuracy
  many = events.IntegerNoise('discrete_gaussian', 150.0, 1, 10_000)
  assert accounting.epsilon([(many,)], DELTA) == pytest.approx(
    continuous, rel=1e-3
  )


@pytest.mark.parametrize('law', events.LAWS)
def test_renyi_bounds_of_integer_noise_are_bounds(law):
  scale, shift = (4.0, 2) if law == 'discrete_gaussian' else (16.0, 2)
  pmf = (
    discrete.gaussian_pmf(scale)
    if law == 'discrete_gaussian'
    else discrete.skellam_pmf(scale)
  )
  orders = dp_accounting.rdp.RdpAccountant().orders
  bound = accounting._rdp_of(events.IntegerNoise(law, scale, shift))
  both = [k for k in pmf if k - shift in pmf]
  log_p = np.log([pmf[k] for k in both])
  log_q = np.log([pmf[k - shift] for k in both])
  for order, limit in zip(orders, bound, strict=True):
    if order < 1.1 or order > 8:  # beyond, what is cut off counts
      continue
    exact = np.log(np.exp(order * log_p + (1 - order) * log_q).sum())
    assert exact / (order - 1) <= limit * (1 + 1e-9)
    assert exact / (order - 1) > 0.7 * limit


def test_a_mixture_of_events():
  """Integers beside Gaussians: between either alone and their sum."""
  integer = (events.IntegerNoise('discrete_gaussian', 30.0, 1, 100),)
  gaussian = (events.Gaussian(30.0, 100),)
  both = accounting.epsilon([integer, gaussian], DELTA)
  two = accounting.epsilon([gaussian, gaussian], DELTA, 'gdp')
  assert both == pytest.approx(two, rel=2e-3)


def test_what_is_spent_grows_to_the_target():
  plan = calibration.diff2(3.0, DELTA, num_rounds=60, restart_interval=20)
  spent = accounting.spent(plan.rounds(), DELTA, 'gdp')
  assert spent.shape == (61,)
  assert spent[0] == 0
  assert (np.diff(spent) > 0).all()
  assert np.argmax(np.diff(spent[1:])) + 1 in (20, 40)  # a restart
  assert spent[-1] == pytest.approx(3.0, abs=1e-6)
  some = [1, 20, 21, 60]
  for accountant in ('pld', 'rdp'):
    found = accounting.spent(plan.rounds(), DELTA, accountant, after=some)
    assert (found >= spent[some]).all()
    limit = 1.01 if accountant == 'pld' else 1.2
    assert (found <= spent[some] * limit).all()
  for after in ([2, 1], [61], [-1]):
    with pytest.raises(ValueError, match='after must ascend'):
      accounting.spent(plan.rounds(), DELTA, 'gdp', after=after)


def test_events_as_json():
  rounds = plan_lib.Plan(40, 20, 2.0, 6.0, 4, 10, 0.1, 1.5).rounds()
  rounds.append((events.IntegerNoise('skellam', 9.0, 2, 3),))
  found = json.loads(json.dumps(events.as_dicts(rounds)))
  assert events.from_dicts(found) == events.merged(rounds)
  assert {x['event'] for x in found} == {
    'Gaussian', 'PoissonGaussian', 'IntegerNoise',
  }  # fmt: skip
  with pytest.raises(ValueError, match='event must be one of'):
    events.from_dicts([{'event': 'Laplace'}])
  with pytest.raises(ValueError, match='Gaussian: .*sigma'):
    events.from_dicts([{'event': 'Gaussian', 'sigma': 1.0}])


@pytest.mark.parametrize(
  ('event', 'message'),
  [
    (events.Gaussian(0.0), 'noise_multiplier of Gaussian must be positive'),
    (events.Gaussian(math.inf), 'noise_multiplier of Gaussian must be pos'),
    (events.Gaussian(math.nan), 'noise_multiplier of Gaussian must be pos'),
    (events.Gaussian(1.0, -1), 'count must be an integer >= 0'),
    (events.PoissonGaussian(0.0, 0.1), 'noise_multiplier of PoissonGaussian'),
    (events.PoissonGaussian(1.0, 1.0), 'sampling_rate of PoissonGaussian'),
    (events.IntegerNoise('laplace', 1.0, 1), 'law must be one of'),
    (events.IntegerNoise('skellam', 0.0, 1), 'scale of IntegerNoise'),
    (events.IntegerNoise('skellam', 1.0, 0), 'sensitivity of IntegerNoise'),
  ],
)
def test_events_that_hide_nothing_are_refused(event, message):
  with pytest.raises(ValueError) as error:
    accounting.epsilon([(event,)], DELTA)
  assert message in str(error.value)


def test_other_arguments_are_checked():
  rounds = [(events.Gaussian(1.0),)]
  for delta in (None, 0.0, 1.0, math.nan):
    with pytest.raises(ValueError, match='delta_dp must be in'):
      accounting.epsilon(rounds, delta)  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match='accountant must be one of gdp, pld'):
    accounting.epsilon(rounds, DELTA, 'moments')
  assert accounting.epsilon([], DELTA) == 0


def test_without_the_extra(monkeypatch):
  real = builtins.__import__

  def missing(name, *args, **kwargs):
    if name.startswith('dp_accounting'):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', missing)
  rounds = [(events.Gaussian(1.0),)]
  with pytest.raises(ImportError, match=r"pip install 'jaxfl\[dp\]'"):
    accounting.epsilon(rounds, DELTA)
  assert accounting.epsilon(rounds, DELTA, 'gdp') > 0
