"""Writes a directory that transformers loads."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxfl import keys
from jaxfl import typing as jt
from jaxfl.models import hf_config, hf_files
from jaxfl.models.config import Config
from jaxfl.models.hf_compose import compose
from jaxfl.models.hf_heads import (
  POOL_FIELD,
  check_savable,
  is_native,
  num_labels,
  without_head,
)
from jaxfl.models.hf_names import LAYOUTS, Layout, shapes

_COPIED = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
  'added_tokens.json', 'vocab.json', 'merges.txt', 'vocab.txt',
  'tokenizer.model', 'sentencepiece.bpe.model', 'spiece.model',
  'chat_template.jinja', 'chat_template.json', 'generation_config.json',
  'modules.json', 'sentence_bert_config.json',
  'config_sentence_transformers.json', '1_Pooling/config.json',
)  # fmt: skip


def save(
  directory: str | os.PathLike,
  config: Config,
  params: jt.Params,
  *,
  source: str | os.PathLike | None = None,
) -> None:
  """Writes a model as transformers does: config.json and model.safetensors.

  The config.json of the source is kept but for the head, the classes and the
  dtype; its tokenizer files are copied. Without a source, the fields are those
  of a family that computes the same.

  A classifier that transformers does not have (the mean of the hidden states)
  goes with the base model's class: `AutoModel` loads the encoder, whose hidden
  states are the same, and reports the classifier's tensors as unexpected.
  `load` here reads the whole of it. Loading such a directory as a
  ...ForSequenceClassification gives a random pooler: transformers says so.
  A BERT without classifier is saved without its pooler, which it does not use.

  Args:
    directory: where to; made if absent.
    config: the model's shape; that of the source but for the head.
    params: its parameters, all float32 or all bfloat16.
    source: directory of the checkpoint that the model comes from, if any.

  Raises:
    FileNotFoundError: if the source has no config.json.
    ValueError: if the config is not the source's or no family has it, the
      parameters are not the config's, or the directory has other weights.
  """
  directory = os.fspath(directory)
  check_savable(config)
  if source is None:
    fields = compose(config)
  else:
    fields = _source_fields(config, os.path.join(source, 'config.json'))
  layout = LAYOUTS[fields['model_type']]
  dtype = _check_params(config, params)
  named = dict(keys.named_leaves(params))
  native = config.head != 'classify' or is_native(config)
  head = config.head if native else 'none'
  prefix = '' if head == 'none' else layout.prefix
  tensors = _tensors(config, layout, named, prefix)
  os.makedirs(directory, exist_ok=True)
  _check_empty(directory)
  new = _new_fields(fields, layout, config, head, native, dtype)
  code = 'F32' if dtype == 'float32' else 'BF16'
  hf_files.write(os.path.join(directory, 'model.safetensors'), tensors, code)
  with open(os.path.join(directory, 'config.json'), 'w') as file:
    file.write(json.dumps(new, indent=2, sort_keys=True) + '\n')
  if source is not None:
    for name in _COPIED:
      _copy(os.path.join(source, name), os.path.join(directory, name))


def _source_fields(config, path):
  """The fields of a config.json, if it is the same model but for the head."""
  fields = hf_files.read_json(path)
  base, own = hf_config.read(fields, path), without_head(config)
  for field in dataclasses.fields(config):
    ours, theirs = (getattr(x, field.name) for x in (own, base))
    if ours != theirs:
      raise ValueError(
        f'config.{field.name} is {ours!r}, but {path} says {theirs!r}'
      )
  return fields


def _check_params(config, params):
  """The dtype's name, if the parameters are those of the config."""
  wanted = shapes(config)
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
  sizes: dict[str, tuple[int, ...]] = {}
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
      sizes[name] = shape[::-1] if slot.transposed else shape
  return {
    name: (sizes[name], functools.partial(_join, makes))
    for name, makes in sorted(parts.items())
  }


def _join(makes):
  """One tensor from its parts (place, function) along the last axis."""
  ordered = [make() for _, make in sorted(makes, key=lambda x: x[0])]
  return ordered[0] if len(ordered) == 1 else np.concatenate(ordered, axis=-1)


def _entry(leaf, i, transposed):
  value = np.asarray(leaf if i is None else leaf[i])
  return value.T if transposed else value


def _new_fields(fields, layout, config, head, native, dtype):
  """The fields of the new config.json."""
  dropped = ('torch_dtype', 'dtype', 'auto_map', 'num_labels', POOL_FIELD)
  new = {name: x for name, x in fields.items() if name not in dropped}
  new['torch_dtype' if 'torch_dtype' in fields else 'dtype'] = dtype
  new['architectures'] = [
    next(name for name, h in layout.architectures.items() if h == head)
  ]
  if config.head == 'classify':
    if (
      'id2label' not in new
      or num_labels(new, 'config.json') != config.num_labels
    ):
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
