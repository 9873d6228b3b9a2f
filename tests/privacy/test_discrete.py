"""Integer noise and the linear code: exact laws, shares, sums, sensitivity."""

import decimal
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfl import discrete, keys, noise

SECRET = bytes(range(32))


def make():
  return noise.NoiseKey(SECRET, run='run')


def p_value(draws, pmf):
  """Of a chi-squared test over the cells with 10 expected draws or more."""
  lowest = min(pmf)
  p = np.array([pmf[k] for k in range(lowest, max(pmf) + 1)])
  assert draws.min() >= lowest
  assert draws.max() < lowest + len(p)
  seen = np.bincount(draws - lowest, minlength=len(p))
  cells = p * len(draws) >= 10
  expected = np.append(p[cells], p[~cells].sum()) * len(draws)
  seen = np.append(seen[cells], seen[~cells].sum())
  return stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue


@pytest.mark.parametrize('sigma', [0.3, 1.0, 15.0])
def test_the_table_is_the_discrete_gaussian_to_1e_17(sigma):
  table = discrete.gaussian_table(sigma)
  assert sum(table.counts) == 2**64
  assert table.counts == table.counts[::-1]
  assert len(table.upper) == len(table.counts) - 1
  decimal.getcontext().prec = 40
  weight = lambda k: (
    -(decimal.Decimal(k) ** 2) / (2 * decimal.Decimal(sigma) ** 2)
  ).exp()
  reach = 12 * math.ceil(sigma) + 3
  total = sum(weight(k) for k in range(-reach, reach + 1))
  counts = dict(enumerate(table.counts, table.lowest))
  distance = sum(
    abs(counts.get(k, 0) / decimal.Decimal(2**64) - weight(k) / total)
    for k in range(-reach, reach + 1)
  )
  assert distance / 2 < 1e-17


@pytest.mark.parametrize('mean', [0.2, 5.0, 400.0])
def test_the_table_is_the_poisson_law(mean):
  table = discrete.poisson_table(mean)
  assert sum(table.counts) == 2**64
  values = np.arange(table.lowest, table.lowest + len(table.counts))
  p = np.array(table.counts, float) * 2.0**-64
  np.testing.assert_allclose(p, stats.poisson.pmf(values, mean), 1e-8, 1e-17)


def test_inversion_hits_every_boundary():
  table = discrete.gaussian_table(0.5)
  upper = table.upper
  ends = np.array([0, 2**64 - 1], np.uint64)
  words = np.concatenate([ends[:1], upper - np.uint64(1), upper, ends[1:]])
  found = discrete.invert(table, words)
  values = np.arange(table.lowest, -table.lowest + 1)
  expected = [values[0], *values[:-1], *values[1:], values[-1]]
  np.testing.assert_array_equal(found, expected)


def test_draws_follow_the_table_and_no_other():
  draws = make().discrete_gaussian((100_000,), 15.0, round=0, name='x')
  assert draws.dtype == np.int64
  assert p_value(draws, discrete.gaussian_pmf(15.0)) > 1e-3
  assert p_value(draws, discrete.gaussian_pmf(15.0 * 1.03)) < 1e-5
  assert p_value(draws, discrete.gaussian_pmf(15.0 / 1.03)) < 1e-5


def test_skellam_shares_add_up():
  variance, parties = 12.0, 4
  shares = [
    make().skellam((200_000,), variance / parties, round=p, name='share')
    for p in range(parties)
  ]
  assert p_value(shares[0], discrete.skellam_pmf(variance / parties)) > 1e-3
  total = sum(shares)
  assert p_value(total, discrete.skellam_pmf(variance)) > 1e-3
  assert p_value(total, discrete.skellam_pmf(variance * 1.04)) < 1e-4
  assert p_value(total, discrete.skellam_pmf(variance / 1.04)) < 1e-4
  pmf = discrete.skellam_pmf(variance)
  assert sum(pmf.values()) == pytest.approx(1, abs=1e-12)
  assert sum(k * k * p for k, p in pmf.items()) == pytest.approx(variance)


def test_units_add_up_exactly_whatever_the_order():
  rng = np.random.default_rng(0)
  values = rng.normal(0, 3, (1000, 4)).astype(np.float32)
  values[5], values[6, 0] = np.nan, np.inf
  units = discrete.clipped_units(values, clip_norm=2.0)
  assert units.dtype == jnp.int32
  shuffled = discrete.clipped_units(
    values[rng.permutation(1000)], clip_norm=2.0
  )
  np.testing.assert_array_equal(units, shuffled)
  clean = np.clip(values[:, 1], -2, 2)
  clean[5] = 0
  found = discrete.mean(units, clip_norm=2.0, divisor=1000)
  assert float(found[1]) == pytest.approx(clean.mean(), abs=2 * 2.0**-15)
  mask = np.arange(1000) < 500
  half = discrete.clipped_units(values, mask, clip_norm=2.0)
  np.testing.assert_array_equal(
    half, discrete.clipped_units(values[:500], clip_norm=2.0)
  )
  assert discrete.clipped_units(values[:, 0], clip_norm=2.0).shape == ()


@pytest.mark.parametrize(
  ('levels', 'divisor', 'expected'),
  [(64, 128, 1), (127, 100, 3), (8, 2, 8), (6144, 4096, 3)],
)
def test_neighbours_move_a_code_by_its_sensitivity(levels, divisor, expected):
  """Under the rounding that is the worst for them."""
  assert discrete.sensitivity(levels, divisor) == expected
  assert discrete.sensitivity(8, 1) == 16
  assert discrete.sensitivity(levels, divisor, replace=False) == max(
    1, math.ceil(levels / divisor)
  )
  most = 2**discrete.UNIT_BITS
  largest = (divisor - 2) * most
  rng = np.random.default_rng(0)
  random = rng.integers(-divisor * most, largest + 1, 50_000)
  # where the steps of float32 become larger, between an example's two sums
  steps = 2.0 ** np.arange(1, 13)[:, None] / (levels / (divisor * most))
  between = (steps - rng.integers(2 * most, size=(1, 5000))).astype(int)
  units = np.concatenate([random, between[between <= largest]])
  scale = levels / (divisor * most) * discrete.code_scale(divisor)
  x = units.astype(np.float32) * np.float32(scale)
  uniform = x - np.floor(x)  # the smallest that does not round up
  code = lambda units: np.asarray(
    discrete.encode(
      jnp.asarray(units, jnp.int32), uniform, levels=levels, divisor=divisor
    )
  )
  moved = code(units + 2 * most) - code(units)
  assert moved.max() == expected
  assert np.abs(code(units)).max() <= levels


def test_codes_are_unbiased_and_linear():
  units = discrete.clipped_units(np.full(50, 0.37, np.float32), clip_norm=1.0)
  count = 40_000
  uniform = keys.uniform(keys.fold(keys.root(1), np.arange(count)))
  settings = {'levels': 20, 'divisor': 50}
  codes = discrete.encode(jnp.full(count, units), uniform, **settings)
  assert set(np.unique(codes)) == {7, 8}
  total = discrete.decode(jnp.sum(codes), clip_norm=1.0, **settings)
  error = 0.05 * 0.5 / np.sqrt(count)
  assert float(total) / count == pytest.approx(0.37, abs=4 * error + 2.0**-15)


@pytest.mark.parametrize('bits', [1, 8, 12, 31])
def test_wrapping_commutes_with_sums(bits):
  half = 1 << (bits - 1)
  rng = np.random.default_rng(bits)
  total = rng.integers(-half, half, 100)
  parts = rng.integers(-(2**40), 2**40, (3, 100))
  parts = np.concatenate([parts, [total - parts.sum(0)]])
  sent = discrete.wrap(parts, bits)
  assert sent.min() >= 0
  assert sent.max() < 2**bits
  np.testing.assert_array_equal(discrete.unwrap(sent.sum(0), bits), total)
  np.testing.assert_array_equal(
    discrete.unwrap(jnp.asarray([half - 1, half, -half, -1], jnp.int32), bits),
    [half - 1, -half, -half, -1],
  )


def test_one_byte_is_for_few_clients_and_rounds():
  """Epsilon 3: sigma = sqrt(rounds) / 0.719, levels so that D is 1."""
  bits = lambda clients, sigma: discrete.bits_needed(
    clients * 4, discrete.gaussian_pmf(sigma)
  )
  assert bits(8, 14.0) == 8
  assert bits(64, 44.0) == 11
  assert bits(1000, 44.0) == 14
  with pytest.raises(ValueError, match='over 31 bits'):
    discrete.bits_needed(2**31, {0: 1.0})


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: discrete.gaussian_table(0.0), 'sigma must be in (0, 10000]'),
    (lambda: discrete.gaussian_table(math.nan), 'sigma must be in (0, 10000]'),
    (lambda: discrete.poisson_table(-1.0), 'square root of the mean must be'),
    (lambda: discrete.skellam_pmf(1e9), 'standard deviation must be in'),
    (
      lambda: discrete.clipped_units(np.zeros(2), clip_norm=math.inf),
      'clip_norm must be positive and finite',
    ),
    (
      lambda: discrete.clipped_units(np.zeros(2**17), clip_norm=1.0),
      'at most 131071 scalars',
    ),
  ],
)
def test_refusals(call, message):
  with pytest.raises(ValueError) as error:
    call()
  assert message in str(error.value)
