"""Pretraining from end to end, and a run that starts from its result."""

import gzip
import hashlib
import json

import numpy as np
import pytest

from jaxfl.models import native
from tests.test_experiments import SMALL, environment, launch  # noqa: F401


@pytest.mark.slow
def test_pretrained_models_can_be_fine_tuned(environment, tmp_path):  # noqa: F811
  books = tmp_path / 'data' / 'standard_ebooks'
  books.mkdir(parents=True)
  text = ' '.join(f'the {i}th word of a book' for i in range(2000)).encode()
  (books / 'book.txt.gz').write_bytes(gzip.compress(text))
  out = tmp_path / 'model'
  done = launch(
    'pretrain', f'--data_dir={tmp_path / "data"}', f'--out_dir={out}',
    '--steps=3', '--num_layers=1', '--model_dim=8', '--length=16',
    environment=environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  config, params = native.load(out)
  assert (config.num_layers, config.model_dim, config.mlp_dim) == (1, 8, 32)
  assert all(np.isfinite(x).all() for x in params['lm_head'].values())
  card = (out / 'MODEL_CARD.md').read_text()
  weights = (out / 'model.safetensors').read_bytes()
  assert hashlib.sha256(weights).hexdigest() in card
  done = launch(
    'train', f'--workdir={tmp_path / "run"}', f'--model={out}', *SMALL,
    '--num_rounds=2', environment=environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['rounds'] == 2


def test_a_folder_without_books_is_refused(environment, tmp_path):  # noqa: F811
  done = launch('pretrain', f'--data_dir={tmp_path}', environment=environment)
  assert done.returncode != 0
  assert '--data_dir: no *.txt.gz in' in done.stderr
