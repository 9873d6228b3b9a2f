"""Studies and cached features, as a user runs them."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxfl.data import tokenizer
from jaxfl.models import hf, transformer
from tests.test_problem import bert as bert
from tests.test_problem import labelled as labelled

pytestmark = pytest.mark.fast_compile

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import sys
from absl import app
from experiments import studies
tiny = {'dataset': sys.argv.pop(), 'num_clients': 2, 'num_rounds': 4,
        'num_perturbations': 1, 'batch_size': 4, 'eval_every': 2,
        'learning_rate': 0.3}
studies.STUDIES['tiny'] = studies.Study(
  'A tiny study', {'floats': tiny | {'codec': 'float32'}},
  ('accuracy', 'loss'), seeds=2, needs=())
from experiments import study
app.run(study.main)
"""


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 5)).astype(np.float32)
  y = (x[:, 0] > 0).astype(np.int32)
  path = tmp_path_factory.mktemp('features') / 'f.npz'
  np.savez(path, f_train=x[:40], y_train=y[:40], f_test=x[40:], y_test=y[40:])
  return path


def test_a_study_compares_settings_over_seeds(npz, tmp_path):
  command = [
    sys.executable, '-c', PROGRAM, '--study=tiny', '--jobs=1',
    f'--runs={tmp_path / "runs"}', f'--out={tmp_path / "out"}', str(npz),
  ]  # fmt: skip
  environment = os.environ | {'XLA_FLAGS': ''}
  run = lambda: subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True,
    timeout=300,
  )  # fmt: skip
  done = run()
  assert done.returncode == 0, done.stderr
  assert '2/2: floats, seed 1' in done.stdout
  result = json.loads((tmp_path / 'out' / 'tiny.json').read_text())
  entry = result['settings']['floats']
  assert [point['round'] for point in entry['runs'][0]['curve']] == [0, 2, 4]
  last = [run['curve'][-1]['accuracy'] for run in entry['runs']]
  assert entry['summary']['accuracy']['last']['values'] == last
  np.testing.assert_allclose(
    entry['summary']['accuracy']['last']['std'], np.std(last, ddof=1)
  )
  losses = [p['loss'] for p in entry['runs'][0]['curve']]
  assert entry['summary']['loss']['best']['values'][0] == min(losses)
  assert '--codec=float32' in entry['command']
  assert (tmp_path / 'out' / 'tiny.png').read_bytes().startswith(b'\x89PNG')
  # finished runs are kept
  before = (tmp_path / 'runs/tiny/floats-0/summary.json').stat().st_mtime_ns
  assert run().returncode == 0
  after = (tmp_path / 'runs/tiny/floats-0/summary.json').stat().st_mtime_ns
  assert before == after


def test_features_are_those_of_the_model(labelled, bert, tmp_path):
  out = tmp_path / 'features.npz'
  done = subprocess.run(
    [
      sys.executable, '-m', 'experiments.features', f'--model={bert}',
      f'--dataset={labelled}', f'--out={out}', '--pool=mean',
      '--sequence_length=16', '--eval_batch_size=4',
    ],
    cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, capture_output=True,
    text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  with np.load(out) as found:
    assert found['f_train'].shape == (18, 16)
    assert list(found['y_test']) == [0, 1, 0, 1, 0]
    made = found['f_test'][3]
  model = hf.load(bert, head='none')
  words = tokenizer.load(bert)
  (ids,) = words.encode(['a bad film'])
  states = transformer.hidden(
    model.config, model.params, np.array([words.wrap(ids)])
  )
  np.testing.assert_allclose(made, states[0].mean(0), atol=2e-6)
