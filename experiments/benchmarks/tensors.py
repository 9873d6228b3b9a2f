"""The sets of tensors that kernels run on: their shapes by path."""

import math

from jaxfl import keys
from jaxfl.models import native

Shapes = dict[str, tuple[int, ...]]


def matrix(entries: float) -> Shapes:
  """One square matrix of about so many entries; its side has aligned tiles."""
  side = 128 * max(1, math.ceil(math.sqrt(entries) / 128))
  return {'w': (side, side)}


def transformer(entries: float) -> Shapes:
  """Those of one layer and an embedding."""
  width = 64 * max(1, math.ceil(math.sqrt(entries / 76) / 64))
  shapes: Shapes = {'embed': (64 * width, width), 'norm': (width,)}
  for name in ('query', 'key', 'value', 'out'):
    shapes[name] = (width, width)
  shapes |= {'up': (width, 4 * width), 'down': (4 * width, width)}
  return shapes


def embedded() -> Shapes:
  """Those of the embedded model, which a cache holds."""
  params = native.load_embedded()[1]
  return {path: w.shape for path, w in keys.named_leaves(params)}


def entries(shapes: Shapes) -> int:
  return sum(math.prod(shape) for shape in shapes.values())
