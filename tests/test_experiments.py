"""The launchers as a user runs them: results, crashes, mistakes."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

from experiments import build, defaults
from experiments.config import UsageError, from_mapping
from jaxfl import metrics
from jaxfl.digest import digest
from jaxfl.log import RoundLog

pytestmark = pytest.mark.fast_compile

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
  '--num_clients=3', '--num_rounds=12', '--num_perturbations=2',
  '--batch_size=1', '--config.sequence_length=16', '--config.eval_every=4',
  '--config.snapshot_every=5', '--config.dropout_rate=0.2',
  '--config.weight_decay=1e-3', '--learning_rate=1e-4',
)  # fmt: skip


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """One device, and a compilation cache that the processes share."""
  cache = tmp_path_factory.mktemp('cache')
  return os.environ | {
    'XLA_FLAGS': '',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


def launch(name, *args, environment):
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{name}', *args],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
  )  # fmt: skip


@pytest.fixture(scope='module')
def finished(tmp_path_factory, environment):
  """A finished run: its directory and what it printed."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  done = launch(
    'train', f'--workdir={workdir}', *SMALL, environment=environment
  )
  assert done.returncode == 0, done.stderr
  return workdir, done


def test_a_run_leaves_its_results(finished):
  workdir, done = finished
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['rounds'] == 12
  assert summary['digest'][:16] in done.stdout
  assert 'bytes up per projected gradient' in done.stdout
  assert 'round 12/12' in done.stderr
  assert (workdir / 'curve.png').read_bytes().startswith(b'\x89PNG')
  config = json.loads((workdir / 'config.json').read_text())
  assert config['num_clients'] == 3
  rows = metrics.read(workdir / 'metrics.jsonl')
  assert [r.round for r in rows if r.metric == 'accuracy'] == [0, 4, 8, 12]
  last = rows[-1]
  assert last.bytes_up == summary['bytes_up'] > 0
  assert last.bytes_down == summary['bytes_down'] > 0
  assert last.forwards == summary['forwards'] > 0
  assert last.digest == summary['digest']


def test_replay_rebuilds_the_run(finished, environment, tmp_path):
  workdir, _ = finished
  out = tmp_path / 'model.safetensors'
  done = launch(
    'replay', f'--workdir={workdir}', f'--out={out}', environment=environment
  )
  assert done.returncode == 0, done.stderr
  summary = json.loads((workdir / 'summary.json').read_text())
  assert f'digest {summary["digest"]}' in done.stdout
  assert 'equal to the digest of the live run' in done.stdout
  assert digest(load_file(out)) == summary['digest']


def test_replay_until_a_round(finished, environment):
  workdir, _ = finished
  done = launch(
    'replay', f'--workdir={workdir}', '--until_round=8', environment=environment
  )
  rows = metrics.read(workdir / 'metrics.jsonl')
  (there,) = {r.digest for r in rows if r.round == 8}
  assert f'digest {there}' in done.stdout
  assert 'equal' in done.stdout
  done = launch(
    'replay', f'--workdir={workdir}', '--until_round=13',
    environment=environment,
  )  # fmt: skip
  assert done.returncode == 1
  assert 'until_round must be in [0, 12]' in done.stderr


def test_killed_at_any_instant_a_run_goes_on_to_the_same_digest(
  finished, environment, tmp_path
):
  """SIGKILL at random instants, until the run has ended."""
  whole, _ = finished
  rng = random.Random(0)
  workdir = tmp_path / 'killed'
  kills = 0
  command = [
    sys.executable, '-m', 'experiments.train', f'--workdir={workdir}',
  ]  # fmt: skip
  while kills < 6:
    # settings are given once; after that the directory knows them
    claimed = (workdir / 'config.json').exists()
    more = ['--resume'] if claimed else SMALL
    process = subprocess.Popen(
      [*command, *more], cwd=ROOT, env=environment,
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # start-up takes seconds: aim at the rounds and snapshots behind it
    log = workdir / 'rounds.log'
    size = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
      if log.exists() and log.stat().st_size > size:
        break
      if rng.random() < 0.0005:  # sometimes before the first round, too
        break
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.1))
    if process.poll() is not None:
      break
    process.send_signal(signal.SIGKILL)
    process.wait()
    kills += 1
  assert kills >= 3
  done = launch(
    'train', f'--workdir={workdir}', '--resume', environment=environment
  )
  assert done.returncode == 0, done.stderr
  there, here = (
    json.loads((d / 'summary.json').read_text()) for d in (whole, workdir)
  )
  same = (
    'digest', 'log_digest', 'rounds', 'bytes_up', 'bytes_down', 'forwards',
    'before', 'after',
  )  # fmt: skip
  assert {k: here[k] for k in same} == {k: there[k] for k in same}
  rows = [metrics.read(d / 'metrics.jsonl') for d in (whole, workdir)]
  values = [[(r.round, r.metric, r.value, r.digest) for r in x] for x in rows]
  assert values[0] == values[1]


@pytest.mark.parametrize(
  'which',
  [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_signal_stops_after_the_round_and_says_how_to_go_on(
  which, environment, tmp_path
):
  workdir = tmp_path / 'stopped'
  with subprocess.Popen(
    [
      sys.executable, '-m', 'experiments.train', f'--workdir={workdir}',
      *SMALL, '--num_rounds=100000', '--tensorboard',
    ],
    cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    stderr=subprocess.DEVNULL,
  ) as process:  # fmt: skip
    try:
      log = workdir / 'rounds.log'
      while not log.exists() or log.stat().st_size < 1500:
        assert process.poll() is None
        time.sleep(0.05)
      process.send_signal(which)
      out, _ = process.communicate(timeout=60)
    finally:
      process.kill()
  assert process.returncode == 130
  assert f'python -m experiments.train --workdir={workdir} --resume' in out
  with RoundLog.open(log) as rounds:
    # stopped between rounds, with a snapshot of the last one
    assert rounds.torn_bytes == 0
    assert (workdir / 'snapshots' / str(rounds.num_rounds)).is_dir()
  (events,) = (workdir / 'tensorboard').iterdir()
  assert events.stat().st_size > 1000


def test_damaged_or_foreign_directories_are_refused(
  finished, environment, tmp_path
):
  whole, _ = finished
  again = launch('train', f'--workdir={whole}', *SMALL, environment=environment)
  assert again.returncode == 1
  assert 'already holds a run: add --resume' in again.stderr
  other = launch(
    'train', f'--workdir={whole}', '--resume', '--seed=5',
    environment=environment,
  )  # fmt: skip
  assert other.returncode == 1
  assert 'its seed is 0, not 5' in other.stderr
  typo = launch(
    'train', f'--workdir={tmp_path / "typo"}', '--resume',
    environment=environment,
  )  # fmt: skip
  assert typo.returncode == 1
  assert 'no run to go on with' in typo.stderr
  damaged = tmp_path / 'damaged'
  shutil.copytree(whole, damaged)
  log = damaged / 'rounds.log'
  data = bytearray(log.read_bytes())
  data[-60] ^= 0x10
  log.write_bytes(data)
  for name, more in (('replay', ()), ('train', ('--resume',))):
    done = launch(name, f'--workdir={damaged}', *more, environment=environment)
    assert done.returncode == 1
    assert str(log) in done.stderr
    assert 'Traceback' not in done.stderr
  missing = launch('replay', f'--workdir={tmp_path}', environment=environment)
  assert missing.returncode == 1
  assert 'no run there' in missing.stderr


def test_broken_snapshots_are_skipped(finished, environment, tmp_path):
  whole, _ = finished
  workdir = tmp_path / 'broken'
  shutil.copytree(whole, workdir)
  for path in (workdir / 'snapshots').rglob('*'):
    if path.is_file() and path.stat().st_size > 1000:
      path.write_bytes(b'\x00' * path.stat().st_size)
  (workdir / 'summary.json').unlink()
  done = launch(
    'train', f'--workdir={workdir}', '--resume', environment=environment
  )
  assert done.returncode == 0, done.stderr
  assert 'skipped' in done.stderr
  there, here = (
    json.loads((d / 'summary.json').read_text()) for d in (whole, workdir)
  )
  assert there['digest'] == here['digest']


def test_lost_metrics_are_made_anew(finished, environment, tmp_path):
  whole, _ = finished
  workdir = tmp_path / 'lost'
  shutil.copytree(whole, workdir)
  (workdir / 'metrics.jsonl').unlink()
  done = launch(
    'train', f'--workdir={workdir}', '--resume', environment=environment
  )
  assert done.returncode == 0, done.stderr
  rows = [metrics.read(d / 'metrics.jsonl') for d in (whole, workdir)]
  found = [[(r.round, r.metric, r.value, r.bytes_up) for r in x] for x in rows]
  assert found[0] == found[1]


def test_changed_data_are_refused(environment, tmp_path):
  data, workdir = tmp_path / 'data', tmp_path / 'run'
  for client in 'ab':
    (data / client).mkdir(parents=True)
    text = ''.join(f'line {i} of client {client}\n' for i in range(400))
    (data / client / 'text').write_text(text)
  args = [f'--workdir={workdir}', f'--dataset={data}', *SMALL]
  args += ['--num_clients=2', '--num_rounds=3']
  done = launch('train', *args, environment=environment)
  assert done.returncode == 0, done.stderr
  (data / 'a' / 'text').write_text('other text\n' * 800)
  done = launch(
    'train', f'--workdir={workdir}', '--resume', environment=environment
  )
  assert done.returncode == 1
  assert 'differs in data_digest' in done.stderr


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'method': 'spas'}, 'method must be one of spsa, fedkseed'),
    ({'codec': 'zip'}, 'codec must be one of log8'),
    ({'mu': float('nan')}, 'mu must be finite'),
    ({'participation_rate': 2.0}, 'no more can be sampled than exist'),
    ({'num_rounds': 0}, 'num_rounds must be > 0'),
    ({'weights': 'int3'}, 'weights must be one of grid, float32'),
    ({'seed': -1}, 'seed must be >= 0'),
    ({'method': 'fed_avg', 'codec': 'sign1'}, 'codec does not apply to'),
    ({'method': 'fed_sgd', 'local_steps': 3}, 'local_steps does not apply'),
    (
      {'method': 'ferret', 'server_optimizer': 'adam', 'server_momentum': 0.5},
      'server_momentum does not apply to server_optimizer adam',
    ),
    (
      {'weight_decay': 1e6, 'learning_rate': 1.0},
      'learning_rate . weight_decay must be < 0.25',
    ),
  ],
)
def test_settings_that_are_wrong_are_named(settings, message):
  def method_of(settings):
    config = defaults.resolve(from_mapping(settings))
    return build.build_method(config, build.no_loss)

  with pytest.raises(UsageError, match=message):
    method_of(settings)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--mu=0'], 'mu must be > 0, got 0.0'),
    (['--config.learnig_rate=1'], 'learnig_rate'),
    (['--config.batch_size=a'], 'batch_size'),
    (['--batch_size=1.5'], 'batch_size'),
    (
      ['--method=ferret', '--coordinates=9'],
      'coordinates must be >= 54, one for every block, got 9',
    ),
    (['--model=nowhere.safetensors'], 'nowhere.safetensors'),
    (['--dataset=/nowhere'], '/nowhere'),
    (['--resume'], '--resume needs --workdir'),
    (['--config=nowhere.py'], 'nowhere.py'),
    (['extra'], 'extra'),
  ],
)
def test_mistakes_are_named_before_any_work(
  args, message, environment, tmp_path
):
  workdir = [] if '--resume' in args else [f'--workdir={tmp_path / "run"}']
  done = launch('train', *workdir, *args, environment=environment)
  assert done.returncode != 0
  assert message in done.stderr + done.stdout
  assert 'Traceback' not in done.stderr
  # the directory is free for the corrected command
  assert not (tmp_path / 'run').exists()
