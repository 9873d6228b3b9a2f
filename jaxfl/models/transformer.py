"""One transformer for all families; they differ by their `Config` alone.

Decoders (GPT-2, OPT, Llama, Mistral, Qwen, Gemma and the embedded byte model)
and encoders (BERT, RoBERTa), with no head, a vocabulary or a classifier. The
layers are stacked by `nn.scan`: every parameter below `layers` has a leading
layer axis, and the compile time does not depend on the depth. There is no
dropout: a forward pass is a function.

Shapes: B examples, T positions, S slots of keys, D model, H heads, G heads per
key head, K head, F hidden, V vocabulary, C classes.

References:
  Vaswani et al., "Attention is all you need", NeurIPS 2017.
  Ainslie et al., "GQA", EMNLP 2023, https://arxiv.org/abs/2305.13245.
  The models' own papers and configurations; see `hf_config`.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxfl import typing as jt
from jaxfl.models import rotary
from jaxfl.models.config import Config
from jaxfl.models.layers import (
  Block,
  ClassHead,
  Dense,
  Embed,
  Norm,
  VocabularyHead,
)

_HIDDEN = -1e9  # added to the scores that attention must not see


class Transformer(nn.Module):
  """See the functions below for what the methods take and return."""

  config: Config

  def setup(self):
    c = self.config
    small = nn.initializers.variance_scaling(1.0, 'fan_out', 'normal')
    embed = lambda n, dim: Embed(n, dim, small)
    narrow = c.embed_dim or c.model_dim
    self.embed = embed(c.vocab_size, narrow)
    if c.learned_positions:
      self.positions = embed(c.max_positions + c.position_offset, c.model_dim)
    if c.type_vocab:
      self.types = embed(c.type_vocab, c.model_dim)
    if narrow != c.model_dim:
      self.project_in = Dense(c.model_dim, use_bias=False)
    if c.embed_norm:
      self.embed_norm = Norm(c)
    # Flax types in_axes as one int; a tuple is documented
    self.layers = nn.scan(
      Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
      length=c.num_layers,
    )(c)
    if c.final_norm:
      self.final_norm = Norm(c)
    if c.head in ('lm', 'mlm'):
      self.lm_head = VocabularyHead(c)
    if c.head == 'classify':
      self.head = ClassHead(c)

  def hidden(self, tokens, mask=None, types=None, cache=None, slots=None):
    c = self.config
    length = tokens.shape[1]
    if slots is None:
      slots = jnp.arange(length)[None]  # [1, T]: tables for the whole batch
    positions = slots
    if c.positions_from_mask and mask is not None and cache is None:
      real = mask.astype(jnp.int32)
      positions = jnp.cumsum(real, axis=1) * real - 1
    x = self.embed(tokens)
    x = x * jnp.asarray(c.embed_scale, x.dtype) if c.embed_scale != 1 else x
    if c.embed_dim and c.embed_dim != c.model_dim:
      x = self.project_in(x)
    if c.learned_positions:
      x = x + self.positions(positions + c.position_offset)
    if c.type_vocab:
      x = x + self.types(jnp.zeros_like(tokens) if types is None else types)
    if c.embed_norm:
      x = self.embed_norm(x)
    shared = (
      slots,
      _biases(c, mask, slots, cache),
      _tables(c, positions),
    )
    per_layer = (jnp.asarray(c.sliding) if c.sliding else None, cache)
    x, cache = self.layers(x, per_layer, shared)
    return (self.final_norm(x) if c.final_norm else x), cache

  def vocab_logits(self, hidden):
    c = self.config
    if c.embed_dim and c.embed_dim != c.model_dim:
      hidden = self.lm_head.project(hidden)
    if c.head == 'mlm':
      hidden = self.lm_head.transform(hidden)
    logits = (
      self.embed.attend(hidden)
      if c.tie_embeddings
      else self.lm_head.untied(hidden)
    )
    logits = self.lm_head.add_bias(logits.astype(jnp.float32))
    if c.logit_softcap:
      logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
    return logits

  def class_logits(self, hidden, mask=None):
    return self.head(hidden, mask)

  def __call__(self, tokens, mask=None, types=None):
    hidden, _ = self.hidden(tokens, mask, types)
    if self.config.head == 'none':
      return hidden
    if self.config.head == 'classify':
      return self.class_logits(hidden, mask)
    return self.vocab_logits(hidden)


def _biases(c, mask, slots, cache):
  """Float32[B, T, S] added to the scores, for global and for sliding layers."""
  if not c.causal and mask is None:
    return ()
  size = slots.shape[1] if cache is None else cache['k'].shape[2]
  keys = jnp.arange(size)[None, None, :]
  queries = slots[:, :, None]
  near = jnp.ones((1, 1, 1), bool)
  if c.sliding_window:
    ahead = keys - queries if not c.causal else 0
    near = (queries - keys < c.sliding_window) & (ahead < c.sliding_window)
  seen = keys <= queries if c.causal else jnp.ones((1, 1, 1), bool)
  if mask is not None and cache is None:
    seen = seen & mask.astype(bool)[:, None, :]
  kinds = [seen]
  if any(c.sliding):
    kinds = [seen & near] if all(c.sliding) else [seen, seen & near]
  return tuple(jnp.where(x, 0.0, _HIDDEN) for x in kinds)


def _tables(c, positions):
  """Rotary tables, for global and for sliding layers."""
  if c.rope is None:
    return ()
  table = lambda rope: rotary.table(rope, c.head_dim, positions)
  if c.local_rope is None or not any(c.sliding):
    return (table(c.rope),)
  if all(c.sliding):
    return (table(c.local_rope),)
  return (table(c.rope), table(c.local_rope))


def _apply(config, params, method, *args) -> Any:
  return Transformer(config).apply({'params': params}, *args, method=method)


def init(config: Config, key: jax.Array) -> jt.Params:
  """Random parameters, a nested dict of float32 arrays, from a typed key."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return Transformer(config).init(key, tokens)['params']


def hidden(
  config: Config,
  params: jt.Params,
  tokens: jt.Array,
  mask: jt.Array | None = None,
  types: jt.Array | None = None,
) -> jax.Array:
  """The last hidden states.

  Args:
    config: the model's shape.
    params: its parameters; the computation has the dtype of the embeddings.
    tokens: integer[B, T].
    mask: [B, T], nonzero where a token is real; None for all.
    types: integer[B, T], segments of BERT; None for zeros.

  Returns:
    [B, T, D], after the final norm if there is one.

  Raises:
    ValueError: if T is larger than the model's positions.
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  _check_length(config, tokens.shape[1])
  mask = None if mask is None else jnp.asarray(mask)
  types = None if types is None else jnp.asarray(types, jnp.int32)
  return _apply(config, params, 'hidden', tokens, mask, types)[0]


def vocab_logits(
  config: Config, params: jt.Params, hidden: jax.Array
) -> jax.Array:
  """Logits float32[..., V] from hidden states [..., D], `lm` or `mlm` head."""
  return _apply(config, params, 'vocab_logits', hidden)


def class_logits(
  config: Config,
  params: jt.Params,
  hidden: jax.Array,
  mask: jt.Array | None = None,
) -> jax.Array:
  """Logits float32[B, C] from hidden states [B, T, D], `classify` head."""
  return _apply(config, params, 'class_logits', hidden, mask)


def logits(
  config: Config,
  params: jt.Params,
  tokens: jt.Array,
  mask: jt.Array | None = None,
  types: jt.Array | None = None,
) -> jax.Array:
  """What the head makes of tokens integer[B, T].

  Returns:
    float32[B, T, V] for `lm` and `mlm`, float32[B, C] for `classify`, the
    hidden states [B, T, D] for `none`.
  """
  states = hidden(config, params, tokens, mask, types)
  if config.head == 'none':
    return states
  if config.head == 'classify':
    return class_logits(config, params, states, mask)
  return vocab_logits(config, params, states)


def init_cache(
  config: Config, batch_size: int, num_slots: int, dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
  """Empty keys and values, [num_layers, B, S, H, K] each."""
  shape = (
    config.num_layers,
    batch_size,
    num_slots,
    config.num_kv_heads,
    config.head_dim,
  )
  return {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}


def hidden_cached(
  config: Config,
  params: jt.Params,
  tokens: jt.Array,
  cache: dict[str, jax.Array],
  slots: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Hidden states of new tokens of a decoder, next to those in the cache.

  A token's slot is its position. It sees its own slot and those before it; what
  lies behind (padding of a prompt) is unseen until it is overwritten.

  Args:
    config: the model's shape; `causal`.
    params: its parameters.
    tokens: integer[B, T].
    cache: of `init_cache`.
    slots: int32[B, T], below the cache's S.

  Returns:
    Hidden states [B, T, D], and the cache with the new tokens.

  Raises:
    ValueError: if S is larger than the model's positions.
  """
  _check_length(config, cache['k'].shape[2])
  tokens = jnp.asarray(tokens, jnp.int32)
  return cast(
    tuple, _apply(config, params, 'hidden', tokens, None, None, cache, slots)
  )


def _check_length(config, length):
  if config.max_positions and length > config.max_positions:
    raise ValueError(
      f'a sequence of {length} tokens is longer than the model, which has '
      f'{config.max_positions} positions; lower max_length'
    )


def num_params(params: jt.Params) -> int:
  """Number of entries."""
  return sum(int(np.size(x)) for x in jax.tree.leaves(params))
