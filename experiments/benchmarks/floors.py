"""What an operation can't be faster than, measured in the same run.

An operation on fields has to move its tensors and to compute its directions:

    seconds >= max(bytes / bandwidth, hashes / their rate + signs / their rate)

`bandwidth` is that of `w + c` in place on the same tensors. A hash is one
Threefry-2x32-20, of 64 signs, of 4 numbers of popcount16 or of 2 normals. A
sign is the least that an entry costs after it: shift, mask, flip and add. Both
rates are those of loops that keep everything in registers or the nearest cache.
The rest of popcount16 and of a normal is left out: their floors are loose. The
best of all repeats counts, as a floor is what can't be beaten.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks import timing
from jaxfl import keys

# entries
PER_HASH = {
  'rademacher': 64,
  'walsh': 64,
  'popcount16': 4,
  'gaussian': 2,
  # factors are short, and their products are not counted
  'rank1': math.inf,
  'rank4': math.inf,
  'rank16': math.inf,
}
# In one pass over the lanes. XLA on CPU is slower with more.
_UNROLL, _BITS = 4, 8


class Cost(NamedTuple):
  """What an operation needs at least."""

  entries: float  # of its tensors
  passes: float = 2.0  # entries read or written, for each of them
  directions: float = 0.0  # fields that are computed
  distribution: str = 'rademacher'


def floor(cost: Cost, on: str) -> Callable:
  """The `floor` of an operation; `w + c` on the same tensors is measured."""

  def least(seconds: timing.Seconds) -> tuple[float, str]:
    copy = min(seconds[on, 'w + c']) * cost.passes / 2
    fields = cost.entries * cost.directions
    size = sizes()
    hashes = fields / PER_HASH[cost.distribution] * min(seconds['core', 'hash'])
    signs = fields * min(seconds['core', 'sign'])
    both = (hashes / size.hashes + signs / size.signs) / size.lanes
    return max((copy, 'memory'), (both, 'operations'))

  return least


class Loops(NamedTuple):
  """Sizes of the loops: for the first cache, or to fill an accelerator."""

  lanes: int
  hashes: int  # of every lane in a call
  signs: int


def sizes() -> Loops:
  """Those for this kind of device."""
  kind = jax.default_backend()
  return {
    'cpu': Loops(1 << 12, 64, 1024),
    'gpu': Loops(1 << 22, 512, 8192),
  }.get(kind, Loops(1 << 22, 64, 1024))


def _xla_loops(size: Loops) -> dict[str, Callable]:
  words = jnp.arange(size.lanes, dtype=jnp.uint32)

  def hash_loop(key):
    def body(_, x):
      for _ in range(_UNROLL):
        a, b = keys.threefry2x32(key[0], key[1], x, key[0])
        x = a ^ b
      return x

    return lax.fori_loop(0, size.hashes // _UNROLL, body, words)

  def sign_loop(key):
    def body(i, total):
      scale = key[0] + i.astype(jnp.uint32)
      parts = [total, jnp.zeros_like(total)]  # two sums at once: no waiting
      for bit in range(_BITS):
        sign = (words << np.uint32(bit)) & np.uint32(1 << 31)
        flipped = lax.bitcast_convert_type(scale ^ sign, jnp.float32)
        parts[bit % 2] += flipped
      return parts[0] + parts[1]

    zeros = jnp.zeros(words.shape, jnp.float32)
    return lax.fori_loop(0, size.signs // _BITS, body, zeros)

  return {'hash': hash_loop, 'sign': sign_loop}


def operations() -> list[timing.Operation]:
  """The two loops, as operations."""
  size = sizes()
  make = _xla_loops
  if jax.default_backend() == 'gpu':
    from experiments.benchmarks import floors_gpu

    make = lambda size: floors_gpu.loops(*size)
  key = jnp.asarray(np.array([0x3F800000, 0x9E3779B9], np.uint32))
  found = []
  for (name, loop), count in zip(
    make(size).items(), (size.hashes, size.signs), strict=True
  ):
    compiled = jax.jit(loop).lower(key).compile()
    found.append(
      timing.Operation(
        name=name,
        on='core',
        run=lambda c=compiled: jax.block_until_ready(c(key)),
        work=size.lanes * count / 1e9,
        unit='G/s',
      )
    )
  return found


def memory(compiled, size: float) -> float | None:
  """Arguments, temporaries and new results of a program, over `size` bytes."""
  found = compiled.memory_analysis()
  if found is None or not math.isfinite(size) or not size:
    return None
  new = found.output_size_in_bytes - found.alias_size_in_bytes
  held = found.argument_size_in_bytes + found.temp_size_in_bytes
  return (held + new) / size
