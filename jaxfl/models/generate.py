"""Greedy generation with a cache of keys and values.

The prompts fill the cache in one pass; then every step feeds one token per row,
until all rows have ended. Pure, for `jit` and `vmap`.

Shapes: B rows, T positions of the prompts, N new tokens.
"""

import jax
import jax.numpy as jnp

from jaxfl import typing as jt
from jaxfl.models import transformer
from jaxfl.models.config import Config


def greedy(
  config: Config,
  params: jt.Params,
  tokens: jt.Array,
  mask: jt.Array,
  *,
  max_new_tokens: int,
  eos_ids: tuple[int, ...],
  pad_id: int = 0,
) -> jax.Array:
  """The likeliest next token, again and again; of equals the first.

  Args:
    config: of a causal model with the head `lm`.
    params: its parameters; cache and computation have the dtype of the
      embeddings.
    tokens: integer[B, T], prompts that are padded on the right.
    mask: [B, T], nonzero where a token is real; every row starts with one.
    max_new_tokens: N, at least 1.
    eos_ids: tokens after which a row ends; empty for none.
    pad_id: what a row holds after its end.

  Returns:
    int32[B, N], the new tokens. An end token is kept.

  Raises:
    ValueError: if the model cannot generate, or T + N exceeds its positions.
  """
  return _generate(
    config, params, tokens, mask, max_new_tokens, eos_ids, pad_id
  )[0]


def _generate(config, params, tokens, mask, max_new_tokens, eos_ids, pad_id):
  """As `greedy`, and the number of tokens fed after the prompts, int32[]."""
  tokens = jnp.asarray(tokens, jnp.int32)
  mask = jnp.asarray(mask)
  _check(config, tokens, mask, max_new_tokens)
  batch, length = tokens.shape
  ends = jnp.asarray(eos_ids, jnp.int32)
  cache = transformer.init_cache(
    config,
    batch,
    length + max_new_tokens - 1,  # the last token is not fed
    params['embed']['embedding'].dtype,
  )
  slots = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
  states, cache = transformer.hidden_cached(
    config, params, tokens, cache, slots
  )
  lengths = jnp.sum((mask != 0).astype(jnp.int32), axis=1)
  last = jnp.maximum(lengths - 1, 0)[:, None, None]
  states = jnp.take_along_axis(states, last, axis=1)

  def pick(states):
    logits = transformer.vocab_logits(config, params, states)
    return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

  def ended(done, token):
    return done | jnp.any(token[:, None] == ends[None, :], axis=-1)

  def unfinished(carry):
    step, done, *_ = carry
    return (step < max_new_tokens) & ~jnp.all(done)

  def advance(carry):
    step, done, cache, new = carry
    token = jax.lax.dynamic_index_in_dim(new, step - 1, axis=1)
    states, cache = transformer.hidden_cached(
      config, params, token, cache, (lengths + step - 1)[:, None]
    )
    token = jnp.where(done, pad_id, pick(states))
    new = jax.lax.dynamic_update_index_in_dim(new, token, step, axis=1)
    return step + 1, ended(done, token), cache, new

  first = pick(states)
  new = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
  done = ended(jnp.zeros(batch, bool), first)
  start = (jnp.int32(1), done, cache, new.at[:, 0].set(first))
  step, _, _, new = jax.lax.while_loop(unfinished, advance, start)
  return new, step - 1


def _check(config, tokens, mask, max_new_tokens):
  if not config.causal or config.head != 'lm':
    raise ValueError(
      'only a causal model with the head lm can generate; this one has '
      f'causal={config.causal} and head={config.head!r}'
    )
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens must be >= 1, got {max_new_tokens}')
  if tokens.ndim != 2 or tokens.shape != mask.shape or 0 in tokens.shape:
    raise ValueError(
      f'tokens and mask must be [B, T] alike, with B and T >= 1; got '
      f'{list(tokens.shape)} and {list(mask.shape)}'
    )
  total = tokens.shape[1] + max_new_tokens
  if config.max_positions and total > config.max_positions:
    raise ValueError(
      f'prompts of {tokens.shape[1]} tokens and max_new_tokens '
      f'{max_new_tokens} exceed the {config.max_positions} positions of the '
      'model; shorten the prompts or lower max_new_tokens'
    )
