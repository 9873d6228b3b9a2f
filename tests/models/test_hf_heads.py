"""Which head a checkpoint gets, what of it is new, and how it is exported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl.models import hf, layers
from tests.models import hf_tools as tools
from tests.models.hf_tools import FIXTURES, changed, checkpoint

KEY = jax.random.key(3)
OUT = ('head/out/bias', 'head/out/kernel')
BOTH = ('head/dense/bias', 'head/dense/kernel', *OUT)


def classify(source, **more):
  return hf.load(source, **{'head': 'classify', 'key': KEY, **more})


@pytest.mark.parametrize(
  ('name', 'head'),
  [
    ('gpt2', 'lm'), ('gpt2_classify', 'classify'), ('bert', 'none'),
    ('bert_mlm', 'mlm'), ('camembert', 'classify'), ('gemma3', 'lm'),
  ],
)  # fmt: skip
def test_the_architecture_says_which(name, head):
  assert checkpoint(name).config.head == head


@pytest.mark.parametrize(
  ('name', 'fresh', 'pool', 'dense'),
  [
    ('bert', OUT, 'first', True),  # it has a pooler
    ('bert_mlm', BOTH, 'first', True),
    ('roberta_mlm', BOTH, 'first', True),
    ('llama_31', OUT[1:], 'last', False),
    ('opt', OUT[1:], 'last', False),
  ],
)
def test_a_new_classifier(name, fresh, pool, dense):
  found = classify(FIXTURES / name, num_labels=5)
  assert found.fresh == fresh
  c = found.config
  assert (c.head, c.num_labels, c.pool) == ('classify', 5, pool)
  assert (c.head_dense, c.head_bias) == (dense, dense)
  head = found.params['head']
  assert head['out']['kernel'].shape == (16, 5)
  assert 0.01 < head['out']['kernel'].std() < 0.03
  if dense:
    assert not head['out']['bias'].any()
  again, other = (
    classify(FIXTURES / name, num_labels=5, key=jax.random.key(i))
    for i in (3, 4)
  )
  same = lambda x: np.array_equal(
    x.params['head']['out']['kernel'], head['out']['kernel']
  )
  assert same(again)
  assert not same(other)


def test_the_bits_of_a_new_head_are_fixed():
  """Every party that starts from the same key has the same model."""
  found = classify(FIXTURES / 'bert_mlm', num_labels=2)
  kernel = found.params['head']['out']['kernel'][:2]
  want = [[0.00449314993, 0.00374484621], [0.00473260041, 0.00967595261]]
  np.testing.assert_array_equal(kernel, np.array(want, np.float32))


def test_the_pooler_is_the_dense_layer():
  found = classify(FIXTURES / 'bert', num_labels=2)
  data = tools.reference('bert')
  assert tools.logits(found, data).shape == (3, 2)
  from safetensors.numpy import load_file

  stored = load_file(FIXTURES / 'bert' / 'model.safetensors')
  np.testing.assert_array_equal(
    found.params['head']['dense']['kernel'], stored['pooler.dense.weight'].T
  )


@pytest.mark.parametrize('name', ['bert_classify', 'gpt2_classify'])
def test_the_checkpoints_classifier_is_used_if_it_fits(name):
  for wish in ({}, {'num_labels': 3}):
    same = hf.load(FIXTURES / name, head='classify', **wish)
    assert same.fresh == ()
    np.testing.assert_array_equal(
      same.params['head']['out']['kernel'],
      checkpoint(name).params['head']['out']['kernel'],
    )
  other = classify(FIXTURES / name, num_labels=4)
  assert other.fresh == (OUT if name == 'bert_classify' else OUT[1:])
  pooled = classify(FIXTURES / name, num_labels=3, pool='mean')
  assert 'head/out/kernel' in pooled.fresh


def test_roberta_gets_both_layers_for_other_classes():
  assert classify(FIXTURES / 'roberta_classify', num_labels=9).fresh == BOTH


@pytest.mark.parametrize('name', ['bert_classify', 'llama_dynamic', 'gpt2'])
def test_no_head(name):
  found = hf.load(FIXTURES / name, head='none')
  assert not {'head', 'lm_head'} & set(found.params)
  assert tools.logits(found, tools.reference(name)).shape == (3, 10, 16)


def test_a_language_model_from_a_base_model(tmp_path):
  """Tied embeddings are all that it takes; names go without prefix."""
  strip = lambda found: {
    x.removeprefix('transformer.'): y for x, y in found.items()
  }
  source = changed(
    'gpt2', tmp_path / 'a', tensors=strip, architectures=['GPT2Model']
  )
  assert hf.load(source).config.head == 'none'
  found = hf.load(source, head='lm')
  assert found.config == checkpoint('gpt2').config
  np.testing.assert_array_equal(
    found.params['embed']['embedding'],
    checkpoint('gpt2').params['embed']['embedding'],
  )


@pytest.mark.parametrize(
  ('name', 'wish', 'text'),
  [
    ('bert', {'head': 'mlm'}, 'cls.predictions.bias'),
    ('roberta_classify', {'head': 'mlm'}, 'lm_head.bias'),
    ('bert', {'head': 'lm'}, 'ask for mlm'),
    ('gpt2', {'head': 'mlm'}, 'ask for lm'),
    ('bert', {'head': 'classify'}, 'num_labels must be given'),
    ('bert', {'head': 'classify', 'num_labels': 2}, 'needs a key'),
    ('bert', {'head': 'classify', 'num_labels': 0}, 'num_labels is 0'),
    ('bert', {'head': 'span'}, "head is 'span', expected one of lm, mlm"),
    ('bert', {'head': 'classify', 'pool': 'max'}, "pool is 'max'"),
    ('gpt2', {'num_labels': 2}, 'num_labels is for the head classify'),
    ('gpt2', {'pool': 'mean'}, 'pool is for the head classify'),
    ('gpt2', {'dtype': 'float16'}, "dtype is 'float16', expected one of"),
    ('llama_dynamic', {'head': 'lm'}, 'lm_head.weight'),  # not tied
  ],
)
def test_wishes_that_can_not_be_met(name, wish, text):
  with pytest.raises(ValueError, match=text):
    hf.load(FIXTURES / name, **wish)


def sentence_directory(target, **modes):
  changed('bert', target)
  (target / '1_Pooling').mkdir()
  text = json.dumps({'word_embedding_dimension': 16, **modes})
  (target / '1_Pooling' / 'config.json').write_text(text)
  return target


def test_sentence_transformers_pool_as_they_say(tmp_path):
  mean = sentence_directory(
    tmp_path / 'a',
    pooling_mode_mean_tokens=True,
    pooling_mode_cls_token=False,
  )
  found = classify(mean, num_labels=2)
  assert (found.config.pool, found.config.head_dense) == ('mean', False)
  assert found.fresh == OUT
  assert hf.load(mean).config.head == 'none'
  assert classify(mean, num_labels=2, pool='first').config.head_dense
  first = sentence_directory(tmp_path / 'b', pooling_mode_cls_token=True)
  found = classify(first, num_labels=2)
  assert (found.config.pool, found.config.head_dense) == ('first', False)
  odd = sentence_directory(tmp_path / 'c', pooling_mode_max_tokens=True)
  with pytest.raises(ValueError, match='pooling_mode_max_tokens'):
    classify(odd, num_labels=2)
  assert classify(odd, num_labels=2, pool='mean').config.pool == 'mean'


@pytest.mark.parametrize(
  ('name', 'pool'), [('bert', 'mean'), ('roberta_mlm', 'mean'), ('opt', 'mean')]
)
def test_a_mean_pool_classifier_there_and_back(name, pool, tmp_path):
  found = classify(FIXTURES / name, num_labels=3, pool=pool)
  hf.save(tmp_path, found.config, found.params, source=FIXTURES / name)
  fields = json.loads((tmp_path / 'config.json').read_text())
  assert fields['architectures'][0].endswith('Model')  # not one of a classifier
  again = hf.load(tmp_path)
  assert (again.config, again.fresh) == (found.config, ())
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
  other = classify(tmp_path, num_labels=3, pool='last')
  assert other.fresh


def test_a_trained_classifier_there_and_back(tmp_path):
  found = classify(FIXTURES / 'opt_350m_classify', num_labels=5)
  hf.save(
    tmp_path, found.config, found.params, source=FIXTURES / 'opt_350m_classify'
  )
  fields = json.loads((tmp_path / 'config.json').read_text())
  assert fields['architectures'] == ['OPTForSequenceClassification']
  assert len(fields['id2label']) == len(fields['label2id']) == 5
  again = hf.load(tmp_path)
  assert (again.config, again.fresh) == (found.config, ())
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_the_mean_of_many_positions_in_bfloat16():
  """301 is none of its numbers: 452 / 300 would be 1.508."""
  states = jnp.full((1, 310, 3), 1.5, jnp.bfloat16)
  mask = np.arange(310)[None] < 301
  mean = layers.pool('mean', states, mask)
  assert mean.dtype == jnp.bfloat16
  np.testing.assert_array_equal(mean, np.full((1, 3), 1.5))
