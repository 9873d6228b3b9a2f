"""Encoded examples of any form, their batches, and the task made of them.

Texts differ in length. They are kept one after the other in one array, and a
batch is padded on the right to the smallest bucket that holds it: 16, 32, 48,
64, and from there steps of 4/3 and 3/2 in turn (96, 128, 192, ...) up to the
longest example. So a program is compiled for few shapes.

Forms (B examples, T tokens, C candidates):

- head: tokens int32[B, T], mask int8[B, T], label int32[B];
- words: the same, and position int32[B];
- candidates: tokens int32[B, C, T], mask int8[B, C, T], label int32[B],
  weights float32[B, C, T - 1], valid int8[B, C];
- lm: tokens int32[B, T], mask int8[B, T], weights float32[B, T - 1];
- prompt: tokens int32[B, T], mask int8[B, T].

All have `example_weight` float32[B], 1 for what is an example. `weights` is 1
where `tokens[..., 1:]` is a target. `types` int8[B, T], the segment ids, is
there for tokenizers that have them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxfl import digest as digest_lib
from jaxfl.data import batching


def buckets(longest: int, max_length: int) -> tuple[int, ...]:
  """The lengths to pad to, the last of which holds the longest example.

  Args:
    longest: tokens of the longest example, at most max_length.
    max_length: no bucket is longer.
  """
  sizes = [16, 32, 48, 64]
  while sizes[-1] < longest:
    # 64, 96, 128, 192, 256, ...
    sizes.append(sizes[-1] + 2 ** (sizes[-1].bit_length() - 2))
  count = sum(size < longest for size in sizes)
  return (*sizes[:count], min(sizes[count], max(max_length, longest)))


def check_length(max_length: int, positions: int | None) -> None:
  """Refuses examples that are longer than the model.

  Args:
    max_length: tokens of an example, at most.
    positions: how many the model has, None if that is not bounded.

  Raises:
    ValueError: naming both.
  """
  if positions is not None and max_length > positions:
    raise ValueError(
      f'max_length (--sequence_length) is {max_length}, the model has'
      f' {positions} positions'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
  """N examples; a sequence each, or C for the form `candidates`.

  Attributes:
    form: one of those above.
    tokens: int32[total], all sequences one after the other.
    offsets: int64[N * C + 1], where each begins and the last one ends.
    num_candidates: C; 1 but for the form `candidates`. Examples with fewer
      have empty sequences.
    starts: int32[N * C], the first token that is a target; None without
      weights.
    seconds: int32[N * C], the first token of segment 1; None without types.
    scalars: name -> int32[N]: label, position.
    pad_id: fills what is masked.
    buckets: the lengths that batches can have, increasing.
    num_labels: how many labels there are; 0 for lm and prompt.
    label_ids: int32[num_labels], the tokens of the label words; else None.
    truncated: how many examples were cut.
    references: the texts an answer is compared with, for the form prompt.
  """

  form: str
  tokens: np.ndarray
  offsets: np.ndarray
  num_candidates: int = 1
  starts: np.ndarray | None = None
  seconds: np.ndarray | None = None
  scalars: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  pad_id: int = 0
  buckets: tuple[int, ...]
  num_labels: int = 0
  label_ids: np.ndarray | None = None
  truncated: int = 0
  references: tuple[tuple[str, ...], ...] | None = None

  def __len__(self) -> int:
    return (len(self.offsets) - 1) // self.num_candidates

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """int64[N], of the longest sequence of every example."""
    sizes = np.diff(self.offsets).reshape(-1, self.num_candidates)
    return sizes.max(axis=1, initial=0)

  def take(self, indices, length: int | None = None) -> dict[str, np.ndarray]:
    """Examples as padded arrays.

    Args:
      indices: int[...] in [0, N).
      length: T; the smallest bucket that holds the examples if None.

    Returns:
      The arrays of the form, with B replaced by the shape of the indices.

    Raises:
      IndexError: if an index is out of range.
      ValueError: if the length is too short.
    """
    indices = np.asarray(indices, np.int64)
    outside = (indices < 0) | (indices >= len(self))
    if outside.any():
      raise IndexError(
        f'there are {len(self)} examples, indices are in'
        f' [{indices.min()}, {indices.max()}]'
      )
    longest = int(self.lengths[indices].max(initial=0))
    if length is None:
      length = next(size for size in self.buckets if size >= longest)
    elif length < longest:
      raise ValueError(f'length {length} is too short for {longest} tokens')
    return self._padded(indices, length) | {
      name: values[indices] for name, values in self.scalars.items()
    }

  def _padded(self, indices, length) -> dict[str, np.ndarray]:
    rows = indices
    if self.form == 'candidates':
      count = self.num_candidates
      rows = indices[..., None] * count + np.arange(count)
    begin = self.offsets[rows]
    sizes = (self.offsets[rows + 1] - begin)[..., None]
    steps = np.arange(length)
    real = steps < sizes
    places = np.minimum(begin[..., None] + steps, max(len(self.tokens) - 1, 0))
    out = {
      'tokens': np.where(real, self.tokens[places], np.int32(self.pad_id)),
      'mask': real.astype(np.int8),
      'example_weight': np.ones(indices.shape, np.float32),
    }
    if self.seconds is not None:
      second = steps >= self.seconds[rows][..., None]
      out['types'] = (second & real).astype(np.int8)
    if self.starts is not None:
      target = steps[1:] >= self.starts[rows][..., None]
      out['weights'] = (target & real[..., 1:]).astype(np.float32)
    if self.form == 'candidates':
      out['valid'] = (sizes[..., 0] > 0).astype(np.int8)
    return out

  def arrays(self) -> dict[str, np.ndarray]:
    """All that the batches are made of, for a digest."""
    optional = {
      'starts': self.starts,
      'seconds': self.seconds,
      'label_ids': self.label_ids,
    }
    return {
      'tokens': self.tokens,
      'offsets': self.offsets,
      'num_candidates': np.array(self.num_candidates),
      'pad_id': np.array(self.pad_id),
      'form': np.frombuffer(self.form.encode(), np.uint8),
      **{k: v for k, v in optional.items() if v is not None},
      **self.scalars,
    }


def from_lists(
  form: str,
  sequences: Sequence[Sequence[int]],
  pad_id: int,
  max_length: int,
  **fields: Any,
) -> Examples:
  """Examples of lists of ids.

  Args:
    form: one of those above.
    sequences: the ids of each; at least one sequence.
    pad_id: fills what is masked.
    max_length: no bucket is longer.
    **fields: the other attributes of `Examples`.
  """
  sizes = np.array([len(ids) for ids in sequences], np.int64)
  flat = np.fromiter(
    itertools.chain.from_iterable(sequences), np.int32, int(sizes.sum())
  )
  return Examples(
    form=form,
    tokens=flat,
    offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
    pad_id=pad_id,
    buckets=buckets(int(sizes.max()), max_length),
    **fields,
  )


def task(
  train: Examples,
  test: Examples,
  partition: Sequence[np.ndarray],
  *,
  name: str,
  client_names: Sequence[str] | None = None,
  eval_batch_size: int = 32,
  eval_examples: int | None = None,
  seed: int = 0,
  vary_length: bool = False,
) -> batching.Task:
  """A task on encoded examples.

  A batch holds no example twice if the client has as many as the batch; if it
  has fewer, all of them come before any comes again. Batches of a round are
  drawn independently.

  Args:
    train: of the clients.
    test: of the evaluation, in the same form.
    partition: indices int[n] of the train examples of every client.
    name: of the task.
    client_names: one per client; 'client 0' and so on if None.
    eval_batch_size: examples in a batch of the evaluation. The last batch is
      filled up with examples whose `example_weight` is 0.
    eval_examples: how many test examples are evaluated, drawn by the seed
      without replacement; all if None.
    seed: of that draw.
    vary_length: whether every call of `batches` has the smallest bucket that
      holds what it draws; clients then differ (see `runtime.stacking`).
      Otherwise all have the last bucket.

  Raises:
    ValueError: naming the client that has no example, or one twice, or one
      that does not exist; or if forms differ, or a number is not positive.
  """
  names = tuple(client_names or (f'client {i}' for i in range(len(partition))))
  clients = [np.asarray(indices, np.int64) for indices in partition]
  _check(train, test, clients, names, eval_batch_size, eval_examples)
  length = None if vary_length else train.buckets[-1]

  def batches(seed, client_id, round, num_batches, batch_size):
    rng = batching.generator(seed, client_id, round)
    own = clients[client_id]
    picks = [
      batching.pick(rng, len(own), batch_size) for _ in range(num_batches)
    ]
    return train.take(own[np.stack(picks)], length)

  sizes = np.array([len(indices) for indices in clients], np.int64)
  data = {
    'train': train.arrays(),
    'test': test.arrays(),
    'partition': {'indices': np.concatenate(clients), 'sizes': sizes},
  }
  return batching.Task(
    name=name,
    num_examples=sizes,
    batches=batches,
    eval_batches=_eval_batches(test, eval_batch_size, eval_examples, seed),
    client_names=names,
    digest=digest_lib.digest(data),
  )


def _check(train, test, clients, names, eval_batch_size, eval_examples):
  if train.form != test.form or train.num_labels != test.num_labels:
    raise ValueError(
      f'train is {train.form!r} with {train.num_labels} labels, test is'
      f' {test.form!r} with {test.num_labels}; they must be alike'
    )
  if not clients or len(names) != len(clients):
    raise ValueError(
      f'the partition has {len(clients)} clients, with {len(names)} names'
    )
  if not len(test):
    raise ValueError('there are no test examples')
  for what, value in (
    ('eval_batch_size', eval_batch_size),
    ('eval_examples', 1 if eval_examples is None else eval_examples),
  ):
    if value < 1:
      raise ValueError(f'{what} must be positive, got {value}')
  for name, indices in zip(names, clients, strict=True):
    if not len(indices):
      raise ValueError(
        f'client {name!r} has no data; use fewer clients, or a partition that'
        ' gives everyone some'
      )
    if indices.min() < 0 or indices.max() >= len(train):
      raise ValueError(
        f'client {name!r} has indices in [{indices.min()}, {indices.max()}];'
        f' there are {len(train)} train examples'
      )
    if len(np.unique(indices)) < len(indices):
      raise ValueError(f'client {name!r} has an example twice')


def _eval_batches(test, batch_size, count, seed) -> dict[str, np.ndarray]:
  """Arrays [N, B, ...] of one length; fillers have `example_weight` 0."""
  rows, weight = batching.eval_rows(len(test), batch_size, count, seed)
  return test.take(rows) | {'example_weight': weight}
