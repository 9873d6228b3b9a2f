"""Rows of text: a task by name, a file, a folder or a hub id."""

import functools

import numpy as np

from experiments import checks, models, parts, text_rows
from experiments.config import Config
from jaxfl import objectives, responses
from jaxfl.data import encode, examples


def build(config: Config) -> parts.Problem:
  """The problem of a resolved config; ValueError or OSError if it has none."""
  data = text_rows.load(config)
  template = text_rows.template_of(config, data) if data.label_names else None
  model, form = _choose_form(config, template, data)
  checks.form(config, form)
  tokenizer = models.load_tokenizer(model)
  encoded = functools.partial(
    encode.encode,
    template=template,
    tokenizer=tokenizer,
    max_length=config.sequence_length,
    kind='causal' if model.shape.causal else 'masked',
    positions=model.shape.max_positions or None,
  )
  shares, notes = parts.split(
    config, data.train, 'label' if data.label_names else None, data.label_names
  )
  if text_rows.is_plain(data):
    train, test, shares, more = text_rows.cut(
      config, data, shares, tokenizer, model.shape.max_positions or None
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
    shares,
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
  return parts.assemble(config, model, task, loss_fn, evaluate, notes)


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


def _choose_form(config, template, data) -> tuple[models.Model, str]:
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
      return models.load_model(config, 'lm'), 'lm'
    except ValueError as error:
      raise ValueError(
        f'rows without labels are for causal models: {error}'
      ) from error
  if config.form == 'lm':
    raise ValueError('form lm is for responses; use words or candidates')
  form, model = config.form, None
  if form == 'auto':
    model = models.load_model(config, None)
    form = _natural_form(model, template)
  if form == 'head':
    model = None  # never two in memory
    count = len(data.label_names)
    return models.load_model(config, 'classify', num_labels=count), form
  model = model or models.load_model(config, None)
  head = 'lm' if model.shape.causal else 'mlm'
  if model.shape.head != head:
    model = None
    model = models.load_model(config, head)
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
    encode.label_ids(template, models.load_tokenizer(model), 'causal')
  except ValueError:  # a word of several tokens
    return 'candidates'
  return 'words'
