"""A linear layer, or a small network, on an npz file of features.

See `jaxfl.data.features`.
"""

import pathlib

import numpy as np

from experiments import parts
from experiments.config import Config
from jaxfl import objectives
from jaxfl.data import features
from jaxfl.models import mlp

MINILM_SST2 = 'minilm_sst2'  # features of the shared data
_MINILM_SST2_FILE = 'minilm_reference/sst2_mean_pool_f16.npz'


def build(config: Config) -> parts.Problem:
  """The problem of a resolved config; ValueError or OSError if it has none."""
  path = pathlib.Path(config.dataset)
  if config.dataset == MINILM_SST2:
    if config.data_dir is None:
      raise ValueError('needs --data_dir, the folder of the shared data')
    path = pathlib.Path(config.data_dir) / _MINILM_SST2_FILE
  arrays = features.load(path)
  rows = [{'label': int(y)} for y in arrays['y_train']]
  shares, notes = parts.split(config, rows, 'label', ())
  task = features.task(arrays, shares, name=path.stem)
  num_labels = 1 + int(max(arrays['y_train'].max(), arrays['y_test'].max()))
  width = arrays['f_train'].shape[1]
  if config.hidden_units is None:
    out = {
      'kernel': np.zeros((width, num_labels), np.float32),
      'bias': np.zeros(num_labels, np.float32),
    }
    params = {'head': {'out': out}}
    scores = objectives.class_scores(None, 'features')
  else:
    params = mlp.init(
      parts.init_key(config), width, config.hidden_units, num_labels
    )
    scores = lambda params, batch: mlp.outputs(params, batch['features'])
  loss_fn = objectives.classification_loss(scores, config.objective)
  measure = objectives.evaluate_classes(scores, num_labels)
  return parts.whole(task, params, loss_fn, measure, notes)
