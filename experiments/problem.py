"""From settings to a problem: data, a model, what is trained and measured.

Three kinds of data, each with the settings that it reads:

  * text: the default task, or a directory of text; any stretch is an example.
  * features: a linear layer on an npz file of features (`jaxfl.data.features`).
  * rows: everything else; a task by name, a file, a folder or a hub id.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from experiments import checks, text_rows
from experiments.config import Config, UsageError
from jaxfl import adapters, keys, objectives, responses
from jaxfl import digest as digest_lib
from jaxfl import typing as jt
from jaxfl.data import (
  batching,
  catalog,
  encode,
  examples,
  features,
  partition,
  python_text,
  sources,
)
from jaxfl.data import tokenizer as tokenizer_lib
from jaxfl.models import config as model_config
from jaxfl.models import hf, native

MINILM_SST2 = 'minilm_sst2'  # features of the shared data
_MINILM_SST2_FILE = 'minilm_reference/sst2_mean_pool_f16.npz'
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
  'features': _PARTITION,
  'rows': _ROWS_SETTINGS | _PARTITION | _MODEL,
}

_PARTITIONS = {
  'iid': 'iid',
  'dirichlet': 'dirichlet',
  'label': 'by_label',
  'column': 'by_column',
}


class Problem(NamedTuple):
  """What an experiment needs to know of data and model.

  Attributes:
    task: the clients' data.
    params: what is trained, a pytree of float arrays.
    frozen: the rest of the weights.
    loss_fn: frozen, params, batch -> float[].
    evaluate: params -> held-out metrics by name; the first is the main one.
    shape: of the model; None for a linear layer on features.
    notes: lines to show before the run.
  """

  task: batching.Task
  params: jt.Params
  frozen: jt.Params
  loss_fn: Callable[[jt.Params, jt.Params, jt.Batch], jax.Array]
  evaluate: Callable[[jt.Params], dict[str, float]]
  shape: model_config.Config | None
  notes: str = ''


class Model(NamedTuple):
  """A model as it was read."""

  shape: model_config.Config
  params: jt.Params
  directory: pathlib.Path | None  # None for the embedded one


def kind_of(config: Config) -> str:
  """Which kind of data the dataset of a config is; see the module."""
  name = config.dataset
  if name == MINILM_SST2 or name.endswith('.npz'):
    return 'features'
  if name == 'python_text':
    return 'text'
  path = pathlib.Path(name)
  if name in catalog.TASKS or not path.is_dir():
    return 'rows'
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
  kind = kind_of(config)
  try:
    if kind == 'features':
      return _features(config)
    return _text(config) if kind == 'text' else _rows(config)
  except (OSError, ValueError, IndexError) as error:
    raise UsageError(blame(config, error)) from error


def blame(config: Config, error: Exception) -> str:
  """An error of model or data, with what was asked for."""
  return f'model {config.model!r}, dataset {config.dataset!r}: {error}'


def load_model(
  config: Config,
  head: str | None,
  *,
  num_labels: int | None = None,
) -> Model:
  """The model with a head: `lm`, `mlm`, `classify`, or None for its own."""
  # all 64 bits of the seed
  root = keys.root(config.seed)
  key = jax.random.wrap_key_data(root, impl='threefry2x32')
  pool = config.pool if head == 'classify' else None
  options = {'head': head, 'num_labels': num_labels, 'pool': pool, 'key': key}
  if config.model == 'embedded' or native.is_native(config.model):
    directory = None if config.model == 'embedded' else config.model
    shape, params = native.load(directory, **options)
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    return Model(shape, params, pathlib.Path(directory) if directory else None)
  found = hf.load(config.model, dtype=config.dtype, **options)
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


def _assemble(config, model, task, loss_fn, evaluate, notes='') -> Problem:
  """The problem over what the adapter trains."""
  checks.finite(model.params)
  if config.adapter == 'head' and not {'head', 'lm_head'} & set(model.params):
    raise ValueError(
      "adapter head: the model's output is its embedding, it has no head of its"
      ' own; use adapter lora, bias or full'
    )
  adapter = make_adapter(config, model.shape)
  params, frozen = adapter.init(model.params, keys.root(config.seed))
  frozen = jax.device_put(frozen)  # once, not at every evaluation

  def merged_loss(frozen, params, batch):
    whole = adapter.merge(frozen, params)
    if config.forward_dtype is not None:
      whole = jax.tree.map(lambda x: x.astype(config.forward_dtype), whole)
    return loss_fn(whole, batch)

  return Problem(
    task=task,
    params=params,
    frozen=frozen,
    loss_fn=merged_loss,
    evaluate=lambda params: evaluate(adapter.merge(frozen, params)),
    shape=model.shape,
    notes=notes,
  )


def export(
  config: Config,
  shape: model_config.Config,
  params: jt.Params,
  frozen_digest: str,
  directory: str,
) -> None:
  """Writes the whole model, in the layout that it was loaded from.

  Args:
    config: of the run.
    shape: of its model.
    params: what was trained; their paths matter, not their structure.
    frozen_digest: of the weights that were not trained.
    directory: to write; must not exist.

  Raises:
    UsageError: if the directory exists, or the base model isn't what it was.
  """
  if pathlib.Path(directory).exists():
    raise UsageError(f'out: {directory} exists; choose another directory')
  labels = shape.num_labels if shape.head == 'classify' else None
  model = load_model(config, shape.head, num_labels=labels)
  adapter = make_adapter(config, shape)
  _, frozen = adapter.init(model.params, keys.root(config.seed))
  if model.shape != shape or digest_lib.digest(frozen) != frozen_digest:
    raise UsageError(
      f'model {config.model!r} is not what it was when the run was made'
    )
  merged = jax.tree.map(np.asarray, adapter.merge(frozen, params))
  if model.directory is None or native.is_native(model.directory):
    native.save(directory, shape, merged)
  else:
    hf.save(directory, shape, merged, source=model.directory)


def _text(config: Config) -> Problem:
  options = {
    'length': config.sequence_length,
    'eval_batch_size': config.eval_batch_size,
    'eval_examples': config.eval_examples or 10**9,
  }
  model = load_model(config, 'lm')
  if load_tokenizer(model).vocab_size != 256:
    raise ValueError(
      'text is read as bytes, which this model is not made for; use'
      ' --model=embedded, or a --dataset of rows'
    )
  checks.length(config, model.shape)
  if config.dataset == 'python_text':
    task = python_text.load(config.num_clients, **options)
  else:
    task = python_text.from_files(config.dataset, config.num_clients, **options)
  measure = objectives.evaluate_lm(model.shape)

  def evaluate(params):
    values = measure(params, task.eval_batches)
    return {
      'bits_per_byte': values['bits_per_token'],
      'accuracy': values['accuracy'],
    }

  loss_fn = objectives.lm_loss(model.shape)
  return _assemble(config, model, task, loss_fn, evaluate)


def _features(config: Config) -> Problem:
  path = pathlib.Path(config.dataset)
  if config.dataset == MINILM_SST2:
    if config.data_dir is None:
      raise ValueError('needs --data_dir, the folder of the shared data')
    path = pathlib.Path(config.data_dir) / _MINILM_SST2_FILE
  arrays = features.load(path)
  rows = [{'label': int(y)} for y in arrays['y_train']]
  parts, notes = _split(config, rows, 'label', ())
  task = features.task(arrays, parts, name=path.stem)
  num_labels = 1 + int(max(arrays['y_train'].max(), arrays['y_test'].max()))
  width = arrays['f_train'].shape[1]
  out = {
    'kernel': np.zeros((width, num_labels), np.float32),
    'bias': np.zeros(num_labels, np.float32),
  }
  scores = objectives.class_scores(None, 'features')
  loss_fn = objectives.classification_loss(scores, config.objective)
  measure = objectives.evaluate_classes(scores, num_labels)
  return Problem(
    task=task,
    params={'head': {'out': out}},
    frozen=(),
    loss_fn=lambda frozen, params, batch: loss_fn(params, batch),
    evaluate=lambda params: measure(params, task.eval_batches),
    shape=None,
    notes=notes,
  )


def _split(config, rows, label_field, label_names):
  """The clients' indices, and lines that describe them."""
  if config.partition == 'column' and config.partition_column is None:
    raise ValueError('partition column needs partition_column')
  parts = partition.partition(
    _PARTITIONS[config.partition],
    rows,
    num_clients=config.num_clients,
    seed=config.seed,
    alpha=config.dirichlet_alpha,
    min_size=max(config.min_examples, 1),
    column=config.partition_column,
    labels_per_client=config.labels_per_client,
  )
  column = config.partition_column or label_field
  values = None
  if column and all(column in row for row in rows):
    values = [row[column] for row in rows]
  named = label_names if column == 'label' else ()
  return parts, partition.describe(parts, values, named)


def _rows(config: Config) -> Problem:
  data = text_rows.load(config)
  template = text_rows.template_of(config, data) if data.label_names else None
  model, form = _choose_form(config, template, data)
  checks.form(config, form)
  tokenizer = load_tokenizer(model)
  encoded = functools.partial(
    encode.encode,
    template=template,
    tokenizer=tokenizer,
    max_length=config.sequence_length,
    kind='causal' if model.shape.causal else 'masked',
    positions=model.shape.max_positions or None,
  )
  parts, notes = _split(
    config, data.train, 'label' if data.label_names else None, data.label_names
  )
  if text_rows.is_plain(data):
    train, test, parts, more = text_rows.cut(
      config, data, parts, tokenizer, model.shape.max_positions or None
    )
    notes += f'\n{more}'
  else:
    train, test = (
      encoded(rows, form=form, name=text_rows.split_name(data, split))
      for split, rows in (('train', data.train), ('test', data.test))
    )
  for part in (train, test):
    checks.tokens(part, model.shape)
  task = examples.task(
    train,
    test,
    parts,
    name=data.name,
    eval_batch_size=config.eval_batch_size,
    eval_examples=config.eval_examples or None,
    vary_length=True,
  )
  if form == 'lm':
    loss_fn, evaluate = _lm(
      config, model, tokenizer, task, data, encoded, train
    )
  else:
    scores = objectives.class_scores(
      model.shape,
      form,
      label_ids=tuple(() if train.label_ids is None else train.label_ids),
      length_normalised=config.length_normalised,
    )
    loss_fn = objectives.classification_loss(scores, config.objective)
    measure = objectives.evaluate_classes(scores, train.num_labels)
    evaluate = lambda params: measure(params, task.eval_batches)
  return _assemble(config, model, task, loss_fn, evaluate, notes)


def _lm(config, model, tokenizer, task, data, encoded, train):
  """Loss and evaluation of responses."""
  if config.objective == 'accuracy':
    raise ValueError('objective accuracy needs classes; use loss or f1')
  if text_rows.is_plain(data) and (
    config.objective == 'f1' or config.generate_examples
  ):
    raise ValueError(
      'objective f1 and generate_examples need instructions and responses;'
      f' the rows are plain text, with the columns {sorted(data.train[0])}'
    )
  eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
  loss_fn = objectives.lm_loss(model.shape)
  if config.objective == 'f1':
    checks.room(config, model.shape, train)
    loss_fn = objectives.generation_loss(
      model.shape, max_new_tokens=config.max_new_tokens, eos_ids=eos_ids
    )
  measure = objectives.evaluate_lm(model.shape)
  answer = compare = None
  if config.generate_examples:
    chosen = np.linspace(
      0, len(data.test) - 1, min(config.generate_examples, len(data.test))
    )
    rows = [data.test[int(i)] for i in chosen]
    prompts = encoded(
      rows, form='prompt', name=text_rows.split_name(data, 'test')
    )
    checks.tokens(prompts, model.shape)
    checks.room(config, model.shape, prompts)
    answer = responses.make_answer(
      model.shape,
      tokenizer,
      prompts,
      max_new_tokens=config.max_new_tokens,
      batch_size=config.eval_batch_size,
    )
    compare = functools.partial(
      responses.compare,
      references=prompts.references,
      final_numbers=config.dataset == 'gsm8k',
    )

  def evaluate(params):
    values = measure(params, task.eval_batches)
    shown = {k: values[k] for k in ('loss', 'perplexity', 'accuracy')}
    if answer is not None and compare is not None:
      shown |= compare(answer(params))
    return shown

  return loss_fn, evaluate


def _choose_form(config, template, data) -> tuple[Model, str]:
  """The form of the data, and the model with the head that it needs."""
  if not data.label_names:
    if config.form not in ('auto', 'lm'):
      raise ValueError(f'form {config.form} needs labels; use form lm')
    if config.template or config.words:
      raise ValueError(
        'template and words are for rows with labels; these have the columns'
        f' {sorted(data.train[0])}'
      )
    try:
      return load_model(config, 'lm'), 'lm'
    except ValueError as error:
      raise ValueError(
        f'rows without labels are for causal models: {error}'
      ) from error
  if config.form == 'lm':
    raise ValueError('form lm is for responses; use words or candidates')
  form, model = config.form, None
  if form == 'auto':
    model = load_model(config, None)
    form = _natural_form(model, template)
  if form == 'head':
    model = None  # never two in memory
    count = len(data.label_names)
    return load_model(config, 'classify', num_labels=count), form
  model = model or load_model(config, None)
  head = 'lm' if model.shape.causal else 'mlm'
  if model.shape.head != head:
    model = None
    model = load_model(config, head)
  return model, form


def _natural_form(model, template) -> str:
  """Label words if there are any and the model can score them, else a head."""
  if not model.shape.causal:
    usable = model.shape.head == 'mlm' and template.masked
    return 'words' if usable else 'head'
  if not template.causal:
    return 'head'
  if template.choices:
    return 'candidates'
  try:
    encode.label_ids(template, load_tokenizer(model), 'causal')
  except ValueError:  # a word of several tokens
    return 'candidates'
  return 'words'
