"""Adapters: what is trained, what is put back, and which bits."""

import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfl import adapters, digest, keys

KEY = keys.root(7)
L, D, F, C = 3, 8, 12, 4


def params(dtype=np.float32, array=np.asarray):
  """A scanned transformer's paths, with norms, biases and a head."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: array(rng.normal(size=shape).astype(dtype))
  dense = lambda *shape: {
    'kernel': draw(*shape), 'bias': draw(*shape[:-2], shape[-1])
  }  # fmt: skip
  return {
    'embed': {'embedding': draw(20, D)},
    'layers': {
      'attention': {name: dense(L, D, D) for name in 'qkvo'},
      'mlp': {'up': dense(L, D, F), 'down': dense(L, F, D)},
      'norm1': {'scale': draw(L, D), 'bias': draw(L, D)},
    },
    'final_norm': {'scale': draw(D)},
    'head': {'dense': dense(D, D), 'out': dense(D, C)},
  }


def paths(tree):
  return {path for path, _ in keys.named_leaves(tree)}


CASES = {
  'full': adapters.full(),
  'head': adapters.head_only(),
  'bias': adapters.bias_only(also=adapters.HEAD),
  'subset': adapters.subset(('layers/mlp/*', '*norm*/scale')),
  'lora': adapters.lora(rank=2, also=adapters.HEAD),
  'lora-all': adapters.lora(rank=4, targets=('*/kernel', 'embed/*')),
}
EVERY = pytest.mark.parametrize('name', CASES)


def check_round_trip(name, dtype, array, jit):
  adapter, start = CASES[name], params(dtype, array)
  start['layers']['mlp']['up']['kernel'] = array(-np.zeros((L, D, F), dtype))
  trainable, frozen = adapter.init(start, KEY)
  merged = jit(adapter.merge)(frozen, trainable)
  assert jax.tree.structure(merged) == jax.tree.structure(start)
  assert digest.digest(merged) == digest.digest(start)


@EVERY
@pytest.mark.parametrize('array', [np.asarray, jnp.asarray])
def test_merge_of_init_is_params(name, array):
  check_round_trip(name, np.float32, array, jax.jit)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize('jit', [jax.jit, lambda f: f])
def test_merge_of_init_is_params_in_every_dtype(dtype, jit):
  check_round_trip('lora', dtype, np.asarray, jit)


@EVERY
def test_merge_keeps_dtypes_of_the_frozen_part(name):
  adapter = CASES[name]
  trainable, frozen = adapter.init(params(np.float16), KEY)
  master = jax.tree.map(lambda x: np.float32(x) + np.float32(1), trainable)
  merged = jax.jit(adapter.merge)(frozen, master)
  assert {x.dtype for x in jax.tree.leaves(merged)} == {np.dtype(np.float16)}
  assert digest.digest(merged) != digest.digest(params(np.float16))


def test_what_is_trained():
  everything = paths(params())
  trained = {n: paths(a.init(params(), KEY)[0]) for n, a in CASES.items()}
  head = set(fnmatch.filter(everything, 'head/*'))
  assert len(head) == 4
  assert trained['full'] == everything
  assert trained['head'] == head
  assert trained['bias'] == head | {
    'layers/norm1/bias', 'layers/mlp/up/bias', 'layers/mlp/down/bias',
    *(f'layers/attention/{x}/bias' for x in 'qkvo'),
  }  # fmt: skip
  assert trained['subset'] == {
    'layers/mlp/up/kernel', 'layers/mlp/up/bias', 'layers/mlp/down/kernel',
    'layers/mlp/down/bias', 'layers/norm1/scale', 'final_norm/scale',
  }  # fmt: skip
  assert trained['lora'] == head | {
    f'layers/attention/{x}/kernel/{factor}' for x in 'qv' for factor in 'ab'
  }
  assert not any(p.endswith(('bias/a', 'scale/a')) for p in trained['lora-all'])
  assert 'embed/embedding/b' in trained['lora-all']


def test_trained_parameters_are_stored_once():
  trainable, frozen = adapters.head_only().init(params(), KEY)
  whole = adapters.count(params())
  assert adapters.count(trainable) + adapters.count(frozen) == whole
  assert adapters.count(trainable) == D * D + D + D * C + C


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_low_rank_update_is_the_equation(rank):
  adapter = adapters.lora(rank=rank, alpha=6.0, targets=('layers/mlp/up/k*',))
  trainable, frozen = adapter.init(params(), KEY)
  rng = np.random.default_rng(1)
  trainable = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), trainable
  )
  merged = jax.jit(adapter.merge)(frozen, trainable)
  factors = trainable['layers']['mlp']['up']['kernel']
  assert factors['a'].shape == (L, D, rank)
  assert factors['b'].shape == (L, rank, F)
  old = params()['layers']['mlp']['up']['kernel']
  new = merged['layers']['mlp']['up'].pop('kernel')
  for layer in range(L):
    update = factors['a'][layer] @ factors['b'][layer] * (6.0 / rank)
    np.testing.assert_allclose(new[layer], old[layer] + update, rtol=1e-5)
    assert np.linalg.matrix_rank(new[layer] - old[layer], tol=1e-4) == rank
  rest = params()
  del rest['layers']['mlp']['up']['kernel']
  assert digest.digest(merged) == digest.digest(rest)


def test_gradients_reach_both_factors_from_the_start():
  """d loss / d B = s A' G and d loss / d A = s G B' = 0, G = d loss / d W."""
  adapter = adapters.lora(rank=2, alpha=6.0, also=('head/out/kernel',))
  trainable, frozen = adapter.init(params(), KEY)
  loss = lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p))
  grads = jax.jit(jax.grad(lambda t: loss(adapter.merge(frozen, t))))(trainable)
  w = params()['layers']['attention']['q']['kernel']
  a = np.asarray(trainable['layers']['attention']['q']['kernel']['a'])
  got = grads['layers']['attention']['q']['kernel']
  expected = 3.0 * np.einsum('lir,lio->lro', a, np.cos(w))
  np.testing.assert_allclose(got['b'], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(got['a'], np.zeros_like(a))
  np.testing.assert_allclose(
    grads['head']['out']['kernel'], np.cos(params()['head']['out']['kernel']),
    rtol=1e-5,
  )  # fmt: skip


def test_first_factors_are_uniform_and_differ():
  adapter = adapters.lora(rank=64, targets=('*',))
  tree = {'x': {'w': np.zeros((2, 100, 80))}, 'y': np.zeros((100, 80))}
  trainable, _ = adapter.init(tree, KEY)
  x, y = trainable['x']['w']['a'], trainable['y']['a']
  bound = 0.1  # 1 / sqrt(in)
  for sample in (x[0], x[1], y):
    u = np.sort(np.asarray(sample).ravel()) / (2 * bound) + 0.5
    distance = np.abs(u - (np.arange(u.size) + 0.5) / u.size).max()
    assert distance < 1.95 / np.sqrt(u.size)  # Kolmogorov-Smirnov, 0.1 %
    assert 0.999 < u[-1] <= 1
  both = np.stack([np.ravel(v) for v in (x[0], x[1], y)])
  correlation = np.corrcoef(both) - np.eye(3)
  assert np.abs(correlation).max() < 4 / np.sqrt(6400)
  other, _ = adapter.init(tree, keys.root(8))
  assert abs(np.corrcoef(other['y']['a'].ravel(), y.ravel())[0, 1]) < 0.05


def test_first_factors_are_golden():
  """Every replica draws the same bits, today and in a year."""
  trainable, _ = adapters.lora(rank=2).init(params(), KEY)
  a = trainable['layers']['attention']['q']['kernel']['a']
  key = keys.leaf_key(keys.stream(KEY, 'lora'), 'layers/attention/q/kernel')
  position = np.array([0, 1, 47])
  bits = np.asarray(keys.fold(key, position))[:, 0] >> 8
  u = (bits / 2**23 - 1).astype(np.float32)
  np.testing.assert_array_equal(a.ravel()[position], u * np.float32(8**-0.5))
  assert digest.digest(trainable)[:16] == '39e7a999171e9f2d'


@settings(max_examples=30, deadline=None)
@given(
  chosen=st.sets(st.sampled_from(sorted(paths(params()))), min_size=1),
)
def test_any_subset_comes_back(chosen):
  adapter = adapters.subset(sorted(chosen))
  trainable, frozen = adapter.init(params(), None)
  assert paths(trainable) == chosen
  ones = jax.tree.map(np.ones_like, trainable)
  for path, leaf in keys.named_leaves(adapter.merge(frozen, ones)):
    assert (leaf == 1).all() == (path in chosen)


def test_trees_that_are_not_dicts():
  tree = {'stack': [np.ones((2, 3)), (np.ones(3), np.ones((3, 3)))]}
  adapter = adapters.lora(rank=1, targets=('stack/0', 'stack/1/1'))
  trainable, frozen = adapter.init(tree, KEY)
  assert paths(trainable) == {
    'stack/0/a', 'stack/0/b', 'stack/1/1/a', 'stack/1/1/b'
  }  # fmt: skip
  merged = adapter.merge(frozen, trainable)
  assert jax.tree.structure(merged) == jax.tree.structure(tree)


@pytest.mark.parametrize(
  ('adapter', 'message'),
  [
    (adapters.head_only(patterns=('heads/*',)),
     "patterns: pattern 'heads/\\*' matches no parameter; near it: .*head/out"),
    (adapters.lora(rank=2, targets=('layers/attention/query/kernel',)),
     "targets: .*query/kernel' matches no .*; near it: .*attention/q/kernel"),
    (adapters.lora(rank=2, also=('classifier/*',)), "also: pattern 'classif"),
    (adapters.lora(rank=2, targets=('layers/norm1/*',)),
     r"'layers/norm1/\w+' of shape \(3, 8\) is not a matrix"),
    (adapters.lora(rank=2, targets=('final_norm/scale',)), 'is not a matrix'),
    (adapters.lora(rank=9), r"got 9 for 'layers/attention/q/kernel' of shape"),
    (adapters.lora(rank=2, targets=('head/*/kernel',), also=('head/*',)),
     "'head/dense/kernel' is matched by targets and by also"),
  ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(adapter, message):
  with pytest.raises(ValueError, match=message):
    adapter.init(params(), KEY)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: adapters.lora(rank=0), 'rank must be >= 1, got 0'),
    (lambda: adapters.lora(alpha=0.0), 'alpha must be > 0'),
    (lambda: adapters.lora(alpha=float('nan')), 'alpha must be > 0'),
    (lambda: adapters.lora(targets=()), 'targets must have at least one'),
    (lambda: adapters.lora(targets='*'), r"targets must be a list .* got '\*'"),
    (lambda: adapters.lora(also='head'), r"also must be a list .* got 'head'"),
    (lambda: adapters.bias_only(also='head'), 'also must be a list'),
    (lambda: adapters.subset(()), 'patterns must have at least one'),
  ],
)
def test_impossible_adapters_are_refused(build, message):
  with pytest.raises(ValueError, match=message):
    build()


@pytest.mark.parametrize('key', [None, jax.random.key(0), np.zeros(2)])
def test_keys_that_are_not_shared_ones_are_refused(key):
  with pytest.raises(ValueError, match=r'key must be uint32\[2\]'):
    adapters.lora(rank=2).init(params(), key)


def test_parts_that_do_not_belong_together_are_refused():
  head, frozen = CASES['head'].init(params(), KEY)
  low_rank, whole = adapters.lora(rank=2).init(params(), KEY)
  with pytest.raises(ValueError, match="trainable has no 'head/dense/bias'"):
    CASES['head'].merge(frozen, low_rank)
  with pytest.raises(ValueError, match="has 'other', for which frozen has no"):
    CASES['lora'].merge(whole, low_rank | {'other': np.ones(1)})
  assert paths(head) <= paths(whole)


def test_paths_that_run_through_each_other_are_refused():
  tree = {'a': {'b': np.ones(2), 'b/c': np.ones(2)}}
  with pytest.raises(ValueError, match="'a/b/c' runs through another"):
    adapters.full().init(tree, KEY)
