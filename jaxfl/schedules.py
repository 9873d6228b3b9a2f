"""Values that change with the round, as tables that every replica shares.

Cosines and powers differ in the last bits between devices. A schedule is
therefore evaluated once, on the host, in double precision, and rounded to 12
significant bits: far coarser than any difference between math libraries, and
products of two such numbers are exact in float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import codecs
from jaxfl import typing as jt

NAMES = ('constant', 'linear', 'cosine')


def make(
  name: str, value: float, num_rounds: int, *, warmup_rounds: int = 0
) -> jt.Schedule:
  """A schedule by name.

  Args:
    name: `constant`, `linear` (to zero) or `cosine` (half a period, to zero).
    value: the peak.
    num_rounds: rounds until the end of the decay.
    warmup_rounds: rounds over which the value rises linearly to its peak.

  Raises:
    ValueError: for an unknown name or a warm-up longer than the run.
  """
  if name not in NAMES:
    raise ValueError(
      f'schedule must be one of {", ".join(NAMES)}, got {name!r}'
    )
  if not 0 <= warmup_rounds <= num_rounds:
    raise ValueError(
      f'warmup_rounds must be in [0, num_rounds={num_rounds}], got'
      f' {warmup_rounds}'
    )

  def schedule(round: int) -> float:
    if round < warmup_rounds:
      return value * (round + 1) / warmup_rounds
    done = (round - warmup_rounds) / max(1, num_rounds - warmup_rounds)
    done = min(1.0, done)
    if name == 'linear':
      return value * (1.0 - done)
    if name == 'cosine':
      return value * 0.5 * (1.0 + math.cos(math.pi * done))
    return value

  return schedule


def table(
  value: float | jt.Schedule, num_rounds: int | None, field: str
) -> np.ndarray:
  """Tabulates a number or a function of the round.

  Args:
    value: a number, or a function from the round to a number.
    num_rounds: length of the table; later rounds use the last entry.
    field: name for error messages.

  Returns:
    float32[num_rounds], or float32[1] for a number; 12 significant bits each.

  Raises:
    ValueError: if `value` is a function and `num_rounds` is None, or if an
      entry is negative, or far from the range of float32.
  """
  if callable(value):
    if num_rounds is None:
      raise ValueError(f'{field} is a schedule: num_rounds is needed with it')
    values = [float(value(r)) for r in range(num_rounds)]
  else:
    values = [float(value)]
  for r, v in enumerate(values):
    if not (v == 0 or 2.0**-100 <= v <= 2.0**100):
      raise ValueError(
        f'{field} must be 0 or in [2**-100, 2**100], got {v} (round {r})'
      )
  return np.array([codecs.round_significant(v) for v in values], np.float32)


def at(table: np.ndarray, round: jax.Array) -> jax.Array:
  """The table's entry for a round, float32[]; the last one after its end."""
  return jnp.asarray(table)[jnp.minimum(round, len(table) - 1)]
