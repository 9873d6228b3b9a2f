"""Configurations of Hugging Face models, read from their config.json.

Both spellings are read: that of transformers 5 (`rope_parameters`, `dtype`) and
the older one (`rope_theta`, `rope_scaling`, `torch_dtype`). Defaults are those
of transformers 5.23.

References (the model families):
  GPT-2: Radford et al., 2019. OPT: https://arxiv.org/abs/2205.01068.
  Llama: https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783.
  Mistral: https://arxiv.org/abs/2310.06825.
  Qwen2: https://arxiv.org/abs/2407.10671. Qwen3: https://arxiv.org/abs/2505.09388.
  Gemma: https://arxiv.org/abs/2403.08295, https://arxiv.org/abs/2408.00118,
    https://arxiv.org/abs/2503.19786.
  BERT: https://arxiv.org/abs/1810.04805. RoBERTa: https://arxiv.org/abs/1907.11692.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxfl.models.config import Config
from jaxfl.models.hf_fields import Fields, rope, scaled_rope


def _gpt2(f: Fields) -> dict[str, Any]:
  dim, heads = f.size('n_embd'), f.size('n_head')
  f.must_be('scale_attn_by_inverse_layer_idx', False)
  f.must_be('add_cross_attention', False)
  return dict(
    vocab_size=f.size('vocab_size'),
    num_layers=f.size('n_layer'),
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=_split(f, dim, heads),
    mlp_dim=f.size('n_inner', 4 * dim),
    activation=f.activation('activation_function', 'gelu_new'),
    norm_eps=f.number('layer_norm_epsilon', 1e-5),
    attention_scale=None if f.flag('scale_attn_weights', True) else 1.0,
    max_positions=f.size('n_positions'),
    learned_positions=True,
    tie_embeddings=f.flag('tie_word_embeddings', True),
  )


def _opt(f: Fields) -> dict[str, Any]:
  dim, heads = f.size('hidden_size'), f.size('num_attention_heads')
  f.must_be('layer_norm_elementwise_affine', True)
  before = f.flag('do_layer_norm_before', True)
  bias = f.flag('enable_bias', True)
  narrow = f.size('word_embed_proj_dim', dim)
  return dict(
    vocab_size=f.size('vocab_size'),
    num_layers=f.size('num_hidden_layers'),
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=_split(f, dim, heads),
    mlp_dim=f.size('ffn_dim'),
    activation=f.activation('activation_function', 'relu'),
    norm_place='pre' if before else 'post',
    final_norm=not f.flag('_remove_final_layer_norm', False) and before,
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=bias,
    max_positions=f.size('max_position_embeddings'),
    learned_positions=True,
    position_offset=2,
    positions_from_mask=True,
    embed_dim=0 if narrow == dim else narrow,
    tie_embeddings=f.flag('tie_word_embeddings', True),
  )


def _modern(
  f: Fields, *, tied: bool, bias: bool | None = None, head_dim: int = 0
) -> dict[str, Any]:
  """What Llama and its relatives share."""
  dim, heads = f.size('hidden_size'), f.size('num_attention_heads')
  positions = f.size('max_position_embeddings')
  return dict(
    vocab_size=f.size('vocab_size'),
    num_layers=f.size('num_hidden_layers'),
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=f.size('num_key_value_heads', heads),
    head_dim=f.integer('head_dim', head_dim, 0) or _split(f, dim, heads),
    mlp_dim=f.size('intermediate_size'),
    gated=True,
    norm='rms',
    norm_eps=f.number('rms_norm_eps', 1e-6),
    qkv_bias=f.flag('attention_bias', False) if bias is None else bias,
    out_bias=f.flag('attention_bias', False) if bias is None else False,
    mlp_bias=False,
    max_positions=positions,
    tie_embeddings=f.flag('tie_word_embeddings', tied),
  )


def _split(f: Fields, dim: int, heads: int) -> int:
  if dim % heads:
    raise f.error(f'the width {dim} is not a multiple of the {heads} heads')
  return dim // heads


def _llama(f: Fields) -> dict[str, Any]:
  made = _modern(f, tied=False)
  return made | dict(
    activation=f.activation('hidden_act', 'silu'),
    mlp_bias=f.flag('mlp_bias', False),
    rope=rope(f, made['max_positions']),
  )


def _mistral(f: Fields) -> dict[str, Any]:
  made = _modern(f, tied=False, bias=False)
  f.must_be('attention_bias', False)
  window = f.integer('sliding_window', 4096, 0)
  return made | dict(
    activation=f.activation('hidden_act', 'silu'),
    rope=rope(f, made['max_positions']),
    sliding=(True,) * made['num_layers'] if window else (),
    sliding_window=window,
  )


def _qwen(f: Fields, **modern: Any) -> dict[str, Any]:
  made = _modern(f, tied=False, **modern)
  layers = made['num_layers']
  window = f.integer('sliding_window', 4096, 0)
  start = f.integer('max_window_layers', 28)
  used = f.flag('use_sliding_window', False) and window > 0
  sliding = _layer_types(f, tuple(used and i >= start for i in range(layers)))
  if any(sliding) and not used:
    raise f.error('layer_types has sliding layers, use_sliding_window is false')
  return made | dict(
    activation=f.activation('hidden_act', 'silu'),
    rope=rope(f, made['max_positions']),
    **_windows(sliding, window),
  )


def _qwen2(f: Fields) -> dict[str, Any]:
  f.must_be('attention_bias', True)
  return _qwen(f, bias=True)


def _qwen3(f: Fields) -> dict[str, Any]:
  return _qwen(f, head_dim=128) | dict(qk_norm=True)


def _any_gemma(f: Fields) -> dict[str, Any]:
  made = _modern(f, tied=True, head_dim=256)
  f.must_be('use_bidirectional_attention', False)
  return made | dict(
    norm='rms_plus_one',
    embed_scale=made['model_dim'] ** 0.5,
  )


def _gemma(f: Fields) -> dict[str, Any]:
  made = _any_gemma(f)
  # the first releases say gelu and mean its approximation
  f.must_be('hidden_act', 'gelu', 'gelu_pytorch_tanh')
  f.must_be('hidden_activation', 'gelu_pytorch_tanh')
  return made | dict(
    activation='gelu_tanh', rope=rope(f, made['max_positions'])
  )


def _gemma2(f: Fields) -> dict[str, Any]:
  made = _gemma_windows(f, _any_gemma(f), pattern=2)
  return made | dict(
    rope=rope(f, made['max_positions']),
    attention_softcap=f.number('attn_logit_softcapping', 50.0, 0.0),
    logit_softcap=f.number('final_logit_softcapping', 30.0, 0.0),
  )


def _gemma3(f: Fields) -> dict[str, Any]:
  pattern = f.integer('sliding_window_pattern', 0)
  pattern = pattern or f.size('_sliding_window_pattern', 6)
  f.must_be('_sliding_window_pattern', pattern)
  f.must_be('attn_logit_softcapping')  # transformers does not apply it
  made = _gemma_windows(f, _any_gemma(f), pattern)
  return (
    made
    | _gemma3_ropes(f, made['max_positions'])
    | dict(
      qk_norm=True,
      logit_softcap=f.number('final_logit_softcapping', 0.0),
    )
  )


def _gemma3_ropes(f: Fields, positions: int) -> dict[str, Any]:
  new, old = f.mapping('rope_parameters'), f.mapping('rope_scaling')
  theta = f.number('rope_theta', 0.0) or None
  local_theta = f.number('rope_local_base_freq', 0.0) or None
  if new and old:
    raise f.error('rope_parameters and rope_scaling are both given')
  if set(new) - {'full_attention', 'sliding_attention'}:
    raise f.error(
      'rope_parameters must have the keys full_attention and '
      f'sliding_attention, got {", ".join(map(str, new))}'
    )
  full = new.get('full_attention') or old
  local = new.get('sliding_attention') or {}
  return dict(
    rope=scaled_rope(f, full, theta, 1e6, positions),
    local_rope=scaled_rope(f, local, local_theta, 1e4, positions),
  )


def _gemma_windows(
  f: Fields, made: dict[str, Any], pattern: int
) -> dict[str, Any]:
  """Every `pattern`-th layer is global, the others are sliding."""
  layers = made['num_layers']
  f.must_be('hidden_act', 'gelu_pytorch_tanh')
  scalar = f.number('query_pre_attn_scalar', 256)
  if not scalar:
    raise f.error('query_pre_attn_scalar is 0, expected a positive number')
  return made | dict(
    activation=f.activation('hidden_activation', 'gelu_pytorch_tanh'),
    norm_place='both',
    attention_scale=scalar**-0.5,
    **_windows(
      _layer_types(f, tuple((i + 1) % pattern > 0 for i in range(layers))),
      f.integer('sliding_window', 4096, 0),
    ),
  )


def _layer_types(f: Fields, default: tuple[bool, ...]) -> tuple[bool, ...]:
  kinds = {'full_attention': False, 'sliding_attention': True}
  types = f.items('layer_types')
  if unknown := [x for x in types if x not in tuple(kinds)]:
    raise f.error(
      f'layer_types has {unknown[0]!r}, expected one of {", ".join(kinds)}'
    )
  if types and len(types) != len(default):
    raise f.error(
      f'layer_types has {len(types)} entries for {len(default)} layers'
    )
  return tuple(kinds[x] for x in types) or default


def _windows(sliding: tuple[bool, ...], window: int) -> dict[str, Any]:
  if not any(sliding):
    return {}
  return dict(sliding=sliding, sliding_window=window)


def _bert(f: Fields) -> dict[str, Any]:
  dim, heads = f.size('hidden_size'), f.size('num_attention_heads')
  f.must_be('position_embedding_type', 'absolute')
  f.must_be('is_decoder', False)
  f.must_be('add_cross_attention', False)
  return dict(
    vocab_size=f.size('vocab_size'),
    num_layers=f.size('num_hidden_layers'),
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=_split(f, dim, heads),
    mlp_dim=f.size('intermediate_size'),
    activation=f.activation('hidden_act', 'gelu'),
    causal=False,
    norm_eps=f.number('layer_norm_eps', 1e-12),
    norm_place='post',
    embed_norm=True,
    final_norm=False,
    max_positions=f.size('max_position_embeddings'),
    learned_positions=True,
    type_vocab=f.size('type_vocab_size', 2),
    tie_embeddings=f.flag('tie_word_embeddings', True),
  )


def _roberta(f: Fields) -> dict[str, Any]:
  made = _bert(f)
  offset = f.integer('pad_token_id', 1) + 1
  if made['max_positions'] <= offset:
    raise f.error(
      f'max_position_embeddings is {made["max_positions"]}, expected more than '
      f'the {offset} rows that are kept for padding'
    )
  return made | dict(
    max_positions=made['max_positions'] - offset,
    position_offset=offset,
    positions_from_mask=True,
  )


_READERS: dict[str, Callable[[Fields], dict[str, Any]]] = {
  'gpt2': _gpt2,
  'opt': _opt,
  'llama': _llama,
  'mistral': _mistral,
  'qwen2': _qwen2,
  'qwen3': _qwen3,
  'gemma': _gemma,
  'gemma2': _gemma2,
  'gemma3_text': _gemma3,
  'bert': _bert,
  'roberta': _roberta,
  'xlm-roberta': _roberta,
  'camembert': _roberta,
}
MODEL_TYPES = tuple(_READERS)


def read(values: Mapping[str, Any], where: str = 'config.json') -> Config:
  """The model of a config.json, without a head.

  Args:
    values: its fields.
    where: its name, for messages.

  Returns:
    The config, with the head `none`.

  Raises:
    ValueError: if the model_type or rope_type is unknown, a field has a value
      that makes no sense or is not supported, or a field is unknown and may
      matter. The text names the field.
  """
  kind = values.get('model_type')
  if not isinstance(kind, str) or kind not in _READERS:
    raise ValueError(
      f'{where}: model_type is {kind!r}, expected one of {", ".join(_READERS)}'
    )
  f = Fields(values, f'{where} (model_type {kind})')
  f.must_be('is_encoder_decoder', False)
  f.must_be('tie_encoder_decoder', False)
  f.must_be('pruned_heads', {})
  made = _READERS[kind](f)
  f.refuse_rest()
  try:
    return Config(head='none', **made)
  except ValueError as e:
    raise f.error(str(e)) from e
