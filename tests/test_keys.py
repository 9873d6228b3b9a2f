"""The seed contract: golden values, chains, streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import keys


def test_golden_chain():
  direction = keys.fold(keys.root(42), 3, 1000)
  leaf = keys.leaf_key(direction, 'layers/0/mlp/w')
  assert keys.tensor_id('layers/0/mlp/w') == 0xBE4B810D
  np.testing.assert_array_equal(leaf, [0x2C81EE86, 0x1249AA1A])


@pytest.mark.parametrize('data', [0, 1, 2**31, 2**32 - 1])
def test_fold_equals_jax_random(data):
  ours = keys.fold(keys.root(7), 5, data)
  theirs = jax.random.wrap_key_data(
    np.array([0, 7], np.uint32), impl='threefry2x32'
  )
  for d in (5, data):
    theirs = jax.random.fold_in(theirs, np.uint32(d))
  np.testing.assert_array_equal(ours, jax.random.key_data(theirs))


def test_all_64_bits_of_a_seed_matter():
  roots = [keys.root(s) for s in (1, 1 << 32, (1 << 63) + 1)]
  assert len({tuple(np.asarray(r).tolist()) for r in roots}) == 3
  np.testing.assert_array_equal(keys.root(2**64 - 1), [2**32 - 1] * 2)
  for seed in (-1, 2**64):
    with pytest.raises(ValueError, match='seed must be'):
      keys.root(seed)


def test_fold_broadcasts_like_a_loop():
  ids = np.arange(5, dtype=np.int32)
  many = keys.fold(keys.root(0), ids, 9)
  one = [keys.fold(keys.root(0), int(i), 9) for i in ids]
  np.testing.assert_array_equal(many, np.stack(one))


def test_streams_differ_from_each_other_and_from_parties():
  root = keys.root(0)
  found = [keys.stream(root, name) for name in ('codec', 'decay', 'rounding')]
  found += list(np.asarray(keys.fold(root, np.arange(1000))))
  assert len({tuple(np.asarray(k).tolist()) for k in found}) == len(found)


def test_directions_of_neighbours_never_collide():
  """`seed * (i + 17) + i` and its kind do."""
  party, round, sample = np.meshgrid(*[np.arange(40)] * 3, indexing='ij')
  found = keys.fold(keys.root(0), party, round, sample).reshape(-1, 2)
  assert len(np.unique(found, axis=0)) == 40**3


def test_uniform_moments():
  n = 20_000
  u = np.asarray(keys.uniform(keys.fold(keys.root(3), np.arange(n))))
  assert u.min() >= 0
  assert u.max() < 1
  error = np.sqrt(1 / 12 / n)
  assert abs(u.mean() - 0.5) < 4 * error
  assert abs(u.mean() - 0.51) > 4 * error  # the test would see a bias of 2 %
  assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)


def test_paths_are_unique_or_refused():
  tree = {'a': {'b': jnp.zeros(1)}, 'c': [jnp.zeros(2), jnp.zeros(3)]}
  assert [p for p, _ in keys.named_leaves(tree)] == ['a/b', 'c/0', 'c/1']
  same_id = {'layers/52050/w': jnp.zeros(1), 'layers/64999/w': jnp.zeros(1)}
  with pytest.raises(ValueError, match='have the same tensor id: rename one'):
    keys.named_leaves(same_id)
  with pytest.raises(ValueError, match="same path 'a/b'"):
    keys.named_leaves({'a': {'b': jnp.zeros(1)}, 'a/b': jnp.zeros(1)})
