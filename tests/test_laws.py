"""Laws of reconstruction from random coordinates, with predicted values.

rec = 1/K sum_k <v_k, delta> v_k with independent entries of variance 1 and
kurtosis kappa. Statistics are over fixed seeds; tolerances are four of their
standard errors, and small enough to tell neighbouring laws apart.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import allocation, blocks, keys

ROOT = keys.root(4)
# small tensors have no Walsh blocks
BASES = pytest.mark.parametrize(
  'distribution', [d for d in blocks.DISTRIBUTIONS if d != 'walsh']
)


def normals(shapes, seed=0):
  rng = np.random.default_rng(seed)
  make = lambda shape: rng.normal(size=shape).astype(np.float32)
  return {name: make(shape) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnames=('num_slots', 'distribution'))
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None, None))
def reconstruction(trial, delta, counts, magnitude, num_slots, distribution):
  """One reconstruction; from signs times a magnitude, if it is positive."""
  parts = blocks.partition(delta, max_size=1 << 20)
  directions = keys.fold(keys.fold(ROOT, trial), jnp.arange(num_slots))
  y = blocks.project(
    delta, parts, counts, directions, distribution=distribution
  )
  y = jnp.where(magnitude > 0, jnp.sign(y) * magnitude, y)
  block, _ = blocks.slots(counts, num_slots)
  y = y / counts.at[block].get(mode='fill', fill_value=1)
  return blocks.reconstruct(
    delta,
    parts,
    counts[None],
    directions[None],
    y[None],
    distribution=distribution,
  )


def trials(
  delta, counts, num, *, distribution='rademacher', magnitude=0.0, slots=None
):
  """Independent reconstructions, a pytree like `delta` with a leading axis."""
  counts = np.asarray(counts, np.int32)
  slots = slots or int(counts.sum())
  recs = reconstruction(
    np.arange(num), delta, counts, np.float32(magnitude), slots, distribution
  )
  return jax.tree.map(np.asarray, recs)


def errors(recs, delta):
  """Squared errors of every trial, float64[T]."""
  square = lambda r, x: np.sum(
    np.square(r.astype(np.float64) - x), axis=tuple(range(1, r.ndim))
  )
  return np.sum(jax.tree.leaves(jax.tree.map(square, recs, delta)), axis=0)


def assert_mean(samples, expected, least):
  """The mean is as expected; `least` is a difference that must be seen."""
  tolerance = 4 * np.std(samples) / math.sqrt(len(samples))
  assert tolerance < least
  assert abs(np.mean(samples) - expected) < tolerance


def energy(delta):
  return sum(float(np.sum(np.square(x, dtype=np.float64))) for x in delta)


@BASES
def test_reconstruction_is_unbiased(distribution):
  delta = normals({'a': (3, 2)})
  recs = trials(delta, [2], 60_000, distribution=distribution)['a']
  standard_error = recs.std(0) / math.sqrt(60_000)
  assert standard_error.max() < 0.01
  assert (np.abs(recs.mean(0) - delta['a']) < 4.5 * standard_error).all()


@BASES
def test_the_second_moment_is_exact(distribution):
  """E |rec - delta|^2 = (d - 2 + kappa) / K |delta|^2."""
  kappa = allocation.KURTOSIS[distribution]
  delta = normals({'a': (3, 2)})
  recs = trials(delta, [2], 60_000, distribution=distribution)
  ratio = errors(recs, delta) / energy(delta.values())
  # for signs, the next kappa is 1.875 away; 0.125 between the other two
  least = 0.3 if distribution == 'rademacher' else 0.12
  assert_mean(ratio, (6 - 2 + kappa) / 2, least)


def test_one_sign_is_enough_for_a_scalar():
  delta = normals({'a': ()})
  recs = trials(delta, [1], 9)['a']
  np.testing.assert_array_equal(recs, np.repeat(delta['a'], 9))


@pytest.mark.parametrize('num', [16, 256, 2048])
def test_the_cosine_follows_from_the_second_moment(num):
  """About sqrt(K / (K + d))."""
  delta = normals({'a': (32, 32)})
  recs = trials(delta, [num], 12, slots=2048)['a'].reshape(12, -1)
  x = delta['a'].reshape(-1)
  found = recs @ x / np.linalg.norm(recs, axis=1) / np.linalg.norm(x)
  assert_mean(found, math.sqrt(num / (num + 1024)), 0.06)


def test_a_sign_instead_of_a_coordinate_costs_half_pi():
  """Var = (pi / 2 d - 1) / K, so that 8 signs are worth 5.1 coordinates."""
  delta = normals({'a': (16, 16)})
  norm = math.sqrt(energy(delta.values()))
  magnitude = math.sqrt(math.pi / 2) * norm
  recs = trials(delta, [64], 4000, magnitude=magnitude)
  ratio = errors(recs, delta) / norm**2
  assert_mean(ratio, (math.pi / 2 * 256 - 1) / 64, 0.05)


def test_reconstruction_is_linear_in_its_coordinates():
  """Exactly so on the grid."""
  params = normals({'a': (130, 3), 'b': (7,)})
  exponents = {'a': 16, 'b': 18}
  params = jax.tree.map(
    lambda x, e: np.rint(x * 2.0**e).astype(np.float32) / 2**e,
    params,
    exponents,
  )
  parts = blocks.partition(params, max_size=256)
  counts = np.array([[4, 0, 2, 3]], np.int32)
  assert counts.shape[1] == len(parts)
  directions = keys.fold(ROOT, np.arange(9))[None]
  rng = np.random.default_rng(0)
  x, y = rng.integers(-999, 999, (2, 1, 9), dtype=np.int32)
  add = jax.jit(
    lambda w, u: blocks.add_units(w, exponents, parts, counts, directions, u)[0]
  )
  both, one_by_one = add(params, x + y), add(add(params, x), y)
  back = add(one_by_one, -x - y)
  for name in params:
    np.testing.assert_array_equal(both[name], one_by_one[name])
    np.testing.assert_array_equal(back[name], params[name])
    assert (both[name] != params[name]).any()


def test_blocks_and_directions_are_independent():
  """Correlations of the errors have a standard deviation of 1 / sqrt(d)."""
  same = normals({'a': (64, 32)})['a']
  delta = {'a': same, 'b': same, 'c': np.tile(same, (2, 1))}
  parts = blocks.partition(delta, max_size=same.size)
  assert [block.path for block in parts] == ['a', 'b', 'c', 'c']
  directions = keys.fold(ROOT, jnp.arange(512))  # 128 of them are used
  counts = np.full(4, 128, np.int32)

  @jax.jit
  def both(delta):
    y = blocks.project(delta, parts, counts, directions)
    return blocks.reconstruct(
      delta, parts, counts[None], directions[None], y[None] / 128
    )

  rec = both(delta)
  other = trials({'a': same}, [128], 2)['a']  # other directions
  recs = [rec['a'], rec['b'], rec['c'][:64], rec['c'][64:], *other]
  noise = np.stack([np.asarray(r - same).reshape(-1) for r in recs])
  correlation = np.corrcoef(noise) - np.eye(6)
  assert np.abs(correlation).max() < 4 / math.sqrt(same.size)
  # blocks of one stream would agree
  assert np.linalg.norm(noise, axis=1).min() > 2 * np.linalg.norm(same)


SHAPES = {'a': (8, 8), 'b': (64, 32), 'c': (1, 300)}


SIZES = np.array([64, 2048, 300])
NORMS = np.array([np.linalg.norm(x) for x in normals(SHAPES).values()])
counts_of = jax.jit(allocation.counts, static_argnums=2)


def law_and_counts(name, total):
  """The predicted squared error; K_l int32[L]."""
  factors = allocation.factors(name, SIZES.tolist(), 'rademacher')
  counts = np.asarray(counts_of(NORMS.astype(np.float32), factors, total))
  assert counts.sum() == total
  return np.sum((SIZES - 1) / counts * NORMS**2), counts


def assert_follows(law, counts):
  delta = normals(SHAPES)
  recs = trials(delta, counts, 400, slots=256)
  assert_mean(errors(recs, delta), law, 0.03 * law)


def test_bytes_has_the_least_error_at_equal_bytes():
  law, counts = law_and_counts('bytes', 256)
  other_law, other_counts = law_and_counts('compute', 256)
  assert law < 0.9 * other_law
  assert_follows(law, counts)
  assert_follows(other_law, other_counts)


def test_compute_has_the_least_error_at_equal_compute():
  law, counts = law_and_counts('compute', 256)
  other_law, other_counts = law_and_counts('bytes', 200)
  assert 0.98 < np.dot(other_counts, SIZES) / np.dot(counts, SIZES) < 1
  assert law < 0.95 * other_law
  assert_follows(other_law, other_counts)


def test_the_best_server_step_shrinks():
  """|lr rec - delta| is smallest at K / (K + d - 1) for signs."""
  delta = normals({'a': (16, 16)})
  recs = trials(delta, [64], 4000)
  ends = {}
  best = 64 / (64 + 255)
  for lr in (best / 2, best, 2 * best, 1.0):
    scaled = jax.tree.map(lambda r, lr=lr: np.float32(lr) * r, recs)
    ends[lr] = errors(scaled, delta).mean() / energy(delta.values())
  assert min(ends, key=lambda lr: ends[lr]) == best
  assert abs(ends[best] - (1 - best)) < 0.01
  assert ends[1.0] > 3.8  # worse than no step at all
