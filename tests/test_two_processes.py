"""Two processes on this machine, with two devices each: jax.distributed."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import build, defaults, problem, runner, session
from experiments.config import from_mapping
from experiments.launch import rehearsal
from experiments.workdir import Workdir
from jaxfl import digest, keys, metrics, wire
from jaxfl.log import Header, RoundLog
from jaxfl.runtime import mesh as mesh_lib
from tests import test_mesh

pytestmark = pytest.mark.fast_compile

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 240  # seconds; a process that waits for another ends all the same


@contextlib.contextmanager
def started(commands, cache, variables=()):
  """Runs a command per process; in the end, none is left.

  `variables` may hold environment variables for each.
  """
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, *command], cwd=ROOT, env=environment | own, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for command, own in itertools.zip_longest(commands, variables, fillvalue={})
  ]  # fmt: skip
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()  # JAX catches SIGTERM


def ends_of(processes):
  """Output, errors and exit status of each."""
  deadline = time.monotonic() + TIMEOUT
  ends = [
    p.communicate(timeout=max(1, deadline - time.monotonic()))
    for p in processes
  ]
  return [(*end, p.returncode) for end, p in zip(ends, processes, strict=True)]


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def header(method):
  return Header(
    spec=keys.SPEC,
    base_digest=digest.digest(test_mesh.PARAMS),
    config={},
    params=wire.describe(test_mesh.PARAMS),
    message=wire.describe(method.message(test_mesh.PARAMS)),
  )


# every client is sampled, some do not answer: 3 blocks at most for 2 processes
COHORT = {'num_clients': 6, 'participation_rate': 0.84, 'dropout_rate': 0.2}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """A compilation cache that the processes share."""
  return tmp_path_factory.mktemp('cache')


def test_two_processes_are_one_run(tmp_path, cache):
  port = str(free_port())
  command = ['-m', 'tests.two_processes']
  commands = [[*command, str(i), port, str(tmp_path)] for i in (0, 1)]
  with started(commands, cache) as processes:
    ends = ends_of(processes)
  files = [tmp_path / f'{i}.json' for i in (0, 1)]
  assert all(f.exists() for f in files), ends[0][1] + ends[1][1]
  first, second = [json.loads(f.read_text()) for f in files]
  # an error in one has ended both
  assert all(code != 0 for *_, code in ends)
  assert 'a client broke' in ends[1][1]

  loaded = [
    [tuple(x) for x in f['spsa 2'].pop('loaded')] for f in (first, second)
  ]
  more = [
    [tuple(x) for x in f['spsa 5'].pop('loaded')] for f in (first, second)
  ]
  assert first.pop('together') == 'process 1: no data here'
  assert second.pop('together') == 'no data here'
  assert first == second
  assert first['exchange'] == ['', 'é']
  assert first['bytes'] == '00ff' * 3
  values = (
    np.array([-0.0, 0, np.nan], np.float32),
    np.array(2**40),
    np.array([True]),
  )
  assert first['share'] == [
    [x.tobytes().hex(), x.dtype.name, list(x.shape)] for x in values
  ]
  assert first['shape'] == {'clients': 2, 'model': 2}
  assert 'num_client_devices=3 is not a multiple of the 2' in first['odd']
  assert 'needs 3 devices in each of 2 processes; there are 2' in first['large']
  assert first['processes'] == [0, 0, 1, 1]
  assert first['gathered'] == [[7, 7]] * 2 + [[8, 8]] * 2
  # only the bytes of the messages cross
  assert first['collectives'] == [['u8', 8]]
  assert 'runs in one process only, not in 2' in first['private']

  seen = set()
  method = test_mesh.built('spsa')

  def batch_fn(round, client):
    seen.add((round, client))
    return test_mesh.table.batch_fn(method.num_batches)(round, client)

  here = test_mesh.run(
    method, test_mesh.simulated(method), 5, batch_fn=batch_fn, **COHORT
  )
  digests = [digest.digest(r.state) for r in here]
  assert first['spsa 2']['digests'] == digests[:2]
  assert first['spsa 5']['digests'] == digests
  # each loads its own clients only, and none of rounds that the log has
  assert not set(loaded[0]) & set(loaded[1])
  assert set(loaded[0] + loaded[1]) == {x for x in seen if x[0] < 2}
  assert set(more[0] + more[1]) == {x for x in seen if x[0] >= 2}
  assert all(loaded)
  assert all(more)
  with RoundLog.open(tmp_path / 'rounds.log') as rounds:
    assert rounds.num_rounds == 5

  method = test_mesh.built('fed_avg')
  here = test_mesh.run(method, test_mesh.simulated(method), 3, **COHORT)
  # float sums, but the same program on the same device
  assert first['fed_avg'] == [digest.digest(r.state) for r in here]


# The launcher.


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """Of a small run on features, as flags of the launcher."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 5)).astype(np.float32)
  path = tmp_path_factory.mktemp('data') / 'f.npz'
  y = (x[:, 0] > 0).astype(np.int8)
  np.savez(path, f_train=x[:40], y_train=y[:40], f_test=x[40:], y_test=y[40:])
  return {
    'dataset': str(path), 'num_clients': 5, 'num_rounds': 12, 'batch_size': 4,
    'learning_rate': 0.1, 'eval_every': 5, 'snapshot_every': 5,
    'dropout_rate': 0.2, 'num_perturbations': 2,
  }  # fmt: skip


def flags_of(settings):
  short = ('dataset', 'num_clients', 'num_rounds', 'batch_size')
  return [
    f'--{"" if k in short else "config."}{k}={v}' for k, v in settings.items()
  ]


def resolved(settings):
  return defaults.resolve(from_mapping(settings))


def what_is_left(directory):
  """What a run leaves that must not depend on where it was computed."""
  summary = json.loads((directory / 'summary.json').read_text())
  names = ('digest', 'log_digest', 'after', 'best', 'bytes_up', 'bytes_down')
  rows = metrics.read(directory / 'metrics.jsonl')
  return (
    {name: summary[name] for name in names},
    [(r.round, r.metric, r.value, r.digest, r.bytes_up) for r in rows],
  )


@pytest.fixture(scope='module')
def simulated(settings, tmp_path_factory):
  """The directory of a run in the simulator."""
  directory = tmp_path_factory.mktemp('runs') / 'simulated'
  runner.run(resolved(settings), directory)
  return directory


def cut(source, target):
  """A copy of a finished run as a crash in its last round would leave it."""
  shutil.copytree(source, target)
  path = target / 'rounds.log'
  os.truncate(path, path.stat().st_size - 40)
  shutil.rmtree(target / 'snapshots' / '12')
  with RoundLog.open(path, 'a') as log:  # drops what is torn
    assert 10 < log.num_rounds < 12


def test_a_run_is_the_same_on_any_mesh(settings, simulated, tmp_path):
  config = resolved(settings)
  runner.run(config, tmp_path / 'whole', mesh_lib.make(2))
  assert what_is_left(tmp_path / 'whole') == what_is_left(simulated)
  # begun on two devices, ended on four
  cut(tmp_path / 'whole', tmp_path / 'cut')
  runner.run(config, tmp_path / 'cut', mesh_lib.make(4))
  assert what_is_left(tmp_path / 'cut') == what_is_left(simulated)


def rounds_in(path):
  if not path.exists():
    return 0
  with RoundLog.open(path) as log:
    return log.num_rounds


def test_several_hosts_are_one_run(settings, cache, tmp_path):
  """Stopped by a signal to one of them, resumed, and stopped again.

  First as under Slurm, by JAX's own detection, then as the pods of a JobSet.
  """
  settings = settings | {'num_rounds': 100_000, 'snapshot_every': 10}
  directories = [tmp_path / str(i) for i in (0, 1)]
  path, known = directories[0] / 'rounds.log', 0
  for launcher in ('slurm', 'jobset'):
    flags = flags_of(settings)
    hosts = rehearsal.hosts(launcher, 2, directories[0], flags)
    assert all(host.command[0] == 'python' for host in hosts)
    # only the first one's directory counts
    commands = [
      [*host.command[1:], f'--workdir={directory}']
      for host, directory in zip(hosts, directories, strict=True)
    ]
    variables = [host.variables for host in hosts]
    with started(commands, cache, variables) as processes:
      deadline = time.monotonic() + TIMEOUT
      while rounds_in(path) < known + 3:
        assert time.monotonic() < deadline
        if any(p.poll() is not None for p in processes):
          break  # fails below
        time.sleep(0.1)
      processes[1].send_signal(signal.SIGTERM)
      ends = ends_of(processes)
    assert [code for *_, code in ends] == [130, 130], ends[0][1] + ends[1][1]
    assert f'--workdir={directories[0]} --resume' in ends[0][0]
    known = rounds_in(path)
  # the second process only says that it was asked to stop
  lines = [
    line
    for out, err, _ in ends[1:]
    for line in (out + err).splitlines()
    if line and not line.startswith(('[Gloo]', 'W', 'I'))
  ]
  assert all('SIGTERM' in line for line in lines), lines
  assert not directories[1].exists()

  with RoundLog.open(path) as log:
    num_rounds, chain = log.num_rounds, log.digest
  # they stop together, where replicas are compared
  assert num_rounds % 10 == 0
  assert (directories[0] / 'snapshots' / str(num_rounds)).is_dir()
  there = metrics.read(directories[0] / 'metrics.jsonl')
  assert there[-1].round == num_rounds
  here = tmp_path / 'simulated'
  config = resolved(settings)
  found = problem.build(config)
  method = build.build_method(config, build.no_loss)
  population = build.build_population(config, method, found.task.num_examples)
  workdir = Workdir(here)
  workdir.path.mkdir()
  with session.open_session(config, workdir, method, found) as live:
    live.evaluate(found.task.name, 0.0)
    for done in live.rounds(population):
      if done.round % config.eval_every == 0:
        live.evaluate(found.task.name, 0.0)
      if done.round == num_rounds:
        break
    assert live.log.digest_at(num_rounds) == chain
  facts = lambda rows: [
    (r.round, r.metric, r.value, r.digest, r.bytes_up, r.bytes_down)
    for r in rows
  ]
  assert facts(metrics.read(workdir.metrics)) == facts(there)


_MISTAKES = """
import sys
from absl.testing import flagsaver
from experiments import setting_flags, train
from experiments.config import UsageError
setting_flags.parse(sys.argv)
for flags in (
  {'mesh_clients': 3}, {'mesh_clients': 0}, {'mesh_model': 4},
  {'process_id': 1}, {'multihost': True, 'process_id': 1},
  {'multihost': True, 'process_id': 2, 'num_processes': 2,
   'coordinator_address': '127.0.0.1:1'},
):
  with flagsaver.flagsaver(**flags):
    try:
      print(train.devices())
    except UsageError as error:
      print(error)
"""


def test_meshes_and_hosts_that_do_not_fit_are_named(cache):
  with started([['-c', _MISTAKES]], cache) as processes:
    ((out, err, code),) = ends_of(processes)
  assert code == 0, err
  for line, message in zip(
    out.splitlines(),
    (
      'num_client_devices=3 with num_model_devices=1 needs 3 devices',
      'num_client_devices must be >= 1, got 0',
      'num_model_devices=4 does not divide the 2 devices',
      '--process_id is for --multihost',
      '--multihost: coordinator_address, num_processes, process_id go together:'
      ' coordinator_address, num_processes is missing',
      '--multihost: process_id must be in [0, 2), got 2',
    ),
    strict=True,
  ):
    assert message in line
