"""NumPy definitions of the fields and updates, independent of the library."""

import hashlib
import math

import numpy as np


def threefry(key, x0, x1):
  """Threefry-2x32-20 in 64-bit integers reduced by hand; returns int64."""
  mask = (1 << 32) - 1
  k = [int(key[0]), int(key[1])]
  k.append(k[0] ^ k[1] ^ 0x1BD11BDA)
  x = np.asarray(x0, np.int64) + k[0] & mask
  y = np.asarray(x1, np.int64) + k[1] & mask
  rotations = [13, 15, 26, 6, 17, 29, 16, 24]
  for i in range(20):
    x = x + y & mask
    n = rotations[i % 8]
    y = (y << n & mask | y >> (32 - n)) ^ x
    if i % 4 == 3:
      j = i // 4 + 1
      x = x + k[j % 3] & mask
      y = y + k[(j + 1) % 3] + j & mask
  return x, y


def fold(key, data):
  x, y = threefry(key, 0, int(data) & 0xFFFFFFFF)
  return int(x), int(y)


def leaf_key(direction, path):
  digest = hashlib.sha256(path.encode()).digest()
  return fold(direction, int.from_bytes(digest[:4], 'big'))


def _positions(shape, offset):
  cols = shape[-1] if shape else 1
  rows = math.prod(shape[:-1])
  return (
    offset[0] + np.arange(rows, dtype=np.int64)[:, None],
    offset[1] + np.arange(cols, dtype=np.int64)[None],
  )


def sign_bits(key, shape, offset=(0, 0)):
  """The bits of the sign field: int64[rows, cols], 1 where z is -1."""
  r, c = _positions(shape, offset)
  a, b = threefry(key, r // 64, c)
  return np.where(r // 32 % 2, b, a) >> (r % 32) & 1


def integers(direction, path, shape, distribution, offset=(0, 0)):
  """The integer field Z, int64[shape]: z, or 2 z for popcount16."""
  key = leaf_key(direction, path)
  if distribution == 'rademacher':
    return (1 - 2 * sign_bits(key, shape, offset)).reshape(shape)
  r, c = _positions(shape, offset)
  a, b = threefry(key, r // 4, c)
  half = np.where(r % 4 < 2, a, b) >> (16 * (r % 2)) & 0xFFFF
  return (np.sum([half >> i & 1 for i in range(16)], axis=0) - 8).reshape(shape)


def field(direction, path, shape, distribution, offset=(0, 0)):
  """z: float32[shape]; float64[shape] for gaussian."""
  if distribution == 'gaussian':
    r, c = _positions(shape, offset)
    a, b = threefry(leaf_key(direction, path), r // 2, c)
    radius = np.sqrt(-2 * np.log((a + 0.5) / 2**32))
    angle = 2 * np.pi * b / 2**32
    z = radius * np.where(r % 2, np.sin(angle), np.cos(angle))
    return z.reshape(shape)
  z = integers(direction, path, shape, distribution, offset)
  scale = {'rademacher': 1, 'popcount16': 0.5}[distribution]
  return (z * scale).astype(np.float32)


def perturb(w, direction, path, scale, distribution):
  """`w + scale * z` in float32, product and sum rounded separately."""
  z = field(direction, path, w.shape, distribution)
  return w + np.float32(scale) * z


def _bit(key, row, group, counter):
  """int64: the bit of rows of a sign field whose groups start at `group`."""
  a, b = threefry(key, group + row // 64, counter)
  return np.where(row // 32 % 2, b, a) >> (row % 32) & 1


def low_rank_factors(key, shape, rank):
  """Signs u [N, R, rank] and v [N, rank, C] of a stack of matrices, int64."""
  rows, cols = (1, 1, *shape)[-2:]
  count = math.prod(shape[:-2])
  n = np.arange(count, dtype=np.int64)[:, None, None]
  i = np.arange(rows, dtype=np.int64)[None, :, None]
  j = np.arange(rank, dtype=np.int64)
  c = np.arange(cols, dtype=np.int64)
  u = _bit(key, n * rows + i, 0, j)
  v = _bit(key, n * rank + j[None, :, None], 2**31, c)
  return 1 - 2 * u, 1 - 2 * v
