"""Schedules: closed forms, twelve bits, clear errors."""

import jax
import numpy as np
import pytest

from jaxfl import schedules


def test_closed_forms():
  linear = schedules.make('linear', 2.0, 10)
  assert [linear(r) for r in (0, 5, 10, 99)] == [2.0, 1.0, 0.0, 0.0]
  cosine = schedules.make('cosine', 2.0, 10)
  np.testing.assert_allclose([cosine(r) for r in (0, 5, 10)], [2, 1, 0])
  constant = schedules.make('constant', 2.0, 10, warmup_rounds=4)
  assert [constant(r) for r in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_entries_have_twelve_bits_and_hide_the_math_library():
  cosine = schedules.make('cosine', 0.1, 1000)
  table = schedules.table(cosine, 1000, 'x')
  nudged = schedules.table(lambda r: cosine(r) * (1 + 2e-16), 1000, 'x')
  np.testing.assert_array_equal(table, nudged)
  mantissa, _ = np.frexp(table.astype(np.float64))
  np.testing.assert_array_equal(mantissa * 2**12 % 1, 0)
  exact = np.array([cosine(r) for r in range(1000)])
  np.testing.assert_allclose(table, exact, rtol=2.0**-12)


def test_products_of_entries_are_exact():
  table = schedules.table(schedules.make('cosine', 0.3, 50), 50, 'x')
  for a in table:
    for b in table[::7]:
      assert float(np.float32(a) * np.float32(b)) == float(a) * float(b)


def test_rounds_beyond_the_table_use_its_end():
  table = schedules.table(lambda r: float(r + 1), 3, 'x')
  at = jax.jit(lambda r: schedules.at(table, r))
  assert [float(at(r)) for r in (0, 2, 3, 10**6)] == [1.0, 3.0, 3.0, 3.0]


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="must be one of .* got 'step'"):
    schedules.make('step', 1.0, 10)
  with pytest.raises(ValueError, match='warmup_rounds must be'):
    schedules.make('linear', 1.0, 10, warmup_rounds=11)
  with pytest.raises(ValueError, match='lr is a schedule: num_rounds'):
    schedules.table(lambda r: 1.0, None, 'lr')
  with pytest.raises(ValueError, match=r'lr must be 0 or in .* \(round 2\)'):
    schedules.table(lambda r: 1.0 - r, 4, 'lr')
