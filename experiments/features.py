"""Computes a frozen model's features of a labelled dataset, once.

    python -m experiments.features --model=DIR --dataset=sst2 --data_dir=DATA \
      --out=features.npz
    python -m experiments.train --dataset=features.npz

The npz file holds `f_train`, `f_test` (float32[N, D], pooled hidden states) and
`y_train`, `y_test` (int32[N]): linear probing then costs no forward passes.
"""

import os
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags, logging

from experiments import checks, models, problem, progress, text_rows
from experiments.config import UsageError, from_mapping
from jaxfl.data import encode, examples
from jaxfl.models import layers, transformer

_OUT = flags.DEFINE_string('out', None, 'The npz file to write.')
_NAMES = ('model', 'dtype', 'pool', 'dataset', 'data_dir', 'columns')
_TEXT = {
  name: flags.DEFINE_string(name, None, 'As in experiments.train.')
  for name in _NAMES
}
_NUMBERS = {
  name: flags.DEFINE_integer(name, None, 'As in experiments.train.')
  for name in ('sequence_length', 'eval_batch_size')
}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  given = {
    name: flag.value
    for name, flag in (_TEXT | _NUMBERS).items()
    if flag.value is not None
  }
  try:
    if not _OUT.value:
      raise UsageError('--out is needed: the npz file to write')
    out = pathlib.Path(_OUT.value)
    if out.is_dir() or not out.absolute().parent.is_dir():
      what = 'is a directory' if out.is_dir() else 'is in no directory'
      raise UsageError(f'--out: {out} {what}; it must be a file to write')
    config = from_mapping(given)
    if problem.kind_of(config) != 'rows':
      raise UsageError(
        f'dataset {config.dataset!r} has no labelled rows; take a task such as'
        ' sst2, a file or a hub id'
      )
    try:
      arrays = compute(config)
    except (OSError, ValueError, IndexError) as error:
      raise UsageError(problem.blame(config, error)) from error
    _write(out, arrays)
  except UsageError as error:
    sys.exit(f'error: {error}')
  shape = arrays['f_train'].shape
  print(f'{_OUT.value}: {shape[0]} x {shape[1]}, and the test rows')


def _write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes the npz file whole or not at all."""
  partial = path.with_name(path.name + '.new')
  try:
    with open(partial, 'wb') as file:  # np.savez adds a suffix to a name
      np.savez(
        file,
        f_train=arrays['f_train'],
        y_train=arrays['y_train'],
        f_test=arrays['f_test'],
        y_test=arrays['y_test'],
      )
    os.replace(partial, path)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise UsageError(f'--out: {path} cannot be written: {error}') from error


def compute(config) -> dict[str, np.ndarray]:
  """The four arrays, see the module."""
  data = text_rows.load(config)
  if not data.label_names:
    raise ValueError('the rows have no labels')
  template = text_rows.template_of(config, data)
  model = models.load_model(
    config, 'classify', num_labels=len(data.label_names)
  )
  tokenizer = models.load_tokenizer(model)

  @jax.jit
  def pooled(params, batch):
    states = transformer.hidden(
      model.shape, params, batch['tokens'], batch['mask'], batch.get('types')
    )
    return layers.pool(model.shape.pool, states, batch['mask'])

  arrays = {}
  for split, rows in (('train', data.train), ('test', data.test)):
    encoded = encode.encode(
      rows,
      template,
      tokenizer,
      form='head',
      max_length=config.sequence_length,
      positions=model.shape.max_positions or None,
    )
    checks.tokens(encoded, model.shape)
    logging.info('%s: %d rows', split, len(encoded))
    arrays[f'f_{split}'] = _run(
      pooled, model.params, encoded, config.eval_batch_size
    )
    arrays[f'y_{split}'] = encoded.scalars['label']
  return arrays


def _run(pooled, params, encoded: examples.Examples, size: int) -> np.ndarray:
  """Features float32[N, D]; rows of like length share a batch."""
  order = np.argsort(encoded.lengths, kind='stable')
  made = None
  with progress.bar(len(order), 0) as advance:
    for start in range(0, len(order), size):
      rows = order[start : start + size]
      batch = encoded.take(np.resize(rows, size))
      found = np.asarray(pooled(params, batch), np.float32)[: len(rows)]
      if made is None:
        made = np.zeros((len(order), found.shape[1]), np.float32)
      made[rows] = found
      advance(min(start + size, len(order)), '')
  assert made is not None  # encode refuses to encode nothing
  return made


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
