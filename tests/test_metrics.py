"""Rows of results and the digest."""

import dataclasses

import numpy as np
import pytest

from jaxfl import metrics
from jaxfl.digest import digest


def row(round, value=1.5):
  return metrics.Row(
    method='spsa', task='t', seed=0, round=round, metric='loss', value=value,
    bytes_up=1, bytes_down=2, forwards=3, backwards=0, wall_s=0.5, digest='d',
  )  # fmt: skip


def test_rows_round_trip_without_a_torn_end(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  metrics.append(path, [row(0), row(1)])
  metrics.append(path, [row(2)])
  with open(path, 'a') as f:
    f.write('{"method": "sp')
  assert metrics.read(path) == [row(0), row(1), row(2)]
  metrics.keep_until(path, 1)
  assert metrics.read(path) == [row(0), row(1)]
  assert path.read_text().endswith('}\n')


def test_damaged_rows_are_located(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  metrics.append(path, [row(0)])
  path.write_text(path.read_text() + '{"method": 1}\n')
  with pytest.raises(ValueError, match='line 2: not a row'):
    metrics.read(path)


def test_one_schema():
  names = [f.name for f in dataclasses.fields(metrics.Row)]
  assert names == [
    'method',
    'task',
    'seed',
    'round',
    'metric',
    'value',
    'bytes_up',
    'bytes_down',
    'forwards',
    'backwards',
    'wall_s',
    'digest',
  ]


def test_any_flipped_bit_changes_the_digest():
  tree = {'a': np.arange(40, dtype=np.float32), 'b': np.zeros(3, np.int8)}
  base = digest(tree)
  data = tree['a'].copy()
  for i in range(data.nbytes * 8):
    flipped = data.copy()
    flipped.view(np.uint8)[i // 8] ^= 1 << (i % 8)
    assert digest(tree | {'a': flipped}) != base


def test_digest_sees_names_shapes_and_types_but_not_the_order_of_keys():
  x, y = np.arange(6, dtype=np.float32), np.ones(2, np.float32)
  base = digest({'x': x, 'y': y})
  assert digest({'y': y, 'x': x}) == base
  assert digest({'x': x.reshape(2, 3), 'y': y}) != base
  assert digest({'x': x.view(np.int32), 'y': y}) != base
  assert digest({'z': x, 'y': y}) != base
