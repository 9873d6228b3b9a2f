"""How many of a message's coordinates each block of the parameters gets.

Reconstructing a block of d entries from K of its coordinates has the expected
squared error `(d - 2 + kappa) / K |delta|^2`, kappa being the kurtosis of the
directions' entries (see `jaxfl.methods.ferret`). Over blocks l, the sum of it
is smallest with

    bytes    K_l ~ sqrt(d_l - 2 + kappa) |delta_l|   for a given sum of K_l
    compute  K_l ~ |delta_l|                         for a given sum of K_l d_l
    paper    K_l ~ |delta_l|

`paper` is the rule in the code of Ferret (Shu et al., "Ferret: federated
full-parameter tuning at scale for large language models",
https://arxiv.org/abs/2409.06277) up to its total: there the block of the
largest norm gets a given number and every block at least 2. With a given
total it is the same as `compute`.

Norms are of 8 significant bits, factors of 12, and all else is integers: who
knows the norms finds the same numbers, on every device.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import codecs, grid

ALLOCATIONS = ('bytes', 'compute', 'paper')
# of the entries of a direction; their variance is 1
KURTOSIS = {
  'rademacher': 1.0,
  'popcount16': 2.875,
  'gaussian': 3.0,
  'walsh': 1.0,
}
# Smaller norms are as good as zero, larger ones are not allowed.
SMALLEST, LARGEST = np.float32(2.0**-100), np.float32(2.0**100)


def factors(
  allocation: str, sizes: Sequence[int], distribution: str
) -> np.ndarray:
  """What the norms of the blocks are multiplied by, up to a common factor.

  Args:
    allocation: one of `ALLOCATIONS`.
    sizes: entries of the blocks.
    distribution: of the directions, a key of `KURTOSIS`.

  Returns:
    float32[L] in [0, 1], of 12 significant bits.
  """
  exact = [1.0] * len(sizes)
  if allocation == 'bytes':
    exact = [math.sqrt(d - 2 + KURTOSIS[distribution]) for d in sizes]
  largest = max(exact) or 1.0
  return np.array(
    [codecs.round_significant(x / largest) for x in exact], np.float32
  )


def counts(norms: jax.Array, factors: np.ndarray, total: int) -> jax.Array:
  """Splits `total` coordinates in proportion to `norms * factors`.

  Every block whose norm is not zero gets one, and its share of the rest; shares
  are rounded so that no running sum of them is off by one or more. Norms that
  are not allowed, as of a client that diverged, count as zero.

  Args:
    norms: float32[L] of 8 significant bits, in [0, `LARGEST`].
    factors: float32[L], see `factors`; one is positive at least.
    total: at least L, below 2**30.

  Returns:
    int32[L]. The sum is `total`; if nothing but blocks with a factor of zero
    has a norm, it is their number.
  """
  used = (norms >= SMALLEST) & (norms <= LARGEST)
  norms = jnp.where(used, norms, 0.0)
  _, exponent = jnp.frexp(jnp.max(norms))
  bits = min(24, 30 - (len(factors) - 1).bit_length())
  # each product is exact: 8 + 12 bits, then powers of two
  shares = norms * grid.power_of_two(-exponent) * factors
  shares = jnp.floor(shares * np.float32(2.0**bits)).astype(jnp.uint32)
  ends = jnp.cumsum(shares)
  rest = total - jnp.sum(used, dtype=jnp.uint32)
  edges = _portion(rest, total.bit_length(), ends)
  return used + jnp.diff(edges, prepend=0).astype(jnp.int32)


def _portion(times: jax.Array, bits: int, parts: jax.Array) -> jax.Array:
  """`floor(times * parts / parts[-1])` by long division.

  Args:
    times: uint32[], below 2**bits.
    bits: at most 30.
    parts: uint32[L], ascending, at most 2**30.

  Returns:
    uint32[L]; zeros if all parts are zero.
  """
  whole = jnp.maximum(parts[-1], 1)

  def step(i, carry):
    quotient, remainder = carry
    bit = (times >> (bits - 1 - i).astype(jnp.uint32)) & 1
    remainder = 2 * remainder + bit * parts  # below 3 * 2**30
    return 2 * quotient + remainder // whole, remainder % whole

  zeros = jnp.zeros_like(parts)
  return jax.lax.fori_loop(0, bits, step, (zeros, zeros))[0]
