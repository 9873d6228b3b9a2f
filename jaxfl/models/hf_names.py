"""Where a Hugging Face checkpoint keeps each of our tensors.

A checkpoint's names are compared without the prefix of the base model (`bert.`,
`model.`, `transformer.`), which is there or not. Linear layers are [out, in]
there and [in, out] here, those of GPT-2 are [in, out] in both.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax

from jaxfl import keys
from jaxfl.models import transformer
from jaxfl.models.config import Config


@functools.lru_cache(maxsize=64)
def shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
  """The shape of every parameter by its path."""
  made = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  return {name: leaf.shape for name, leaf in keys.named_leaves(made)}


@dataclasses.dataclass(frozen=True)
class Slot:
  """The tensors of a checkpoint that make one of ours.

  Attributes:
    name: of the tensor, with `{}` for the number of the layer.
    transposed: the axes are the other way round.
    part: which third of the last axis (GPT-2), or None for all of it.
    base: the name belongs to the base model and may have its prefix.
  """

  name: str
  transposed: bool = False
  part: int | None = None
  base: bool = True

  def names(self, num_layers: int) -> list[str]:
    if '{}' not in self.name:
      return [self.name]
    return [self.name.format(i) for i in range(num_layers)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The names of one family.

  Attributes:
    prefix: of the base model in a checkpoint with a head.
    architectures: names of the classes, with the head that each of them has;
      the first of a head is the one that export writes.
    modules: of every module of ours in the base model, its name there.
    heads: the same of the modules outside the base model, by head.
    output_bias: name of the bias of the vocabulary's logits.
    tied: tensors that repeat others, as pairs of (copy, original).
    droppable: patterns of tensors that a model may not use: buffers, and the
      heads that were not asked for.
    conv: linear layers are [in, out].
  """

  prefix: str
  architectures: Mapping[str, str]
  modules: Mapping[str, str]
  heads: Mapping[str, Mapping[str, str]]
  tied: tuple[tuple[str, str], ...]
  droppable: tuple[str, ...]
  output_bias: str = ''
  conv: bool = False

  def may_drop(self, name: str) -> bool:
    return any(re.fullmatch(x, name) for x in self.droppable)

  def slot(self, path: str, config: Config) -> Slot:
    """The place of our parameter, such as `layers/mlp/up/kernel`."""
    if path == 'lm_head/bias':
      return Slot(self.output_bias, base=False)
    module, leaf = path.rsplit('/', 1)
    head = self.heads.get(config.head, {})
    base = module not in head
    name = self.modules[module] if base else head[module]
    name, _, part = name.partition('|')
    ending = 'bias' if leaf == 'bias' else 'weight'
    conv = self.conv and base
    return Slot(
      f'{name}.{ending}',
      transposed=leaf == 'kernel' and not conv,
      part=int(part) if part else None,
      base=base,
    )


def _architectures(stem: str, decoder: bool, *more: tuple[str, str]):
  lm = ('ForCausalLM', 'lm') if decoder else ('ForMaskedLM', 'mlm')
  ends = (lm, ('ForSequenceClassification', 'classify'), ('Model', 'none'))
  return {stem + end: head for end, head in ends} | dict(more)


_LLAMA = {
  'embed': 'embed_tokens',
  'layers/attention/q': 'layers.{}.self_attn.q_proj',
  'layers/attention/k': 'layers.{}.self_attn.k_proj',
  'layers/attention/v': 'layers.{}.self_attn.v_proj',
  'layers/attention/o': 'layers.{}.self_attn.o_proj',
  'layers/attention/q_norm': 'layers.{}.self_attn.q_norm',
  'layers/attention/k_norm': 'layers.{}.self_attn.k_norm',
  'layers/attention_norm': 'layers.{}.input_layernorm',
  'layers/mlp/gate': 'layers.{}.mlp.gate_proj',
  'layers/mlp/up': 'layers.{}.mlp.up_proj',
  'layers/mlp/down': 'layers.{}.mlp.down_proj',
  'layers/mlp_norm': 'layers.{}.post_attention_layernorm',
  'final_norm': 'norm',
}
_GEMMA2 = _LLAMA | {
  'layers/attention_post_norm': 'layers.{}.post_attention_layernorm',
  'layers/mlp_norm': 'layers.{}.pre_feedforward_layernorm',
  'layers/mlp_post_norm': 'layers.{}.post_feedforward_layernorm',
}
_OPT = {
  'embed': 'decoder.embed_tokens',
  'positions': 'decoder.embed_positions',
  'project_in': 'decoder.project_in',
  'lm_head/project_out': 'decoder.project_out',
  'head/project_out': 'decoder.project_out',
  'layers/attention/q': 'decoder.layers.{}.self_attn.q_proj',
  'layers/attention/k': 'decoder.layers.{}.self_attn.k_proj',
  'layers/attention/v': 'decoder.layers.{}.self_attn.v_proj',
  'layers/attention/o': 'decoder.layers.{}.self_attn.out_proj',
  'layers/attention_norm': 'decoder.layers.{}.self_attn_layer_norm',
  'layers/mlp/up': 'decoder.layers.{}.fc1',
  'layers/mlp/down': 'decoder.layers.{}.fc2',
  'layers/mlp_norm': 'decoder.layers.{}.final_layer_norm',
  'final_norm': 'decoder.final_layer_norm',
}
_GPT2 = {
  'embed': 'wte',
  'positions': 'wpe',
  'layers/attention/q': 'h.{}.attn.c_attn|0',
  'layers/attention/k': 'h.{}.attn.c_attn|1',
  'layers/attention/v': 'h.{}.attn.c_attn|2',
  'layers/attention/o': 'h.{}.attn.c_proj',
  'layers/attention_norm': 'h.{}.ln_1',
  'layers/mlp/up': 'h.{}.mlp.c_fc',
  'layers/mlp/down': 'h.{}.mlp.c_proj',
  'layers/mlp_norm': 'h.{}.ln_2',
  'final_norm': 'ln_f',
}
_BERT = {
  'embed': 'embeddings.word_embeddings',
  'positions': 'embeddings.position_embeddings',
  'types': 'embeddings.token_type_embeddings',
  'embed_norm': 'embeddings.LayerNorm',
  'layers/attention/q': 'encoder.layer.{}.attention.self.query',
  'layers/attention/k': 'encoder.layer.{}.attention.self.key',
  'layers/attention/v': 'encoder.layer.{}.attention.self.value',
  'layers/attention/o': 'encoder.layer.{}.attention.output.dense',
  'layers/attention_norm': 'encoder.layer.{}.attention.output.LayerNorm',
  'layers/mlp/up': 'encoder.layer.{}.intermediate.dense',
  'layers/mlp/down': 'encoder.layer.{}.output.dense',
  'layers/mlp_norm': 'encoder.layer.{}.output.LayerNorm',
}
_DECODER_HEADS = {
  'lm': {'lm_head/out': 'lm_head'},
  'classify': {'head/out': 'score'},
}
_DECODER_DROPS = (
  r'lm_head\.weight',
  r'score\.weight',
  r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq',
)
_ENCODER_DROPS = (
  r'embeddings\.(position_ids|token_type_ids)',
  r'pooler\.dense\.(weight|bias)',
)


def _llama_like(stem: str, modules: Mapping[str, str] = _LLAMA, *more):
  return Layout(
    prefix='model.',
    architectures=_architectures(stem, True, *more),
    modules=modules,
    heads=_DECODER_HEADS,
    tied=(('lm_head.weight', 'embed_tokens.weight'),),
    droppable=_DECODER_DROPS,
  )


def _roberta(stem: str):
  return Layout(
    prefix='roberta.',
    architectures=_architectures(stem, False),
    modules=_BERT,
    heads={
      'mlm': {
        'lm_head/dense': 'lm_head.dense',
        'lm_head/norm': 'lm_head.layer_norm',
      },
      'classify': {
        'head/dense': 'classifier.dense',
        'head/out': 'classifier.out_proj',
      },
    },
    output_bias='lm_head.bias',
    tied=(
      ('lm_head.decoder.weight', 'embeddings.word_embeddings.weight'),
      ('lm_head.decoder.bias', 'lm_head.bias'),
    ),
    droppable=(
      *_ENCODER_DROPS,
      r'lm_head\.(bias|(dense|layer_norm|decoder)\.(weight|bias))',
      r'classifier\.(dense|out_proj)\.(weight|bias)',
    ),
  )


LAYOUTS: dict[str, Layout] = {
  'gpt2': Layout(
    prefix='transformer.',
    architectures={
      'GPT2LMHeadModel': 'lm',
      'GPT2ForSequenceClassification': 'classify',
      'GPT2Model': 'none',
    },
    modules=_GPT2,
    heads=_DECODER_HEADS,
    tied=(('lm_head.weight', 'wte.weight'),),
    droppable=(*_DECODER_DROPS, r'h\.\d+\.attn\.(bias|masked_bias)'),
    conv=True,
  ),
  'opt': Layout(
    prefix='model.',
    architectures=_architectures('OPT', True),
    modules=_OPT,
    heads=_DECODER_HEADS,
    tied=(('lm_head.weight', 'decoder.embed_tokens.weight'),),
    droppable=(*_DECODER_DROPS, r'decoder\.project_out\.weight'),
  ),
  'llama': _llama_like('Llama'),
  'mistral': _llama_like('Mistral'),
  'qwen2': _llama_like('Qwen2'),
  'qwen3': _llama_like('Qwen3'),
  'gemma': _llama_like('Gemma'),
  'gemma2': _llama_like('Gemma2', _GEMMA2),
  'gemma3_text': dataclasses.replace(
    _llama_like('Gemma3', _GEMMA2),
    architectures={
      'Gemma3ForCausalLM': 'lm',
      'Gemma3TextForSequenceClassification': 'classify',
      'Gemma3TextModel': 'none',
    },
  ),
  'bert': Layout(
    prefix='bert.',
    architectures=_architectures('Bert', False, ('BertForPreTraining', 'mlm')),
    modules=_BERT | {'head/dense': 'pooler.dense'},
    heads={
      'mlm': {
        'lm_head/dense': 'cls.predictions.transform.dense',
        'lm_head/norm': 'cls.predictions.transform.LayerNorm',
      },
      'classify': {'head/out': 'classifier'},
    },
    output_bias='cls.predictions.bias',
    tied=(
      ('cls.predictions.decoder.weight', 'embeddings.word_embeddings.weight'),
      ('cls.predictions.decoder.bias', 'cls.predictions.bias'),
    ),
    droppable=(
      *_ENCODER_DROPS,
      r'cls\.predictions\.(bias|decoder\.(weight|bias))',
      r'cls\.predictions\.transform\.(dense|LayerNorm)\.(weight|bias)',
      r'cls\.seq_relationship\.(weight|bias)',
      r'classifier\.(weight|bias)',
    ),
  ),
  'roberta': _roberta('Roberta'),
  'xlm-roberta': _roberta('XLMRoberta'),
  'camembert': _roberta('Camembert'),
}
