"""A log as a table, as CSV and as JSON."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments import build, defaults, log_table, replayer, run_log
from experiments.config import UsageError, from_mapping
from experiments.workdir import Workdir
from jaxfl import checkpoint, digest, keys, metrics, wire
from jaxfl.log import Header, RoundLog
from tests.test_experiments import environment as environment
from tests.test_experiments import launch

pytestmark = pytest.mark.fast_compile

COHORTS = (([0, 2], [1, 3]), ([], []), ([1], [1]))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Three rounds of SPSA on six parameters, evaluated before and after."""
  workdir = Workdir(tmp_path_factory.mktemp('run'))
  settings = {'num_perturbations': 2, 'num_clients': 3, 'dataset': 'x.npz'}
  config = defaults.resolve(from_mapping(settings))
  method = build.build_method(config, build.no_loss)
  params = {'w': np.ones((2, 3), np.float32)}
  like = method.message(params)
  header = Header(
    base_digest=digest.digest(params),
    config=dataclasses.asdict(config) | dict.fromkeys(run_log.DIGESTS, ''),
    params=wire.describe(params),
    message=wire.describe(like),
  )
  checkpoint.save_base(workdir.base, params)
  with RoundLog.create(workdir.log, header) as log:
    for round, cohort in enumerate(COHORTS):
      codes = np.full((len(cohort[0]), *like.shape), 50 + round, like.dtype)
      log.append(round, *cohort, codes)
  for round in (0, 3):
    found, *_ = replayer.rebuild(workdir.path, round)
    row = metrics.Row(
      method='spsa', task='x', seed=0, round=round, metric='loss',
      value=1.5 - round / 10, bytes_up=10 * round, bytes_down=20 * round,
      forwards=0, backwards=0, wall_s=0.0, digest=digest.digest(found),
    )  # fmt: skip
    metrics.append(workdir.metrics, [row])
  return workdir


def test_rows(finished):
  found = log_table.read(str(finished.path))
  assert found[1:] == log_table.read(str(finished.log))[1:]
  frame = len(wire.to_bytes(np.zeros(2, np.uint8)))
  unknown = dict.fromkeys(
    ('total_bytes_up', 'total_bytes_down', 'metric', 'value')
  )
  assert found.rows == [
    {'round': 1, 'clients': [0, 2], 'weights': [1, 3], 'bytes_up': 2 * frame}
    | unknown,
    {'round': 2, 'clients': [], 'weights': [], 'bytes_up': 0} | unknown,
    {'round': 3, 'clients': [1], 'weights': [1], 'bytes_up': frame}
    | {'total_bytes_up': 30, 'total_bytes_down': 60}
    | {'metric': 'loss', 'value': 1.2},
  ]
  with RoundLog.open(finished.log) as log:
    assert found.digest == log.digest
    release = log_table._row(log.read(0), False, None)
  assert release['clients'] is release['bytes_up'] is None


def test_the_screen_has_the_first_and_the_last_rounds(finished):
  found = log_table.read(str(finished.path))
  cells = lambda show: [
    list(column.cells) for column in log_table.table(found, show).columns
  ]
  assert cells(0)[0] == cells(3)[0] == ['1', '2', '3']
  assert cells(0)[1] == ['0 2:3', 'nobody', '1']
  assert cells(2)[0] == ['1', '...', '3']
  assert cells(1)[0] == ['1', '...']
  assert cells(0)[5] == ['', '', 'loss 1.2000']


def test_the_command(finished, environment, tmp_path):
  out = tmp_path / 'rounds.csv'
  done = launch(
    'log', str(finished.path), '--verify', f'--out={out}',
    environment=environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'equal to that of the live run' in done.stdout
  assert 'checksums and chain are right' in done.stdout
  with out.open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['clients'] for row in rows] == ['0 2', '', '1']
  assert [row['value'] for row in rows] == ['', '', '1.2']


def test_json(finished, tmp_path):
  found = log_table.read(str(finished.path))
  log_table.write(found, str(tmp_path / 'x.json'))
  whole = json.loads((tmp_path / 'x.json').read_text())
  assert whole['rounds'] == found.rows
  assert whole['digest'] == found.digest
  assert whole['header']['spec'] == keys.SPEC


def test_what_is_wrong_is_said(finished, environment, tmp_path):
  with pytest.raises(UsageError, match='no such log'):
    log_table.read(str(tmp_path))
  copy = Workdir(tmp_path / 'copy')
  shutil.copytree(finished.path, copy.path)
  text = copy.metrics.read_text()
  last = metrics.read(copy.metrics)[-1].digest
  copy.metrics.write_text(text.replace(last, 64 * '0'))
  found = log_table.read(str(copy.path))
  with pytest.raises(UsageError, match='but the live run recorded 0000'):
    log_table.verify(found)
  with pytest.raises(UsageError, match='not the log of a run directory'):
    log_table.verify(found._replace(path=copy.path / 'other.log'))
  shutil.rmtree(copy.base)
  with pytest.raises(UsageError, match='no usable base checkpoint'):
    log_table.verify(found)
  data = bytearray(copy.log.read_bytes())
  data[-40] ^= 1
  copy.log.write_bytes(data)
  done = launch('log', str(copy.path), environment=environment)
  assert done.returncode == 1
  assert f'error: {copy.log}: ' in done.stderr
  assert '(round 2, byte ' in done.stderr
  assert 'Traceback' not in done.stderr
