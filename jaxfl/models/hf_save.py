"""Writes a directory that transformers loads."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxfl import keys
from jaxfl import typing as jt
from jaxfl.models import hf_config, hf_files, transformer
from jaxfl.models.config import Config
from jaxfl.models.hf_heads import POOL_FIELD, is_native, num_labels
from jaxfl.models.hf_names import LAYOUTS, Layout

_COPIED = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
  'added_tokens.json', 'vocab.json', 'merges.txt', 'vocab.txt',
  'tokenizer.model', 'sentencepiece.bpe.model', 'spiece.model',
  'chat_template.jinja', 'chat_template.json', 'generation_config.json',
  'modules.json', 'sentence_bert_config.json',
  'config_sentence_transformers.json', '1_Pooling/config.json',
)  # fmt: skip
_HEAD_FIELDS = (
  'head', 'num_labels', 'pool', 'head_dense', 'head_bias', 'output_bias',
)  # fmt: skip


def save(
  directory: str | os.PathLike,
  config: Config,
  params: jt.Params,
  *,
  source: str | os.PathLike,
) -> None:
  """Writes a model as transformers does: config.json and model.safetensors.

  The config.json of the source is kept but for the head, the classes and the
  dtype; its tokenizer files are copied.

  A classifier that transformers does not have (the mean of the hidden states)
  goes with the base model's class: `AutoModel` loads the encoder, whose hidden
  states are the same, and reports the classifier's tensors as unexpected.
  `load` here reads the whole of it. Loading such a directory as a
  ...ForSequenceClassification gives a random pooler: transformers says so.

  Args:
    directory: where to; made if absent.
    config: the model's shape; that of the source but for the head.
    params: its parameters, all float32 or all bfloat16.
    source: directory of the checkpoint that the model comes from.

  Raises:
    FileNotFoundError: if the source has no config.json.
    ValueError: if the config is not the source's, the parameters are not the
      config's, or the directory has other weights.
  """
  directory, source = os.fspath(directory), os.fspath(source)
  path = os.path.join(source, 'config.json')
  fields = hf_files.read_json(path)
  layout = LAYOUTS[_check_config(config, fields, path)]
  dtype = _check_params(config, params)
  named = dict(keys.named_leaves(params))
  native = config.head != 'classify' or is_native(config)
  head = config.head if native else 'none'
  prefix = '' if head == 'none' else layout.prefix
  tensors = _tensors(config, layout, named, prefix)
  os.makedirs(directory, exist_ok=True)
  _check_empty(directory)
  new = _new_fields(fields, layout, config, head, native, dtype, path)
  code = 'F32' if dtype == 'float32' else 'BF16'
  hf_files.write(os.path.join(directory, 'model.safetensors'), tensors, code)
  with open(os.path.join(directory, 'config.json'), 'w') as file:
    file.write(json.dumps(new, indent=2, sort_keys=True) + '\n')
  for name in _COPIED:
    _copy(os.path.join(source, name), os.path.join(directory, name))


def _check_config(config, fields, path):
  """The model_type, if the config is that of the fields but for the head."""
  base = hf_config.read(fields, path)
  heads = {name: getattr(config, name) for name in _HEAD_FIELDS}
  base = dataclasses.replace(base, **heads)
  for field in dataclasses.fields(config):
    ours, theirs = (getattr(x, field.name) for x in (config, base))
    if ours != theirs:
      raise ValueError(
        f'config.{field.name} is {ours!r}, but {path} says {theirs!r}'
      )
  if config.head == 'none' and config.embed_dim:
    raise ValueError(
      f'{path}: a model with word_embed_proj_dim {config.embed_dim} can only '
      'be saved with a head'
    )
  return fields['model_type']


def _check_params(config, params):
  """The dtype's name, if the parameters are those of the config."""
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  wanted = {name: x.shape for name, x in keys.named_leaves(shapes)}
  found = dict(keys.named_leaves(params))
  if wrong := sorted(set(wanted) ^ set(found)):
    side = 'missing' if wrong[0] in wanted else 'not of this config'
    raise ValueError(f'the parameter {wrong[0]!r} is {side}')
  for name, x in found.items():
    if x.shape != wanted[name]:
      raise ValueError(
        f'the parameter {name!r} has the shape {x.shape}, not {wanted[name]}'
      )
  dtypes = sorted({x.dtype.name for x in found.values()})
  if len(dtypes) > 1 or dtypes[0] not in ('float32', 'bfloat16'):
    raise ValueError(
      'the parameters must be all float32 or all bfloat16, found '
      f'{", ".join(dtypes)}'
    )
  return dtypes[0]


def _tensors(
  config: Config, layout: Layout, named: Mapping[str, Any], prefix: str
) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
  """Of every tensor of the file its shape and what makes it."""
  parts: dict[str, list[tuple[int, Callable[[], np.ndarray]]]] = {}
  shapes: dict[str, tuple[int, ...]] = {}
  for path, leaf in named.items():
    slot = layout.slot(path, config)
    stacked = '{}' in slot.name
    shape = leaf.shape[1:] if stacked else leaf.shape
    if slot.part is not None:
      shape = (*shape[:-1], 3 * shape[-1])
    for i, name in enumerate(slot.names(config.num_layers)):
      name = prefix + name if slot.base else name
      make = functools.partial(
        _entry, leaf, i if stacked else None, slot.transposed
      )
      parts.setdefault(name, []).append((slot.part or 0, make))
      shapes[name] = shape[::-1] if slot.transposed else shape
  return {
    name: (shapes[name], functools.partial(_join, makes))
    for name, makes in sorted(parts.items())
  }


def _join(makes):
  """One tensor from its parts (place, function) along the last axis."""
  ordered = [make() for _, make in sorted(makes, key=lambda x: x[0])]
  return ordered[0] if len(ordered) == 1 else np.concatenate(ordered, axis=-1)


def _entry(leaf, i, transposed):
  value = np.asarray(leaf if i is None else leaf[i])
  return value.T if transposed else value


def _new_fields(fields, layout, config, head, native, dtype, path):
  """The fields of the new config.json."""
  dropped = ('torch_dtype', 'dtype', 'auto_map', 'num_labels', POOL_FIELD)
  new = {name: x for name, x in fields.items() if name not in dropped}
  new['torch_dtype' if 'torch_dtype' in fields else 'dtype'] = dtype
  new['architectures'] = [
    next(name for name, h in layout.architectures.items() if h == head)
  ]
  if config.head == 'classify':
    if 'id2label' not in new or num_labels(new, path) != config.num_labels:
      names = [f'LABEL_{i}' for i in range(config.num_labels)]
      new['id2label'] = {str(i): name for i, name in enumerate(names)}
      new['label2id'] = {name: i for i, name in enumerate(names)}
    if not native:
      new[POOL_FIELD] = config.pool
  return new


def _check_empty(directory):
  for name in sorted(os.listdir(directory)):
    if name != 'model.safetensors' and name.endswith(
      ('.safetensors', '.safetensors.index.json')
    ):
      raise ValueError(
        f'{directory} has {name}, which would be in the way: save to an empty '
        'directory'
      )


def _copy(source, target):
  if os.path.isfile(source) and not (
    os.path.exists(target) and os.path.samefile(source, target)
  ):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(source, target)
