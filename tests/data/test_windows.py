"""Plain text: every token a target once, and clients keep their texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfl.data import tokenizer, windows

BYTES = tokenizer.load('bytes')
BEGINS = BYTES._replace(prefix=(1,), bos_id=1)
TEXTS = st.lists(st.text('abc', max_size=30), min_size=1, max_size=6)


def _encode(texts, t, length, **options):
  rows = [{'text': text} for text in texts]
  return windows.encode(rows, t, max_length=length, **options)


def _targets(found, index):
  batch = found.take(index)
  return batch['tokens'][1:][batch['weights'] == 1].tolist()


def test_a_text_is_cut_without_gaps():
  found, origin = _encode(['abcde', 'f'], BYTES, 4)
  # an end after each text; the first token of a text is not predicted
  assert [_targets(found, i) for i in range(3)] == [
    list(b'bcd'),
    list(b'e\n'),
    list(b'\n'),
  ]
  assert bytes(found.take(1)['tokens'][:3].tolist()) == b'de\n'
  assert origin.tolist() == [0, 0, 1]
  assert (found.form, found.truncated, found.num_labels) == ('lm', 0, 0)
  found, origin = _encode(['abcde', 'f'], BEGINS, 4)
  assert [_targets(found, i) for i in range(3)] == [
    list(b'abc'),
    list(b'de\n'),
    list(b'f\n'),
  ]
  assert found.take(1)['tokens'][0] == 1


@given(TEXTS, st.integers(2, 9), st.sampled_from([BYTES, BEGINS]))
def test_every_token_is_a_target_once(texts, length, t):
  texts = ['start', *texts]
  found, origin = _encode(texts, t, length)
  lost = 0 if t.prefix else 1
  for i, text in enumerate(texts):
    own = np.flatnonzero(origin == i)
    ids = [x for j in own for x in _targets(found, j)]
    assert ids == list(text.encode() + b'\n')[lost:]
  assert found.lengths.max() <= length


def test_clients_have_the_windows_of_their_texts():
  origin = np.array([0, 0, 1, 3, 3, 3])
  parts = windows.share_out([np.array([0, 3]), np.array([1, 2])], origin)
  assert [part.tolist() for part in parts] == [[0, 1, 3, 4, 5], [2]]


def test_errors():
  with pytest.raises(ValueError, match='here: max_length.* 1 leaves no room'):
    _encode(['abc'], BYTES, 1, name='here')
  with pytest.raises(ValueError, match='a window needs 2 tokens'):
    _encode(['abc'], BEGINS, 1)
  with pytest.raises(ValueError, match='max_length.* is 9.* has 8 positions'):
    _encode(['abc'], BYTES, 9, positions=8)
  with pytest.raises(ValueError, match='no text has two tokens'):
    _encode([''], BYTES, 8)
