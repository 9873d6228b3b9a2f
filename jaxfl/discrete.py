"""Integer noise of an exactly known law, and a code of scalars that adds up.

Noise in floating point has gaps that can give away what it hides. Integer noise
has none: a table holds the probability of every integer as a multiple of
2**-64, a draw inverts it with 64 uniform bits, and the accountant gets the same
table.

    discrete Gaussian   p(k) ~ exp(-k**2 / (2 sigma**2))        one noiser
    Skellam             Poisson(v/2) - Poisson(v/2), variance v    any number of
                        noisers: shares of v / P add up to v

What is noised must be integers too, and bounded: `clipped_units` sums clipped
scalars exactly, `encode` turns a mean into an integer in [-levels, levels] by
rounding at random, without bias. The code is linear, so that sums of codes are
codes of sums; logarithmic codes are not, and have no bounded sensitivity. Sums
may be sent modulo 2**bits (`wrap`): what is added later commutes with it.

References:
  Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy",
    NeurIPS 2020, https://arxiv.org/abs/2004.00010.
  Agarwal, Kairouz and Liu, "The Skellam mechanism for differentially private
    federated learning", NeurIPS 2021, https://arxiv.org/abs/2110.04995.
"""

import decimal
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from jaxfl import grid
from jaxfl import typing as jt

UNIT_BITS = 14  # scalars are summed in units of 2**-14 of their bound
_MAX_SCALARS = 2 ** (31 - UNIT_BITS) - 1
_MAX_STD = 1e4  # tables have about 20 entries per standard deviation
_SMALLEST = decimal.Decimal(2) ** -66  # rounds to no multiple of 2**-64
_CONTEXT = decimal.Context(prec=50, Emin=-(10**9), Emax=10**9)


class Table(NamedTuple):
  """A law on consecutive integers, in multiples of 2**-64.

  Attributes:
    lowest: the first integer.
    counts: probability of each integer times 2**64; they add up to 2**64.
    upper: uint64[len(counts) - 1], their cumulative sums without the last.
  """

  lowest: int
  counts: tuple[int, ...]
  upper: np.ndarray


@functools.lru_cache(maxsize=16)
def gaussian_table(sigma: float) -> Table:
  """The discrete Gaussian, symmetric; the tails below 2**-65 are cut off.

  Raises:
    ValueError: if sigma is not in (0, 10000].
  """
  _check_std('sigma', sigma)
  with decimal.localcontext(_CONTEXT):
    rate = -1 / (2 * decimal.Decimal(sigma) ** 2)
    weights = [decimal.Decimal(1)]
    while weights[-1] > _SMALLEST:
      weights.append((rate * len(weights) ** 2).exp())
    total = 2 * sum(weights) - 1
    tail = [int((w / total * 2**64).to_integral_value()) for w in weights[1:]]
  while tail and not tail[-1]:
    tail.pop()
  middle = 2**64 - 2 * sum(tail)
  return _table(-len(tail), [*tail[::-1], middle, *tail])


@functools.lru_cache(maxsize=16)
def poisson_table(mean: float) -> Table:
  """The Poisson law; what rounding takes from the rest goes to the mode.

  Raises:
    ValueError: if the mean is not in (0, 10**8].
  """
  _check_std('the square root of the mean', math.sqrt(max(mean, 0.0)))
  mode = int(mean)
  with decimal.localcontext(_CONTEXT):
    exact = decimal.Decimal(mean)
    up, down = [decimal.Decimal(1)], [decimal.Decimal(1)]
    while up[-1] > _SMALLEST:
      up.append(up[-1] * exact / (mode + len(up)))
    while down[-1] > _SMALLEST and len(down) <= mode:
      down.append(down[-1] * (mode - len(down) + 1) / exact)
    weights = [*down[:0:-1], *up]
    total = sum(weights)
    counts = [int((w / total * 2**64).to_integral_value()) for w in weights]
  counts[len(down) - 1] += 2**64 - sum(counts)
  lowest = mode - len(down) + 1
  while not counts[0]:
    counts.pop(0)
    lowest += 1
  while not counts[-1]:
    counts.pop()
  return _table(lowest, counts)


def _table(lowest: int, counts: list[int]) -> Table:
  upper, total = [], 0
  for count in counts[:-1]:
    total += count
    upper.append(total)
  return Table(lowest, tuple(counts), np.array(upper, np.uint64))


def _check_std(field: str, value: float) -> None:
  if not 0 < value <= _MAX_STD:
    raise ValueError(f'{field} must be in (0, {_MAX_STD:.0f}], got {value}')


def invert(table: Table, words: np.ndarray) -> np.ndarray:
  """The integers, int64[...], that uniform words, uint64[...], stand for."""
  return np.searchsorted(table.upper, words, side='right') + table.lowest


def gaussian_pmf(sigma: float) -> dict[int, float]:
  """Probabilities of `gaussian_table`."""
  table = gaussian_table(sigma)
  values = range(table.lowest, table.lowest + len(table.counts))
  return {k: c * 2.0**-64 for k, c in zip(values, table.counts, strict=True)}


def skellam_pmf(variance: float) -> dict[int, float]:
  """Probabilities `exp(-v) I_k(v)` of Skellam noise, above 1e-20."""
  _check_std('the standard deviation', math.sqrt(max(variance, 0.0)))
  reach = math.ceil(10.0 * math.sqrt(variance)) + 20
  values = np.arange(-reach, reach + 1)
  pmf = special.ive(np.abs(values), variance)  # exp(-v) I_|k|(v)
  pairs = zip(values.tolist(), pmf.tolist(), strict=True)
  return {k: p for k, p in pairs if p > 1e-20}


def clipped_units(
  values: jt.Array, mask: jt.Array | None = None, *, clip_norm: float
) -> jax.Array:
  """Sums scalars of examples, each clipped to [-clip_norm, clip_norm], exactly.

  Integers in units of `clip_norm * 2**-14`: the same for every order and on
  every device. Replacing an example moves an entry by at most 2 * 2**14, and
  dropping one by at most 2**14.

  Args:
    values: float32[N] or [N, K], such as projected gradients of N examples
      along K directions; what is not finite adds zero.
    mask: bool[N], False for padding; or None.
    clip_norm: the bound, of each scalar.

  Returns:
    int32[] or [K].

  Raises:
    ValueError: if N is 2**17 or more, or the bound is not positive and finite.
  """
  if not 0 < clip_norm < math.inf:
    raise ValueError(f'clip_norm must be positive and finite, got {clip_norm}')
  values = jnp.asarray(values, jnp.float32)
  if values.shape[0] > _MAX_SCALARS:
    raise ValueError(
      f'at most {_MAX_SCALARS} scalars have a sum in int32, got'
      f' {values.shape[0]}'
    )
  share = jnp.clip(values * np.float32(1.0 / clip_norm), -1.0, 1.0)
  units = jnp.rint(share * 2.0**UNIT_BITS)
  units = jnp.where(jnp.isfinite(values), units, 0.0).astype(jnp.int32)
  if mask is not None:
    kept = jnp.asarray(mask) > 0
    units = jnp.where(kept.reshape(-1, *[1] * (units.ndim - 1)), units, 0)
  return jnp.sum(units, axis=0)


def mean(units: jt.Array, *, clip_norm: float, divisor: int) -> jax.Array:
  """The mean of clipped scalars, float32[...].

  Args:
    units: int32[...], from `clipped_units`, maybe with noise.
    clip_norm: the bound of a scalar.
    divisor: a public number of examples; never a count of who took part.
  """
  per_unit = np.float32(clip_norm / (divisor * 2.0**UNIT_BITS))
  return jnp.asarray(units).astype(jnp.float32) * per_unit


def encode(
  units: jt.Array, uniform: jt.Array, *, levels: int, divisor: int
) -> jax.Array:
  """A mean of clipped scalars as an integer in [-levels, levels].

  Args:
    units: int32[...], from `clipped_units`.
    uniform: float32[...] in [0, 1), not computed from the data; it may be
      shared (`keys.uniform`).
    levels: of the mean `clip_norm`; the code is scaled down by 2**-22 *
      `divisor`, so that float32 can't break `sensitivity`.
    divisor: a public number of examples, not below the number of terms.

  Returns:
    int32[...], with expectation `levels * mean / clip_norm`, to that scale.
  """
  factor = np.float32(code_factor(levels, divisor))
  return encode_by(units, uniform, factor, levels=levels)


def encode_by(
  units: jt.Array, uniform: jt.Array, factor: jt.Array, *, levels: int
) -> jax.Array:
  """`encode` for a divisor that is known to the program as its factor.

  Args:
    units: int32[...].
    uniform: float32[...].
    factor: float32[], `code_factor` of levels and divisor.
    levels: see `encode`.
  """
  x = jnp.asarray(units).astype(jnp.float32) * jnp.asarray(factor)
  return jnp.clip(grid.round_units(x, jnp.asarray(uniform)), -levels, levels)


def code_factor(levels: int, divisor: int) -> float:
  """What `encode` multiplies units by."""
  return levels / (divisor * 2.0**UNIT_BITS) * code_scale(divisor)


def code_scale(divisor: int) -> float:
  """The factor by which `encode` shrinks; `decode` undoes it."""
  return 1.0 - divisor * 2.0**-22


def decode(
  total: jt.Array, *, clip_norm: float, levels: int, divisor: int
) -> jax.Array:
  """Sums of codes, maybe with noise, as sums of means: float32[...]."""
  per_level = np.float32(clip_norm / (levels * code_scale(divisor)))
  return jnp.asarray(total).astype(jnp.float32) * per_level


def sensitivity(levels: int, divisor: int, *, replace: bool = True) -> int:
  """How far one example can move its code: an integer, at least 1.

  Args:
    levels: see `encode`.
    divisor: see `encode`; 1 if the unit is a client.
    replace: an example is replaced; otherwise it is dropped.
  """
  return max(1, math.ceil((2 if replace else 1) * levels / divisor))


def wrap(values: Any, bits: int) -> Any:
  """Integers modulo 2**bits, in [0, 2**bits): all that needs to be sent."""
  return values & ((1 << bits) - 1)


def unwrap(values: Any, bits: int) -> Any:
  """The representatives in [-2**(bits - 1), 2**(bits - 1)).

  Args:
    values: int32 or int64 [...], sums of wrapped integers; wrapped or not.
    bits: as for `wrap`, at most 31.
  """
  half = 1 << (bits - 1)
  return wrap(values + half, bits) - half


def bits_needed(
  largest: int, pmf: dict[int, float], probability: float = 1e-9
) -> int:
  """The width that sums with noise leave with at most this probability.

  Args:
    largest: bound on the sum without noise; clients times levels.
    pmf: of the noise in the sum.
    probability: that a sum is read wrongly.
  """
  for bits in range(1, 32):
    room = (1 << (bits - 1)) - 1 - largest
    if room >= 0 and sum(p for k, p in pmf.items() if k > room) <= probability:
      return bits
  raise ValueError(f'sums up to {largest} with this noise need over 31 bits')
