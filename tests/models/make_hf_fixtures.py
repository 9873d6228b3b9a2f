"""Makes tests/models/hf: tiny checkpoints with logits of transformers.

    pip install -e '.[hf]' && python -m tests.models.make_hf_fixtures

Weights, biases and norms are random; one row is padded at its end, one at its
start; thetas, head sizes and groups are not the defaults, so that nothing that
is read wrongly goes unseen. The norms are near 1 and the weights small enough
that float32 itself does not cost the tolerance of the tests.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

DIRECTORY = pathlib.Path(__file__).parent / 'hf'
SIZES = dict(
  vocab_size=40,
  hidden_size=16,
  num_hidden_layers=3,
  num_attention_heads=4,
  intermediate_size=24,
  max_position_embeddings=32,
  pad_token_id=1,
)
MODERN = SIZES | dict(num_key_value_heads=2)
TWELVE = dict(vocab_size=40, pad_token_id=1, n_positions=32, n_embd=16)
OPT = dict(
  vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
  ffn_dim=24, max_position_embeddings=32,
)  # fmt: skip
ENCODER = SIZES | dict(max_position_embeddings=20)


def rope(theta, **more):
  return {'rope_type': 'default', 'rope_theta': theta} | more


# name: (class, config, what to change in the directory)
CASES = {
  'gpt2': (
    hf.GPT2LMHeadModel,
    hf.GPT2Config(**TWELVE, n_layer=3, n_head=4, n_inner=20),
  ),
  'gpt2_classify': (
    hf.GPT2ForSequenceClassification,
    hf.GPT2Config(
      **TWELVE, n_layer=2, n_head=2, scale_attn_weights=False, num_labels=3,
      activation_function='relu', layer_norm_epsilon=1e-3,
    ),
  ),
  'opt': (hf.OPTForCausalLM, hf.OPTConfig(**OPT, activation_function='gelu')),
  'opt_350m_classify': (
    hf.OPTForSequenceClassification,
    hf.OPTConfig(
      **OPT, word_embed_proj_dim=8, do_layer_norm_before=False, num_labels=3
    ),
  ),
  'opt_no_bias': (
    hf.OPTForCausalLM,
    hf.OPTConfig(
      **OPT, word_embed_proj_dim=24, enable_bias=False,
      _remove_final_layer_norm=True,
    ),
  ),
  'llama_linear': (
    hf.LlamaForCausalLM,
    hf.LlamaConfig(
      **MODERN, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3,
      rope_parameters=rope(5e3, rope_type='linear', factor=2.5),
    ),
    ('old', 'shards'),
  ),
  'llama_yarn': (
    hf.LlamaForCausalLM,
    hf.LlamaConfig(
      **MODERN, head_dim=12, tie_word_embeddings=True,
      rope_parameters=rope(
        5e2, rope_type='yarn', factor=4.0, beta_fast=2.0,
        original_max_position_embeddings=8,
      ),
    ),
    ('old',),
  ),
  'llama_yarn_mscale': (
    hf.LlamaForCausalLM,
    hf.LlamaConfig(
      **MODERN, head_dim=12,
      rope_parameters=rope(
        20.0, rope_type='yarn', factor=2.0, beta_fast=1.5, beta_slow=0.25,
        truncate=False, mscale=0.7, mscale_all_dim=0.4,
        original_max_position_embeddings=16,
      ),
    ),
  ),
  'llama_31': (
    hf.LlamaForCausalLM,
    hf.LlamaConfig(
      **MODERN, head_dim=12, tie_word_embeddings=True,
      rope_parameters=rope(
        5e2, rope_type='llama3', factor=8.0, low_freq_factor=1.5,
        high_freq_factor=3.0, original_max_position_embeddings=24,
      ),
    ),
    ('old',),
  ),
  'llama_dynamic': (
    hf.LlamaForSequenceClassification,
    hf.LlamaConfig(
      **MODERN, num_labels=3,
      rope_parameters=rope(5e2, rope_type='dynamic', factor=2.0),
    ),
  ),
  'mistral': (
    hf.MistralForCausalLM,
    hf.MistralConfig(**MODERN, sliding_window=4, rope_parameters=rope(5e2)),
    ('old',),
  ),
  'qwen2': (
    hf.Qwen2ForCausalLM,
    hf.Qwen2Config(
      **MODERN, use_sliding_window=True, sliding_window=4, max_window_layers=1,
      rope_parameters=rope(5e2), tie_word_embeddings=False,
    ),
    ('layers',),
  ),
  'qwen3': (
    hf.Qwen3ForCausalLM,
    hf.Qwen3Config(
      **MODERN, head_dim=6, attention_bias=True, rope_parameters=rope(5e2),
      tie_word_embeddings=True,
    ),
    ('old',),
  ),
  'gemma': (
    hf.GemmaForCausalLM,
    hf.GemmaConfig(**MODERN, head_dim=6, rope_parameters=rope(5e2)),
    ('old', 'gelu'),
  ),
  'gemma2': (
    hf.Gemma2ForCausalLM,
    hf.Gemma2Config(
      **MODERN, head_dim=6, query_pre_attn_scalar=3, sliding_window=4,
      attn_logit_softcapping=0.7, final_logit_softcapping=1.5,
      rope_parameters=rope(5e2), attn_implementation='eager',
    ),
    ('old', 'layers'),
  ),
  'gemma3': (
    hf.Gemma3ForCausalLM,
    hf.Gemma3TextConfig(
      **MODERN, head_dim=6, query_pre_attn_scalar=3, sliding_window=4,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      rope_parameters={
        'full_attention': rope(5e3, rope_type='linear', factor=3.0),
        'sliding_attention': rope(5e2),
      },
    ),
  ),
  'gemma3_old': (
    hf.Gemma3ForCausalLM,
    hf.Gemma3TextConfig(
      **MODERN, head_dim=6, query_pre_attn_scalar=3, sliding_window=4,
      sliding_window_pattern=2,
      rope_parameters={
        'full_attention': rope(5e3, rope_type='linear', factor=3.0),
        'sliding_attention': rope(5e2),
      },
    ),
    ('old', 'layers', 'pattern'),
  ),
  'bert': (hf.BertModel, hf.BertConfig(**ENCODER, hidden_act='relu')),
  'bert_classify': (
    hf.BertForSequenceClassification,
    hf.BertConfig(**ENCODER, type_vocab_size=3, num_labels=3),
  ),
  'bert_mlm': (
    hf.BertForMaskedLM,
    hf.BertConfig(**ENCODER, hidden_act='gelu_new', layer_norm_eps=1e-5),
    ('gamma',),
  ),
  'roberta_classify': (
    hf.RobertaForSequenceClassification,
    hf.RobertaConfig(**ENCODER, type_vocab_size=1, num_labels=3),
  ),
  'roberta_mlm': (
    hf.RobertaForMaskedLM,
    hf.RobertaConfig(**ENCODER | dict(pad_token_id=3), type_vocab_size=1),
  ),
  'xlm_roberta': (
    hf.XLMRobertaForMaskedLM,
    hf.XLMRobertaConfig(**ENCODER, type_vocab_size=1),
  ),
  'camembert': (
    hf.CamembertForSequenceClassification,
    hf.CamembertConfig(**ENCODER, type_vocab_size=1, num_labels=2),
  ),
}  # fmt: skip


def randomise(model, seed):
  """Random parameters; gains near what they are for a fresh model."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if p.ndim == 1:
        p.add_(0.2 * noise - (p if name.endswith('bias') else 0))
      elif 'embed' in name or 'wte' in name or 'wpe' in name:
        p.copy_(0.08 * noise)
      elif any(x in name for x in ('lm_head.weight', 'score', 'classifier')):
        p.copy_(0.3 * noise / p.shape[1] ** 0.5)
      else:
        p.copy_(0.8 * noise / min(p.shape) ** 0.5)


def inputs(config, seed):
  rng = np.random.default_rng(seed)
  mask = np.ones((3, 10), np.int64)
  mask[1, 7:] = 0
  mask[2, :2] = 0
  tokens = rng.integers(4, config.vocab_size, mask.shape)
  data = {'tokens': np.where(mask > 0, tokens, config.pad_token_id)}
  data['mask'] = mask
  if config.model_type == 'bert':
    data['types'] = rng.integers(0, config.type_vocab_size, mask.shape)
  return data


def run(model, data):
  """Logits, or the hidden states of a model without head."""
  tensors = {name: torch.tensor(x) for name, x in data.items()}
  if 'types' in tensors:
    tensors['token_type_ids'] = tensors.pop('types')
  with torch.no_grad():
    out = model(
      input_ids=tensors.pop('tokens'),
      attention_mask=tensors.pop('mask'),
      **tensors,
    )
  found = out.logits if hasattr(out, 'logits') else out.last_hidden_state
  return found.numpy()


def edit(directory, changes):
  """Turns a directory into one of older software."""
  path = directory / 'config.json'
  fields = json.loads(path.read_text())
  if 'old' in changes:
    fields['torch_dtype'] = fields.pop('dtype')
    values = fields.pop('rope_parameters')
    local = values.pop('sliding_attention', None)
    values = values.pop('full_attention', values)
    if local:
      fields['rope_local_base_freq'] = local['rope_theta']
    fields['rope_theta'] = values.pop('rope_theta')
    default = values['rope_type'] == 'default'
    if not local:
      values['type'] = values.pop('rope_type')
    fields['rope_scaling'] = None if default else values
  if 'layers' in changes:
    fields.pop('layer_types')  # they follow from other fields
  if 'pattern' in changes:
    fields['sliding_window_pattern'] = fields.pop('_sliding_window_pattern')
  if 'gelu' in changes:
    fields |= {'hidden_act': 'gelu', 'hidden_activation': None}
  path.write_text(json.dumps(fields, indent=1, sort_keys=True) + '\n')
  if 'gamma' in changes:
    file = directory / 'model.safetensors'
    tensors = {
      name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
        'LayerNorm.bias', 'LayerNorm.beta'
      ): x
      for name, x in load_file(file).items()
    }
    save_file(tensors, file, {'format': 'pt'})


def main():
  shutil.rmtree(DIRECTORY, ignore_errors=True)
  for i, (name, (kind, config, *changes)) in enumerate(CASES.items()):
    model = kind(config).eval()
    randomise(model, i)
    directory = DIRECTORY / name
    changes = changes[0] if changes else ()
    size = '8KB' if 'shards' in changes else '1GB'
    model.save_pretrained(directory, max_shard_size=size)
    (directory / 'generation_config.json').unlink(missing_ok=True)
    edit(directory, changes)
    data = inputs(config, i)
    data['logits'] = run(model, data)
    np.savez(directory / 'reference.npz', **data)  # pyright: ignore[reportArgumentType]
    # the edited directory is the same model to transformers
    again = run(kind.from_pretrained(directory).eval(), {
      x: data[x] for x in data if x != 'logits'
    })  # fmt: skip
    real = data['mask'] > 0 if again.ndim == 3 else slice(None)
    error = np.abs(again - data['logits'])[real].max()
    print(
      f'{name}: {np.abs(data["logits"][real]).max():.2f}, again {error:.1e}'
    )


if __name__ == '__main__':
  main()
