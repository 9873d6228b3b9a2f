"""Bad directories are refused, and the text says what is wrong where."""

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfl.models import hf, hf_config
from tests.models import hf_tools as tools
from tests.models.hf_tools import FIXTURES, changed, checkpoint


def fields_of(name):
  return json.loads((FIXTURES / name / 'config.json').read_text())


@pytest.mark.parametrize(
  ('name', 'fields', 'text'),
  [
    ('gpt2', {'model_type': 'mamba'}, "'mamba', expected one of gpt2, opt, ll"),
    ('gpt2', {'model_type': None}, 'model_type is None'),
    ('gpt2', {'n_embd': '16'}, "n_embd is '16', expected int"),
    ('gpt2', {'n_layer': 0}, 'n_layer is 0, expected a positive integer'),
    ('gpt2', {'n_layer': True}, 'n_layer is True'),
    ('gpt2', {'n_head': 3}, 'the width 16 is not a multiple of the 3 heads'),
    ('gpt2', {'layer_norm_epsilon': float('nan')}, 'layer_norm_epsilon is nan'),
    ('gpt2', {'activation_function': 'mish'}, "activation_function is 'mish'"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'inverse_layer_idx'),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention is True'),
    ('gpt2', {'quantization_config': {'bits': 4}}, 'field quantization_config'),
    ('gpt2', {'is_encoder_decoder': True}, 'is_encoder_decoder is True'),
    ('opt', {'layer_norm_elementwise_affine': False}, 'elementwise_affine'),
    ('opt', {'do_layer_norm_before': 1}, 'do_layer_norm_before is 1, expected'),
    ('llama_31', {'num_key_value_heads': 3}, 'multiple of num_kv_heads 3'),
    ('llama_31', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
    ('llama_31', {'rope_interleaved': True}, 'the field rope_interleaved'),
    ('llama_31', {'num_local_experts': 8}, 'the field num_local_experts'),
    ('llama_31', {'head_dim': 5}, 'even head_dim'),
    ('llama_31', {'rope_theta': 'big'}, "rope_theta is 'big'"),
    ('llama_31', {'rope_parameters': {'rope_theta': 1.0}}, 'both given'),
    ('mistral', {'layer_types': ['full_attention'] * 3}, 'field layer_types'),
    ('mistral', {'sliding_window': -1}, 'sliding_window is -1'),
    ('qwen2', {'layer_types': ['chunked_attention'] * 3}, 'chunked_attention'),
    ('qwen2', {'layer_types': ['full_attention']}, '1 entries for 3 layers'),
    ('qwen2', {'use_sliding_window': False,
               'layer_types': ['sliding_attention'] * 3}, 'window is false'),
    ('qwen2', {'dual_chunk_attention_config': {'a': 1}}, 'dual_chunk'),
    ('gemma', {'use_bidirectional_attention': True}, 'use_bidirectional'),
    ('gemma', {'hidden_activation': 'silu'}, "hidden_activation is 'silu'"),
    ('gemma3', {'attn_logit_softcapping': 5.0}, 'attn_logit_softcapping'),
    ('gemma3', {'query_pre_attn_scalar': 0}, 'query_pre_attn_scalar is 0'),
    ('gemma3', {'rope_parameters': {'global': {}}}, 'must have the keys f'),
    ('bert', {'is_decoder': True}, 'is_decoder is True'),
    ('bert', {'position_embedding_type': 'relative_key'}, 'relative_key'),
    ('bert', {'pruned_heads': {'0': [1]}}, 'pruned_heads'),
    ('roberta_mlm', {'pad_token_id': 30}, 'max_position_embeddings is 20'),
    ('roberta_mlm', {'hidden_act': 'relu'}, 'hidden_act is relu'),
    ('bert_mlm', {'tie_word_embeddings': False}, 'tie_word_embeddings false'),
    ('bert', {'architectures': ['BertForTokenClassification']}, 'of BertFor'),
    ('bert', {'architectures': []}, 'architectures is missing; ask for a head'),
    ('bert', {'architectures': {'a': 1}}, "architectures has {'a': 1}"),
    ('bert_classify', {'jaxfl_pool': 'max'}, "jaxfl_pool is 'max'"),
    ('bert_classify', {'id2label': 'abc'}, "id2label is 'abc'"),
  ],
)  # fmt: skip
def test_fields_that_are_refused(name, fields, text, tmp_path):
  source = changed(name, tmp_path / 'a', **fields)
  with pytest.raises(ValueError, match='config.json') as e:
    hf.load(source)
  assert text in str(e.value)


@pytest.mark.parametrize(
  ('rope', 'text'),
  [
    ({'rope_type': 'longrope', 'factor': 2.0}, "rope_type is 'longrope'"),
    ({'rope_type': 'mrope', 'mrope_section': [1]}, "rope_type is 'mrope'"),
    ({'rope_type': 'linear'}, 'factor is missing'),
    ({'rope_type': 'linear', 'factor': 0.0}, 'factor is 0.0, expected > 0'),
    ({'rope_type': 'default', 'factor': 2.0}, 'the field factor'),
    ({'rope_type': 'linear', 'type': 'yarn', 'factor': 2.0}, "type is 'yarn'"),
    ({'rope_theta': 3.0}, 'rope_theta is 3.0, and 500.0 outside'),
    (
      {'rope_type': 'dynamic', 'factor': 2.0,
       'original_max_position_embeddings': 4},
      'the field original_max_position_embeddings',
    ),
    (
      {'rope_type': 'llama3', 'factor': 2.0, 'high_freq_factor': 1.0,
       'low_freq_factor': 1.0},
      'high_freq_factor 1.0 is not above 1.0',
    ),
    (
      {'rope_type': 'yarn', 'factor': 2.0, 'beta_fast': 1.0},
      'beta_fast 1.0 is not above beta_slow 1.0',
    ),
    ({'rope_type': 'linear', 'factor': 2.0, 'partial_rotary_factor': 0.5},
     'partial_rotary_factor'),
  ],
)  # fmt: skip
def test_rotary_positions_that_are_refused(rope, text):
  old = fields_of('llama_31')
  assert old['rope_theta'] == 500.0
  with pytest.raises(ValueError, match='rotary positions') as e:
    hf_config.read(old | {'rope_scaling': rope})
  assert text in str(e.value)


def test_both_spellings_mean_the_same():
  old = fields_of('llama_31')
  scaling = old.pop('rope_scaling')
  new = {x: y for x, y in old.items() if x not in ('rope_theta', 'torch_dtype')}
  new['rope_parameters'] = {
    'rope_theta': old['rope_theta'],
    'rope_type': scaling['type'],
    **{x: y for x, y in scaling.items() if x != 'type'},
  }
  old['rope_scaling'] = scaling
  assert hf_config.read(new) == hf_config.read(old)
  assert hf_config.read(old).rope.original_max_positions == 24


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    # as in checkpoints on the hub: bookkeeping, and features that are off
    ('bert', {'directionality': 'bidi', 'pooler_type': 'first_token_transform',
              'pooler_fc_size': 768, 'gradient_checkpointing': False}),
    ('xlm_roberta', {'language': 'english', 'name': 'X', 'output_past': True}),
    ('opt', {'prefix': '</s>', 'activation_dropout': 0.0}),
    ('gpt2', {'n_ctx': 32, 'task_specific_params': {'a': {'max_length': 5}}}),
    ('llama_31', {'is_llama_config': True, 'rope_interleaved': False,
                  'transformers.js_config': {'dtype': 'q4'}}),
    ('qwen2', {'use_mrope': False}),
    ('gemma2', {'cache_implementation': 'hybrid', 'sliding_window_size': 4,
                'hidden_act': 'gelu_pytorch_tanh'}),
  ],
)  # fmt: skip
def test_fields_that_do_not_matter(name, fields):
  old = fields_of(name)
  assert hf_config.read(old | fields) == hf_config.read(old)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_field_is_never_an_accident(data):
  """Any value of any field is read or refused with a ValueError."""
  name = data.draw(st.sampled_from(tools.NAMES))
  fields = fields_of(name)
  field = data.draw(st.sampled_from(sorted(fields)))
  fields[field] = data.draw(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats()
    | st.text(max_size=3) | st.just([]) | st.just(['a']) | st.just({})
    | st.just({'rope_type': 'linear'})
  )  # fmt: skip
  with contextlib.suppress(ValueError):
    hf_config.read(fields)


def test_sizes_are_never_ignored():
  """A field that config.json can't do without is an error where missing."""
  for name in tools.NAMES:
    fields = fields_of(name)
    for field in fields:
      rest = {x: y for x, y in fields.items() if x != field}
      if field in ('vocab_size', 'hidden_size', 'n_embd', 'num_hidden_layers'):
        with pytest.raises(ValueError, match=f'{field} is missing'):
          hf_config.read(rest)


def add(**more):
  return lambda found: found | more


def without(name):
  return lambda found: {x: y for x, y in found.items() if x != name}


NORM = np.zeros(16, np.float32)


@pytest.mark.parametrize(
  ('name', 'tensors', 'text'),
  [
    ('gpt2', without('transformer.h.1.ln_1.bias'),
     'lacks 1 tensors: transformer.h.1.ln_1.bias'),
    ('gpt2', add(**{'transformer.h.3.ln_1.bias': NORM}),
     'has 1 tensors that a lm model of this family does not have: h.3.ln_1'),
    ('gpt2', add(**{'transformer.ln_f.bias': NORM[:3]}),
     "'transformer.ln_f.bias' has the shape [3], config.json says [16]"),
    ('gpt2', add(**{'transformer.ln_f.bias': NORM.astype(np.int32)}),
     "'transformer.ln_f.bias' has the dtype I32, expected one of F32, BF16"),
    ('gpt2', add(**{'ln_f.bias': NORM}), 'twice'),
    ('gpt2', add(**{'lm_head.weight': np.ones((40, 16), np.float32)}),
     "tie_word_embeddings is true, but 'lm_head.weight' is not equal to"),
    ('llama_dynamic', without('score.weight'), 'lacks 1 tensors: score.weight'),
    ('bert_classify', add(**{'qa_outputs.bias': NORM}), 'qa_outputs.bias'),
    ('llama_31', add(**{'model.layers.0.self_attn.q_proj.bias': NORM}),
     'layers.0.self_attn.q_proj.bias'),
    ('llama_31', add(**{'model.layers.0.mlp.up_proj.weight':
                        np.zeros((16, 24), np.float32)}),
     'the shape [16, 24], config.json says [24, 16]'),
  ],
)  # fmt: skip
def test_tensors_that_do_not_fit(name, tensors, text, tmp_path):
  source = changed(name, tmp_path / 'a', tensors=tensors)
  with pytest.raises(ValueError, match='a') as e:
    hf.load(source)
  assert text in str(e.value)
  assert str(source) in str(e.value)


def test_known_leftovers_are_dropped(tmp_path):
  wte = checkpoint('gpt2').params['embed']['embedding']
  more = {
    'transformer.h.0.attn.bias': np.ones((1, 1, 32, 32), np.uint8),
    'transformer.h.0.attn.masked_bias': NORM[:1],
    'lm_head.weight': wte,  # equal to what it is tied to
  }
  hf.load(changed('gpt2', tmp_path / 'a', tensors=add(**more)))
  rename = lambda found: {
    'lm_head.weight' if x == 'transformer.wte.weight' else x: y
    for x, y in found.items()
  }
  found = hf.load(changed('gpt2', tmp_path / 'b', tensors=rename))
  np.testing.assert_array_equal(found.params['embed']['embedding'], wte)
  more = {
    'bert.embeddings.position_ids': np.arange(20)[None],
    'cls.seq_relationship.weight': np.zeros((2, 16), np.float32),
    'bert.pooler.dense.bias': NORM,
    'cls.predictions.decoder.bias': np.asarray(
      checkpoint('bert_mlm').params['lm_head']['bias']
    ),
  }
  hf.load(changed('bert_mlm', tmp_path / 'c', tensors=add(**more)))


def test_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'there is no directory \./x'):
    hf.load('./x')
  with pytest.raises(FileNotFoundError, match='there is no directory'):
    hf.load('a/b/c')
  with pytest.raises(FileNotFoundError, match='there is no .*config.json'):
    hf.load(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='config.json is not valid JSON'):
    hf.load(tmp_path)
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(ValueError, match='config.json is not a JSON object'):
    hf.load(tmp_path)


def test_files_that_could_run_code_are_refused(tmp_path):
  source = changed('gpt2', tmp_path / 'a')
  (source / 'model.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='no model.safetensors in'):
    hf.load(source)
  (source / 'pytorch_model.bin').write_bytes(b'\x80\x04.')
  with pytest.raises(FileNotFoundError, match='save_pretrained') as e:
    hf.load(source)
  assert 'pytorch_model.bin is not read' in str(e.value)


def test_damaged_files(tmp_path):
  source = changed('gpt2', tmp_path / 'a')
  file = source / 'model.safetensors'
  whole = file.read_bytes()
  (size,) = struct.unpack('<Q', whole[:8])
  for damaged in (
    whole[:-1],
    whole[: size // 2],
    b'',
    b'\xff' * 8 + whole[8:],
    whole[:8] + b'#' + whole[9:],
    whole.replace(b'"F32"', b'"F99"', 1),
    whole + b'more',
  ):
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match='is damaged or no safetensors'):
      hf.load(source)


def test_an_index_that_does_not_fit(tmp_path):
  source = changed('llama_linear', tmp_path / 'a')
  index = source / 'model.safetensors.index.json'
  whole = json.loads(index.read_text())
  weights = whole['weight_map']
  first, *_, last = weights

  def refused(weight_map, text, error=ValueError):
    index.write_text(json.dumps(whole | {'weight_map': weight_map}))
    with pytest.raises(error, match=text):
      hf.load(source)

  refused(None, 'weight_map is missing')
  refused(weights | {'more': weights[first]}, "see 'more'")
  refused(weights | {first: weights[last]}, 'does not fit')
  outside = dict.fromkeys(weights, '../model.safetensors')
  refused(outside, 'is not the name of a shard')
  refused(dict.fromkeys(weights, 'pytorch_model.bin'), 'not the name of a sha')
  (source / weights[last]).unlink()
  refused(weights, f'{weights[last]}, which is missing', FileNotFoundError)


def test_the_hub_is_asked_for_other_names(tmp_path, monkeypatch):
  import huggingface_hub

  asked = []

  def fetch(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(FIXTURES / 'gpt2')

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
  found = hf.load('some/model')
  assert found.config == checkpoint('gpt2').config
  ((name, patterns),) = asked
  assert name == 'some/model'
  assert not any('bin' in x and 'bpe' not in x for x in patterns)
  changed('opt', tmp_path / 'some' / 'model')
  assert hf.load('some/model').config == checkpoint('opt').config
  assert len(asked) == 1  # a directory comes first


def test_without_a_network_the_text_says_what_to_do(monkeypatch):
  import huggingface_hub

  def fail(name, allow_patterns):
    del name, allow_patterns
    raise huggingface_hub.errors.LocalEntryNotFoundError('no network')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
  with pytest.raises(FileNotFoundError, match='hf download some/model') as e:
    hf.load('some/model')
  assert 'no network' in str(e.value)


def test_exports_that_are_refused(tmp_path):
  found = checkpoint('llama_31')
  source = FIXTURES / 'llama_31'
  target = tmp_path / 'a'

  def refused(text, config=found.config, params=found.params, where=source):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
      hf.save(target, config, params, source=where)
    assert not (target / 'model.safetensors').exists()

  more = dict(found.params, new={'x': NORM})
  refused("'new/x' is not of this config", params=more)
  less = {x: y for x, y in found.params.items() if x != 'final_norm'}
  refused("'final_norm/scale' is missing", params=less)
  odd = dict(found.params, final_norm={'scale': NORM[:3]})
  refused(r"'final_norm/scale' has the shape \(3,\)", params=odd)
  half = dict(found.params, final_norm={'scale': NORM.astype(np.float16)})
  refused('all float32 or all bfloat16', params=half)
  refused('config.num_kv_heads is 2', where=FIXTURES / 'gpt2')
  refused('there is no', where=tmp_path)
  narrow = checkpoint('opt_350m_classify')
  none = hf.load(FIXTURES / 'opt_350m_classify', head='none')
  refused('only be saved with a head', none.config, none.params,
          FIXTURES / 'opt_350m_classify')  # fmt: skip
  bias = type(narrow.config)(**vars(narrow.config) | {'output_bias': True})
  refused('output_bias is True', bias, narrow.params)
  target.mkdir(exist_ok=True)
  (target / 'model-00001-of-00002.safetensors').write_bytes(b'')
  refused('would be in the way')
