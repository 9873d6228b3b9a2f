"""Plain text as examples for language modelling: the whole text is a target.

A text ends in the end token and is cut into windows, each with the model's
begin token before it. Every token is a target once: where there is no begin
token, a window starts with the last token of the one before, and only the
first token of a text is not predicted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxfl.data import examples as examples_lib
from jaxfl.data import tokenizer as tokenizer_lib


def encode(
  rows: Sequence[Mapping[str, Any]],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  max_length: int,
  positions: int | None = None,
  name: str = 'text',
) -> tuple[examples_lib.Examples, np.ndarray]:
  """Cuts texts into windows.

  Args:
    rows: with a field `text`.
    tokenizer: of a causal model.
    max_length: tokens of a window, at most; a text ends with a shorter one.
    positions: how many positions the model has, if that is bounded.
    name: what to call the dataset in messages.

  Returns:
    Examples of the form lm, in the order of the texts; and int64[N], the row
    that each comes from. A text of one token has no target, and no window.

  Raises:
    ValueError: if the length cannot be had, or no text has a target.
  """
  examples_lib.check_length(max_length, positions)
  prefix = list(tokenizer.prefix)
  again = 0 if prefix else 1  # tokens that two windows share
  size = max_length - len(prefix)
  if size <= again:
    raise ValueError(
      f'{name}: max_length (--sequence_length) {max_length} leaves no room for '
      f'text: a window needs {len(prefix) + again + 1} tokens'
    )
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  sequences, origin = [], []
  for i, ids in enumerate(tokenizer.encode([row['text'] for row in rows])):
    ids = ids + end
    for at in range(0, len(ids) - again, size - again):
      sequences.append(prefix + ids[at : at + size])
      origin.append(i)
  if not sequences:
    raise ValueError(f'{name}: no text has two tokens')
  starts = np.full(len(sequences), len(prefix), np.int32)
  found = examples_lib.from_lists(
    'lm', sequences, tokenizer.pad_id, max_length, starts=starts
  )
  return found, np.array(origin, np.int64)


def share_out(
  partition: Sequence[np.ndarray], origin: np.ndarray
) -> list[np.ndarray]:
  """The windows int64[*] of every client, from its rows.

  Args:
    partition: the indices of the rows of every client.
    origin: int64[N], the row of every window.
  """
  return [np.flatnonzero(np.isin(origin, rows)) for rows in partition]
