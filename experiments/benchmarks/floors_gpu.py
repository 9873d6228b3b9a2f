"""The loops of `floors` on an NVIDIA GPU, where XLA's go through memory.

Written as the kernels are (`jaxfl.kernels.mosaic_gpu`), everything in
registers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  mosaic_gpu,
  signs,
)

from jaxfl import keys

_ROWS = 32  # sums of a thread at once
_UNROLL = 4


def _hash(number, key, out, *, count, interpret):
  def body(_, x):
    for _ in range(_UNROLL):
      a, b = keys.threefry2x32(key[0], key[1], x, x)
      x = a ^ b
    return x

  first = number.astype(jnp.uint32) * np.uint32(mosaic_gpu.COLS)
  x = mosaic_gpu.columns(interpret) + first
  x = lax.fori_loop(0, count // _UNROLL, body, x)
  out[pl.ds(number * mosaic_gpu.COLS, mosaic_gpu.COLS)] = x


def _sign(number, key, out, *, count, interpret):
  words = mosaic_gpu.columns(interpret) + key[1]

  def body(i, values):
    amount = jnp.broadcast_to(key[0] + i.astype(jnp.uint32), words.shape)
    return tuple(
      signs.add(x, amount, words, np.uint32(31 - row))
      for row, x in enumerate(values)
    )

  zeros = lax.bitcast_convert_type(words & np.uint32(0), jnp.float32)
  values = lax.fori_loop(0, count // _ROWS, body, (zeros,) * _ROWS)
  total = signs.bits(sum(values[1:], values[0]))
  out[pl.ds(number * mosaic_gpu.COLS, mosaic_gpu.COLS)] = total


def loops(lanes: int, hashes: int, flips: int, interpret=False) -> dict:
  """Functions of a key uint32[2], by name: so many hashes or signs a lane."""

  def loop(body, count, key):
    bound = functools.partial(body, count=count, interpret=bool(interpret))
    out = jax.ShapeDtypeStruct((lanes,), jnp.uint32)
    tiles = lanes // mosaic_gpu.COLS
    return mosaic_gpu.run(bound, tiles, key, out_type=out, interpret=interpret)

  return {
    'hash': functools.partial(loop, _hash, hashes),
    'sign': functools.partial(loop, _sign, flips),
  }
