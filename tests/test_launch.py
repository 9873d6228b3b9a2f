"""Launchers: what they start, when a job goes on, and that it is one run."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from experiments import runner
from experiments.launch import rehearsal
from tests.test_two_processes import (
  ROOT,
  TIMEOUT,
  flags_of,
  resolved,
  rounds_in,
  what_is_left,
)

pytestmark = pytest.mark.fast_compile

FLAGS = ['--method=spsa', '--dataset=a "b" \\ $c & (d).csv']
VARIABLES = {
  launcher: own
  | {'WORKDIR': '/shared/a run', 'HOSTS': '3', 'SLURM_JOB_ID': '7'}
  for launcher, (_, _, own) in rehearsal.LAUNCHERS.items()
}
# read by the script, set by its user
NEEDED = [
  ('slurm', 'WORKDIR'),
  *[('tpu_vm', name) for name in ('TPU_NAME', 'ZONE', 'WORKDIR')],
  *[
    ('jobset', name)
    for name in ('HOSTS', 'IMAGE', 'CLAIM', 'WORKDIR', 'DEVICE', 'DEVICES')
  ],
]


def test_slurm_runs_one_step():
  found, _ = rehearsal.noted('slurm', VARIABLES['slurm'], FLAGS)
  assert found == [
    '--kill-on-bad-exit=0', 'python', '-m', 'experiments.train', '--multihost',
    '--auto_resume', '--workdir=/shared/a run', *FLAGS,
  ]  # fmt: skip


def test_all_workers_of_a_slice_run_the_same(tmp_path):
  found, _ = rehearsal.noted('tpu_vm', VARIABLES['tpu_vm'], FLAGS)
  *first, command = found
  assert first == [
    'compute', 'tpus', 'tpu-vm', 'ssh', 'slice', '--zone=zone', '--worker=all'
  ]  # fmt: skip
  # as the shell of a worker understands it
  path = tmp_path / 'python3'
  path.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$PWD" "$@"\n')
  path.chmod(0o755)
  done = subprocess.run(
    ['bash', '-c', command.removeprefix('--command=')],
    env={'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
    check=True, capture_output=True, text=True,
  )  # fmt: skip
  assert done.stdout.split('\0')[:-1] == [
    str(ROOT), '-m', 'experiments.train', '--multihost', '--auto_resume',
    '--workdir=/shared/a run', *FLAGS,
  ]  # fmt: skip


def test_pods_find_each_other():
  found, text = rehearsal.noted('jobset', VARIABLES['jobset'], FLAGS)
  assert found == ['apply', '-f', '-']
  bare = [line.split('#')[0] for line in text.splitlines()]
  assert not [line for line in bare if '<' in line]  # all is filled in
  jobset = yaml.safe_load(text)
  (replicated,) = jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  assert container['args'] == FLAGS
  assert container['image'] == 'image'
  assert container['resources']['limits'] == {'cpu': 1}
  assert job['completions'] == job['parallelism'] == 3
  assert (job['completionMode'], job['backoffLimit']) == ('Indexed', 0)
  assert '--num_processes=3' in container['command']
  assert '--process_id=$(JOB_COMPLETION_INDEX)' in container['command']
  # JOBSET-REPLICATED_JOB-0-0.JOBSET, see the JobSet API on DNS names
  name, own = jobset['metadata']['name'], replicated['name']
  (coordinator,) = container['env']
  assert coordinator['value'] == f'{name}-{own}-0-0.{name}:55527'
  # the claim is where the directory of the run is
  (mount,), (volume,) = container['volumeMounts'], pod['volumes']
  assert mount == {'name': volume['name'], 'mountPath': '/shared'}
  assert volume['persistentVolumeClaim'] == {'claimName': 'claim'}


@pytest.mark.parametrize(('launcher', 'name'), NEEDED)
def test_a_missing_variable_is_named(launcher, name):
  with pytest.raises(RuntimeError, match=f'{name}: set it to'):
    rehearsal.noted(launcher, VARIABLES[launcher] | {name: ''}, [])


@pytest.mark.parametrize(('code', 'again'), [(0, 0), (1, 0), (130, 1)])
def test_slurm_requeues_what_was_stopped(tmp_path, code, again):
  for name, text in {
    'srun': f'exit {code}',
    'scontrol': f'echo "$@" >> {tmp_path}/asked',
  }.items():
    (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
    (tmp_path / name).chmod(0o755)
  path = {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  done = subprocess.run(
    ['bash', str(rehearsal.DIRECTORY / 'slurm.sbatch')],
    env=VARIABLES['slurm'] | path,
  )
  assert done.returncode == code
  asked = tmp_path / 'asked'
  lines = asked.read_text().splitlines() if asked.exists() else []
  assert lines == ['requeue 7'] * again


# Runs that are stopped, and go on with as many hosts as there are.


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """A run that is long enough to be stopped twice."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 5)).astype(np.float32)
  path = tmp_path_factory.mktemp('data') / 'f.npz'
  y = (x[:, 0] > 0).astype(np.int8)
  np.savez(path, f_train=x[:40], y_train=y[:40], f_test=x[40:], y_test=y[40:])
  return {
    'dataset': str(path), 'num_clients': 6, 'num_rounds': 600,
    'batch_size': 4, 'learning_rate': 0.02, 'eval_every': 50,
    'snapshot_every': 20, 'block_size': 2, 'dropout_rate': 0.2,
    'num_perturbations': 2,
  }  # fmt: skip


@pytest.fixture(scope='module')
def simulated(settings, tmp_path_factory):
  directory = tmp_path_factory.mktemp('runs') / 'simulated'
  runner.run(resolved(settings), directory)
  return what_is_left(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('launcher', 'numbers'),
  [
    ('slurm', (2, 2)),
    ('slurm', (2, 1, 2)),
    ('tpu_vm', (2, 2)),
    ('jobset', (1, 2, 3)),
  ],
)
def test_stopped_runs_go_on(launcher, numbers, settings, simulated, tmp_path):
  """The last of some numbers of hosts ends the run, the others are stopped."""
  directory, known = tmp_path / 'run', 0
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=1'
  }
  for i, number in enumerate(numbers):
    last = i == len(numbers) - 1
    process = subprocess.Popen(
      [
        sys.executable, '-m', 'experiments.launch.local', f'--hosts={number}',
        f'--launcher={launcher}', f'--workdir={directory}', '--',
        *flags_of(settings),
      ],
      cwd=ROOT, env=environment, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
      deadline = time.monotonic() + TIMEOUT
      while not last and rounds_in(directory / 'rounds.log') < known + 3:
        assert time.monotonic() < deadline
        if process.poll() is not None:
          break  # fails below
        time.sleep(0.05)
      if not last:
        process.send_signal(signal.SIGTERM)
      output, _ = process.communicate(timeout=TIMEOUT)
    finally:
      process.terminate()
    assert process.returncode == (0 if last else 130), output
    known = rounds_in(directory / 'rounds.log')
    assert (known == settings['num_rounds']) == last
  assert what_is_left(directory) == simulated
