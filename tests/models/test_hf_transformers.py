"""What we save is what transformers loads; needs the extra `hf`."""

import json

import jax
import numpy as np
import pytest

from jaxfl.models import hf
from tests.models.hf_tools import (
  FIXTURES,
  NAMES,
  at_real,
  checkpoint,
  logits,
  random_params,
  reference,
)

POOLER = ['pooler.dense.bias', 'pooler.dense.weight']
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('default'),  # of the other library
]


def theirs(directory, data, **expected):
  """What transformers computes, and nothing must be missing or left over."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  fields = json.loads((directory / 'config.json').read_text())
  cls = getattr(transformers, fields['architectures'][0])
  model, info = cls.from_pretrained(
    directory, output_loading_info=True, attn_implementation='eager'
  )
  if cls is transformers.BertModel:
    expected = {'missing_keys': POOLER, **expected}  # we do not use it
  for name in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
    assert sorted(info[name]) == expected.get(name, [])
  types = {'token_type_ids': data['types']} if 'types' in data else {}
  given = {'input_ids': data['tokens'], 'attention_mask': data['mask']} | types
  with torch.no_grad():
    out = model(**{name: torch.tensor(x) for name, x in given.items()})
  found = out.logits if 'logits' in out else out.last_hidden_state
  return found.numpy()


@pytest.mark.parametrize('name', NAMES)
def test_transformers_loads_an_export(name, tmp_path):
  found, data = checkpoint(name), reference(name)
  params = jax.tree.map(lambda x: x * np.float32(1.01), found.params)
  new = found._replace(params=params)
  hf.save(tmp_path, new.config, params, source=FIXTURES / name)
  got = at_real(logits(new, data), data)
  want = at_real(theirs(tmp_path, data), data)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
  assert np.abs(at_real(data['logits'], data) - want).max() > 1e-4


@pytest.mark.parametrize(
  'name', ['bert', 'roberta_mlm', 'opt', 'llama_31', 'gemma3', 'xlm_roberta']
)
def test_a_new_classifier(name, tmp_path):
  data = reference(name)
  found = hf.load(
    FIXTURES / name, head='classify', num_labels=4, key=jax.random.key(0)
  )
  params = dict(found.params)
  params['head'] = random_params(found.config)['head']
  found = found._replace(params=params)
  hf.save(tmp_path, found.config, params, source=FIXTURES / name)
  want = theirs(tmp_path, data)
  scale = np.abs(want).max()
  assert want.shape == (3, 4)
  np.testing.assert_allclose(
    logits(found, data) / scale, want / scale, rtol=0, atol=2e-6
  )


@pytest.mark.parametrize('name', ['bert_classify', 'roberta_mlm', 'llama_31'])
def test_a_mean_pool_classifier_loads_as_its_encoder(name, tmp_path):
  data = reference(name)
  found = hf.load(
    FIXTURES / name,
    head='classify',
    num_labels=4,
    pool='mean',
    key=jax.random.key(0),
  )
  hf.save(tmp_path, found.config, found.params, source=FIXTURES / name)
  head = {
    'bert_classify': ['classifier.bias', 'classifier.weight'],
    'roberta_mlm': ['classifier.out_proj.bias', 'classifier.out_proj.weight'],
    'llama_31': ['score.weight'],
  }
  want = theirs(
    tmp_path,
    data,
    unexpected_keys=head[name],
    missing_keys=[] if name == 'llama_31' else POOLER,
  )
  bare = hf.load(tmp_path, head='none')
  np.testing.assert_allclose(
    at_real(logits(bare, data), data), at_real(want, data), rtol=0, atol=4e-6
  )


@pytest.mark.parametrize('name', NAMES)
def test_an_export_without_source(name, tmp_path):
  found, data = checkpoint(name), reference(name)
  hf.save(tmp_path, found.config, found.params)
  if found.config.head == 'classify':  # transformers finds the last by this
    path = tmp_path / 'config.json'
    fields = json.loads(path.read_text()) | {'pad_token_id': 1}
    path.write_text(json.dumps(fields))
  want = at_real(theirs(tmp_path, data), data)
  np.testing.assert_allclose(
    at_real(data['logits'], data), want, rtol=0, atol=2e-6
  )


def test_bfloat16_is_loaded_as_such(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  half = hf.load(FIXTURES / 'llama_31', dtype='bfloat16')
  hf.save(tmp_path, half.config, half.params, source=FIXTURES / 'llama_31')
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  assert model.dtype == torch.bfloat16
  weight = model.model.norm.weight.float().detach().numpy()
  scale = half.params['final_norm']['scale']
  np.testing.assert_array_equal(weight, scale.astype(np.float32))
