"""What all kinds of problems are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import checks, models
from experiments.config import Config
from jaxfl import keys, lazy
from jaxfl import typing as jt
from jaxfl.data import batching, partition
from jaxfl.models import config as model_config

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


def split(
  config: Config,
  rows: Sequence[Mapping[str, Any]],
  label_field: str | None,
  label_names: Sequence[str],
) -> tuple[list[np.ndarray], str]:
  """Examples over clients, as the settings say.

  Args:
    config: of the run.
    rows: the fields of every example.
    label_field: the one that is described; None if there are no labels.
    label_names: of the field `label`.

  Returns:
    Indices int64[n] of every client, and lines that describe them.

  Raises:
    ValueError: naming the setting, if there is no such partition.
  """
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


def whole(
  task: batching.Task,
  params: jt.Params,
  loss_fn: jt.LossFn,
  measure: Callable[[jt.Params, Any], dict[str, float]],
  notes: str,
) -> Problem:
  """The problem of a small network of our own, all of which is trained.

  Args:
    task: the clients' data.
    params: at the start.
    loss_fn: params, batch -> float[].
    measure: params, batches -> metrics by name.
    notes: lines to show before the run.
  """
  return Problem(
    task=task,
    params=params,
    frozen=(),
    loss_fn=lambda frozen, params, batch: loss_fn(params, batch),
    evaluate=lambda params: measure(params, task.eval_batches),
    shape=None,
    notes=notes,
  )


def init_key(config: Config) -> jax.Array:
  """The key of a run under which new weights are drawn."""
  key = keys.stream(keys.root(config.seed), 'init')
  return jax.random.wrap_key_data(key, impl='threefry2x32')


def assemble(
  config: Config,
  model: models.Model,
  task: batching.Task,
  loss_fn: jt.LossFn,
  evaluate: Callable[[jt.Params], dict[str, float]],
  notes: str = '',
) -> Problem:
  """The problem over what the adapter trains.

  Args:
    config: of the run.
    model: whole.
    task: the clients' data.
    loss_fn: of the whole model's parameters and a batch.
    evaluate: of the whole model's parameters.
    notes: lines to show before the run.

  Raises:
    ValueError: if the model is not finite, or has not what the adapter trains.
  """
  checks.finite(model.params)
  if config.adapter == 'head' and not {'head', 'lm_head'} & set(model.params):
    raise ValueError(
      "adapter head: the model's output is its embedding, it has no head of its"
      ' own; use adapter lora, bias or full'
    )
  adapter, params, frozen = models.adapt(config, model)
  frozen = jax.device_put(frozen)  # once, not at every evaluation

  def merged_loss(frozen, params, batch):
    whole = lazy.cast(adapter.merge(frozen, params), config.forward_dtype)
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
