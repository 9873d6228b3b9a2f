"""A classification task on given features: linear probing.

What a frozen encoder makes of every example is computed once
(`experiments.features`) and kept in an npz file; a run then trains a linear
layer on it, thousands of steps a second.
"""

import os
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from jaxfl.data import arrays as arrays_lib
from jaxfl.data import batching

ARRAYS = ('f_train', 'y_train', 'f_test', 'y_test')


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads features and labels.

  Args:
    path: an npz file with `f_train` and `f_test`, float[N, D], and `y_train`
      and `y_test`, integer[N]; further arrays are left alone.

  Returns:
    The four arrays, float32 and int32.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is damaged, or an array is missing, has a wrong
      shape, or holds values that are not finite or no labels.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f'no features at {os.fspath(path)!r}')
  found = _read(os.fspath(path))
  width = (*found['f_train'].shape, 0, 0)[1]
  for split in ('train', 'test'):
    f, y = found[f'f_{split}'], found[f'y_{split}']
    if (
      f.ndim != 2 or y.shape != f.shape[:1] or f.shape[1] != width or not y.size
    ):
      raise ValueError(
        f'{os.fspath(path)!r}: f_{split} must be [N, {width}] and y_{split} [N]'
        f' with N > 0, got {f.shape} and {y.shape}'
      )
    if y.dtype.kind not in 'iu' or y.min() < 0:
      raise ValueError(
        f'{os.fspath(path)!r}: y_{split} must hold labels 0, 1, ...'
      )
    if f.dtype.kind != 'f' or not np.isfinite(f).all():
      raise ValueError(
        f'{os.fspath(path)!r}: f_{split} must hold finite floats'
      )
  return {
    name: x.astype(np.float32 if name[0] == 'f' else np.int32)
    for name, x in found.items()
  }


def _read(path: str) -> dict[str, np.ndarray]:
  # NumPy takes any other file for a pickle or for an array
  if not zipfile.is_zipfile(path):
    raise ValueError(f'{path!r} is damaged or no npz file')
  try:
    with np.load(path, allow_pickle=False) as file:
      if missing := [name for name in ARRAYS if name not in file]:
        raise ValueError(
          f'{path!r} lacks {", ".join(missing)}; it has'
          f' {", ".join(sorted(file))}'
        )
      return {name: file[name] for name in ARRAYS}
  except (zipfile.BadZipFile, EOFError, zlib.error) as error:
    raise ValueError(f'{path!r} is damaged: {error}') from error


def task(
  arrays: dict[str, np.ndarray],
  partition: Sequence[np.ndarray],
  *,
  name: str,
  eval_batch_size: int = 512,
) -> batching.Task:
  """A task whose batches are `features` float32[B, D] and `label` int32[B].

  Args:
    arrays: of `load`.
    partition: indices int[n] of the train examples of every client.
    name: of the task.
    eval_batch_size: examples in a batch of the evaluation; the last is filled
      up with examples whose `example_weight` is 0.

  Raises:
    ValueError: if a client has no example.
  """
  train, test = (
    {'features': arrays[f'f_{split}'], 'label': arrays[f'y_{split}']}
    for split in ('train', 'test')
  )
  return arrays_lib.task(
    train, test, partition, name=name, eval_batch_size=eval_batch_size
  )
