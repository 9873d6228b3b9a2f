"""A config.json for a model that comes from no Hugging Face checkpoint."""

from collections.abc import Iterator
from typing import Any

from jaxfl.models import hf_config
from jaxfl.models.config import Config
from jaxfl.models.hf_heads import without_head
from jaxfl.models.rotary import Rope

_ACTIVATIONS = {'gelu_tanh': 'gelu_pytorch_tanh'}
_YARN = ('beta_fast', 'beta_slow', 'truncate', 'attention_factor')
_LLAMA3 = ('low_freq_factor', 'high_freq_factor')


def compose(config: Config) -> dict[str, Any]:
  """The fields of a family that computes the same as a config without head.

  Args:
    config: the model's shape; its head does not matter.

  Returns:
    Fields that `hf_config.read` turns into the same config.

  Raises:
    ValueError: if no family has this model.
  """
  base = without_head(config)
  for fields in _candidates(base):
    try:
      if hf_config.read(fields) == base:
        return fields
    except ValueError:
      continue
  raise ValueError(
    'no Hugging Face family computes what this config says (they are '
    f'{", ".join(hf_config.MODEL_TYPES)}): {config}'
  )


def _candidates(c: Config) -> Iterator[dict[str, Any]]:
  """Fields of the families that may fit."""
  activation = _ACTIVATIONS.get(c.activation, c.activation)
  shared = {
    'vocab_size': c.vocab_size,
    'hidden_size': c.model_dim,
    'num_hidden_layers': c.num_layers,
    'num_attention_heads': c.num_heads,
    'tie_word_embeddings': c.tie_embeddings,
    'pad_token_id': None,
  }
  if c.norm == 'layer':
    yield from _old(c, shared, activation)
    return
  shared |= {
    'num_key_value_heads': c.num_kv_heads,
    'head_dim': c.head_dim,
    'intermediate_size': c.mlp_dim,
    'max_position_embeddings': c.max_positions,
    'rms_norm_eps': c.norm_eps,
    'attention_bias': c.out_bias,
    'hidden_act': activation,
    'rope_parameters': _rope(c.rope),
  }
  kinds = ('full_attention', 'sliding_attention')
  types = [kinds[x] for x in c.sliding or (False,) * c.num_layers]
  window = c.sliding_window or None
  if c.norm == 'rms':
    yield {'model_type': 'llama', 'mlp_bias': c.mlp_bias, **shared}
    yield {'model_type': 'mistral', 'sliding_window': window, **shared}
    shared |= {
      'layer_types': types,
      'sliding_window': window,
      'use_sliding_window': any(c.sliding),
    }
    yield {'model_type': 'qwen3', **shared}
    yield {**shared, 'model_type': 'qwen2', 'attention_bias': None}
    return
  yield {'model_type': 'gemma', **shared}
  scale = c.attention_scale or c.head_dim**-0.5
  shared |= {
    'layer_types': types,
    'sliding_window': window,
    'hidden_activation': activation,
    'query_pre_attn_scalar': round(scale**-2),
    'attn_logit_softcapping': c.attention_softcap or None,
    'final_logit_softcapping': c.logit_softcap or None,
  }
  yield {'model_type': 'gemma2', **shared}
  both = {kinds[0]: _rope(c.rope), kinds[1]: _rope(c.local_rope)}
  yield {**shared, 'model_type': 'gemma3_text', 'rope_parameters': both}


def _old(c, shared, activation):
  """GPT-2, OPT, BERT and RoBERTa."""
  yield {
    'model_type': 'gpt2',
    'vocab_size': c.vocab_size,
    'n_embd': c.model_dim,
    'n_layer': c.num_layers,
    'n_head': c.num_heads,
    'n_inner': c.mlp_dim,
    'n_positions': c.max_positions,
    'activation_function': activation,
    'layer_norm_epsilon': c.norm_eps,
    'scale_attn_weights': c.attention_scale is None,
    'tie_word_embeddings': c.tie_embeddings,
    'bos_token_id': None,
    'eos_token_id': None,
  }
  yield shared | {
    'model_type': 'opt',
    'ffn_dim': c.mlp_dim,
    'activation_function': activation,
    'do_layer_norm_before': c.norm_place == 'pre',
    '_remove_final_layer_norm': c.norm_place == 'pre' and not c.final_norm,
    'enable_bias': c.mlp_bias,
    'max_position_embeddings': c.max_positions,
    'word_embed_proj_dim': c.embed_dim or c.model_dim,
  }
  encoder = shared | {
    'intermediate_size': c.mlp_dim,
    'hidden_act': activation,
    'layer_norm_eps': c.norm_eps,
    'max_position_embeddings': c.max_positions + c.position_offset,
    'type_vocab_size': c.type_vocab,
  }
  yield {**encoder, 'model_type': 'bert'}
  yield {
    **encoder,
    'model_type': 'roberta',
    'pad_token_id': c.position_offset - 1,
  }


def _rope(rope: Rope | None) -> dict[str, Any] | None:
  if rope is None:
    return None
  made = {'rope_type': rope.scaling, 'rope_theta': rope.theta}
  if rope.scaling != 'default':
    made['factor'] = rope.factor
  if rope.scaling in ('llama3', 'yarn'):
    made['original_max_position_embeddings'] = rope.original_max_positions
    names = _YARN if rope.scaling == 'yarn' else _LLAMA3
    made |= {name: getattr(rope, name) for name in names}
  return made
