"""A convolutional network on images (`jaxfl.data.images`)."""

import pathlib

from experiments import parts
from experiments.config import Config
from jaxfl import objectives
from jaxfl.data import images
from jaxfl.models import cnn

MODELS = ('embedded', 'cnn')  # the default means the network, too


def build(config: Config) -> parts.Problem:
  """The problem of a resolved config; ValueError or OSError if it has none."""
  if config.model not in MODELS:
    raise ValueError(
      'images have a network of their own; leave model out, or say cnn'
    )
  folder = pathlib.Path(config.dataset)
  name = folder.resolve().name
  if config.dataset in images.NAMES:
    if config.data_dir is None:
      raise ValueError('needs --data_dir, the folder where its files are')
    name, folder = config.dataset, images.find(config.dataset, config.data_dir)
  data = images.load(folder)
  rows = [{'label': int(y)} for y in data.y_train]
  shares, notes = parts.split(config, rows, 'label', ())
  if data.split_again:
    notes += (
      f'\n{folder} has {data.split_again}-images alone: split again,'
      f' {len(data.y_train)} to train on and {len(data.y_test)} held out, so'
      ' figures are not those of papers'
    )
  task = images.task(
    data,
    shares,
    name=name,
    eval_batch_size=config.eval_batch_size,
    eval_examples=config.eval_examples or None,
  )
  num_labels = 1 + int(max(data.y_train.max(), data.y_test.max()))
  params = cnn.init(
    parts.init_key(config),
    data.x_train.shape[1:],
    num_labels,
  )
  scores = lambda params, batch: cnn.logits(params, batch['images'])
  loss_fn = objectives.classification_loss(scores, config.objective)
  measure = objectives.evaluate_classes(scores, num_labels)
  return parts.whole(task, params, loss_fn, measure, notes)
