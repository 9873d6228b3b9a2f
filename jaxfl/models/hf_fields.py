"""The fields of a Hugging Face config.json: typed, and none of them ignored.

A field that is neither read nor known to be harmless is refused, because it may
change what the model computes. `null` and `false` pass: they turn a feature
off.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxfl.models import rotary

_REQUIRED = object()
_ACTIVATIONS = {
  'gelu': 'gelu',
  'gelu_python': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_python_tanh': 'gelu_tanh',
  'relu': 'relu',
  'relu2': 'relu2',
  'silu': 'silu',
  'swish': 'silu',
}
# training, generation, bookkeeping: no part of the forward pass
_HARMLESS = (
  'architectures', 'attn_pdrop', 'auto_map', 'bad_words_ids',
  'begin_suppress_tokens', 'cache_implementation',
  'chunk_size_feed_forward', 'classifier_dropout', 'directionality',
  'diversity_penalty', 'do_sample', 'dropout', 'dtype', 'early_stopping',
  'embd_pdrop', 'encoder_no_repeat_ngram_size',
  'exponential_decay_length_penalty', 'finetuning_task',
  'gradient_checkpointing', 'id2label', 'init_std', 'initializer_range',
  'is_llama_config', 'jaxfl_pool', 'label2id', 'language', 'layerdrop',
  'length_penalty', 'max_length', 'min_length', 'model_type', 'n_ctx',
  'name', 'no_repeat_ngram_size', 'num_beam_groups', 'num_beams',
  'num_labels', 'num_return_sequences', 'output_attentions',
  'output_hidden_states', 'output_past', 'output_scores',
  'predict_special_tokens', 'prefix', 'pretraining_tp', 'problem_type',
  'remove_invalid_values', 'reorder_and_upcast_attn', 'repetition_penalty',
  'resid_pdrop', 'return_dict', 'return_dict_in_generate',
  'sliding_window_size', 'suppress_tokens', 'task_specific_params',
  'temperature', 'tf_legacy_loss', 'tokenizer_class', 'top_k', 'top_p',
  'torch_dtype', 'torchscript', 'transformers.js_config',
  'transformers_version', 'typical_p', 'use_bfloat16', 'use_cache',
)  # fmt: skip
_HARMLESS_STARTS = ('summary_', 'unsloth_', '_name_or_path', '_commit_hash')
_HARMLESS_STARTS += ('_attn_implementation', 'pooler_')
_HARMLESS_ENDS = ('_dropout', '_dropout_prob', '_token_id', '_token_ids')


class Fields:
  """Reads the fields of a JSON object and remembers which ones."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self._values = values
    self.where = where
    self._read: set[str] = set()

  def error(self, text: str) -> ValueError:
    return ValueError(f'{self.where}: {text}')

  def _take(self, name, kinds, default, null) -> Any:
    self._read.add(name)
    value = self._values.get(name, default)
    if value is _REQUIRED:
      raise self.error(f'{name} is missing')
    if value is None and (null is not _REQUIRED or default is not _REQUIRED):
      return default if null is _REQUIRED else null
    if name in self._values and (
      not isinstance(value, kinds)
      or (isinstance(value, bool) and kinds is not bool)
    ):
      names = getattr(kinds, '__name__', 'number')
      raise self.error(f'{name} is {value!r}, expected {names}')
    return value

  def size(self, name: str, default: Any = _REQUIRED) -> int:
    """A positive integer."""
    value = self._take(name, int, default, _REQUIRED)
    if value < 1:
      raise self.error(f'{name} is {value}, expected a positive integer')
    return value

  def integer(self, name: str, default: Any, null: Any = _REQUIRED) -> int:
    """A non-negative integer."""
    value = self._take(name, int, default, null)
    if value < 0:
      raise self.error(f'{name} is {value}, expected a non-negative integer')
    return value

  def number(
    self, name: str, default: Any = _REQUIRED, null: Any = _REQUIRED
  ) -> float:
    """A finite, non-negative number."""
    value = self._take(name, (int, float), default, null)
    if not (math.isfinite(value) and value >= 0):
      raise self.error(f'{name} is {value}, expected a non-negative number')
    return float(value)

  def flag(self, name: str, default: bool) -> bool:
    return self._take(name, bool, default, _REQUIRED)

  def text(self, name: str, default: Any = _REQUIRED) -> str:
    return self._take(name, str, default, _REQUIRED)

  def items(self, name: str) -> list:
    return self._take(name, list, [], _REQUIRED)

  def mapping(self, name: str) -> dict:
    return dict(self._take(name, dict, {}, _REQUIRED))

  def activation(self, name: str, default: str) -> str:
    value = self.text(name, default)
    if value not in _ACTIVATIONS:
      raise self.error(
        f'{name} is {value!r}, expected one of {", ".join(_ACTIVATIONS)}'
      )
    return _ACTIVATIONS[value]

  def must_be(self, name: str, *allowed: Any) -> None:
    """Refuses a field with another value; it may be absent or null."""
    self._read.add(name)
    value = self._values.get(name)
    if value is not None and value not in allowed:
      raise self.error(
        f'{name} is {value!r}, which is not supported (only '
        f'{" or ".join(map(repr, allowed))})'
      )

  def refuse_rest(self) -> None:
    """Refuses fields that nobody read."""
    for name, value in self._values.items():
      if not (
        name in self._read
        or value is None
        or value is False
        or name in _HARMLESS
        or name.startswith(_HARMLESS_STARTS)
        or name.endswith(_HARMLESS_ENDS)
      ):
        raise self.error(
          f'the field {name} (here {value!r}) is not supported; if it does '
          'not change what the model computes, set it to null in a local copy'
        )


def rope(f: Fields, max_positions: int) -> rotary.Rope:
  """The rotary positions in either spelling."""
  new, old = f.mapping('rope_parameters'), f.mapping('rope_scaling')
  if new and old and new != old:
    raise f.error('rope_parameters and rope_scaling are both given')
  f.must_be('partial_rotary_factor', 1)
  theta = f.number('rope_theta', None, 0.0) or None
  return scaled_rope(f, new or old, theta, 10_000.0, max_positions)


def scaled_rope(
  f: Fields,
  values: Mapping[str, Any],
  theta: float | None,
  default_theta: float,
  max_positions: int,
) -> rotary.Rope:
  """Rotary positions of one kind of layer.

  Args:
    f: the fields around it.
    values: `rope_parameters` or `rope_scaling`.
    theta: the base given elsewhere, or None.
    default_theta: the base if it is given nowhere.
    max_positions: the model's longest sequence.
  """
  g = Fields(values, f'{f.where}, rotary positions')
  inner = g.number('rope_theta', None, 0.0) or None
  if inner and theta and inner != theta:
    raise g.error(f'rope_theta is {inner}, and {theta} outside')
  kind, old_kind = g.text('rope_type', ''), g.text('type', '')
  if kind and old_kind and kind != old_kind:
    raise g.error(f'rope_type is {kind!r}, but type is {old_kind!r}')
  kind = kind or old_kind or 'default'
  g.must_be('partial_rotary_factor', 1)
  made = {'theta': inner or theta or default_theta, 'scaling': kind}
  if kind in ('linear', 'llama3', 'yarn', 'dynamic'):
    made['factor'] = g.number('factor')
    if made['factor'] <= 0:
      raise g.error(f'factor is {made["factor"]}, expected > 0')
  if kind in ('llama3', 'yarn'):
    f.must_be('original_max_position_embeddings')
    made['original_max_positions'] = g.size(
      'original_max_position_embeddings', max_positions
    )
  if kind == 'llama3':
    low, high = g.number('low_freq_factor'), g.number('high_freq_factor')
    if high <= low:
      raise g.error(f'high_freq_factor {high} is not above {low}')
    made |= {'low_freq_factor': low, 'high_freq_factor': high}
  elif kind == 'yarn':
    made |= _yarn(g, made['factor'])
  elif kind == 'dynamic':
    # the base grows beyond max_position_embeddings, which is our limit
    made = {'theta': made['theta'], 'scaling': 'default'}
  elif kind not in rotary.SCALINGS:
    raise g.error(
      f'rope_type is {kind!r}, expected one of '
      f'{", ".join((*rotary.SCALINGS, "dynamic"))}'
    )
  g.refuse_rest()
  return rotary.Rope(**made)


def _yarn(g: Fields, factor: float) -> dict[str, Any]:
  fast = g.number('beta_fast', 32.0) or 32.0
  slow = g.number('beta_slow', 1.0) or 1.0
  if fast <= slow:
    raise g.error(f'beta_fast {fast} is not above beta_slow {slow}')
  gain = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
  m, all_dim = g.number('mscale', 0.0), g.number('mscale_all_dim', 0.0)
  default = gain(m) / gain(all_dim) if m and all_dim else gain(1.0)
  return {
    'beta_fast': fast,
    'beta_slow': slow,
    'truncate': g.flag('truncate', True),
    'attention_factor': g.number('attention_factor', default),
  }
