"""Small images for `experiments.attack`: drawn strokes, or shrunken MNIST.

A stroke is a blurred line on 8 x 8 pixels. Its label is its direction, one of
ten; position, length, width and brightness vary. All are functions of a seed:
nothing is downloaded. MNIST's digits are averaged over squares of 4 x 4 pixels,
to 7 x 7.
"""

import os
from typing import NamedTuple

import numpy as np

from jaxfl.data import images as idx_files

NUM_LABELS = 10
_SIDE, _POOL = 8, 4
_COUNT = 4000  # strokes that are drawn
_PUBLIC = 0.75  # share that the attacker knows; no victim has one of them


class Pictures(NamedTuple):
  """Pictures that everybody knows, and pictures of victims.

  Attributes:
    name: of the data.
    side: pixels of an edge; D is its square.
    public: float32[N, D] in [0, 1].
    public_labels: int32[N].
    private: float32[M, D].
    private_labels: int32[M].
  """

  name: str
  side: int
  public: np.ndarray
  public_labels: np.ndarray
  private: np.ndarray
  private_labels: np.ndarray


def _split(name: str, side: int, x: np.ndarray, y: np.ndarray) -> Pictures:
  cut = int(_PUBLIC * len(x))
  x = x.reshape(len(x), side * side).astype(np.float32)
  return Pictures(name, side, x[:cut], y[:cut], x[cut:], y[cut:])


def strokes(seed: int = 0) -> Pictures:
  """Drawn lines, of ten directions."""
  rng = np.random.default_rng(seed)
  uniform = lambda low, high: rng.uniform(low, high, _COUNT)[:, None, None]
  labels = rng.integers(NUM_LABELS, size=_COUNT).astype(np.int32)
  angle = np.pi / NUM_LABELS * (labels[:, None, None] + uniform(-0.3, 0.3))
  middle = (_SIDE - 1) / 2
  grid = np.arange(_SIDE) - middle
  across = grid[None, None, :] - uniform(-1.5, 1.5)
  down = grid[None, :, None] - uniform(-1.5, 1.5)
  along = across * np.cos(angle) + down * np.sin(angle)
  beside = down * np.cos(angle) - across * np.sin(angle)
  beyond = np.maximum(np.abs(along) - uniform(1.5, 3.5), 0.0)
  distance = np.square(beside) + np.square(beyond)
  ink = np.exp(-distance / (2 * np.square(uniform(0.5, 0.9))))
  return _split('strokes', _SIDE, uniform(0.6, 1.0) * ink, labels)


def mnist(data_dir: str | os.PathLike) -> Pictures:
  """MNIST's train images, in the order of a fixed shuffle.

  Args:
    data_dir: where `jaxfl.data.images.find` looks.

  Raises:
    FileNotFoundError: if there are none, saying which files go where.
  """
  found = idx_files.load(idx_files.find('mnist', data_dir))
  order = np.random.default_rng(0).permutation(len(found.x_train))
  x = found.x_train[order] / np.float32(255)
  count, height, width = x.shape
  if height != width or height % _POOL:
    raise ValueError(
      f'expected square images with an edge of a multiple of {_POOL} pixels,'
      f' got {height} x {width}'
    )
  side = height // _POOL
  x = x.reshape(count, side, _POOL, side, _POOL).mean((2, 4))
  return _split('mnist', side, x, found.y_train[order])
