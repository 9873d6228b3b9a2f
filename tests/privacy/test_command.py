"""`experiments.privacy`: what it finds, writes and refuses."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import privacy_cost
from experiments.config import UsageError
from jaxfl import events

ROOT = pathlib.Path(__file__).parents[2]
TARGET = {'epsilon_dp': 3.0, 'delta_dp': 1e-5, 'num_rounds': 40}
LOCAL = {'local_steps': 3, 'num_clients': 10, 'sampling_rate': 0.2}


def settings(**change):
  return privacy_cost.Settings(**(TARGET | change))


@pytest.mark.parametrize(
  ('change', 'kinds', 'accountants'),
  [
    ({}, ['Gaussian'], ['gdp', 'pld', 'rdp']),
    ({'restart_interval': 10}, ['Gaussian'] * 2, ['gdp', 'pld', 'rdp']),
    (
      LOCAL | {'restart_interval': 10, 'local_share': 0.2},
      ['Gaussian', 'PoissonGaussian', 'Gaussian'],
      ['pld', 'rdp'],
    ),
    ({'sampling_rate': 0.02}, ['PoissonGaussian'], ['pld', 'rdp']),
    (
      {'mechanism': 'skellam', 'num_scalars': 2, 'sensitivity': 3},
      ['IntegerNoise'],
      ['pld', 'rdp'],
    ),
  ],
)
def test_a_run_spends_its_target(change, kinds, accountants, monkeypatch):
  monkeypatch.setattr(privacy_cost, '_POINTS', 3)
  found = json.loads(json.dumps(privacy_cost.make(settings(**change))))
  assert [event['event'] for event in found['events']] == kinds
  assert list(found['epsilon']) == accountants
  assert found['rounds'] == [1, 14, 27, 40]
  for name, spent in found['epsilon'].items():
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(3.0, rel=0.3 if name == 'rdp' else 0.01)
  counts = sum(e.count for e in events.from_dicts(found['events']))
  releases = 80 if 'IntegerNoise' in kinds else 40
  assert counts == releases + 8 * ('local_steps' in change)
  adjacency = 'adds zero' if 'sampling_rate' in change else 'by another'
  assert found['lines']['adjacency'].endswith(adjacency)
  guarantee, spent = privacy_cost.tables(found)
  assert guarantee.row_count == len(found['lines'])
  assert spent.row_count == 4
  privacy_cost.draw(found)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'epsilon_dp': None}, 'epsilon_dp must be positive'),
    ({'delta_dp': None}, 'delta_dp is missing'),
    ({'num_examples': 200_000}, 'delta_dp is 1e-05, one over 200000'),
    ({'num_rounds': None}, 'num_rounds must be >= 1, got None'),
    ({'mechanism': 'skellam', 'num_rounds': 0}, 'num_rounds must be >= 1'),
    ({'budget_share': 1.0}, 'budget_share must be in (0, 1)'),
    ({'local_steps': 0}, 'local_steps must be >= 1, got 0'),
    ({'local_steps': 3}, 'num_clients must be >= 1, got None'),
    (LOCAL | {'sampling_rate': None}, 'sampling_rate must be in (0, 1)'),
    ({'local_share': 0.1}, 'local_share does not apply to mechanism'),
    (
      {'sampling_rate': 0.1, 'restart_interval': 5},
      'restart_interval is of DIFF2',
    ),
    (
      {'mechanism': 'skellam', 'sampling_rate': 0.1},
      'sampling_rate does not apply to mechanism skellam',
    ),
    ({'num_scalars': 2}, 'num_scalars does not apply to mechanism gaussian'),
    (
      {'mechanism': 'skellam', 'restart_interval': 2},
      'restart_interval does not apply to mechanism skellam',
    ),
  ],
)
def test_mistakes(change, message):
  with pytest.raises((UsageError, ValueError)) as error:
    privacy_cost.make(settings(**change))
  assert message in str(error.value)


def test_the_launcher(tmp_path):
  program = """
from absl import app, flags
from experiments import privacy
def main(argv):
  privacy.main(argv)
  flags.FLAGS.delta_dp = None
  privacy.main(argv)
app.run(main)
"""
  done = subprocess.run(
    [sys.executable, '-c', program, '--epsilon_dp=3', '--delta_dp=1e-5',
     '--num_rounds=20', '--mechanism=discrete_gaussian', f'--out={tmp_path}'],
    cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, capture_output=True,
    text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 1
  assert 'standard deviation' in done.stdout
  assert 'error: delta_dp is missing' in done.stderr
  assert 'Traceback' not in done.stderr
  found = json.loads((tmp_path / 'privacy.json').read_text())
  assert found['epsilon']['pld'][-1] == pytest.approx(3.0, rel=0.01)
  assert (tmp_path / 'privacy.png').read_bytes().startswith(b'\x89PNG')
