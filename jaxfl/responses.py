"""Answers to held-out prompts, generated greedily and compared with references.

Generation is jitted, one program per padded length; decoding and comparing run
on the host, once an evaluation.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxfl import text_metrics
from jaxfl import typing as jt
from jaxfl.data import examples as examples_lib
from jaxfl.data import tokenizer as tokenizer_lib
from jaxfl.models import generate
from jaxfl.models.config import Config

Answer = Callable[[jt.Params], list[str]]


def make_answer(
  config: Config,
  tokenizer: tokenizer_lib.Tokenizer,
  prompts: examples_lib.Examples,
  *,
  max_new_tokens: int,
  batch_size: int,
) -> Answer:
  """A function of the parameters with the answer to every prompt.

  Args:
    config: of the model.
    tokenizer: of the model.
    prompts: of form `prompt`.
    max_new_tokens: of an answer.
    batch_size: prompts at once.
  """
  eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)

  @jax.jit
  def greedy(params, tokens, mask):
    return generate.greedy(
      config,
      params,
      tokens,
      mask,
      max_new_tokens=max_new_tokens,
      eos_ids=eos_ids,
      pad_id=tokenizer.pad_id,
    )

  size = min(batch_size, len(prompts))
  blocks = [
    np.resize(np.arange(start, min(start + size, len(prompts))), size)
    for start in range(0, len(prompts), size)
  ]

  def answer(params):
    texts = []
    for block in blocks:
      batch = prompts.take(block)
      made = np.asarray(greedy(params, batch['tokens'], batch['mask']))
      texts.extend(tokenizer.decode(_until(ids, eos_ids)) for ids in made)
    return [text.strip() for text in texts[: len(prompts)]]

  return answer


def _until(ids: np.ndarray, ends: tuple[int, ...]) -> list[int]:
  """The ids before the first end."""
  stops = np.flatnonzero(np.isin(ids, ends))
  return ids[: stops[0]].tolist() if stops.size else ids.tolist()


def compare(
  answers: Sequence[str],
  references: Sequence[Sequence[str]],
  *,
  final_numbers: bool = False,
) -> dict[str, float]:
  """Rouge-L, exact match and F1 of answers, means in [0, 1].

  Args:
    answers: texts.
    references: of each, the texts that count as right.
    final_numbers: exact match of the numbers that answers end in (GSM8K).
  """
  if final_numbers:
    exact = text_metrics.gsm8k_exact_match(answers, references)
  else:
    exact = text_metrics.exact_match(answers, references)
  return {
    'rouge_l': text_metrics.rouge_l(answers, references),
    'exact_match': exact,
    'f1': text_metrics.token_f1(answers, references),
  }
