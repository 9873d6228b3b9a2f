"""Secret Poisson samples of a client's examples, in arrays of one size.

Every example is drawn on its own with the same probability, by the client's
`NoiseKey`. Nobody else may know who was drawn, or how many: sums over a sample
are divided by a public number. Samples of a fixed size, or from a shared key,
are other mechanisms, for which accounting as Poisson samples is wrong.
"""

import math

import numpy as np

from jaxfl import noise as noise_lib
from jaxfl import typing as jt


def draw(
  examples: jt.Batch,
  steps: int,
  rate: float,
  key: noise_lib.NoiseKey,
  *,
  round: int,
  name: str,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Samples, one for every step.

  Args:
    examples: all of the client's, arrays [N, ...] with `example_weight`, 0 for
      what fills up.
    steps: how many samples.
    rate: probability of an example, in (0, 1).
    key: private.
    round: see `NoiseKey.bernoulli`.
    name: likewise.

  Returns:
    Arrays [steps, S, ...], and bool[steps, S], False for what fills up. S
    depends on N and the rate only, and is large enough for all samples but one
    in 10**12; what is more is left out.
  """
  noise_lib.check_key(key)
  examples = dict(examples)
  weight = np.asarray(examples.pop('example_weight'))
  present = np.flatnonzero(weight > 0)
  chosen = key.bernoulli((steps, len(present)), rate, round=round, name=name)
  size = min(len(weight), _most(rate * len(weight)))
  rows = np.zeros((steps, size), np.int64)
  mask = np.zeros((steps, size), bool)
  for step, flags in enumerate(chosen):
    found = present[flags][:size]
    rows[step, : len(found)], mask[step, : len(found)] = found, True
  return {name: np.asarray(x)[rows] for name, x in examples.items()}, mask


def _most(mean: float) -> int:
  """A number that a sum of coins with this mean exceeds once in 10**12."""
  return math.ceil(mean + 8.0 * math.sqrt(mean) + 20.0)
