"""Images in the idx files of MNIST, plain or gzipped.

A folder has two pairs of files, and that is all a data set needs; Fashion-MNIST
and others come in the same files:

    train-images-idx3-ubyte  train-labels-idx1-ubyte
    t10k-images-idx3-ubyte   t10k-labels-idx1-ubyte

A folder with one pair alone is split again: its images sorted by label, every
label in the order of the file, and 15 % of them held out at equal distances.
Labels have their shares in both parts; the split depends on nothing else.

References:
  LeCun, Cortes and Burges, "The MNIST database of handwritten digits",
    http://yann.lecun.com/exdb/mnist (the file format).
  Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017,
    https://arxiv.org/abs/1708.07747.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxfl.data import arrays, batching, files

# names, with the folders under `data_dir` that are looked into
NAMES = {
  'mnist': ('mnist', 'MNIST/raw', '.', 'mnist_t10k'),
  'fashion_mnist': ('fashion_mnist', 'FashionMNIST/raw', '.'),
}
PAIRS = {'train': 'train', 'test': 't10k'}
HELD_OUT = (3, 20)  # of a pair that is split again: 15 %
# mean and standard deviation of MNIST's train images, in [0, 1]
_MNIST = (0.1307, 0.3081)


class Images(NamedTuple):
  """Images and labels.

  Attributes:
    x_train: uint8[N, H, W].
    y_train: int32[N].
    x_test: uint8[M, H, W].
    y_test: int32[M].
    split_again: the pair of files that both parts are of, or None.
  """

  x_train: np.ndarray
  y_train: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  split_again: str | None


def read_idx(path: str | os.PathLike, ndim: int) -> np.ndarray:
  """Reads an idx file of bytes.

  Args:
    path: of the file, gunzipped if its name ends in .gz.
    ndim: the number of axes that it must have.

  Returns:
    uint8[...].

  Raises:
    ValueError: naming the file, if it is damaged, or of another kind.
  """
  path = pathlib.Path(path)
  data = files.read_bytes(path)
  start = 4 + 4 * ndim
  if data[:4] != bytes([0, 0, 8, ndim]) or len(data) < start:
    raise ValueError(
      f'{path}: no idx file of bytes with {ndim} axes; it begins with'
      f' {data[:4].hex(" ") or "nothing"}, expected 00 00 08 0{ndim}'
    )
  shape = tuple(int(n) for n in np.frombuffer(data[4:start], '>u4'))
  expected = int(np.prod(shape, dtype=object))
  if len(data) - start != expected:
    raise ValueError(
      f'{path}: damaged; an array of {list(shape)} takes {expected} bytes, the'
      f' file has {len(data) - start}'
    )
  return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def holds_images(folder: pathlib.Path) -> bool:
  """Whether a folder has images in idx files."""
  return any(
    files.find(folder, f'{pair}-images-idx3-ubyte') for pair in PAIRS.values()
  )


def find(name: str, data_dir: str | os.PathLike) -> pathlib.Path:
  """The folder of a data set that has a name.

  Args:
    name: one of `NAMES`.
    data_dir: the folder of that folder, or that folder itself.

  Raises:
    FileNotFoundError: saying which files may be where.
  """
  folders = [pathlib.Path(data_dir) / place for place in NAMES[name]]
  found = [folder for folder in folders if holds_images(folder)]
  if not found:
    places = ', '.join(map(str, folders))
    raise FileNotFoundError(
      f'no images of {name}: put train-images-idx3-ubyte,'
      ' train-labels-idx1-ubyte, t10k-images-idx3-ubyte and'
      f' t10k-labels-idx1-ubyte, plain or .gz, into one of {places}'
    )
  return found[0]


def _pair(
  folder: pathlib.Path, pair: str
) -> tuple[np.ndarray, np.ndarray] | None:
  """Images and labels of a pair of files, or None if neither is there."""
  names = (f'{pair}-images-idx3-ubyte', f'{pair}-labels-idx1-ubyte')
  paths = [files.find(folder, name) for name in names]
  if paths == [None, None]:
    return None
  if missing := [n for n, path in zip(names, paths, strict=True) if not path]:
    raise FileNotFoundError(f'{folder} lacks {missing[0]}, plain or .gz')
  x, y = (
    read_idx(path, ndim)
    for path, ndim in zip(paths, (3, 1), strict=True)
    if path
  )
  if len(x) != len(y) or not x.size:
    raise ValueError(
      f'{paths[0]} is {list(x.shape)} and {paths[1]} {list(y.shape)}; expected'
      ' [N, H, W] and [N], none of them 0'
    )
  return x, y.astype(np.int32)


def load(folder: str | os.PathLike) -> Images:
  """Reads the images of a folder; see the module.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: naming the file that is damaged, or what does not fit.
  """
  folder = pathlib.Path(folder)
  train, test = (_pair(folder, pair) for pair in PAIRS.values())
  if train is None or test is None:
    alone = train or test
    if alone is None:
      raise FileNotFoundError(f'no images in idx files in {folder}')
    x, y = alone
    kept, held = again(y)
    pair = PAIRS['train' if train else 'test']
    return Images(x[kept], y[kept], x[held], y[held], pair)
  (x_train, y_train), (x_test, y_test) = train, test
  if x_train.shape[1:] != x_test.shape[1:]:
    raise ValueError(
      f'{folder}: train images are of {x_train.shape[1:]}, test images of'
      f' {x_test.shape[1:]}; expected one size'
    )
  return Images(x_train, y_train, x_test, y_test, None)


def again(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Splits examples in two, labels in their shares; see the module.

  Args:
    labels: integer[N].

  Returns:
    Indices int64[N - M] and int64[M], ascending, M = 15 % of N rounded down.

  Raises:
    ValueError: if there are too few examples.
  """
  count = len(labels)
  size = count * HELD_OUT[0] // HELD_OUT[1]
  if not size:
    raise ValueError(
      f'{count} images are too few to hold some out; add the other pair of'
      ' files'
    )
  order = np.argsort(labels, kind='stable')
  places = (2 * np.arange(size) + 1) * count // (2 * size)
  held = np.zeros(count, bool)
  held[order[places]] = True
  return np.flatnonzero(~held), np.flatnonzero(held)


def normalisation(name: str) -> tuple[float, float]:
  """What is subtracted from pixels in [0, 1], and what they are divided by.

  MNIST's mean and standard deviation under its name, else 0.5 and 0.5, which
  makes [-1, 1] of them.
  """
  return _MNIST if name == 'mnist' else (0.5, 0.5)


def task(
  images: Images,
  partition: Sequence[np.ndarray],
  *,
  name: str,
  eval_batch_size: int,
  eval_examples: int | None = None,
) -> batching.Task:
  """A task whose batches are `images` float32[B, H, W, 1], `label` int32[B].

  Args:
    images: of `load`.
    partition: indices int[n] of the train examples of every client.
    name: of the data set; says how pixels are normalised.
    eval_batch_size: as in `arrays.task`.
    eval_examples: as in `arrays.task`.

  Raises:
    ValueError: if a client has no example.
  """
  mean, scale = normalisation(name)

  def normal(x):
    values = (np.arange(256) / 255 - mean) / scale  # of the 256 bytes
    return values.astype(np.float32)[x][..., None]

  return arrays.task(
    {'images': normal(images.x_train), 'label': images.y_train},
    {'images': normal(images.x_test), 'label': images.y_test},
    partition,
    name=name,
    eval_batch_size=eval_batch_size,
    eval_examples=eval_examples,
  )
