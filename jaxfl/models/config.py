"""The shape of a transformer: what makes one family differ from another."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfl.models import rotary

ACTIVATIONS = {
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'silu': jax.nn.silu,
}
_CHOICES = {
  'norm': ('layer', 'rms', 'rms_plus_one'),
  'norm_place': ('pre', 'post', 'both'),
  'head': ('none', 'lm', 'mlm', 'classify'),
  'pool': ('first', 'mean', 'last'),
  'activation': tuple(ACTIVATIONS),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The shape of a `Transformer`.

  Attributes:
    vocab_size: number of tokens.
    num_layers: transformer blocks.
    model_dim: width of the residual stream.
    num_heads: query heads.
    num_kv_heads: key and value heads; divides `num_heads`.
    head_dim: width of a head.
    mlp_dim: hidden units of a block's feed-forward part.
    activation: one of `ACTIVATIONS`.
    gated: multiply the hidden units by a second projection (GLU).
    causal: attend to earlier positions only.
    norm: `layer`, `rms`, or `rms_plus_one` (gain 1 + w).
    norm_eps: added to the variance.
    norm_place: before (`pre`) or after (`post`) each part of a block, or
      `both`; `post` norms the sum with the residual, `both` the part alone.
    embed_norm: norm the embeddings.
    final_norm: norm after the last block.
    qkv_bias: biases of the query, key and value projections.
    out_bias: bias of the attention's output projection.
    mlp_bias: biases of the feed-forward part.
    qk_norm: RMS norm of every query and key head.
    attention_scale: of the scores; head_dim ** -0.5 if None.
    attention_softcap: c tanh(x / c) of the scores, 0 for none.
    logit_softcap: the same of the logits.
    max_positions: longest sequence; 0 for no limit.
    learned_positions: add learned embeddings of the positions.
    position_offset: row of the first position in their table.
    positions_from_mask: count real tokens only (OPT, RoBERTa).
    rope: rotary positions, or None.
    local_rope: those of the sliding layers, if they have their own.
    sliding: of every layer, whether it attends to `sliding_window` positions
      only; empty for no such layers.
    sliding_window: positions, one's own included.
    type_vocab: segment types (BERT); 0 for none.
    embed_dim: width of the token embeddings; `model_dim` if 0 (OPT-350M).
    embed_scale: multiplies the token embeddings.
    tie_embeddings: the output projection is the embedding.
    output_bias: bias of the vocabulary logits.
    head: `none`, `lm`, `mlm` (dense, activation, norm, vocabulary) or
      `classify`.
    num_labels: classes of `classify`.
    pool: what `classify` reads: the first position, the mean or the last one.
    head_dense: a dense layer with tanh before the classes.
    head_bias: bias of the classes.

  Raises:
    ValueError: naming the field that does not fit.
  """

  vocab_size: int
  num_layers: int
  model_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  activation: str = 'gelu'
  gated: bool = False
  causal: bool = True
  norm: str = 'layer'
  norm_eps: float = 1e-5
  norm_place: str = 'pre'
  embed_norm: bool = False
  final_norm: bool = True
  qkv_bias: bool = True
  out_bias: bool = True
  mlp_bias: bool = True
  qk_norm: bool = False
  attention_scale: float | None = None
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  max_positions: int = 0
  learned_positions: bool = False
  position_offset: int = 0
  positions_from_mask: bool = False
  rope: rotary.Rope | None = None
  local_rope: rotary.Rope | None = None
  sliding: tuple[bool, ...] = ()
  sliding_window: int = 0
  type_vocab: int = 0
  embed_dim: int = 0
  embed_scale: float = 1.0
  tie_embeddings: bool = True
  output_bias: bool = False
  head: str = 'lm'
  num_labels: int = 0
  pool: str = 'first'
  head_dense: bool = False
  head_bias: bool = True

  def __post_init__(self):
    for name, choices in _CHOICES.items():
      if (value := getattr(self, name)) not in choices:
        raise ValueError(
          f'{name} must be one of {", ".join(choices)}; got {value!r}'
        )
    for name in (
      'vocab_size', 'num_layers', 'model_dim', 'num_heads', 'num_kv_heads',
      'head_dim', 'mlp_dim',
    ):  # fmt: skip
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be >= 1, got {getattr(self, name)}')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads {self.num_heads} is not a multiple of num_kv_heads '
        f'{self.num_kv_heads}'
      )
    if self.rope and self.head_dim % 2:
      raise ValueError(f'rotary positions need an even head_dim: {self}')
    if self.sliding and len(self.sliding) != self.num_layers:
      raise ValueError(
        f'sliding has {len(self.sliding)} entries for {self.num_layers} layers'
      )
    if any(self.sliding) and self.sliding_window < 1:
      raise ValueError('sliding layers need a sliding_window >= 1')
    if self.head == 'classify' and self.num_labels < 1:
      raise ValueError('head classify needs num_labels >= 1')
