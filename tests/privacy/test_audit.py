"""The audit: its bounds, its adversary, what is shipped and planted bugs."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import special, stats

from experiments.audits import (
  bounds,
  catalog,
  scalars,
  table,
  vector_bugs,
  vectors,
)
from jaxfl import calibration, gdp, noise

pytestmark = pytest.mark.fast_compile

ROOT = pathlib.Path(__file__).parents[2]
DELTA = 1e-5


def coins(count, seed=0):
  return 2 * np.random.default_rng(seed).integers(2, size=count) - 1


@pytest.mark.parametrize(('count', 'total'), [(1, 9), (60, 100), (500, 500)])
def test_bounds_are_those_of_the_binomial_law(count, total):
  low = bounds.lower(count, total, 0.03)
  assert stats.binom.sf(count - 1, total, low) == pytest.approx(0.03)
  high = bounds.upper(total - count, total, 0.03)
  assert stats.binom.cdf(total - count, total, high) == pytest.approx(0.03)
  assert bounds.lower(0, total, 0.03) == 0
  assert bounds.upper(total, total, 0.03) == 1


def test_a_gaussian_mechanism_is_bounded_from_below():
  """Seldom above the truth: in at most alpha / 2 of many audits."""
  mu, wrong, found = 0.8, 0, []
  truth = gdp.epsilon_of(mu, DELTA)
  for seed in range(300):
    signs = coins(500, seed)
    draws = np.random.default_rng([seed, 1]).normal(size=500)
    seen = bounds.evidence(
      draws + signs * mu / 2, signs, delta=DELTA, alpha=0.2
    )
    wrong += seen.epsilon_gaussian > truth
    found.append(seen.epsilon_gaussian)
    assert seen.accuracy_lower < seen.accuracy
  assert wrong <= stats.binom.ppf(0.999, 300, 0.1)
  assert wrong >= 5  # neither is it loose
  assert np.mean(found) > 0.7 * truth


@pytest.mark.parametrize('epsilon', [0.5, 2.0])
def test_randomised_response_is_bounded_from_below(epsilon):
  """A mechanism that is not Gaussian; only one in five trials tells much."""
  right = special.expit(epsilon)
  found = []
  for seed in range(100):
    rng = np.random.default_rng([seed, 2])
    signs, sure = coins(4000, seed), rng.uniform(size=4000) < 0.2
    answers = np.where(rng.uniform(size=4000) < right, signs, -signs)
    scores = np.where(sure, 2.0 * answers, 0.1 * rng.choice([-1, 1], 4000))
    seen = bounds.evidence(scores, signs, delta=0.0, alpha=0.1)
    found.append(seen.epsilon_any)
  assert np.mean(np.array(found) > epsilon) <= 0.1
  assert np.mean(found) > 0.4 * epsilon


def test_a_blind_adversary_proves_nothing():
  scores = np.random.default_rng(0).normal(size=5000)
  seen = bounds.evidence(scores, coins(5000), delta=DELTA, alpha=0.01)
  assert seen.epsilon_gaussian == seen.epsilon_any == 0
  with pytest.raises(ValueError, match='50 trials at least, got 49'):
    bounds.evidence(scores[:49], coins(49), delta=DELTA, alpha=0.01)
  with pytest.raises(ValueError, match='not a number'):
    bounds.evidence(np.full(50, np.nan), coins(50), delta=DELTA, alpha=0.01)


def plan_of(interval, epsilon=3.0):
  return calibration.diff2(
    epsilon, DELTA, num_rounds=vectors.NUM_ROUNDS, restart_interval=interval
  )


def transcript(pieces, count=60):
  """What the adversary of the pieces sees."""
  held = []
  keep = lambda seen: held.append(seen) or np.zeros(count)
  vectors.player(pieces._replace(score=keep))(coins(count), 0)
  return held[0]


def telling(seen):
  """float64[N]: how far apart both signs are, in noise, over all rounds."""
  plus, minus = seen.means[:, 0], seen.means[:, 1]
  return np.sqrt((np.square(plus - minus).sum(2) / seen.std**2).sum(0))


@pytest.mark.parametrize('interval', [1, 4])
def test_the_canary_spends_the_budget_and_no_more(interval):
  """In every trial: the transcript is as telling as the plan says at most."""
  found = telling(transcript(vectors.shipped(plan_of(interval))))
  mu = gdp.mu_of(3.0, DELTA)
  assert found.max() <= mu * (1 + 1e-9)
  assert found.min() > 0.999 * mu


@pytest.mark.parametrize(
  ('bug', 'least', 'most'),
  [
    (vector_bugs.half_sensitivity, 1.998, 2.001),
    (vector_bugs.average_of_averages, 1.998, 2.001),
    (vector_bugs.clip_of_the_mean, 7.0, 8.001),
    (vector_bugs.no_clip_on_the_difference, 5.0, 8.001),
    (vector_bugs.no_noise_on_the_difference, 700, 708),
  ],
)
def test_how_much_bugs_tell(bug, least, most):
  """Over what is claimed. Two clients of 8 and 12: a clip of a mean is 8 x."""
  found = telling(transcript(bug(plan_of(4)))) / gdp.mu_of(3.0, DELTA)
  assert least < found.mean()
  assert found.max() < most


def test_the_adversary_knows_the_mean_that_is_released(monkeypatch):
  """Its model of the aggregator, beside the aggregator without its noise."""
  monkeypatch.setattr(noise, 'add_gaussian', lambda key, mean, *_, **__: mean)
  signs = coins(60)
  seen = transcript(vectors.shipped(plan_of(4)))
  true = np.where((signs > 0)[:, None], seen.means[:, 0], seen.means[:, 1])
  np.testing.assert_allclose(seen.releases, true, rtol=0, atol=1e-15)


def test_noise_that_comes_again_can_be_subtracted():
  """Unless the canary pulls the same way in both intervals: 1 run in 16."""
  signs = coins(100)
  play = vectors.player(vector_bugs.reused_noise(plan_of(4, 1.0)))
  assert np.mean((play(signs, 1) > 0) == (signs > 0)) >= 0.9


def test_scores_of_bytes_are_log_likelihood_ratios():
  """exp(score) has mean 1 under sign -1, over all values of a byte."""
  rng = np.random.default_rng(0)
  codes = rng.integers(-24, 25, (2, 1, 1))
  sent = np.arange(-127, 128)[:, None, None]
  for sigma in (15.7, 60.0):
    score = scalars.likelihood_ratio(scalars.Transcript(sent, codes, sigma))
    chance = stats.norm.cdf(sent.ravel() + 0.5 - codes[1, 0, 0], scale=sigma)
    chance[-1] = 1.0
    chance = np.diff(chance, prepend=0.0)
    assert np.sum(chance * np.exp(score)) == pytest.approx(1, abs=2e-3)


def test_short_audit_of_all_mechanisms():
  """What is shipped holds; gross bugs are found; the table has all of it."""
  settings = table.Settings(
    epsilon_dp=(3.0,), num_trials=75, seeds=2, bug='noise_from_the_shared_key'
  )
  found = json.loads(json.dumps(table.make(settings)))
  names = [(row['mechanism'], row['bug']) for row in found['rows']]
  shared = 'noise_from_the_shared_key'
  assert names == [
    ('dp_gd', table.SHIPPED),
    ('diff2', table.SHIPPED),
    ('diff2', shared),
    ('private_byte', table.SHIPPED),
    ('private_byte', shared),
  ]
  assert [row['refuted'] for row in found['rows']] == [
    bug == shared for _, bug in names
  ]
  assert table.refuted(found) == []
  for row in found['rows']:
    assert row['epsilon_claimed'] == pytest.approx(3.0, rel=2e-3)
    assert row['epsilon_any'] <= 1.1 * row['epsilon_gaussian']
  byte = found['rows'][3]
  assert byte['num_trials'] == 1500
  assert 0.25 < byte['epsilon_gaussian'] / byte['epsilon_claimed'] < 1
  assert table.table(found).row_count == 5
  table.draw(found)
  found['rows'][2]['bug'] = table.SHIPPED
  assert table.refuted(found) == ['diff2 at epsilon 3']


@pytest.mark.parametrize(
  ('name', 'bug'),
  [
    ('diff2', 'clip_of_the_mean'),
    ('private_byte', 'half_sensitivity'),
    ('private_byte', 'clip_of_the_mean'),
    ('private_byte', 'reused_noise'),
  ],
)
def test_gross_bugs_are_found_in_few_trials(name, bug):
  mechanism = catalog.MECHANISMS[name]
  settings = table.Settings(num_trials=100, seeds=1)
  found = table.audit(
    mechanism, bug, mechanism.claim(3.0, DELTA), settings, 0.01
  )
  assert found['refuted']
  assert found['epsilon_gaussian'] > 3.5


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'mechanism': 'laplace'}, 'mechanism must be one of all, dp_gd, diff2'),
    ({'bug': 'typo'}, 'bug must be one of all, none, half_sensitivity'),
    (
      {'mechanism': 'dp_gd', 'bug': 'reused_noise'},
      "bug must be one of all, none, got 'reused_noise'",
    ),
    ({'epsilon_dp': ()}, 'epsilon_dp must be one positive number or several'),
    ({'epsilon_dp': (1.0, -1.0)}, 'epsilon_dp must be positive and finite'),
    ({'delta_dp': 2.0}, 'delta_dp must be in (0, 1), got 2.0'),
    ({'num_trials': 49}, 'num_trials must be >= 50, got 49'),
    ({'seeds': 0}, 'seeds must be >= 1, got 0'),
  ],
)
def test_mistakes(change, message):
  with pytest.raises(ValueError) as error:
    table.make(table.Settings(**change))
  assert message in str(error.value)


def test_the_launcher(tmp_path):
  program = """
from absl import app, flags
from experiments import audit
def main(argv):
  audit.main(argv)
  flags.FLAGS.epsilon_dp = ['1', 'x']
  audit.main(argv)
app.run(main)
"""
  done = subprocess.run(
    [sys.executable, '-c', program, '--mechanism=dp_gd', '--bug=none',
     '--num_trials=50', '--epsilon_dp=3', f'--out={tmp_path}'],
    cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, capture_output=True,
    text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 1
  assert 'as shipped' in done.stdout
  assert 'error: epsilon_dp must be numbers such as 1,3; got 1,x' in done.stderr
  assert 'Traceback' not in done.stderr
  found = json.loads((tmp_path / 'audit.json').read_text())
  assert [row['refuted'] for row in found['rows']] == [False]
  assert (tmp_path / 'audit.png').read_bytes().startswith(b'\x89PNG')
