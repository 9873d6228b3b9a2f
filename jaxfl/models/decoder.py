"""A small byte-level decoder, made to be quick in forward passes on a CPU.

A pre-norm transformer over bytes: RMS normalisation, rotary positions, squared
ReLU, tied embeddings, an output bias. Zeroth-order methods run nothing but the
forward pass. What counts there on a CPU is the softmax of the attention: two
heads instead of four save a fifth of the time at T = 128, GELU instead of the
squared ReLU costs a thirtieth more, and the kind of norm costs nothing.

The layers are stacked by `nn.scan`: every parameter below `layers` has a
leading layer axis, and the compile time does not depend on the depth.

Shapes: B examples, T positions, D model, H heads, K head, F hidden, V bytes.

References:
  Su et al., "RoFormer: Enhanced transformer with rotary position embedding",
    2021, https://arxiv.org/abs/2104.09864
  Zhang and Sennrich, "Root mean square layer normalization", NeurIPS 2019,
    https://arxiv.org/abs/1910.07467
  So et al., "Primer: Searching for efficient transformers", NeurIPS 2021 (the
    squared ReLU), https://arxiv.org/abs/2109.08668
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxfl import keys
from jaxfl import typing as jt

FORMAT = 'jaxfl.decoder/1'  # in the metadata of every file that `save` writes
EMBEDDED = 'embedded/model.safetensors'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The shape of a `Decoder`.

  Attributes:
    vocab_size: number of tokens; 256 for bytes.
    num_layers: number of transformer blocks.
    model_dim: width of the residual stream, a multiple of `2 * num_heads`.
    num_heads: attention heads.
    mlp_dim: hidden units of a block's feed-forward part.
    rope_base: base of the rotary frequencies.

  Raises:
    ValueError: if a size is not positive or the heads do not fit.
  """

  vocab_size: int = 256
  num_layers: int = 4
  model_dim: int = 128
  num_heads: int = 2
  mlp_dim: int = 512
  rope_base: float = 10_000.0

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value <= 0:
        raise ValueError(f'{name} must be positive, got {value}')
    if self.model_dim % (2 * self.num_heads):
      raise ValueError(
        f'model_dim {self.model_dim} is not a multiple of twice num_heads '
        f'{self.num_heads}'
      )


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
  """`x / rms(x) * gain`: x float32[B, T, D], gain float32[D]."""
  scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
  return x * scale * gain[None, None, :]


def rotary(x: jax.Array, base: float) -> jax.Array:
  """Turns the halves of float32[B, T, H, K] by an angle that grows with T."""
  length, half = x.shape[1], x.shape[-1] // 2
  rates = base ** (-np.arange(half) / half)
  angles = np.arange(length)[:, None] * rates[None, :]
  cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
  cos, sin = cos[None, :, None, :], sin[None, :, None, :]
  left, right = x[..., :half], x[..., half:]
  return jnp.concatenate(
    [left * cos - right * sin, left * sin + right * cos], axis=-1
  )


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Softmax attention to the positions up to one's own; float32[B, T, H, K]."""
  length, head = q.shape[1], q.shape[-1]
  hidden = np.where(np.tri(length, dtype=bool), 0.0, -1e9).astype(np.float32)
  scores = jnp.einsum('bqhk,bshk->bhqs', q, k) * head**-0.5
  weights = jax.nn.softmax(scores + hidden[None, None], axis=-1)
  return jnp.einsum('bhqs,bshk->bqhk', weights, v)


class Block(nn.Module):
  """Attention and feed-forward part with residuals; the body of the scan."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array, _) -> tuple[jax.Array, None]:
    c = self.config
    batch, length, dim = x.shape
    init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
    small = nn.initializers.variance_scaling(
      0.5 / c.num_layers, 'fan_in', 'normal'
    )
    gain_attention = self.param('gain_attention', nn.initializers.ones, (dim,))
    qkv = self.param('qkv', init, (dim, 3 * dim))
    out = self.param('out', small, (dim, dim))
    gain_mlp = self.param('gain_mlp', nn.initializers.ones, (dim,))
    up = self.param('up', init, (dim, c.mlp_dim))
    down = self.param('down', small, (c.mlp_dim, dim))

    heads = rms_norm(x, gain_attention) @ qkv
    heads = heads.reshape(batch, length, 3, c.num_heads, dim // c.num_heads)
    q, k = (rotary(heads[:, :, i], c.rope_base) for i in range(2))
    y = causal_attention(q, k, heads[:, :, 2])
    x = x + y.reshape(batch, length, dim) @ out
    hidden = jax.nn.relu(rms_norm(x, gain_mlp) @ up)
    return x + (hidden * hidden) @ down, None


class Decoder(nn.Module):
  """Logits float32[B, T, V] of the next token from tokens integer[B, T]."""

  config: Config

  @nn.compact
  def __call__(self, tokens: jt.Array) -> jax.Array:
    c = self.config
    embedding = self.param(
      'embedding',
      nn.initializers.normal(c.model_dim**-0.5),
      (c.vocab_size, c.model_dim),
    )
    gain = self.param('gain', nn.initializers.ones, (c.model_dim,))
    bias = self.param('bias', nn.initializers.zeros, (c.vocab_size,))
    layers = nn.scan(
      Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=c.num_layers,
    )(c, name='layers')
    x, _ = layers(embedding[jnp.asarray(tokens)], None)
    return rms_norm(x, gain) @ embedding.T + bias[None, None, :]


def init(config: Config, key: jax.Array) -> jt.Params:
  """Random parameters, a nested dict of float32 arrays, from a typed key."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return Decoder(config).init(key, tokens)['params']


def apply(config: Config, params: jt.Params, tokens: jt.Array) -> jax.Array:
  """Logits float32[B, T, V] of the next token from tokens integer[B, T]."""
  logits = Decoder(config).apply({'params': params}, tokens)
  return cast(jax.Array, logits)


def _token_stats(config, params, batch):
  """Loss, hit and weight float32[B, T] of every target byte."""
  tokens = jnp.asarray(batch['tokens']).astype(jnp.int32)
  logits = apply(config, params, tokens[:, :-1])
  targets = tokens[:, 1:]
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  loss = jax.nn.logsumexp(logits, axis=-1) - picked
  mask = batch.get('mask')
  weight = jnp.ones_like(loss) if mask is None else mask.astype(loss.dtype)
  return loss, (jnp.argmax(logits, axis=-1) == targets), weight


def make_example_loss(
  config: Config,
) -> Callable[[jt.Params, jt.Batch], jax.Array]:
  """The loss of every example of a batch.

  Returns:
    A function of `(params, batch)` with the mean next-byte cross-entropy of
    every example in nats, float32[B]. `batch` has `tokens`, integer[B, T + 1],
    and may have `mask`, [B, T], the weights of the targets `tokens[:, 1:]`. An
    example whose mask is zero has the loss 0.
  """

  def example_loss(params, batch):
    loss, _, weight = _token_stats(config, params, batch)
    total = jnp.maximum(jnp.sum(weight, axis=-1), 1e-9)
    return jnp.sum(loss * weight, axis=-1) / total

  return example_loss


def make_loss(config: Config) -> jt.LossFn:
  """`loss_fn(params, batch)`: the mean of `make_example_loss`, float32[]."""
  example_loss = make_example_loss(config)
  return lambda params, batch: jnp.mean(example_loss(params, batch))


def make_evaluate(
  config: Config,
) -> Callable[[jt.Params, jt.Batch], dict[str, float]]:
  """Evaluation over a fixed stack of batches, compiled once.

  Returns:
    A function of `(params, batches)` with `loss` (nats per byte),
    `bits_per_byte`, and `accuracy` (of the likeliest next byte), means over all
    bytes that count. `batches` has `tokens`, integer[N, B, T + 1], and may have
    `mask`, [N, B, T].
  """

  def sums(params, batches):
    def step(carry, batch):
      loss, hit, weight = _token_stats(config, params, batch)
      new = (jnp.sum(loss * weight), jnp.sum(hit * weight), jnp.sum(weight))
      return jax.tree.map(jnp.add, carry, new), None

    return jax.lax.scan(step, (jnp.zeros(()),) * 3, batches)[0]

  compiled = jax.jit(sums)

  def evaluate(params, batches):
    loss, hits, count = (float(x) for x in compiled(params, batches))
    return {
      'loss': loss / count,
      'bits_per_byte': loss / count / np.log(2).item(),
      'accuracy': hits / count,
    }

  return evaluate


def save(
  path: str | os.PathLike,
  config: Config,
  params: jt.Params,
  *,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes parameters as safetensors, the config as JSON in the metadata.

  Args:
    path: the file to write.
    config: the model's shape.
    params: nested dict of float32 arrays; the tensors' names are their paths,
      such as `layers/qkv`.
    metadata: more text for the header.
  """
  tensors = {
    name: np.ascontiguousarray(leaf) for name, leaf in keys.named_leaves(params)
  }
  header = {
    **(metadata or {}),
    'format': FORMAT,
    'config': json.dumps(dataclasses.asdict(config), sort_keys=True),
  }
  save_file(tensors, path, metadata=header)


def load(path: str | os.PathLike) -> tuple[Config, jt.Params]:
  """Reads what `save` wrote.

  Returns:
    The config and the parameters, a nested dict of float32 arrays.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is not a decoder's, or its tensors do not have the
      names, shapes and dtypes that its config asks for.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f'no model file at {os.fspath(path)!r}')
  with safe_open(path, framework='numpy') as file:
    header = file.metadata() or {}
    found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  if header.get('format') != FORMAT:
    raise ValueError(
      f'{os.fspath(path)!r} has the format {header.get("format")!r}, '
      f'not {FORMAT!r}'
    )
  config = Config(**json.loads(header['config']))
  return config, _nest(found, config)


def _nest(found: dict[str, np.ndarray], config: Config) -> dict[str, Any]:
  """The nested dict of the model's parameters from tensors by path."""
  wanted = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  names = [name for name, _ in keys.named_leaves(wanted)]
  if set(names) != set(found):
    raise ValueError(
      f'missing tensors {sorted(set(names) - set(found))}, '
      f'unexpected tensors {sorted(set(found) - set(names))}'
    )
  for name, leaf in keys.named_leaves(wanted):
    value = found[name]
    if value.shape != leaf.shape or value.dtype != leaf.dtype:
      raise ValueError(
        f'{name!r} is {value.dtype}{list(value.shape)}, expected '
        f'{leaf.dtype}{list(leaf.shape)}'
      )
  return jax.tree.unflatten(
    jax.tree.structure(wanted), [jnp.asarray(found[name]) for name in names]
  )


def load_embedded() -> tuple[Config, jt.Params]:
  """The pretrained decoder that comes with the package; see its MODEL_CARD.md.

  Returns:
    As `load`.
  """
  with resources.as_file(
    resources.files('jaxfl.models').joinpath(EMBEDDED)
  ) as path:
    return load(path)
