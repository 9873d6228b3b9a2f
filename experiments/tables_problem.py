"""A small network on tables of numbers (`jaxfl.data.tables`)."""

import pathlib

from experiments import parts
from experiments.config import Config
from jaxfl import objectives
from jaxfl.data import known_tables, tables
from jaxfl.models import mlp


def build(config: Config) -> parts.Problem:
  """The problem of a resolved config; ValueError or OSError if it has none."""
  name, table = _load(config)
  rows = [
    dict(zip(table.groups, values, strict=True))
    for values in zip(*table.groups.values(), strict=True)
  ] or [{}] * len(table.y_train)
  has_labels = bool(table.label_names)
  shares, notes = parts.split(
    config, rows, 'label' if has_labels else None, table.label_names
  )
  task = tables.task(table, shares, name=name)
  params = mlp.init(
    parts.init_key(config),
    table.x_train.shape[1],
    10 if config.hidden_units is None else config.hidden_units,
    len(table.label_names) or 1,
  )
  scores = lambda params, batch: mlp.outputs(params, batch['features'])
  if has_labels:
    loss_fn = objectives.classification_loss(scores, config.objective)
    measure = objectives.evaluate_classes(scores, len(table.label_names))
  elif config.objective == 'loss':
    predict = lambda params, batch: scores(params, batch)[:, 0]
    loss_fn = objectives.regression_loss(predict)
    measure = objectives.evaluate_regression(predict)
  else:
    raise ValueError(
      f'objective {config.objective} needs classes, the target is a number; use'
      ' loss'
    )
  return parts.whole(task, params, loss_fn, measure, notes)


def _load(config: Config) -> tuple[str, tables.Table]:
  """What the table is called, and the table, scaled."""
  if config.dataset in known_tables.NAMES:
    if config.data_dir is None:
      raise ValueError('needs --data_dir, the folder where its files are')
    if config.target is not None or config.label_names is not None:
      raise ValueError(
        'target and label_names are for your own csv; this table has its own'
      )
    return config.dataset, known_tables.load(
      config.dataset, config.data_dir, config.feature_scaling
    )
  assert config.target is not None  # else the file is of the kind rows
  names = (config.label_names or '').split(',')
  table = tables.load_csv(
    config.dataset,
    config.target,
    label_names=[x.strip() for x in names] if config.label_names else (),
    group=config.partition_column,
  )
  scaling = config.feature_scaling
  return (
    pathlib.Path(config.dataset).name.split('.')[0],
    tables.scale(table, 'none' if scaling == 'auto' else scaling),
  )
