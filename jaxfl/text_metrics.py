"""Scores of texts and of classes, computed on the host.

All are fractions in [0, 1] and means over examples. Where an example has
several references the best one counts.

    rouge_l(['a cat sat'], [['the cat sat', 'a dog']])
    counts = sum(confusion(y, f(x), num_classes=3) for x, y in batches)
    accuracy(counts), macro_f1(counts)

References:
  Lin, "ROUGE: A package for automatic evaluation of summaries", 2004,
    https://aclanthology.org/W04-1013
  Rajpurkar et al., "SQuAD: 100,000+ questions for machine comprehension of
    text", EMNLP 2016, https://arxiv.org/abs/1606.05250
  Cobbe et al., "Training verifiers to solve math word problems" (GSM8K), 2021,
    https://arxiv.org/abs/2110.14168
"""

import collections
import decimal
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(?:a|an|the)\b')
# a minus after a digit is a difference; commas only between groups of three
_NUMBER = re.compile(
  r'(?P<sign>(?<![0-9])-)?\$?'
  r'(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?)'
)


def rouge_l(
  predictions: Sequence[str],
  references_list: Sequence[Sequence[str]],
  *,
  use_stemmer: bool = True,
) -> float:
  """Mean ROUGE-L (F-measure) by the package rouge-score.

  Words are runs of the characters a-z and 0-9 of the lower-cased text; other
  scripts count as empty texts, which score 0.

  Args:
    predictions: a text per example.
    references_list: its references, one or more.
    use_stemmer: compare Porter stems of words longer than three characters, as
      the evaluation of Super-NaturalInstructions does.

  Raises:
    ValueError: if there is no example, the lengths differ, or an example has
      no list of references.
  """
  from rouge_score import rouge_scorer

  scorer = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=use_stemmer)
  score = lambda text, reference: (
    scorer.score(target=reference, prediction=text)['rougeL'].fmeasure
  )
  return _mean_of_best(score, predictions, references_list)


def exact_match(
  predictions: Sequence[str], references_list: Sequence[Sequence[str]]
) -> float:
  """Share of the predictions that are a reference, after `squad_words`.

  Args and errors are those of `rouge_l`.
  """
  score = lambda text, reference: squad_words(text) == squad_words(reference)
  return _mean_of_best(score, predictions, references_list)


def token_f1(
  predictions: Sequence[str], references_list: Sequence[Sequence[str]]
) -> float:
  """Mean F1 of the words (as multisets) of prediction and reference.

  With n words in common, 2 n / (words predicted + words of the reference). Two
  texts without words score 1, so that F1 is never below the exact match.

  Args and errors are those of `rouge_l`.
  """

  def score(text, reference):
    predicted, true = (
      collections.Counter(squad_words(t)) for t in (text, reference)
    )
    total = predicted.total() + true.total()
    return 2 * (predicted & true).total() / total if total else 1.0

  return _mean_of_best(score, predictions, references_list)


def squad_words(text: str) -> list[str]:
  """Words of the lower-cased text without ASCII punctuation and articles."""
  text = text.lower().translate(_NO_PUNCTUATION)
  return _ARTICLES.sub(' ', text).split()


def gsm8k_answer(text: str) -> decimal.Decimal | None:
  """The first number after '####', or else the last number of the text.

  A dollar sign may come before a number and commas within; 18 equals 18.00.

  Returns:
    None if the text has no number.
  """
  marked = _NUMBER.search(text.partition('####')[2])
  numbers = [marked] if marked else list(_NUMBER.finditer(text))
  if not numbers:
    return None
  sign, digits = numbers[-1].group('sign', 'digits')
  return decimal.Decimal((sign or '') + digits.replace(',', ''))


def gsm8k_exact_match(
  predictions: Sequence[str], references_list: Sequence[Sequence[str]]
) -> float:
  """Share of the predictions whose `gsm8k_answer` is that of a reference.

  Args are those of `rouge_l`; a reference is a solution with its '####'.

  Raises:
    ValueError: as `rouge_l`, or if a reference has no number.
  """

  def score(text, reference):
    expected = gsm8k_answer(reference)
    if expected is None:
      raise ValueError(f'reference {reference!r} has no number')
    return gsm8k_answer(text) == expected

  return _mean_of_best(score, predictions, references_list)


def confusion(
  labels: np.ndarray, predictions: np.ndarray, *, num_classes: int
) -> np.ndarray:
  """Counts int64[num_classes, num_classes]: rows true, columns predicted.

  Counts of batches and of clients add up.

  Args:
    labels: integers [...].
    predictions: integers of the same shape.
    num_classes: number of classes.

  Raises:
    ValueError: if the shapes differ, or an entry is not an integer in
      [0, num_classes).
  """
  labels, predictions = np.asarray(labels), np.asarray(predictions)
  if labels.shape != predictions.shape:
    raise ValueError(
      f'labels have shape {labels.shape}, predictions {predictions.shape}'
    )
  for name, x in (('labels', labels), ('predictions', predictions)):
    if x.dtype.kind not in 'iu':
      raise ValueError(f'{name} must be integers, got {x.dtype}')
    if x.size and (x.min() < 0 or x.max() >= num_classes):
      raise ValueError(
        f'{name} must be in [0, {num_classes}), got {x.min()} to {x.max()}'
      )
  counts = np.zeros((num_classes, num_classes), np.int64)
  np.add.at(counts, (labels.ravel(), predictions.ravel()), 1)
  return counts


def accuracy(counts: np.ndarray) -> float:
  """Share of the examples on the diagonal of a confusion matrix.

  Raises:
    ValueError: if `counts` is not square, or has no example.
  """
  counts = _check_counts(counts)
  return float(np.trace(counts) / counts.sum())


def macro_f1(counts: np.ndarray) -> float:
  """Mean over classes of F1 = 2 tp / (2 tp + fp + fn), from counts.

  A class that no example has and that is never predicted has no F1 and is left
  out of the mean. A class that is only predicted, or never, has the F1 zero.

  Raises:
    ValueError: if `counts` is not square, or has no example.
  """
  counts = _check_counts(counts)
  true_positives = np.diag(counts)
  sizes = counts.sum(axis=0) + counts.sum(axis=1)  # 2 tp + fp + fn
  seen = sizes > 0
  return float(np.mean(2 * true_positives[seen] / sizes[seen]))


def _check_counts(counts):
  counts = np.asarray(counts)
  if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
    raise ValueError(f'counts must be a square matrix, got {counts.shape}')
  if not counts.sum() > 0:
    raise ValueError('counts has no example')
  return counts


def _mean_of_best(
  score: Callable[[str, str], float],
  predictions: Sequence[str],
  references_list: Sequence[Sequence[str]],
) -> float:
  """Mean over examples of the best score among the references."""
  if len(predictions) != len(references_list) or not len(predictions):
    raise ValueError(
      'there must be as many predictions as references, and at least one: got'
      f' {len(predictions)} and {len(references_list)}'
    )
  for i, references in enumerate(references_list):
    if isinstance(references, str) or not references:
      raise ValueError(
        f'example {i} must have a list of references, got {references!r}'
      )
  best = [
    max(score(text, reference) for reference in references)
    for text, references in zip(predictions, references_list, strict=True)
  ]
  return float(np.mean(best))
