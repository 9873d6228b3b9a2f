"""Rows of text as the settings name them: which, with what prompt, how cut."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.config import Config
from jaxfl.data import catalog, examples, templates, windows
from jaxfl.data import rows as rows_lib
from jaxfl.data import tokenizer as tokenizer_lib


def load(config: Config) -> rows_lib.Dataset:
  """The rows of a config's dataset."""
  return catalog.load(
    config.dataset,
    data_dir=config.data_dir,
    columns=rows_lib.parse_columns(config.columns),
    label_names=_names(config.label_names),
    train_split=config.train_split,
    test_split=config.test_split,
  )


def _names(text: str | None) -> tuple[str, ...]:
  return tuple(name.strip() for name in text.split(',')) if text else ()


def template_of(config: Config, data: rows_lib.Dataset) -> templates.Template:
  """The dataset's own template, the one of the settings, or the bare fields."""
  words = _names(config.words)
  if words and len(words) != len(data.label_names):
    raise ValueError(
      f'words are {", ".join(words)}; expected one for each of the labels'
      f' {", ".join(data.label_names)}'
    )
  if config.template is not None:
    return templates.custom(
      config.template,
      words or data.label_names,
      labels=data.label_names,
      name=data.name,
    )
  if config.dataset in templates.TEMPLATES:
    own = templates.match_labels(
      templates.named(config.dataset), data.label_names
    )
    return templates.with_words(own, words) if words else own
  if words:
    raise ValueError('words need a template, such as "{text} It was {answer}"')
  return templates.bare(data.name, data.train[0], data.label_names)


def is_plain(data: rows_lib.Dataset) -> bool:
  """Whether rows are nothing but text: neither labels nor responses."""
  return not data.label_names and 'response' not in data.train[0]


def split_name(data: rows_lib.Dataset, split: str) -> str:
  """What messages call a part of a dataset."""
  return f'{data.name}, split {split}'


class Windows(NamedTuple):
  """Plain text, cut up.

  Attributes:
    train: windows of the clients' texts.
    test: windows of the texts held out.
    parts: the indices of every client's windows.
    notes: a line to show.
  """

  train: examples.Examples
  test: examples.Examples
  parts: list[np.ndarray]
  notes: str


def cut(
  config: Config,
  data: rows_lib.Dataset,
  parts: Sequence[np.ndarray],
  tokenizer: tokenizer_lib.Tokenizer,
  positions: int | None,
) -> Windows:
  """Cuts plain text; a client has the windows of its texts."""
  (train, origin), (test, _) = (
    windows.encode(
      rows,
      tokenizer,
      max_length=config.sequence_length,
      positions=positions,
      name=f'dataset {split_name(data, split)!r}',
    )
    for split, rows in (('train', data.train), ('test', data.test))
  )
  notes = (
    f'{len(data.train)} texts are {len(train)} windows of at most'
    f' {config.sequence_length} tokens'
  )
  return Windows(train, test, windows.share_out(parts, origin), notes)
