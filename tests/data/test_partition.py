"""Laws of partitions, and what they refuse."""

import hashlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxfl.data import partition

LABELS = np.repeat(np.arange(4), (40, 30, 20, 10)).tolist()
ROWS = [
  {'label': label, 'task': f't{i % 7}', 'client': i % 3}
  for i, label in enumerate(LABELS)
]


def _is_exact(parts, count):
  """Every index once, ascending within a client."""
  assert all(part.dtype == np.int64 for part in parts)
  assert all((np.diff(part) > 0).all() for part in parts)
  np.testing.assert_array_equal(
    np.sort(np.concatenate(parts)), np.arange(count)
  )


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  labels=st.lists(st.integers(0, 3), min_size=8, max_size=60),
  num_clients=st.integers(1, 4),
  seed=st.integers(0, 2**64 - 1),
)
def test_every_index_is_given_away_once(labels, num_clients, seed):
  count = len(labels)
  _is_exact(partition.iid(count, num_clients, seed), count)
  _is_exact(partition.dirichlet(labels, num_clients, seed, alpha=10.0), count)
  _is_exact(partition.by_label(labels, num_clients, seed), count)
  _is_exact(partition.by_column(labels), count)


@pytest.mark.parametrize('kind', ['iid', 'dirichlet', 'by_label'])
def test_the_seed_decides(kind):
  split = lambda seed: partition.digest(
    partition.partition(kind, ROWS, num_clients=5, seed=seed)
  )
  state = np.random.get_state()[1].copy()  # type: ignore
  assert split(3) == split(3) != split(4)
  np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore


def test_iid_sizes_differ_by_one_at_most():
  sizes = sorted(len(part) for part in partition.iid(100, 8, 0))
  assert sizes == [12, 12, 12, 12, 13, 13, 13, 13]


def _distance(parts):
  """Mean total variation between the clients' labels and all labels."""
  share = lambda x: np.bincount(x, minlength=2) / len(x)
  labels = np.repeat([0, 1], 500)
  return np.mean(
    [np.abs(share(labels[part]) - 0.5).sum() / 2 for part in parts]
  )


def test_alpha_is_the_skew():
  labels = np.repeat([0, 1], 500).tolist()
  split = lambda alpha: partition.dirichlet(labels, 5, 0, alpha=alpha)
  assert _distance(split(0.05)) > 0.35  # nearly one label each
  assert _distance(split(1e5)) < 0.01
  assert [len(part) for part in split(1e5)] == pytest.approx([200] * 5, abs=5)


def test_mean_and_variance_of_the_shares():
  """Var of a share under Dirichlet(a, ..., a): (1/n)(1 - 1/n) / (n a + 1)."""
  labels, n, alpha = [0] * 1000, 4, 0.7
  shares = np.array(
    [
      len(partition.dirichlet(labels, n, seed, alpha=alpha)[0]) / 1000
      for seed in range(600)
    ]
  )
  # min_size = 1 cuts off next to nothing here
  variance = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
  assert shares.mean() == pytest.approx(1 / n, abs=0.03)
  assert shares.var() == pytest.approx(variance, rel=0.15)


def test_min_size_is_kept_by_drawing_again():
  least = lambda **kw: min(
    len(part) for part in partition.dirichlet(LABELS, 5, 1, alpha=0.3, **kw)
  )
  assert least() < 8
  assert least(min_size=8) >= 8


def test_dirichlet_says_what_cannot_be():
  with pytest.raises(ValueError, match='5 clients .* need 105 examples'):
    partition.dirichlet(LABELS, 5, 0, alpha=1.0, min_size=21)
  with pytest.raises(ValueError, match='larger alpha, a smaller min_size'):
    partition.dirichlet(LABELS, 20, 0, alpha=0.01, min_size=5)
  with pytest.raises(ValueError, match='alpha must be positive'):
    partition.dirichlet(LABELS, 5, 0, alpha=0.0)


def test_by_label_gives_shards():
  labels = np.tile(np.arange(10), 20).tolist()
  parts = partition.by_label(labels, 10, 0, labels_per_client=2)
  assert [len(part) for part in parts] == [20] * 10
  # 20 shards of 10 examples: two shards are just one label
  assert all(len({labels[i] for i in part}) <= 2 for part in parts)
  assert {len({labels[i] for i in part}) for part in parts} == {1, 2}


def test_by_column_is_a_client_per_value():
  values = ['b', 'a', 'b', 'c', 'c', 'd', 'b']
  parts = partition.by_column(values)
  assert partition.client_names(parts, values) == ('b', 'c', 'a', 'd')
  assert [part.tolist() for part in parts] == [[0, 2, 6], [3, 4], [1], [5]]
  fewer = partition.by_column(values, 3)
  assert partition.client_names(fewer, values) == ('b+d', 'c', 'a')
  with pytest.raises(ValueError, match='from 1 to 4, .*, got 5'):
    partition.by_column(values, 5)


def test_integers_of_a_column_keep_their_order():
  rows = [{'client': i} for i in range(12)]
  parts = partition.partition(
    'by_column', rows, column='client', num_clients=None
  )
  assert [part.tolist() for part in parts] == [[i] for i in range(12)]


def test_dirichlet_over_a_column():
  rows = [{'category': c} for c in 'aabbbccccc' * 10]
  parts = partition.partition(
    'dirichlet', rows, num_clients=3, column='category', min_size=10
  )
  _is_exact(parts, 100)
  assert min(len(part) for part in parts) >= 10


@pytest.mark.parametrize(
  ('kind', 'options', 'message'),
  [
    ('iit', {}, 'iid.*dirichlet.*by_label.*by_column'),
    ('iid', {'num_clients': 101}, '101 clients'),
    ('iid', {'num_clients': 0}, 'num_clients must be positive'),
    ('iid', {'num_clients': None}, 'needs num_clients'),
    ('iid', {'min_size': 21}, 'a client has 20 examples, min_size is 21'),
    ('iid', {'min_size': 0}, 'min_size must be positive'),
    ('iid', {'seed': -1}, 'out of range'),
    ('by_column', {}, 'needs the name of a column'),
    ('by_column', {'column': 'speaker'}, "'speaker': row 1 .*'client'"),
    ('by_label', {'labels_per_client': 0}, 'labels_per_client'),
    ('by_label', {'labels_per_client': 21}, 'need 105 examples'),
    ('dirichlet', {'column': 'speaker'}, "'speaker': row 1 has none"),
  ],
)
def test_refusals(kind, options, message):
  with pytest.raises(ValueError, match=message):
    partition.partition(kind, ROWS, **{'num_clients': 5, **options})


def test_digest_is_over_sizes_and_indices():
  parts = [np.array([0, 2]), np.array([1])]
  expected = hashlib.sha256(
    b''.join(x.to_bytes(8, 'little') for x in (2, 0, 2, 1, 1))
  ).hexdigest()
  assert partition.digest(parts) == expected
  assert partition.digest(parts[::-1]) != expected


def test_describe():
  parts = [np.array([0, 1, 2]), np.array([3])]
  text = partition.describe(parts, [0, 1, 1, 0], ('bad', 'good'))
  assert text == (
    '2 clients, 4 examples: min 1, median 2, max 3; split '
    f'{partition.digest(parts)[:16]}\n'
    '  client 0: good 2, bad 1\n'
    '  client 1: bad 1'
  )
  assert partition.describe(parts, [0, 1, 1, 0], max_clients=1).endswith(
    '  client 0: 1 2, 0 1\n  and 1 more clients'
  )
  assert len(partition.describe(parts).splitlines()) == 1
