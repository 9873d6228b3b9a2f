"""Clipped sums: single examples, neighbours by brute force, rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import privacy

pytestmark = pytest.mark.fast_compile

DIM = 7
PARAMS = {'w': jnp.zeros((3, 2)), 'b': jnp.zeros(())}


def loss_fn(params, batch):
  """A mean over the batch with a cubic in it, so that gradients vary."""
  features, label = batch['x'], batch['y']
  out = jnp.sum(features @ params['w'], axis=1) + params['b']
  error = out - label
  return jnp.mean(0.5 * error**2 + 0.1 * error**3)


def examples(count, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  scales = scale * 10.0 ** rng.uniform(-2, 2, (count, 1))
  x = rng.normal(size=(count, 3)) * scales
  return {
    'x': x.astype(np.float32),
    'y': rng.normal(size=count).astype(np.float32),
  }


def params(seed):
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  return jax.tree.map(draw, PARAMS)


def flat(tree):
  """float64[D]."""
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


def one_by_one(at, batch, clip_norm, old=None):
  """The sum in float64, from a loop over examples."""
  total = 0.0
  for i in range(len(batch['y'])):
    example = jax.tree.map(lambda x: x[i : i + 1], batch)
    g = flat(jax.grad(loss_fn)(at, example))
    if old is not None:
      g = g - flat(jax.grad(loss_fn)(old, example))
    total = total + g * min(1.0, clip_norm / np.linalg.norm(g))
  return total


@pytest.mark.parametrize('microbatch_size', [1, 4, 64])
def test_a_sum_is_that_of_single_examples(microbatch_size):
  at, old, batch = params(1), params(2), examples(11)
  kwargs = {'clip_norm': 0.7, 'microbatch_size': microbatch_size}
  found = privacy.clipped_sum(loss_fn, at, batch, **kwargs)
  np.testing.assert_allclose(
    flat(found.total), one_by_one(at, batch, 0.7), rtol=0, atol=3e-3
  )
  assert float(found.loss) == pytest.approx(float(loss_fn(at, batch)), rel=1e-4)
  found = privacy.clipped_difference_sum(loss_fn, at, old, batch, **kwargs)
  np.testing.assert_allclose(
    flat(found.total), one_by_one(at, batch, 0.7, old), rtol=0, atol=3e-3
  )


def test_a_difference_is_clipped_not_its_parts():
  """Both gradients are far above the bound, and their difference below it."""
  batch = {
    'x': np.full((1, 3), 1.0, np.float32),
    'y': np.array([100.0], np.float32),
  }
  quadratic = lambda p, b: jnp.mean((b['x'] @ p['w'] - b['y'][:, None]) ** 2)
  at, old = {'w': jnp.full((3, 1), 0.01)}, {'w': jnp.zeros((3, 1))}
  found = privacy.clipped_difference_sum(
    quadratic, at, old, batch, clip_norm=1.0, microbatch_size=1
  )
  np.testing.assert_allclose(flat(found.total), [0.06] * 3, rtol=1e-3)
  assert float(found.clipped) == 0


def test_unclipped_without_a_bound():
  at, batch = params(1), examples(9, scale=0.1)
  found = privacy.clipped_sum(
    loss_fn, at, batch, clip_norm=np.inf, microbatch_size=4
  )
  expected = 9 * flat(jax.grad(loss_fn)(at, batch))
  np.testing.assert_allclose(flat(found.total), expected, rtol=1e-4)


def test_padding_and_rejected_examples_add_exact_zeros():
  at, batch = params(1), examples(6)
  run = jax.jit(
    lambda batch, mask: privacy.clipped_sum(
      loss_fn, at, batch, mask, clip_norm=1.0, microbatch_size=4
    )
  )
  mask = np.array([1, 1, 0, 1, 0, 1], bool)
  expected = run(batch, mask)
  spoilt = jax.tree.map(np.copy, batch)
  spoilt['x'][2], spoilt['x'][4] = np.nan, np.inf
  padded = run(spoilt, mask)
  np.testing.assert_array_equal(flat(padded.total), flat(expected.total))
  assert float(padded.loss) == float(expected.loss)
  assert int(padded.rejected) == 0
  rejected = run(spoilt, np.ones(6, bool))
  np.testing.assert_array_equal(flat(rejected.total), flat(expected.total))
  assert int(rejected.rejected) == 2


def test_a_bound_of_zero_gives_exact_zeros_and_may_be_traced():
  at, batch = params(1), examples(5)
  run = jax.jit(
    lambda c, old: privacy.clipped_difference_sum(
      loss_fn, at, old, batch, clip_norm=c, microbatch_size=2
    )
  )
  found = run(0.0, params(2))
  assert not flat(found.total).any()
  assert int(found.rejected) == 0
  assert float(found.loss) == pytest.approx(float(loss_fn(at, batch)), rel=1e-4)
  assert flat(run(0.5, params(2)).total).any()
  assert not flat(run(jnp.nan, params(2)).total).any()


@pytest.mark.parametrize('size', [1, 7, 1000, 1_000_000])
def test_rounding_never_exceeds_the_bound(size):
  """With bounds that float32 can't hold, and at entries of any magnitude."""
  rng = np.random.default_rng(size)
  clip = jax.jit(privacy.clip)
  worst = 0.0
  for trial in range(20 if size < 1_000_000 else 3):
    bound = np.float32(10.0 ** rng.uniform(-12, 4))
    x = rng.normal(size=size) * 10.0 ** rng.uniform(-15, 8)
    if trial % 2:
      x = bound * x / np.linalg.norm(x)  # just at the bound
    found, _ = clip({'x': x.astype(np.float32)}, bound)
    norm = np.linalg.norm(np.asarray(found['x'], np.float64))
    worst = max(worst, norm / float(bound))
  assert 0.99 < worst <= 1 + 1e-9
  found, _ = clip({'x': np.full(size, 3.0, np.float32)}, 0.1)
  norm = np.linalg.norm(np.asarray(found['x'], np.float64))
  assert 0.0999 < norm <= 0.1  # float32(0.1) is above 0.1


def neighbours(rng, count, kind):
  """Two data sets that differ in one example."""
  one = examples(count, int(rng.integers(1 << 30)))
  other = jax.tree.map(np.copy, one)
  i = int(rng.integers(count))
  if kind == 'opposite':  # gradients near the bound, in opposite directions
    one['x'][i], one['y'][i] = 1.0, -100.0
    other['x'][i], other['y'][i] = 1.0, 100.0
  elif kind == 'spoilt':
    other['x'][i] = np.nan
  else:
    other['x'][i] = rng.normal(size=3) * 10.0 ** rng.uniform(-3, 6)
  return one, other


@pytest.mark.parametrize('kind', ['opposite', 'random', 'spoilt'])
def test_neighbours_by_brute_force(kind):
  """The float32 sums themselves differ by at most twice the bound."""
  at, old = params(3), params(4)
  total = jax.jit(
    lambda batch, c: (
      privacy.clipped_sum(
        linear, at, batch, clip_norm=c, microbatch_size=4
      ).total
    )
  )
  difference = jax.jit(
    lambda batch, c: (
      privacy.clipped_difference_sum(
        loss_fn, at, old, batch, clip_norm=c, microbatch_size=4
      ).total
    )
  )
  rng = np.random.default_rng(0)
  worst = 0.0
  for _ in range(60):
    c = np.float32(10.0 ** rng.uniform(-6, 2))
    one, other = neighbours(rng, 10, kind)
    for run in (total, difference):
      moved = np.linalg.norm(flat(run(one, c)) - flat(run(other, c)))
      worst = max(worst, moved / (2 * float(c)))
  assert worst <= 1 + 1e-9
  assert worst > {'opposite': 0.999, 'random': 0.5, 'spoilt': 0.49}[kind]


def linear(params, batch):
  """Gradients in the direction of the example, with the sign of its label."""
  out = batch['x'] @ params['w'] + params['b']
  return jnp.mean(out * batch['y'][:, None])


def test_long_sums_keep_their_bound():
  """Plain float32 sums of 50,000 examples move by more than one example."""
  count, c, size = 50_000, np.float32(0.1), 64
  loss = lambda params, batch: jnp.mean(batch * params['w'])
  run = jax.jit(
    lambda batch: privacy.clipped_sum(
      loss, {'w': jnp.zeros(())}, batch, clip_norm=c, microbatch_size=size
    ).total['w']
  )
  rng = np.random.default_rng(0)
  batch = rng.uniform(0.05, 3.0, count).astype(np.float32)
  total = float(run(batch))
  for i in rng.integers(count, size=12):
    other = batch.copy()
    other[i] = -3.0
    one = batch.copy()
    one[i] = 3.0
    moved = float(run(one)) - float(run(other))
    assert 0.98 < moved / (2 * float(c)) <= 1 + 1e-9
  bound = (1 - privacy.margin(1, count, size)) * float(c)
  exact = np.minimum(batch.astype(np.float64), bound)
  assert total == pytest.approx(exact.sum(), rel=2e-7)
  plain = np.cumsum(exact.astype(np.float32), dtype=np.float32)[-1]
  assert abs(plain - exact.sum()) > 0.1 * float(c)


def test_a_margin_that_is_too_large_is_refused():
  assert privacy.margin(10_000, 10_000, 32) < 2e-3
  with pytest.raises(ValueError, match='float32 can not bound a sum of'):
    privacy.margin(10, 10_000_000, 32)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'clip_norm': 0.0}, 'clip_norm must be positive, got 0.0'),
    ({'clip_norm': -1.0}, 'clip_norm must be positive, got -1.0'),
    ({'clip_norm': np.nan}, 'clip_norm must be positive, got nan'),
    ({'microbatch_size': 0}, 'microbatch_size must be >= 1, got 0'),
    ({'examples': examples(0)}, 'there are no examples'),
    ({'mask': np.ones(4, bool)}, "got lengths ['4', '5']"),
  ],
)
def test_refusals(change, message):
  arguments = {'examples': examples(5), 'mask': None} | {
    'clip_norm': 1.0, 'microbatch_size': 2,
  } | change  # fmt: skip
  with pytest.raises(ValueError) as error:
    privacy.clipped_sum(loss_fn, params(0), **arguments)
  assert message in str(error.value)


def test_gradients_in_memory_are_those_of_a_microbatch():
  """Peak memory of the compiled sum does not grow with the examples."""
  wide = {'w': jnp.zeros((64, 256))}
  loss = lambda params, batch: jnp.sum((batch @ params['w']) ** 2)

  def temporary(count, size):
    run = lambda batch: privacy.clipped_sum(
      loss, wide, batch, clip_norm=1.0, microbatch_size=size
    )
    batch = jax.ShapeDtypeStruct((count, 64), jnp.float32)
    analysis = jax.jit(run).lower(batch).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes

  weights = 4 * 64 * 256
  assert temporary(512, 4) < 12 * weights
  assert temporary(512, 64) > 60 * weights  # this is what would be seen
