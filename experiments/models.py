"""The model of a run: read, adapted, and written again."""

import pathlib
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from flax import linen as nn

from experiments.config import Config, UsageError
from jaxfl import adapters, int8, keys
from jaxfl import digest as digest_lib
from jaxfl import typing as jt
from jaxfl.data import tokenizer as tokenizer_lib
from jaxfl.models import config as model_config
from jaxfl.models import hf, native


class Model(NamedTuple):
  """A model as it was read."""

  shape: model_config.Config
  params: jt.Params
  directory: pathlib.Path | None  # None for the embedded one


def load_model(
  config: Config,
  head: str | None,
  *,
  num_labels: int | None = None,
) -> Model:
  """The model with a head: `lm`, `mlm`, `classify`, or None for its own."""
  # all 64 bits of the seed
  root = keys.root(config.seed)
  dtype = 'float32' if config.dtype == 'int8' else config.dtype  # see `adapt`
  key = jax.random.wrap_key_data(root, impl='threefry2x32')
  pool = config.pool if head == 'classify' else None
  options = {'head': head, 'num_labels': num_labels, 'pool': pool, 'key': key}
  if config.model == 'embedded' or native.is_native(config.model):
    directory = None if config.model == 'embedded' else config.model
    shape, params = native.load(directory, **options)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return Model(shape, params, pathlib.Path(directory) if directory else None)
  found = hf.load(config.model, dtype=dtype, **options)
  if found.fresh:
    logging.info('new weights: %s', ', '.join(found.fresh))
  return Model(found.config, found.params, pathlib.Path(found.source_dir))


def load_tokenizer(model: Model) -> tokenizer_lib.Tokenizer:
  """The tokenizer that came with a model."""
  if model.directory is None or native.is_native(model.directory):
    return tokenizer_lib.load('bytes')
  found = tokenizer_lib.load(model.directory)
  # a pad token that was added to the tokenizer alone; any id does, as it is
  # masked, but one that the model lacks would make its hidden states nan
  known = found.pad_id < model.shape.vocab_size
  return found if known else found._replace(pad_id=0)


def make_adapter(
  config: Config, shape: model_config.Config
) -> adapters.Adapter:
  """The adapter of a config, for a model of that shape."""
  head = ('head/*',) if shape.head == 'classify' else ('lm_head/*',)
  also = head if shape.head == 'classify' else ()
  if config.adapter == 'lora':
    return adapters.lora(
      rank=config.lora_rank,
      alpha=config.lora_alpha,
      targets=tuple(config.lora_targets.split(',')),
      also=also,
    )
  if config.adapter == 'head':
    return adapters.head_only(patterns=head)
  if config.adapter == 'bias':
    return adapters.bias_only(also=also)
  return adapters.full()


def adapt(
  config: Config, model: Model
) -> tuple[adapters.Adapter, jt.Params, jt.Params]:
  """The adapter of a config, what it trains of a model, and the rest.

  Raises:
    UsageError: if nothing is left that could have eight bits.
  """
  if config.dtype == 'int8' and config.adapter == 'full':
    raise UsageError(
      'dtype int8 is for frozen weights, and adapter full leaves none; use'
      ' adapter lora, head or bias'
    )
  adapter = make_adapter(config, model.shape)
  trainable, frozen = adapter.init(model.params, keys.root(config.seed))
  if config.dtype == 'int8':
    frozen = int8.quantise(frozen)
  return adapter, trainable, frozen


class Base(NamedTuple):
  """The base model of a run that is over, as the run had it."""

  model: Model
  adapter: adapters.Adapter
  trainable: jt.Params
  frozen: jt.Params


def load_base(
  config: Config, shape: model_config.Config, frozen_digest: str
) -> Base:
  """Reads the base model of a run again.

  Args:
    config: of the run.
    shape: of its model.
    frozen_digest: of the weights that were not trained.

  Raises:
    UsageError: if the base model isn't what it was.
  """
  labels = shape.num_labels if shape.head == 'classify' else None
  model = load_model(config, shape.head, num_labels=labels)
  adapter, trainable, frozen = adapt(config, model)
  was = f'model {config.model!r} is not what it was when the run was made'
  if model.shape != shape:
    raise UsageError(f'{was}: it has another shape')
  found = digest_lib.digest(frozen)
  if found != frozen_digest:
    raise UsageError(
      f'{was}: its digest is {found[:16]}, not {frozen_digest[:16]}'
    )
  return Base(model, adapter, trainable, frozen)


def export(base: Base, params: jt.Params, directory: str) -> None:
  """Writes the whole model, in the layout that it was loaded from.

  Args:
    base: from `load_base`.
    params: what was trained; their paths matter, not their structure.
    directory: to write; must not exist.
  """
  check_new(directory)
  model = base.model
  whole = nn.meta.unbox(base.adapter.merge(base.frozen, params))
  merged = jax.tree.map(np.asarray, whole)
  if model.directory is None or native.is_native(model.directory):
    native.save(directory, model.shape, merged)
  else:
    hf.save(directory, model.shape, merged, source=model.directory)


def check_new(directory: str) -> None:
  """Raises UsageError if the directory to write exists."""
  if pathlib.Path(directory).exists():
    raise UsageError(f'out: {directory} exists; choose another directory')
