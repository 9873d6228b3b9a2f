"""Losses and evaluations against plain NumPy on unpadded rows."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfl import objectives
from jaxfl.models import generate, rotary, transformer
from jaxfl.models.config import Config

pytestmark = pytest.mark.fast_compile

DECODER = Config(
  vocab_size=23,
  num_layers=2,
  model_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=24,
  norm='rms',
  rope=rotary.Rope(),
)
ENCODER = Config(
  vocab_size=23,
  num_layers=2,
  model_dim=16,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  causal=False,
  norm_place='post',
  final_norm=False,
  max_positions=12,
  learned_positions=True,
  type_vocab=2,
  head='classify',
  num_labels=3,
  pool='mean',
)

init = jax.jit(transformer.init, static_argnums=0)
# op by op they take longer to compile
logits_of = jax.jit(transformer.logits, static_argnums=0)
token_log_probs = jax.jit(objectives.token_log_probs, static_argnums=0)


@pytest.fixture(scope='module')
def decoder():
  return init(DECODER, jax.random.key(0))


@pytest.fixture(scope='module')
def encoder():
  return init(ENCODER, jax.random.key(1))


def pad(rows, length, fill=0):
  """Right-padded int32[B, T] and mask int8[B, T]."""
  tokens = np.full((len(rows), length), fill, np.int32)
  mask = np.zeros((len(rows), length), np.int8)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    mask[i, : len(row)] = 1
  return tokens, mask


def log_probs(params, row):
  """float64[len(row) - 1], the log-probability of every next token."""
  logits = logits_of(DECODER, params, np.array([row[:-1]]))
  logits = np.asarray(logits, np.float64)[0]
  logits -= logits.max(-1, keepdims=True)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return logits[np.arange(len(row) - 1), row[1:]]


def test_token_log_probs_ignore_padding(decoder):
  rows = [[3, 5, 7, 2, 9], [4, 1, 8]]
  tokens, mask = pad(rows, 7, fill=11)
  got, hits = token_log_probs(DECODER, decoder, tokens, mask)
  for i, row in enumerate(rows):
    want = log_probs(decoder, row)
    np.testing.assert_allclose(got[i, : len(want)], want, atol=2e-6)
  assert hits.dtype == bool


def test_words_read_one_position(decoder):
  rows = [[3, 5, 7, 2, 9], [4, 1, 8]]
  tokens, mask = pad(rows, 6)
  scores = objectives.class_scores(DECODER, 'words', label_ids=(6, 2, 20))
  position = np.array([4, 2])
  got = jax.jit(scores)(
    decoder, {'tokens': tokens, 'mask': mask, 'position': position}
  )
  for i, row in enumerate(rows):
    logits = logits_of(DECODER, decoder, np.array([row]))[0, -1]
    np.testing.assert_allclose(got[i], logits[np.array([6, 2, 20])], atol=2e-6)


@pytest.mark.parametrize('normalised', [True, False])
def test_candidates_are_scored_by_their_own_tokens(decoder, normalised):
  prompt = [3, 5, 7]
  answers = [[2], [9, 4, 1], []]
  rows = [prompt + a if a else [] for a in answers]
  tokens, mask = pad(rows, 8)
  weights = np.zeros((3, 7), np.float32)
  for i, answer in enumerate(answers):
    weights[i, 2 : 2 + len(answer)] = 1
  batch = {
    'tokens': tokens[None],
    'mask': mask[None],
    'weights': weights[None],
    'valid': np.array([[1, 1, 0]], np.int8),
  }
  scores = objectives.class_scores(
    DECODER, 'candidates', length_normalised=normalised
  )
  got = np.asarray(jax.jit(scores)(decoder, batch))[0]
  for i, answer in enumerate(answers[:2]):
    want = log_probs(decoder, prompt + answer)[2:].sum()
    want = want / len(answer) if normalised else want
    np.testing.assert_allclose(got[i], want, atol=5e-6)
  assert got[2] < -1e8


def test_head_and_features(encoder):
  tokens, mask = pad([[3, 5, 7, 2], [4, 1]], 6)
  types = np.zeros_like(tokens)
  types[0, 2:4] = 1
  scores = jax.jit(objectives.class_scores(ENCODER, 'head'))
  got = scores(encoder, {'tokens': tokens, 'mask': mask, 'types': types})
  alone = logits_of(ENCODER, encoder, np.array([[4, 1]]))
  np.testing.assert_allclose(got[1], alone[0], atol=2e-6)
  plain = scores(encoder, {'tokens': tokens, 'mask': mask})
  assert np.abs(plain[0] - got[0]).max() > 1e-3  # segments count
  out = {'kernel': np.eye(3, 2, dtype=np.float32), 'bias': np.array([1.0, 0])}
  linear = objectives.class_scores(None, 'features')
  made = linear({'head': {'out': out}}, {'features': np.array([[1.0, 2, 3]])})
  np.testing.assert_allclose(made, [[2.0, 2.0]])


def test_classification_objectives():
  values = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
  scores = lambda params, batch: values
  batch = {
    'label': np.array([0, 0, 0]),
    'example_weight': np.array([1.0, 1.0, 0.0], np.float32),
  }
  loss = objectives.classification_loss(scores)(None, batch)
  want = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(1.0))) / 2
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  error = objectives.classification_loss(scores, 'accuracy')(None, batch)
  assert error == 0.5
  with pytest.raises(ValueError, match='loss or accuracy'):
    objectives.classification_loss(scores, 'f1')


def test_forms_without_classes_are_refused():
  with pytest.raises(ValueError, match="'lm' has no classes"):
    objectives.class_scores(DECODER, 'lm')
  with pytest.raises(ValueError, match='needs label_ids'):
    objectives.class_scores(DECODER, 'words')


def test_lm_loss_counts_the_response_only(decoder):
  rows = [[3, 5, 7, 2, 9], [4, 1, 8]]
  tokens, mask = pad(rows, 7)
  weights = np.zeros((2, 6), np.float32)
  weights[0, 2:4] = 1  # targets 2 and 9
  weights[1, 1:2] = 1  # target 8
  batch = {'tokens': tokens, 'mask': mask, 'weights': weights}
  parts = [log_probs(decoder, rows[0])[2:], log_probs(decoder, rows[1])[1:]]
  want = -np.concatenate(parts).mean()
  loss_fn = jax.jit(objectives.lm_loss(DECODER))
  got = loss_fn(decoder, batch)
  np.testing.assert_allclose(got, want, atol=2e-6)
  filler = batch | {'example_weight': np.array([1.0, 0.0], np.float32)}
  got = loss_fn(decoder, filler)
  np.testing.assert_allclose(got, -parts[0].mean(), atol=2e-6)


def test_lm_evaluation_is_that_of_all_tokens(decoder):
  tokens = np.random.default_rng(0).integers(0, 23, (3, 2, 6))
  values = objectives.evaluate_lm(DECODER)(decoder, {'tokens': tokens})
  every = [log_probs(decoder, list(row)) for row in tokens.reshape(-1, 6)]
  want = -np.concatenate(every).mean()
  np.testing.assert_allclose(values['loss'], want, atol=2e-6)
  np.testing.assert_allclose(values['perplexity'], np.exp(want), rtol=1e-5)
  np.testing.assert_allclose(values['bits_per_token'], want / np.log(2))
  assert 0 <= values['accuracy'] <= 1


def test_evaluation_leaves_fillers_out():
  scores = lambda params, batch: batch['scores'] * params
  rng = np.random.default_rng(0)
  values = rng.normal(size=(4, 5, 3)).astype(np.float32)
  label = rng.integers(0, 3, (4, 5))
  weight = np.ones((4, 5), np.float32)
  weight[3, 2:] = 0
  batches = {'scores': values, 'label': label, 'example_weight': weight}
  got = objectives.evaluate_classes(scores, 3)(np.float32(1.0), batches)
  real = weight.ravel() > 0
  v, y = values.reshape(-1, 3)[real], label.ravel()[real]
  guess = v.argmax(1)
  f1 = []
  for c in range(3):
    hits = np.sum((guess == c) & (y == c))
    f1.append(2 * hits / (np.sum(guess == c) + np.sum(y == c)))
  logs = v - np.log(np.exp(v).sum(1, keepdims=True))
  want = -logs[np.arange(len(y)), y].mean()
  np.testing.assert_allclose(got['accuracy'], (guess == y).mean(), 1e-12)
  np.testing.assert_allclose(got['macro_f1'], np.mean(f1), rtol=1e-12)
  np.testing.assert_allclose(got['loss'], want, rtol=1e-5)


TOKENS = st.lists(st.integers(-1, 4), min_size=1, max_size=6)


@settings(deadline=None)
@given(made=TOKENS, wanted=TOKENS)
def test_bag_f1_is_that_of_multisets(made, wanted):
  pads = lambda xs: np.array(xs + [-1] * (6 - len(xs)), np.int32)
  a = collections.Counter(x for x in made if x >= 0)
  b = collections.Counter(x for x in wanted if x >= 0)
  total = a.total() + b.total()
  want = 2 * (a & b).total() / total if total else 1.0
  got = objectives.bag_f1(pads(made), pads(wanted))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_generation_loss_is_one_minus_f1_of_the_greedy_answer(decoder):
  rows = [[3, 5, 7], [4, 1]]
  free = np.asarray(
    generate.greedy(
      DECODER, decoder, *pad(rows, 3), max_new_tokens=4, eos_ids=(), pad_id=-1
    )
  )
  eos = 22
  answers = [[*free[0, :2], eos], [0, 0, 0]]  # half of it; something else
  tokens, mask = pad(
    [r + list(a) for r, a in zip(rows, answers, strict=True)], 8
  )
  weights = np.zeros((2, 7), np.float32)
  for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
    weights[i, len(row) - 1 : len(row) - 1 + len(answer)] = 1
  batch = {'tokens': tokens, 'mask': mask, 'weights': weights}
  loss = objectives.generation_loss(DECODER, max_new_tokens=4, eos_ids=(eos,))
  f1 = []
  for made, answer in zip(free, answers, strict=True):
    stop = list(made).index(eos) if eos in made else 4
    a = collections.Counter(made[:stop].tolist())
    b = collections.Counter(int(x) for x in answer if x != eos)
    f1.append(2 * (a & b).total() / (a.total() + b.total()))
  assert f1[0] > 0
  got = jax.jit(loss)(decoder, batch)
  np.testing.assert_allclose(got, 1 - np.mean(f1), rtol=1e-6)
