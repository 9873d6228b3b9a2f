"""Models of the Hugging Face hub: directories in and out.

A directory has config.json, *.safetensors and tokenizer files. Tensors are read
a few megabytes at a time straight into their stacked place, so that loading
needs little more memory than the parameters.
"""

import os
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from absl import logging

from jaxfl import keys
from jaxfl import typing as jt
from jaxfl.models import hf_config, hf_files
from jaxfl.models.config import Config
from jaxfl.models.hf_heads import Wish, choose
from jaxfl.models.hf_names import LAYOUTS, Layout, Slot, shapes
from jaxfl.models.hf_save import save as save

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}
_PATTERNS = (  # what is fetched from the hub
  '*.json',
  '*.txt',
  'model.safetensors',
  'model-*.safetensors',
  'tokenizer.model',
  '*.bpe.model',
  'spiece.model',
  '*.jinja',
)


class Checkpoint(NamedTuple):
  """A model that was read.

  Attributes:
    config: its shape.
    params: nested dict of NumPy arrays, ready for `transformer`.
    source_dir: the directory with its config.json and tokenizer files.
    fresh: paths of the parameters that are new and random.
  """

  config: Config
  params: jt.Params
  source_dir: str
  fresh: tuple[str, ...]


def load(
  source: str | os.PathLike,
  *,
  dtype: str = 'float32',
  head: str | None = None,
  num_labels: int | None = None,
  pool: str | None = None,
  key: jax.Array | None = None,
) -> Checkpoint:
  """Reads a model.

  A classifier that the checkpoint does not have, or has with another number of
  classes or another pooling, is made anew: normal with standard deviation 0.02,
  no bias. That of BERT starts from the pooler if there is one; that of a
  sentence-transformers directory reads the pooling named there.

  Args:
    source: a directory, or a hub id such as `facebook/opt-125m`.
    dtype: of the parameters, `float32` or `bfloat16`.
    head: `lm`, `mlm`, `classify` or `none`; None for the checkpoint's own.
    num_labels: classes of `classify`; None for the checkpoint's.
    pool: what `classify` reads: `first`, `mean` or `last`; None for what the
      checkpoint says, else the family's.
    key: typed key of a new head.

  Returns:
    The checkpoint.

  Raises:
    FileNotFoundError: if there is no such directory, config.json, model or
      shard, or the hub can't be reached.
    ValueError: if the architecture or a setting is not supported; tensors are
      missing, left over or of the wrong shape; a file is damaged; or the head
      can't be had. The text names the file and the field or tensor.
  """
  if dtype not in DTYPES:
    raise ValueError(f'dtype is {dtype!r}, expected one of {", ".join(DTYPES)}')
  wish = Wish(head=head, num_labels=num_labels, pool=pool)
  directory = _directory(os.fspath(source))
  path = os.path.join(directory, 'config.json')
  fields = hf_files.read_json(path)
  base = hf_config.read(fields, path)
  layout = LAYOUTS[fields['model_type']]
  tensors = _tensors(directory, layout, base)
  config, fresh = choose(base, layout, fields, tensors, wish, directory)
  slots = _slots(config, layout, tensors, fresh, directory)
  if key is None and fresh:
    raise ValueError(f'{directory}: the head is new and needs a key')
  made: dict[str, Any] = {}
  for name, (shape, slot) in slots.items():
    value = np.zeros(shape, DTYPES[dtype])
    if slot is None:
      _start(value, key, name)
    else:
      _fill(value, slot, tensors, config.num_layers)
    _put(made, name, value)
  new = tuple(name for name, (_, slot) in slots.items() if slot is None)
  if new:
    logging.info('%s: new parameters %s', directory, ', '.join(new))
  return Checkpoint(config, made, directory, new)


def _directory(source: str) -> str:
  if os.path.isdir(source):
    return source
  name = source.strip('/')
  if name != source or name.count('/') > 1 or name.startswith('.'):
    raise FileNotFoundError(f'there is no directory {source}')
  from huggingface_hub import snapshot_download

  try:
    return snapshot_download(source, allow_patterns=list(_PATTERNS))
  except (OSError, ValueError) as e:
    raise FileNotFoundError(
      f'there is no directory {source!r}, and the Hugging Face hub does not '
      f'give it ({type(e).__name__}: {e}). Check the name and the network; '
      f'where there is none, fetch it elsewhere with "hf download {source} '
      '--local-dir DIRECTORY" and give the directory'
    ) from e


def _tensors(directory: str, layout: Layout, config: Config):
  """The checkpoint's tensors by their names without prefix."""
  tensors: dict[str, hf_files.Stored] = {}
  for name, stored in hf_files.find(directory).items():
    short = name.removeprefix(layout.prefix)
    for old, new in (('.gamma', '.weight'), ('.beta', '.bias')):
      if short.endswith(old):  # the first BERT checkpoints
        short = short.removesuffix(old) + new
    if short in tensors:
      raise ValueError(f'{stored.path} has the tensor {name!r} twice')
    tensors[short] = stored
  copies = layout.tied if config.tie_embeddings else ()
  for copy, original in copies:
    if copy in tensors and original not in tensors:
      tensors[original] = tensors.pop(copy)
  return tensors


def _slots(config, layout, tensors, fresh, directory):
  """Of every parameter its shape and slot, None for a new one; checked."""
  slots: dict[str, tuple[tuple[int, ...], Slot | None]] = {}
  missing, used = [], set()
  for path, shape in shapes(config).items():
    new = path.rsplit('/', 1)[0] in fresh
    slot = None if new else layout.slot(path, config)
    slots[path] = (shape, slot)
    for name in slot.names(config.num_layers) if slot else ():
      used.add(name)
      full = layout.prefix + name if slot and slot.base else name
      if name not in tensors:
        missing.append(full)
      else:
        _check(full, tensors[name], _stored_shape(path, shape, slot))
  if missing:
    raise ValueError(
      f'{directory} lacks {len(missing)} tensors: {_few(sorted(missing))}'
    )
  extra = [x for x in tensors if x not in used and not layout.may_drop(x)]
  if extra:
    raise ValueError(
      f'{directory} has {len(extra)} tensors that a {config.head} model of '
      f'this family does not have: {_few(sorted(extra))}'
    )
  if config.head in ('lm', 'mlm') and config.tie_embeddings:
    _check_tied(layout, tensors)
  return slots


def _few(names):
  return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def _stored_shape(path, shape, slot):
  if path.startswith('layers/'):
    shape = shape[1:]
  if slot.part is not None:
    shape = (*shape[:-1], 3 * shape[-1])
  return shape[::-1] if slot.transposed else shape


def _check(name, stored, shape):
  hf_files.check_dtype(name, stored)
  if stored.shape != shape:
    raise ValueError(
      f'{stored.path}: the tensor {name!r} has the shape {list(stored.shape)}, '
      f'config.json says {list(shape)}'
    )


def _check_tied(layout, tensors):
  """Refuses output projections that are tied but differ."""
  for copy, original in layout.tied:
    if copy not in tensors:
      continue
    a, b = tensors[copy], tensors[original]
    hf_files.check_dtype(copy, a)
    if a.shape != b.shape or not all(
      np.array_equal(x, y)
      for (_, x), (_, y) in zip(a.pieces(), b.pieces(), strict=True)
    ):
      raise ValueError(
        f'{a.path}: tie_word_embeddings is true, but {copy!r} is not equal to '
        f'{layout.prefix + original!r}'
      )


def _fill(value, slot, tensors, num_layers):
  names = slot.names(num_layers)
  places = value if '{}' in slot.name else [value]
  for name, place in zip(names, places, strict=True):
    width = place.shape[-1]
    place = place.T if slot.transposed else place
    for rows, piece in tensors[name].pieces():
      if slot.part is not None:
        piece = piece[..., slot.part * width : (slot.part + 1) * width]
      place[rows] = piece


def _start(value, key, name):
  """Normal kernels, zero biases; the same bits for every version of JAX."""
  if name.endswith('/kernel'):
    seed = jax.random.key_data(jax.random.fold_in(key, keys.tensor_id(name)))
    rng = np.random.default_rng(np.asarray(seed))
    value[...] = 0.02 * rng.standard_normal(value.shape)


def _put(tree, path, value):
  *parents, last = path.split('/')
  for name in parents:
    tree = tree.setdefault(name, {})
  tree[last] = value
