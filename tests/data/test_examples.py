"""Ragged examples, their batches, and tasks of them."""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxfl.data import examples

SIZES = st.lists(st.integers(1, 70), min_size=1, max_size=12)


def _make(sizes, form='head', count=1, **fields):
  """Sequences of 1, 2, 3, ... in which every number occurs once."""
  total = sum(sizes)
  offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
  longest = max(sizes)
  return examples.Examples(
    form=form,
    tokens=np.arange(1, total + 1, dtype=np.int32),
    offsets=offsets,
    num_candidates=count,
    buckets=examples.buckets(longest, 96),
    pad_id=-7,
    **fields,
  )


def _labelled(count, start=0):
  """Examples of one token; the label tells which it is."""
  label = np.arange(start, start + count, dtype=np.int32)
  return _make([1] * count, scalars={'label': label}, num_labels=2)


class TestBuckets:
  @pytest.mark.parametrize(
    ('longest', 'max_length', 'sizes'),
    [
      (1, 512, (16,)),
      (16, 512, (16,)),
      (17, 512, (16, 32)),
      (48, 48, (16, 32, 48)),
      (50, 50, (16, 32, 48, 50)),
      (50, 512, (16, 32, 48, 64)),
      (300, 512, (16, 32, 48, 64, 96, 128, 192, 256, 384)),
      (300, 320, (16, 32, 48, 64, 96, 128, 192, 256, 320)),
      (3, 8, (8,)),
    ],
  )
  def test_values(self, longest, max_length, sizes):
    assert examples.buckets(longest, max_length) == sizes

  @hypothesis.given(st.integers(1, 5000), st.integers(0, 5000))
  def test_laws(self, longest, more):
    sizes = examples.buckets(longest, longest + more)
    assert longest <= sizes[-1] <= longest + more
    assert all(size < longest for size in sizes[:-1])
    steps = [b / a for a, b in itertools.pairwise(sizes[3:-1])]
    assert all(1.25 <= step <= 1.5 for step in steps)
    assert list(sizes) == sorted(set(sizes))


class TestTake:
  @hypothesis.given(SIZES, st.data())
  def test_every_row_is_its_sequence_padded(self, sizes, data):
    e = _make(sizes)
    index = st.integers(0, len(sizes) - 1)
    indices = data.draw(st.lists(index, min_size=1, max_size=6))
    batch = e.take(indices)
    longest = max(sizes[i] for i in indices)
    length = batch['tokens'].shape[1]
    assert length == min(b for b in e.buckets if b >= longest)
    for i, tokens, mask in zip(
      indices, batch['tokens'], batch['mask'], strict=True
    ):
      begin = e.offsets[i]
      wanted = list(range(begin + 1, begin + 1 + sizes[i]))
      padding = length - sizes[i]
      assert tokens.tolist() == wanted + [-7] * padding
      assert mask.tolist() == [1] * sizes[i] + [0] * padding
    assert batch['example_weight'].tolist() == [1] * len(indices)

  @hypothesis.given(SIZES, st.data())
  def test_weights_and_types_begin_where_they_should(self, sizes, data):
    start = [data.draw(st.integers(1, size)) for size in sizes]
    places = np.array(start, np.int32)
    e = _make(sizes, form='lm', starts=places, seconds=places)
    batch = e.take(range(len(sizes)))
    targets = batch['tokens'][:, 1:] * batch['weights']
    for i, size in enumerate(sizes):
      found = targets[i][targets[i] > 0].tolist()
      begin = int(e.offsets[i]) + 1
      assert found == list(range(begin + start[i], begin + size))
      second = batch['tokens'][i][batch['types'][i] == 1].tolist()
      assert second == found

  def test_candidates(self):
    starts = np.array([2, 2, 1, 1], np.int32)
    e = _make([3, 4, 2, 0], form='candidates', count=2, starts=starts)
    assert len(e) == 2
    assert e.lengths.tolist() == [4, 2]
    batch = e.take([[1], [0]])
    assert batch['tokens'].shape == (2, 1, 2, 16)
    assert batch['weights'].shape == (2, 1, 2, 15)
    assert batch['valid'].tolist() == [[[1, 0]], [[1, 1]]]
    assert batch['tokens'][1, 0, :, :5].tolist() == [
      [1, 2, 3, -7, -7],
      [4, 5, 6, 7, -7],
    ]
    assert batch['weights'].sum(-1).tolist() == [[[1, 0]], [[1, 2]]]

  def test_shapes_of_indices(self):
    e = _labelled(5)
    batch = e.take([[0, 1], [2, 4]])
    assert batch['tokens'].shape == (2, 2, 16)
    assert batch['label'].tolist() == [[0, 1], [2, 4]]
    assert e.take(3)['tokens'].shape == (16,)

  def test_length_that_is_asked_for(self):
    e = _make([3, 40])
    assert e.take([0], 40)['tokens'].shape == (1, 40)
    with pytest.raises(ValueError, match='length 39.*40 tokens'):
      e.take([1], 39)

  @pytest.mark.parametrize('index', [-1, 2])
  def test_index_out_of_range(self, index):
    with pytest.raises(IndexError, match='there are 2 examples'):
      _make([3, 4]).take([index])


class TestTask:
  partition = (np.arange(0, 10), np.arange(10, 13))

  def _task(self, **options):
    return examples.task(
      _labelled(13), _labelled(7, 100), self.partition, name='t', **options
    )

  def test_batches_are_a_function_of_their_arguments(self):
    one, two = self._task(), self._task()
    a = one.batches(3, 0, 5, 4, 6)
    one.batches(3, 1, 5, 4, 6)
    b = two.batches(3, 0, 5, 4, 6)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
    assert a['tokens'].shape == (4, 6, 16)
    assert (a['label'] != one.batches(3, 0, 6, 4, 6)['label']).any()
    assert (a['label'] != one.batches(4, 0, 5, 4, 6)['label']).any()

  @hypothesis.given(st.integers(0, 2**32), st.integers(1, 10))
  @hypothesis.settings(max_examples=30)
  def test_no_example_twice_where_there_are_enough(self, seed, size):
    task = self._task()
    for client, own in enumerate(self.partition):
      labels = task.batches(seed, client, 0, 3, size)['label']
      for batch in labels:
        counts = np.bincount(batch, minlength=13)
        assert set(batch) <= set(own)
        assert counts.max() == -(-size // len(own))
        assert counts[own].min() >= size // len(own)

  def test_every_example_is_drawn_equally_often(self):
    task = self._task()
    labels = task.batches(0, 0, 0, 4000, 3)['label']
    counts = np.bincount(labels.ravel(), minlength=10)
    # 1200 each; a count's standard deviation is sqrt(4000 * 0.3 * 0.7) = 29
    assert np.abs(counts - 1200).max() < 5 * 29

  def test_evaluation_has_all_once_in_one_shape(self):
    batches = self._task(eval_batch_size=3).eval_batches
    assert batches['tokens'].shape == (3, 3, 16)
    weight = batches['example_weight']
    assert weight.dtype == np.float32
    assert weight.tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert batches['label'][weight == 1].tolist() == list(range(100, 107))

  def test_evaluation_on_some(self):
    def labels(seed):
      batches = self._task(eval_examples=4, seed=seed).eval_batches
      assert batches['example_weight'].tolist() == [[1] * 4]
      return batches['label'][0].tolist()

    assert labels(0) == labels(0)
    assert len({tuple(labels(seed)) for seed in range(8)}) > 1
    assert len(set(labels(1))) == 4

  def test_names_and_numbers(self):
    task = self._task()
    assert task.num_examples.tolist() == [10, 3]
    assert task.num_examples.dtype == np.int64
    assert task.client_names == ('client 0', 'client 1')
    assert self._task(client_names=('a', 'b')).client_names == ('a', 'b')

  def test_lengths_are_alike_unless_they_may_vary(self):
    data = _make([3, 40])
    clients = (np.array([0]), np.array([1]))
    task = examples.task(data, data, clients, name='t')
    both = [task.batches(0, i, 0, 1, 2)['mask'].shape for i in (0, 1)]
    assert both == [(1, 2, 48)] * 2
    task = examples.task(data, data, clients, name='t', vary_length=True)
    both = [task.batches(0, i, 0, 1, 2)['mask'].shape for i in (0, 1)]
    assert both == [(1, 2, 16), (1, 2, 48)]

  def test_digest_sees_tokens_and_partition(self):
    train, test = _labelled(13), _labelled(7)
    digest = lambda *args: examples.task(*args, name='t').digest
    base = digest(train, test, self.partition)
    assert base == digest(_labelled(13), test, self.partition)
    tokens = train.tokens.copy()
    tokens[4] ^= 1
    other = dataclasses.replace(train, tokens=tokens)
    moved = (np.arange(0, 9), np.arange(9, 13))
    label = {'label': train.scalars['label'][::-1]}
    changed = [
      digest(other, test, self.partition),
      digest(train, other, self.partition),
      digest(train, test, moved),
      digest(dataclasses.replace(train, scalars=label), test, self.partition),
    ]
    assert len({base, *changed}) == 5

  @pytest.mark.parametrize(
    ('partition', 'options', 'message'),
    [
      ([[0], []], {}, "client 'client 1' has no data"),
      ([[0], []], {'client_names': ('a', 'b')}, "client 'b' has no data"),
      ([[0, 13]], {}, r"'client 0' has indices in \[0, 13\].*13 train"),
      ([[-1]], {}, r'indices in \[-1, -1\]'),
      ([[2, 2]], {}, "'client 0' has an example twice"),
      ([], {}, 'the partition has 0 clients'),
      ([[0]], {'client_names': ('a', 'b')}, '1 clients, with 2 names'),
      ([[0]], {'eval_batch_size': 0}, 'eval_batch_size must be positive'),
      ([[0]], {'eval_examples': 0}, 'eval_examples must be positive'),
    ],
  )
  def test_refused(self, partition, options, message):
    data = _labelled(13), _labelled(7)
    with pytest.raises(ValueError, match=message):
      examples.task(*data, partition, name='t', **options)

  def test_forms_that_differ(self):
    other = dataclasses.replace(_labelled(7), form='words')
    with pytest.raises(ValueError, match="train is 'head'.*test is 'words'"):
      examples.task(_labelled(13), other, self.partition, name='t')
