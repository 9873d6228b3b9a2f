"""The seed contract: how a run, a party and a round name their randomness.

A key is `uint32[2]`, the key of Threefry-2x32 with 20 rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). A chain of folds leads
from the run's 64-bit seed to one tensor of one direction:

    root      = (seed >> 32, seed & 0xffffffff)
    direction = fold(root, party, round, sample)              # SPSA, Ferret
    direction = fold(root, seed id)                           # seed pools
    direction = fold(stream(root, 'cohort'), round, sample)   # DeComFL
    leaf      = fold(direction, tensor_id(path))

and to seed k of a Walsh pool, whose key is the root (FedKSeed) or that of a
party's round (Ferret), with two more streams:

    leaf      = fold(stream(pool, 'walsh'), k // 4096, tensor_id(path))
    shifts    = fold(stream(pool, 'walsh shifts'), k // 4096, tensor_id(path))

with `fold(k, d) = Threefry2x32(k, (0, d))`, which is `jax.random.fold_in` of
threefry2x32 keys. A leaf key addresses bits by their position in the tensor
(`jaxfl.perturb`) and is never folded again.

Everything that is random but is not a direction (who takes part in a round,
stochastic rounding ...) has a stream of its own, `stream(root, name)`. Stream
names fold in a word whose highest bit is set, which no party id has.

Shared keys are bare `uint32[2]` arrays on purpose: private noise has keys of
another type (`jaxfl.noise.NoiseKey`), which is no array, so that one can't be
passed where the other is expected.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import typing as jt

SPEC = 'signs-threefry2x32-20/1'  # recorded in every log and checkpoint

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry2x32(key0, key1, x0, x1):
  """Threefry-2x32-20 of the counter words `(x0, x1)` under `(key0, key1)`.

  Args:
    key0: uint32[...], first word of the key.
    key1: uint32[...], second word of the key.
    x0: uint32[...], first word of the counter; broadcasts with the others.
    x1: uint32[...], second word of the counter.

  Returns:
    Two arrays uint32[...]. Works on JAX and on NumPy arrays (of rank >= 1).
  """
  keys = (key0, key1, key0 ^ key1 ^ _PARITY)
  x0, x1 = x0 + keys[0], x1 + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      x0 = x0 + x1
      x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
      x1 = x1 ^ x0
    x0 = x0 + keys[(group + 1) % 3]
    x1 = x1 + (keys[(group + 2) % 3] + np.uint32(group + 1))
  return x0, x1


@jax.jit
def hash_words(key0, key1, x0, x1):
  """`threefry2x32` as a function of its own in a program.

  It is traced and lowered once for its shapes. Pallas kernels can't call it.
  """
  return threefry2x32(key0, key1, x0, x1)


def root(seed: int) -> jax.Array:
  """The run's key, uint32[2], from a seed of up to 64 bits.

  Raises:
    ValueError: if the seed is not in [0, 2**64).
  """
  if not 0 <= seed < 2**64:
    raise ValueError(f'seed must be in [0, 2**64), got {seed}')
  return jnp.asarray(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def fold(key: jt.Array, *data) -> jax.Array:
  """Folds integers into a key, one after the other.

  Args:
    key: uint32[..., 2].
    *data: integers or integer arrays that broadcast with `key[..., 0]`.

  Returns:
    uint32[..., 2].
  """
  k0, k1 = jnp.asarray(key)[..., 0], jnp.asarray(key)[..., 1]
  for d in data:
    if isinstance(d, int):
      d = np.uint32(d & 0xFFFFFFFF)
    d = jnp.asarray(d).astype(jnp.uint32)
    shape = np.broadcast_shapes(k0.shape, d.shape)
    k0, k1, d = (jnp.broadcast_to(x, shape) for x in (k0, k1, d))
    k0, k1 = hash_words(k0, k1, jnp.zeros_like(d), d)
  return jnp.stack([k0, k1], axis=-1)


def tensor_id(path: str) -> int:
  """The first four bytes of sha256 of a parameter's path, big-endian.

  Raises:
    ValueError: if UTF-8 can't encode the path.
  """
  try:
    data = path.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'path {path!r} is not text') from error
  return int.from_bytes(hashlib.sha256(data).digest()[:4], 'big')


def leaf_key(direction: jt.Array, path: str) -> jax.Array:
  """The key uint32[..., 2] of one tensor of a direction."""
  return fold(direction, tensor_id(path))


def stream(key: jt.Array, name: str) -> jax.Array:
  """A key for randomness that is not a direction: `stream(root, 'decay')`."""
  return fold(key, tensor_id(name) | 0x80000000)


def uniform(key: jt.Array) -> jax.Array:
  """One float32 in [0, 1) per key: a multiple of 2**-24, equal on all devices.

  Args:
    key: uint32[..., 2].
  """
  bits = fold(key, 0)[..., 0] >> np.uint32(8)
  return bits.astype(jnp.float32) * np.float32(2.0**-24)


def path_str(path) -> str:
  """A pytree path as text: `layers/0/mlp/w`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def named_leaves(tree, is_leaf=None) -> list[tuple[str, jax.Array]]:
  """The leaves of a pytree with their paths, in the order of `jax.tree.leaves`.

  Args:
    tree: a pytree.
    is_leaf: as of `jax.tree.leaves`.

  Raises:
    ValueError: if two leaves have the same path text or tensor id, because they
      would share their randomness.
  """
  leaves = [
    (path_str(path), leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]
  ]
  seen: dict[int, str] = {}
  for path, _ in leaves:
    if (other := seen.get(tensor_id(path))) is not None:
      raise ValueError(
        f'two parameters have the same path {path!r}'
        if other == path
        else f'{other!r} and {path!r} have the same tensor id: rename one'
      )
    seen[tensor_id(path)] = path
  return leaves
