"""From settings to a problem: data, a model, what is trained and measured.

Five kinds of data, each with the settings that it reads:

  * text: the default task, or a directory of text; any stretch is an example.
  * features: a linear layer on an npz file of features (`jaxfl.data.features`).
  * images: a small network on files as those of MNIST (`jaxfl.data.images`).
  * tables: numbers to predict from numbers, a known table or a csv file with a
    target (`jaxfl.data.tables`).
  * rows: everything else; a task by name, a file, a folder or a hub id.
"""

import pathlib

from experiments import (
  features_problem,
  images_problem,
  rows_problem,
  tables_problem,
  text_problem,
)
from experiments.config import Config, UsageError
from experiments.parts import Problem
from jaxfl.data import catalog, images, known_tables, sources

_ROWS_SETTINGS = frozenset(
  {'train_split', 'test_split', 'label_names', 'columns', 'template', 'words'}
  | {'form', 'length_normalised', 'pool', 'generate_examples', 'max_new_tokens'}
)
_PARTITION = frozenset(
  {'data_dir', 'partition', 'dirichlet_alpha', 'min_examples'}
  | {'labels_per_client', 'partition_column', 'objective'}
)
_MODEL = frozenset(
  {'model', 'dtype', 'adapter', 'lora_rank', 'lora_alpha', 'lora_targets'}
  | {'sequence_length', 'eval_examples', 'eval_batch_size'}
)
SETTINGS = {
  'text': _MODEL,
  'features': _PARTITION | {'hidden_units'},
  'images': _PARTITION | {'model', 'eval_examples', 'eval_batch_size'},
  'tables': _PARTITION
  | {'target', 'feature_scaling', 'label_names', 'hidden_units'},
  'rows': _ROWS_SETTINGS | _PARTITION | _MODEL,
}
_BUILDERS = {
  'text': text_problem.build,
  'features': features_problem.build,
  'images': images_problem.build,
  'tables': tables_problem.build,
  'rows': rows_problem.build,
}


def kind_of(config: Config) -> str:
  """Which kind of data the dataset of a config is; see the module."""
  name = config.dataset
  if name == features_problem.MINILM_SST2 or name.endswith('.npz'):
    return 'features'
  if name == 'python_text':
    return 'text'
  if name in images.NAMES:
    return 'images'
  path = pathlib.Path(name)
  if name in known_tables.NAMES or (
    config.target is not None and sources.file_format(path) == 'csv'
  ):
    return 'tables'
  if name in catalog.TASKS or not path.is_dir():
    return 'rows'
  if images.holds_images(path):
    return 'images'
  return 'rows' if holds_rows(path, config.train_split) else 'text'


def holds_rows(path: pathlib.Path, split: str) -> bool:
  """Whether a folder has rows: files of the split, or nothing but tables."""
  entries = [p for p in path.iterdir() if not p.name.startswith('.')]
  formats = {sources.file_format(p) if p.is_file() else None for p in entries}
  tables = bool(formats) and formats <= {'csv', 'json', 'parquet'}
  return tables or any(sources.is_split_file(p, split) for p in entries)


def build(config: Config) -> Problem:
  """The problem of a resolved config.

  Raises:
    UsageError: naming the setting, file or field that is wrong.
  """
  try:
    return _BUILDERS[kind_of(config)](config)
  except (OSError, ValueError, IndexError) as error:
    raise UsageError(blame(config, error)) from error


def blame(config: Config, error: Exception) -> str:
  """An error of model or data, with what was asked for."""
  return f'model {config.model!r}, dataset {config.dataset!r}: {error}'
