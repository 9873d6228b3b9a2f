"""The models that steps are measured on: shapes, parameters and batches."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfl import objectives
from jaxfl import typing as jt
from jaxfl.models import native, transformer
from jaxfl.models.config import Config

MINILM = Config(
  vocab_size=30522,
  num_layers=6,
  model_dim=384,
  num_heads=12,
  num_kv_heads=12,
  head_dim=32,
  mlp_dim=1536,
  causal=False,
  norm_eps=1e-12,
  norm_place='post',
  embed_norm=True,
  final_norm=False,
  max_positions=512,
  learned_positions=True,
  type_vocab=2,
  head='classify',
  num_labels=2,
  pool='mean',
)
OPT = Config(
  vocab_size=50272,
  num_layers=24,
  model_dim=2048,
  num_heads=32,
  num_kv_heads=32,
  head_dim=64,
  mlp_dim=8192,
  activation='relu',
  max_positions=2048,
  learned_positions=True,
  position_offset=2,
)


class Model(NamedTuple):
  """What a step needs; the length is that of a row of its batches."""

  config: Config
  length: int
  dtype: str | None = None  # of the forward pass; None: as the weights are

  @property
  def loss_fn(self) -> jt.LossFn:
    if self.config.head == 'classify':
      scores = objectives.class_scores(self.config, 'head')
      return objectives.classification_loss(scores)
    return objectives.lm_loss(self.config)

  def batch(self, tokens: int) -> dict[str, np.ndarray]:
    """Rows of random tokens, all of them real: at least so many in all."""
    rng = np.random.default_rng(0)
    length = min(self.length, tokens)
    shape = (-(-tokens // length), length)
    batch: dict[str, Any] = {
      'tokens': rng.integers(0, self.config.vocab_size, shape).astype(np.int32)
    }
    if self.config.head == 'classify':
      batch['mask'] = np.ones(shape, np.int8)
      batch['label'] = rng.integers(0, 2, shape[0]).astype(np.int32)
    return batch


def model(name: str) -> Model:
  """By name: embedded, minilm or opt-1.3b."""
  if name == 'embedded':
    return Model(native.load_embedded()[0], 128)
  return {
    'minilm': Model(MINILM, 64),
    'opt-1.3b': Model(OPT, 512, 'bfloat16'),
  }[name]


def params(name: str) -> jt.Params:
  """float32 parameters: the embedded model's own, random ones for a shape."""
  if name == 'embedded':
    return native.load_embedded()[1]
  config = model(name).config
  return jax.jit(lambda: transformer.init(config, jax.random.key(0)))()
