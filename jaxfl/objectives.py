"""What is minimised and what is reported, for every form of data.

Five forms of batches (`jaxfl.data.encode` makes them), one loss for each:

  * `head`: cross-entropy of a classification head.
  * `words`: cross-entropy over label words at one position; the next token of a
    decoder or the masked one of an encoder.
  * `candidates`: cross-entropy over the log-likelihoods of whole candidates,
    by default per token (multiple choice; label words of several tokens).
  * `features`: cross-entropy of a linear layer on given features.
  * `lm`: next-token cross-entropy on the weighted tokens (the response).

Numbers to predict, `target` float32[B], have a loss of their own: the mean
squared error.

Zeroth-order methods also minimise what has no gradient: `1 - accuracy` where
there are classes, `1 - F1` of the greedily generated tokens where there are
responses. Everything is jittable and a function of `(params, batch)`.

Shapes: B examples, C classes or candidates, T tokens, N batches.

References:
  Malladi et al., "Fine-tuning language models with just forward passes" (MeZO),
    NeurIPS 2023, https://arxiv.org/abs/2305.17333, section 3.3 and appendix E.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import text_metrics
from jaxfl import typing as jt
from jaxfl.models import generate, transformer
from jaxfl.models.config import Config

FORMS = ('head', 'words', 'candidates', 'features', 'lm')
OBJECTIVES = ('loss', 'accuracy', 'f1')

Scores = Callable[[jt.Params, jt.Batch], jax.Array]  # -> float32[B, C]
Predict = Callable[[jt.Params, jt.Batch], jax.Array]  # -> float32[B]
Evaluate = Callable[[jt.Params, jt.Batch], dict[str, float]]


def token_log_probs(
  config: Config,
  params: jt.Params,
  tokens: jax.Array,
  mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities of `tokens[:, 1:]`, and whether each was the likeliest.

  Args:
    config: of a model with a vocabulary.
    params: its parameters.
    tokens: integer[B, T].
    mask: [B, T], nonzero where a token is real, or None.

  Returns:
    float32[B, T - 1] and bool[B, T - 1].
  """
  tokens = jnp.asarray(tokens).astype(jnp.int32)
  inside = None if mask is None else mask[:, :-1]
  states = transformer.hidden(config, params, tokens[:, :-1], inside)
  logits = transformer.vocab_logits(config, params, states)
  targets = tokens[:, 1:]
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  hits = jnp.argmax(logits, axis=-1) == targets
  return picked - jax.nn.logsumexp(logits, axis=-1), hits


def class_scores(
  config: Config | None,
  form: str,
  *,
  label_ids: tuple[int, ...] = (),
  length_normalised: bool = True,
) -> Scores:
  """The scores of the classes, for the forms that have classes.

  Args:
    config: of the model; None for `features`.
    form: `head`, `words`, `candidates` or `features`.
    label_ids: tokens of the label words, in the order of the labels (`words`).
    length_normalised: mean instead of sum of a candidate's log-probabilities.

  Returns:
    params, batch -> float32[B, C].

  Raises:
    ValueError: if the form has no classes, or `words` no label ids.
  """
  if form == 'features':
    return _linear
  assert config is not None
  if form == 'head':
    return lambda params, batch: transformer.logits(
      config, params, batch['tokens'], batch['mask'], batch.get('types')
    )
  if form == 'words':
    if not label_ids:
      raise ValueError('form words needs label_ids')
    return lambda params, batch: _word_scores(config, params, batch, label_ids)
  if form == 'candidates':
    return lambda params, batch: _candidate_scores(
      config, params, batch, length_normalised
    )
  raise ValueError(f'form {form!r} has no classes')


def _linear(params, batch):
  out = params['head']['out']
  return batch['features'] @ out['kernel'] + out['bias'][None, :]


def _word_scores(config, params, batch, label_ids):
  states = transformer.hidden(
    config, params, batch['tokens'], batch['mask'], batch.get('types')
  )
  position = jnp.asarray(batch['position'])[:, None, None]
  state = jnp.take_along_axis(states, position, axis=1)[:, 0]
  logits = transformer.vocab_logits(config, params, state)
  return logits[:, np.asarray(label_ids)]


def _candidate_scores(config, params, batch, length_normalised):
  tokens = jnp.asarray(batch['tokens'])
  rows = tokens.shape[:2]
  flat = lambda x: jnp.asarray(x).reshape(-1, x.shape[-1])
  log_probs, _ = token_log_probs(
    config, params, flat(tokens), flat(batch['mask'])
  )
  weights = jnp.asarray(batch['weights'])
  score = jnp.sum(log_probs.reshape(*rows, -1) * weights, axis=-1)
  if length_normalised:
    score = score / jnp.maximum(jnp.sum(weights, axis=-1), 1.0)
  return jnp.where(jnp.asarray(batch['valid']) > 0, score, -1e9)


def _example_weight(batch, like):
  weight = batch.get('example_weight')
  return jnp.ones_like(like) if weight is None else jnp.asarray(weight)


def _cross_entropy(scores, label):
  picked = jnp.take_along_axis(scores, label[:, None], axis=1)[:, 0]
  return jax.nn.logsumexp(scores, axis=1) - picked


def _mean(values, weights):
  return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def classification_loss(scores: Scores, objective: str = 'loss') -> jt.LossFn:
  """Mean cross-entropy in nats, or one minus the accuracy.

  Args:
    scores: from `class_scores`.
    objective: `loss` or `accuracy`.

  Returns:
    params, batch -> float32[].

  Raises:
    ValueError: for another objective.
  """
  if objective not in ('loss', 'accuracy'):
    raise ValueError(
      f'objective must be loss or accuracy for classes, got {objective!r}'
    )

  def loss_fn(params, batch):
    values = scores(params, batch)
    label = jnp.asarray(batch['label']).astype(jnp.int32)
    if objective == 'loss':
      error = _cross_entropy(values, label)
    else:
      error = (jnp.argmax(values, axis=1) != label).astype(jnp.float32)
    return _mean(error, _example_weight(batch, error))

  return loss_fn


def regression_loss(predict: Predict) -> jt.LossFn:
  """Mean squared error of the predictions.

  Args:
    predict: params, batch -> float32[B].

  Returns:
    params, batch -> float32[].
  """

  def loss_fn(params, batch):
    error = jnp.square(predict(params, batch) - jnp.asarray(batch['target']))
    return _mean(error, _example_weight(batch, error))

  return loss_fn


def lm_loss(config: Config) -> jt.LossFn:
  """Mean next-token cross-entropy in nats over the weighted tokens.

  Args:
    config: of the model.

  Returns:
    params, batch -> float32[]. `batch` has `tokens`, integer[B, T], and may
    have `mask`, [B, T], and `weights`, float32[B, T - 1], of `tokens[:, 1:]`.
  """

  def loss_fn(params, batch):
    log_probs, _, weights = _lm_stats(config, params, batch)
    return _mean(-log_probs, weights)

  return loss_fn


def _lm_stats(config, params, batch):
  log_probs, hits = token_log_probs(
    config, params, batch['tokens'], batch.get('mask')
  )
  weights = batch.get('weights')
  weights = jnp.ones_like(log_probs) if weights is None else weights
  weights = weights * _example_weight(batch, log_probs[:, 0])[:, None]
  return log_probs, hits, weights


def generation_loss(
  config: Config, *, max_new_tokens: int, eos_ids: tuple[int, ...]
) -> jt.LossFn:
  """One minus the mean F1 between generated and reference tokens.

  The prompt of an example ends before its first weighted token; F1 is that of
  the two bags of tokens, end tokens left out.

  Args:
    config: of the model.
    max_new_tokens: tokens to generate, at most.
    eos_ids: tokens that end a generation.

  Returns:
    params, batch of form `lm` -> float32[]; has no gradient.
  """

  def loss_fn(params, batch):
    tokens = jnp.asarray(batch['tokens']).astype(jnp.int32)
    scored = jnp.asarray(batch['weights']) > 0
    prompt_length = jnp.argmax(scored, axis=1) + 1
    places = jnp.arange(tokens.shape[1])[None, :]
    prompt_mask = (places < prompt_length[:, None]).astype(jnp.int8)
    pad = -1  # no token
    made = generate.greedy(
      config,
      params,
      jnp.where(prompt_mask > 0, tokens, 0),
      prompt_mask,
      max_new_tokens=max_new_tokens,
      eos_ids=eos_ids,
      pad_id=pad,
    )
    wanted = jnp.where(scored, tokens[:, 1:], pad)
    for end in eos_ids:
      made = jnp.where(made == end, pad, made)
      wanted = jnp.where(wanted == end, pad, wanted)
    f1 = jax.vmap(bag_f1)(made, wanted)
    return 1.0 - _mean(f1, _example_weight(batch, f1))

  return loss_fn


def bag_f1(made: jax.Array, wanted: jax.Array) -> jax.Array:
  """F1 of two bags of tokens, int32[M] and int32[N]; negative ones are none.

  Returns:
    float32[]; 1 if both are empty, 0 if one is.
  """
  real = made >= 0
  same = (made[:, None] == made[None, :]) & real[None, :]
  rank = jnp.sum(jnp.tril(same, -1), axis=1)  # equal ones before this one
  there = jnp.sum(made[:, None] == wanted[None, :], axis=1)
  common = jnp.sum(real & (rank < there))
  total = jnp.sum(real) + jnp.sum(wanted >= 0)
  f1 = 2.0 * common / jnp.maximum(total, 1)
  return jnp.where(total == 0, 1.0, f1).astype(jnp.float32)


def _summed(step: Callable[[jt.Params, Any], Any]) -> Callable:
  """jit of the sum of `step(params, batch)` over batches [N, ...]."""

  def total(params, batches):
    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(step, params, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda carry, batch: (
      jax.tree.map(jnp.add, carry, step(params, batch)),
      None,
    )
    return jax.lax.scan(add, zeros, batches)[0]

  return jax.jit(total)


def evaluate_classes(scores: Scores, num_labels: int) -> Evaluate:
  """Evaluation of classes over a fixed stack of batches, compiled once.

  Args:
    scores: from `class_scores`.
    num_labels: C.

  Returns:
    A function of `(params, batches)` with `accuracy`, `macro_f1` and `loss` in
    nats; batches have leading axes [N, B].
  """

  def step(params, batch):
    values = scores(params, batch)
    label = jnp.asarray(batch['label']).astype(jnp.int32)
    weight = _example_weight(batch, values[:, 0])
    guess = jax.nn.one_hot(jnp.argmax(values, axis=1), num_labels)
    truth = jax.nn.one_hot(label, num_labels) * weight[:, None]
    loss = jnp.sum(_cross_entropy(values, label) * weight)
    return loss, jnp.einsum('bt,bg->tg', truth, guess), jnp.sum(weight)

  total = _summed(step)

  def evaluate(params, batches):
    loss, confusion, count = jax.device_get(total(params, batches))
    counts = confusion.astype(np.int64)  # of ones: exact
    return {
      'accuracy': text_metrics.accuracy(counts),
      'macro_f1': text_metrics.macro_f1(counts),
      'loss': float(loss / count),
    }

  return evaluate


def evaluate_regression(predict: Predict) -> Evaluate:
  """Evaluation of predicted numbers over a fixed stack of batches.

  Args:
    predict: params, batch -> float32[B].

  Returns:
    A function of `(params, batches)` with `loss`, the mean squared error, and
    `r2`, one minus the loss over the variance of the targets (0 if they have
    none); batches have leading axes [N, B].
  """

  def step(params, batch):
    error = jnp.square(predict(params, batch) - jnp.asarray(batch['target']))
    weight = _example_weight(batch, error)
    return jnp.sum(error * weight), jnp.sum(weight)

  total = _summed(step)

  def evaluate(params, batches):
    loss, count = (float(x) for x in total(params, batches))
    target = np.asarray(batches['target'], np.float64)
    weights = batches.get('example_weight')
    mean = np.average(target, weights=weights)
    variance = float(np.average((target - mean) ** 2, weights=weights))
    r2 = 1.0 - loss / count / variance if variance else 0.0
    return {'loss': loss / count, 'r2': r2}

  return evaluate


def evaluate_lm(config: Config) -> Evaluate:
  """Evaluation of a language model over a fixed stack of batches.

  Args:
    config: of the model.

  Returns:
    A function of `(params, batches)` with `loss` in nats per token,
    `perplexity`, `bits_per_token` and `accuracy` of the likeliest next token.
  """

  def step(params, batch):
    log_probs, hits, weights = _lm_stats(config, params, batch)
    return (
      -jnp.sum(log_probs * weights),
      jnp.sum(hits * weights),
      jnp.sum(weights),
    )

  total = _summed(step)

  def evaluate(params, batches):
    loss, hits, count = (float(x) for x in total(params, batches))
    return {
      'loss': loss / count,
      'perplexity': float(np.exp(loss / count)),
      'bits_per_token': loss / count / np.log(2).item(),
      'accuracy': hits / count,
    }

  return evaluate
