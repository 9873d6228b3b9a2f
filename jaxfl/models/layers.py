"""The parts of a transformer: norms, attention, feed-forward, heads.

Shapes as in `transformer`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxfl import lazy
from jaxfl.models import rotary
from jaxfl.models.config import ACTIVATIONS, Config


class Dense(nn.Module):
  """A linear layer whose kernel may be in a box of `jaxfl.lazy`.

  Attributes:
    features: outputs.
    use_bias: whether there is a bias.
    dtype: of the result; None for that of input and parameters together.
    kernel_init: of the kernel.
    wide: whether there are so many outputs that they are made in parts.
  """

  features: int
  use_bias: bool = True
  dtype: Any = None
  kernel_init: Any = nn.initializers.lecun_normal()
  wide: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, unbox=False)
    bias = None
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
    used = [kernel.dtype] if bias is None else [kernel.dtype, bias.dtype]
    x = x.astype(self.dtype or jnp.result_type(x, *used))
    y = lazy.wide_dot(x, kernel) if self.wide else lazy.dot(x, kernel)
    if bias is None:
      return y
    return y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Embed(nn.Module):
  """A table of vectors that may be in a box of `jaxfl.lazy`."""

  num_embeddings: int
  features: int
  embedding_init: Any

  def setup(self):
    shape = (self.num_embeddings, self.features)
    self.embedding = self.param(
      'embedding', self.embedding_init, shape, unbox=False
    )

  def __call__(self, index: jax.Array) -> jax.Array:
    return lazy.take(self.embedding, index)

  def attend(self, x: jax.Array) -> jax.Array:
    """The inner products of `x` and all vectors, [..., D] -> [..., N]."""
    x = x.astype(jnp.result_type(x, self.embedding.dtype))
    return lazy.wide_dot(x, self.embedding, axis=1)


class Norm(nn.Module):
  """Layer or RMS norm in float32 over the last axis."""

  config: Config
  rms: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    plus_one = c.norm == 'rms_plus_one'
    start = nn.initializers.zeros if plus_one else nn.initializers.ones
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = self.param('scale', start, x.shape[-1:]).reshape(shape)
    y = x.astype(jnp.float32)
    if c.norm == 'layer' and not self.rms:
      bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
      y = y - jnp.mean(y, axis=-1, keepdims=True)
      y = y * jax.lax.rsqrt(
        jnp.mean(y * y, axis=-1, keepdims=True) + c.norm_eps
      )
      return (y * scale + bias.reshape(shape)).astype(x.dtype)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + c.norm_eps)
    return (y * (1.0 + scale if plus_one else scale)).astype(x.dtype)


def _dense(features, bias, name, x, scale=1.0):
  """A linear layer in the dtype of `x`."""
  return Dense(
    features,
    use_bias=bias,
    dtype=x.dtype,
    kernel_init=nn.initializers.variance_scaling(scale, 'fan_in', 'normal'),
    name=name,
  )(x)


class Attention(nn.Module):
  """Grouped-query attention, with or without a cache of keys and values."""

  config: Config

  @nn.compact
  def __call__(self, x, cache, slots, bias, cos_sin):
    c = self.config
    batch, length, _ = x.shape
    split = lambda name, heads: _dense(
      heads * c.head_dim, c.qkv_bias, name, x
    ).reshape(batch, length, heads, c.head_dim)
    q, k, v = (
      split('q', c.num_heads),
      split('k', c.num_kv_heads),
      split('v', c.num_kv_heads),
    )
    if c.qk_norm:
      q = Norm(c, rms=True, name='q_norm')(q)
      k = Norm(c, rms=True, name='k_norm')(k)
    if cos_sin is not None:
      q, k = rotary.turn(q, *cos_sin), rotary.turn(k, *cos_sin)
    if cache is not None:
      rows = jnp.arange(batch)[:, None]
      k = cache['k'].at[rows, slots].set(k)
      v = cache['v'].at[rows, slots].set(v)
      cache = {'k': k, 'v': v}
    scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
    # the G queries of a key head are further rows of it: [B, T G, H, K]; with
    # an axis of their own the products are 10 % slower on a CPU
    groups = c.num_heads // c.num_kv_heads
    q = (q * scale).reshape(batch, length, c.num_kv_heads, groups, c.head_dim)
    q = q.swapaxes(2, 3).reshape(batch, -1, c.num_kv_heads, c.head_dim)
    scores = jnp.einsum('bthk,bshk->bhts', q, k).astype(jnp.float32)
    if c.attention_softcap:
      scores = c.attention_softcap * jnp.tanh(scores / c.attention_softcap)
    if bias is not None:
      scores = scores + jnp.repeat(bias, groups, axis=1)[:, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    y = jnp.einsum('bhts,bshk->bthk', weights, v)
    y = y.reshape(batch, length, groups, c.num_kv_heads, c.head_dim)
    y = y.swapaxes(2, 3).reshape(batch, length, c.num_heads * c.head_dim)
    return _dense(c.model_dim, c.out_bias, 'o', y, 0.5 / c.num_layers), cache


class MLP(nn.Module):
  """The feed-forward part."""

  config: Config

  @nn.compact
  def __call__(self, x):
    c = self.config
    act = ACTIVATIONS[c.activation]
    hidden = _dense(c.mlp_dim, c.mlp_bias, 'up', x)
    if c.gated:
      hidden = act(_dense(c.mlp_dim, c.mlp_bias, 'gate', x)) * hidden
    else:
      hidden = act(hidden)
    return _dense(c.model_dim, c.mlp_bias, 'down', hidden, 0.5 / c.num_layers)


class Block(nn.Module):
  """Attention and feed-forward part with residuals; the body of the scan."""

  config: Config

  @nn.compact
  def __call__(self, x, per_layer, shared):
    c = self.config
    sliding, cache = per_layer
    slots, biases, tables = shared
    choose = lambda pair: jax.tree.map(
      lambda *xs: xs[0] if len(xs) == 1 else jnp.where(sliding, xs[1], xs[0]),
      *pair,
    )
    bias = choose(biases) if biases else None
    cos_sin = choose(tables) if tables else None
    attend = lambda y: Attention(c, name='attention')(
      y, cache, slots, bias, cos_sin
    )
    mlp = MLP(c, name='mlp')
    norm = lambda name: Norm(c, name=name)
    if c.norm_place == 'post':
      y, cache = attend(x)
      x = norm('attention_norm')(x + y)
      return norm('mlp_norm')(x + mlp(x)), cache
    y, cache = attend(norm('attention_norm')(x))
    if c.norm_place == 'both':
      y = norm('attention_post_norm')(y)
    x = x + y
    y = mlp(norm('mlp_norm')(x))
    if c.norm_place == 'both':
      y = norm('mlp_post_norm')(y)
    return x + y, cache


class VocabularyHead(nn.Module):
  """What comes between the hidden states and the logits of the vocabulary."""

  config: Config

  def setup(self):
    c = self.config
    if c.embed_dim and c.embed_dim != c.model_dim:
      self.project_out = Dense(c.embed_dim, use_bias=False)
    if c.head == 'mlm':
      self.dense = Dense(c.model_dim)
      self.norm = Norm(c)
    if not c.tie_embeddings:
      self.out = Dense(c.vocab_size, use_bias=False, wide=True)
    if c.output_bias:
      self.bias = self.param('bias', nn.initializers.zeros, (c.vocab_size,))

  def project(self, x):
    return self.project_out(x)

  def transform(self, x):
    return self.norm(ACTIVATIONS[self.config.activation](self.dense(x)))

  def untied(self, x):
    return self.out(x)

  def add_bias(self, logits):
    if not self.config.output_bias:
      return logits
    return logits + self.bias.reshape((1,) * (logits.ndim - 1) + (-1,))


class ClassHead(nn.Module):
  """Pools the hidden states [B, T, D] and scores the classes, float32[B, C]."""

  config: Config

  @nn.compact
  def __call__(self, hidden, mask):
    c = self.config
    x = pool(c.pool, hidden, mask)
    init = nn.initializers.normal(0.02)
    if c.head_dense:
      x = jnp.tanh(Dense(c.model_dim, kernel_init=init, name='dense')(x))
    if c.embed_dim and c.embed_dim != c.model_dim:
      x = Dense(c.embed_dim, use_bias=False, name='project_out')(x)
    out = Dense(
      c.num_labels, use_bias=c.head_bias, kernel_init=init, name='out'
    )
    return out(x).astype(jnp.float32)


def pool(how: str, hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
  """One vector of every row.

  Args:
    how: `first`, `mean` or `last` of the real positions.
    hidden: [B, T, D].
    mask: [B, T], nonzero where a position is real; None for all.

  Returns:
    [B, D].
  """
  if how == 'first':
    return hidden[:, 0]
  real = jnp.ones(hidden.shape[:2]) if mask is None else mask
  if how == 'mean':  # in float32: bfloat16 cannot count beyond 256
    total = jnp.sum(real.astype(jnp.float32), axis=1, keepdims=True)
    x = jnp.einsum(
      'btd,bt->bd',
      hidden,
      real.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )
    return (x / jnp.maximum(total, 1)).astype(hidden.dtype)
  last = hidden.shape[1] - 1 - jnp.argmax(real[:, ::-1] > 0, axis=1)
  return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
