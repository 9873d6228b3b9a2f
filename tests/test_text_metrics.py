"""Scores against closed forms and hand computations."""

import decimal
import fractions
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfl import text_metrics

WORDS = st.lists(st.sampled_from(['red', 'blue', 'one', 'the', 'a'])).map(
  ' '.join
)


def longest_common_subsequence(a, b):
  table = np.zeros((len(a) + 1, len(b) + 1), int)
  for i, x in enumerate(a):
    for j, y in enumerate(b):
      table[i + 1, j + 1] = max(
        table[i, j] + (x == y), table[i, j + 1], table[i + 1, j]
      )
  return table[-1, -1]


@settings(deadline=None)  # the first call imports rouge-score
@given(WORDS, WORDS)
def test_rouge_l_is_the_f_measure_of_the_common_subsequence(a, b):
  x, y = a.split(), b.split()
  common = longest_common_subsequence(x, y)
  expected = 2 * common / (len(x) + len(y)) if common else 0.0
  assert text_metrics.rouge_l([a], [[b]]) == pytest.approx(expected)


def test_rouge_l_takes_the_best_reference_and_the_mean():
  got = text_metrics.rouge_l(
    ['the cat was sitting', 'Nothing!'], [['a dog', 'the cat sat'], ['else']]
  )
  assert got == pytest.approx((2 * 2 / (4 + 3) + 0) / 2)


def test_rouge_l_stems():
  pairs = ['He was running'], [['he was run']]
  assert text_metrics.rouge_l(*pairs) == 1
  plain = text_metrics.rouge_l(*pairs, use_stemmer=False)
  assert plain == pytest.approx(2 / 3)


_OFFLINE = """
import socket
def refuse(*args, **kwargs):
  raise AssertionError('network')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import sys
from jaxfl import text_metrics
assert 'rouge_score' not in sys.modules
assert text_metrics.rouge_l(['Cats sat.'], [['cat sat']]) == 1
"""


def test_rouge_l_needs_no_network_and_no_nltk_data(tmp_path):
  paths = {'HOME': str(tmp_path), 'NLTK_DATA': str(tmp_path / 'none')}
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', _OFFLINE],
    env=os.environ | paths, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('The  Cat, a dog; an owl!', ['cat', 'dog', 'owl']),
    ("Theatre and anthem's", ['theatre', 'and', 'anthems']),
    ('U.S.A.', ['usa']),
    ('the\u2013cat', ['\u2013cat']),
    ('a the an', []),
  ],
)
def test_squad_words(text, words):
  assert text_metrics.squad_words(text) == words


def test_exact_match_and_f1():
  predictions = ['The Eiffel Tower.', 'in Paris, France', 'no no yes']
  references = [['eiffel tower', 'tower'], ['Paris'], ['no yes yes']]
  assert text_metrics.exact_match(predictions, references) == pytest.approx(
    1 / 3
  )
  # 1; 2 * 1 / (3 + 1); 2 * 2 / (3 + 3) as multisets
  assert text_metrics.token_f1(predictions, references) == pytest.approx(
    (1 + 1 / 2 + 2 / 3) / 3
  )


@given(WORDS, st.lists(WORDS, min_size=1))
def test_f1_is_symmetric_and_between_exact_match_and_1(text, references):
  match = text_metrics.exact_match([text], [references])
  f1 = text_metrics.token_f1([text], [references])
  assert match <= f1 <= 1
  one = references[:1]
  assert text_metrics.token_f1([text], [one]) == text_metrics.token_f1(
    one, [[text]]
  )
  assert text_metrics.token_f1([text], [[*references, text]]) == 1


@pytest.mark.parametrize(
  ('text', 'number'),
  [
    ('6*3=<<6*3=18>>18 eggs\n#### 18', '18'),
    ('#### 18\n\nQuestion: 5 apples? #### 7', '18'),
    ('#### $2,125,000.50', '2125000.50'),
    ('#### -3', '-3'),
    ('-$7', '-7'),
    ('I do not know #### so 12 it is', '12'),
    ('first 4, then 9 ####', '9'),
    ('the answer is 1,234.', '1234'),
    ('3,4,5', '5'),
    ('12,3456', '3456'),
    ('10-4', '4'),
    ('it is -4%', '-4'),
    ('7.50', '7.5'),
    ('none', None),
    ('', None),
  ],
)
def test_gsm8k_answer(text, number):
  expected = None if number is None else decimal.Decimal(number)
  assert text_metrics.gsm8k_answer(text) == expected


@given(st.integers(-(10**12), 10**12))
def test_gsm8k_answer_reads_what_is_written(number):
  for form in (f'{number}', f'{number:,}', f'{number:,}.00'):
    for text in (f'so 1, 2\n#### {form}', f'2 and 3 make {form}.'):
      assert text_metrics.gsm8k_answer(text) == number


def test_gsm8k_exact_match():
  got = text_metrics.gsm8k_exact_match(
    ['... #### 1,000', 'it is 3', 'no idea', '8.0'],
    [['#### 1000'], ['#### 4', '5'], ['#### 0'], ['#### 7', '#### 8']],
  )
  assert got == 0.5
  with pytest.raises(ValueError, match="reference 'none' has no number"):
    text_metrics.gsm8k_exact_match(['1', '1'], [['#### 1'], ['none']])


SCORES = [
  text_metrics.rouge_l,
  text_metrics.exact_match,
  text_metrics.token_f1,
  text_metrics.gsm8k_exact_match,
]


@pytest.mark.parametrize('score', SCORES)
@pytest.mark.parametrize(
  ('predictions', 'references', 'message'),
  [
    ([], [], 'at least one: got 0 and 0'),
    (['x'], [['x'], ['y']], 'got 1 and 2'),
    (['x'], ['x'], "example 0 must have a list of references, got 'x'"),
    (['1', 'y'], [['1'], []], r'example 1 must have a list .* got \[\]'),
  ],
)
def test_bad_texts_are_refused(score, predictions, references, message):
  with pytest.raises(ValueError, match=message):
    score(predictions, references)


def test_confusion_counts_add_up():
  labels, predictions = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 0]
  counts = text_metrics.confusion(
    np.array(labels), np.array(predictions), num_classes=3
  )
  np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 1, 0], [2, 0, 1]])
  parts = [
    text_metrics.confusion(np.array([y]), np.array([p]), num_classes=3)
    for y, p in zip(labels, predictions, strict=True)
  ]
  np.testing.assert_array_equal(sum(parts), counts)
  assert text_metrics.accuracy(counts) == 0.5


def test_macro_f1_by_hand():
  """Class 0: p 1/3, r 1/2; class 1: p 1/2, r 1; class 2: p 1, r 1/3."""
  counts = np.array([[1, 1, 0], [0, 1, 0], [2, 0, 1]])
  assert text_metrics.macro_f1(counts) == pytest.approx(
    (2 / 5 + 2 / 3 + 2 / 4) / 3
  )


def test_macro_f1_of_classes_that_are_absent():
  """Class 1 is only predicted, class 2 never is, class 3 does not occur."""
  counts = np.zeros((4, 4), int)
  counts[0, 0], counts[0, 1], counts[2, 0] = 6, 2, 1
  assert text_metrics.macro_f1(counts) == pytest.approx((12 / 15 + 0 + 0) / 3)


@given(st.data())
def test_macro_f1_against_precision_and_recall(data):
  """Built from lists, in exact fractions, not from counts."""
  num_classes = data.draw(st.integers(1, 5))
  entries = st.integers(0, num_classes - 1)
  pairs = data.draw(st.lists(st.tuples(entries, entries), min_size=1))
  scores = []
  for k in range(num_classes):
    hits = sum(y == p == k for y, p in pairs)
    predicted, true = (sum(pair[i] == k for pair in pairs) for i in (1, 0))
    if not predicted and not true:
      continue
    precision = fractions.Fraction(hits, predicted) if predicted else 0
    recall = fractions.Fraction(hits, true) if true else 0
    both = precision + recall
    scores.append(2 * precision * recall / both if both else 0)
  counts = text_metrics.confusion(*np.array(pairs).T, num_classes=num_classes)
  expected = float(sum(scores) / fractions.Fraction(len(scores)))
  assert text_metrics.macro_f1(counts) == pytest.approx(expected)
  hits = sum(y == p for y, p in pairs) / len(pairs)
  assert text_metrics.accuracy(counts) == pytest.approx(hits)


@pytest.mark.parametrize(
  ('labels', 'predictions', 'message'),
  [
    ([0, 1], [0], r'labels have shape \(2,\), predictions \(1,\)'),
    ([0, 2], [0, 1], r'labels must be in \[0, 2\), got 0 to 2'),
    ([0, 1], [-1, 1], r'predictions must be in \[0, 2\), got -1 to 1'),
    ([0.0], [0], 'labels must be integers, got float64'),
  ],
)
def test_bad_classes_are_refused(labels, predictions, message):
  with pytest.raises(ValueError, match=message):
    text_metrics.confusion(
      np.array(labels), np.array(predictions), num_classes=2
    )


@pytest.mark.parametrize(
  'score', [text_metrics.accuracy, text_metrics.macro_f1]
)
def test_bad_counts_are_refused(score):
  with pytest.raises(ValueError, match='no example'):
    score(np.zeros((2, 2), int))
  with pytest.raises(ValueError, match=r'square matrix, got \(2, 3\)'):
    score(np.ones((2, 3), int))
