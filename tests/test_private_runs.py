"""Private runs from the launcher: what they promise, keep and refuse."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import defaults, guarantee, replay, runner
from experiments.config import UsageError, from_mapping
from experiments.workdir import Workdir
from jaxfl import log as log_lib
from jaxfl import metrics

pytestmark = pytest.mark.fast_compile

CLIENTS, EXAMPLES = 4, 200


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  rng = np.random.default_rng(0)
  f = rng.normal(size=(EXAMPLES, 6)).astype(np.float16)
  path = tmp_path_factory.mktemp('features') / 'f.npz'
  y = (f[:, 0] > 0).astype(np.int8)
  np.savez(path, f_train=f, y_train=y, f_test=f[:50], y_test=y[:50])
  return path


def config_of(npz, **settings):
  fixed = {
    'dataset': str(npz), 'num_clients': CLIENTS, 'method': 'diff2',
    'num_rounds': 8, 'restart_interval': 4, 'epsilon_dp': 20.0,
    'delta_dp': 1e-4, 'learning_rate': 0.5, 'clip_norm': 2.0,
    'clip_norm_diff': 0.5, 'research_float_noise': True, 'eval_every': 4,
    'snapshot_every': 4, 'block_size': 4,
  }  # fmt: skip
  return defaults.resolve(from_mapping(fixed | settings))


@pytest.fixture(scope='module')
def run(npz, tmp_path_factory):
  directory = tmp_path_factory.mktemp('runs') / 'diff2'
  return directory, runner.run(config_of(npz), directory)


def test_a_run_learns_and_replays(run, npz):
  directory, summary = run
  assert summary['after']['loss'] < summary['before']['loss']
  assert summary['epsilon_spent'] == pytest.approx(20.0, rel=1e-6)
  params, rounds, _ = replay.rebuild(directory)
  assert rounds == 8
  replay.compare(params, rounds, Workdir(directory))
  replay.rebuild(directory, 3)


def test_the_log_has_one_release_a_round(run):
  directory, summary = run
  width = 6 * 2 + 2
  with log_lib.RoundLog.open(directory / 'rounds.log', 'r') as log:
    assert log.num_rounds == 8
    leaves = [leaf for leaf in log.header.message]
  assert sum(int(np.prod(shape)) for _, _, shape in leaves) == width
  # the messages of four clients would not fit
  assert summary['bytes_log'] < 8 * 2 * 4 * width + 8000
  assert summary['bytes_up'] > CLIENTS * 8 * 4 * width


def test_the_guarantee_is_written_down(run):
  directory, _ = run
  found = json.loads((directory / 'privacy.json').read_text())
  assert found['epsilon_dp'] == 20.0
  assert found['delta_dp'] == 1e-4
  assert found['adjacency'] == 'one record is replaced by another'
  assert found['num_examples'] == [EXAMPLES // CLIENTS] * CLIENTS
  assert found['plan']['restart_interval'] == 4
  assert found['epsilon_spent_if_all_rounds_run'] <= 20.0


def test_the_log_tells_nothing_of_the_data(run, npz, capsys, tmp_path):
  directory, _ = run
  with log_lib.RoundLog.open(directory / 'rounds.log', 'r') as log:
    assert log.header.config['data_digest'] == ''
  runner.run(config_of(npz, num_rounds=1), tmp_path / 'run')
  assert 'client 2' not in capsys.readouterr().out  # how many of which label


def test_scaling_by_the_data_is_a_caveat(npz):
  found = guarantee.describe(config_of(npz), [50] * 4)
  assert not any('feature_scaling' in x for x in found['caveats'])
  scaled = dataclasses.replace(config_of(npz), feature_scaling='standard')
  found = guarantee.describe(scaled, [50] * 4)
  assert any('feature_scaling' in x for x in found['caveats'])


def test_no_private_loss_is_kept(run):
  directory, _ = run
  rows = metrics.read(directory / 'metrics.jsonl')
  assert {row.metric for row in rows} == {'accuracy', 'macro_f1', 'loss'}
  assert {row.round for row in rows} == {0, 4, 8}  # held-out evaluations


def test_a_run_goes_on_from_its_releases(run, npz, tmp_path):
  """Rounds of the log are not drawn again."""
  directory, summary = run
  data = (directory / 'rounds.log').read_bytes()
  (directory / 'summary.json').unlink()
  again = runner.run(config_of(npz), directory)
  assert again['digest'] == summary['digest']
  assert (directory / 'rounds.log').read_bytes() == data


def test_two_runs_have_different_noise(npz, run, tmp_path):
  _, summary = run
  other = runner.run(config_of(npz), tmp_path / 'other')
  assert other['base_digest'] == summary['base_digest']
  assert other['digest'] != summary['digest']


SCALARS = {'mu': 0.01, 'clip_norm': 2.0, 'num_rounds': 6}
OTHERS = {
  'spsa': SCALARS | {'method': 'spsa', 'num_perturbations': 4},
  'fedkseed': SCALARS
  | {'method': 'fedkseed', 'local_steps': 4, 'num_seeds': 64},
  'dp_sgd': {
    'method': 'dp_sgd', 'num_rounds': 6, 'sampling_rate': 0.1,
    'research_float_noise': True, 'epsilon_dp': 3.0,
  },
  'dp_sketch': {'method': 'dp_sketch', 'coordinates': 8, 'num_rounds': 6},
  'local steps': {
    'num_rounds': 6, 'local_steps': 3, 'sampling_rate': 0.3,
    'restart_interval': 2, 'epsilon_dp': 20.0, 'research_float_noise': True,
    'allow_unstable': True,
  },
}  # fmt: skip
PRIVATE = {
  'restart_interval': 20,
  'clip_norm_diff': 1.0,
  'research_float_noise': False,
}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name, marks=[pytest.mark.slow] * (name in ('fedkseed', 'local steps'))
    )
    for name in OTHERS
  ],
)
def test_other_mechanisms_run_and_replay(npz, tmp_path, name):
  """From the log alone, whose scale is public."""
  settings = (PRIVATE if name != 'local steps' else {}) | OTHERS[name]
  config = config_of(npz, **settings)
  summary = runner.run(config, tmp_path / 'run')
  found = json.loads((tmp_path / 'run' / 'privacy.json').read_text())
  assert found['epsilon_spent_if_all_rounds_run'] <= config.epsilon_dp
  assert summary['epsilon_spent'] == pytest.approx(config.epsilon_dp, rel=2e-3)
  params, rounds, _ = replay.rebuild(tmp_path / 'run')
  replay.compare(params, rounds, Workdir(tmp_path / 'run'))
  log = (tmp_path / 'run' / 'rounds.log').read_bytes()
  (tmp_path / 'run' / 'summary.json').unlink()
  again = runner.run(config, tmp_path / 'run')
  assert again['digest'] == summary['digest']
  assert (tmp_path / 'run' / 'rounds.log').read_bytes() == log


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('spsa', {'codec': 'log8'}, 'codec of private scalars must be one of'),
    ('spsa', {'codec': 'float32'}, 'research_float_noise must be set'),
    ('spsa', {'sides': 'one_sided'}, 'sides does not apply'),
    ('spsa', {'privacy_unit': 'client'}, 'privacy_unit does not apply'),
    ('spsa', {'epsilon_dp': None}, 'clip_norm does not apply'),
    ('spsa', {'delta_dp': None}, 'delta_dp is missing'),
    ('dp_sgd', {'sampling_rate': None}, 'dp_sgd needs sampling_rate'),
    ('dp_sgd', {'privacy_unit': 'client'}, 'privacy_unit does not apply'),
    ('dp_sketch', {'local_steps': 2}, 'for privacy_unit client'),
    ('dp_sketch', {'delta_dp': 0.01}, 'one over 200 examples or more'),
    ('local steps', {'sampling_rate': None}, 'local_steps need sampling_rate'),
    ('dp_sketch', {'client_optimizer': 'adamw'}, 'client_optimizer is for'),
    ('local steps', {'local_steps': 1}, 'sampling_rate is of local steps'),
    (
      'local steps',
      {'local_steps': 1, 'sampling_rate': None, 'local_share': 0.4},
      'local_share is of local steps',
    ),
    ('local steps', {'sampling_rate': 1.5}, 'sampling_rate must be in'),
  ],
)
def test_other_mechanisms_refuse(npz, tmp_path, name, changes, message):
  settings = (PRIVATE if name != 'local steps' else {}) | OTHERS[name]
  with pytest.raises(UsageError, match=message):
    runner.run(config_of(npz, **(settings | changes)), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_dp_gd(npz, tmp_path):
  config = config_of(npz, method='dp_gd', clip_norm_diff=1.0,
                     restart_interval=20)  # fmt: skip
  summary = runner.run(config, tmp_path / 'run')
  assert summary['after']['loss'] < summary['before']['loss']


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'epsilon_dp': None}, 'epsilon_dp must be positive'),
    ({'delta_dp': None}, 'delta_dp is missing'),
    ({'delta_dp': 0.01}, 'one over 200 examples or more'),
    (
      {'delta_dp': 0.3, 'privacy_unit': 'client'},
      'one over 4 examples or more',
    ),
    ({'participation_rate': 0.5}, 'participation_rate must be 1'),
    ({'dropout_rate': 0.1}, 'dropout_rate 0'),
    ({'weighting': 'examples'}, 'weighting must be uniform'),
    ({'research_float_noise': False}, 'research_float_noise must be set'),
    ({'budget_share': 1.0}, 'budget_share'),
    ({'clip_norm_diff': 1e4}, 'allow_unstable'),
    ({'dataset': 'python_text'}, 'all examples of a client at once'),
  ],
)
def test_refuses_before_work_starts(npz, tmp_path, settings, message):
  with pytest.raises(UsageError, match=message):
    runner.run(config_of(npz, **settings), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_settings_of_diff2_are_not_those_of_dp_gd(npz):
  with pytest.raises(UsageError, match='restart_interval does not apply'):
    config_of(npz, method='dp_gd', clip_norm_diff=1.0)
