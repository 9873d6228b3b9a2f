"""A task on arrays that fit into memory: features, images."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxfl import digest as digest_lib
from jaxfl.data import batching


def task(
  train: Mapping[str, np.ndarray],
  test: Mapping[str, np.ndarray],
  partition: Sequence[np.ndarray],
  *,
  name: str,
  eval_batch_size: int,
  eval_examples: int | None = None,
) -> batching.Task:
  """A task whose batches are rows of arrays.

  Args:
    train: arrays [N, ...] by their names in a batch.
    test: arrays [M, ...] of the same names.
    partition: indices int[n] of the train examples of every client.
    name: of the task.
    eval_batch_size: examples in a batch of the evaluation; the last is filled
      up with examples whose `example_weight` is 0.
    eval_examples: how many test examples are evaluated, drawn without
      replacement and equal in all runs; all if None.

  Raises:
    ValueError: if a client has no example.
  """
  for client, own in enumerate(partition):
    if not len(own):
      raise ValueError(f'client {client} has no data; use fewer clients')

  def batches(seed, client_id, round, num_batches, batch_size):
    rng = batching.generator(seed, client_id, round)
    own = partition[client_id]
    picks = [
      batching.pick(rng, len(own), batch_size) for _ in range(num_batches)
    ]
    chosen = own[np.stack(picks)]
    return {name: x[chosen] for name, x in train.items()}

  most = max(map(len, partition))

  def whole(client_id):
    own = partition[client_id]
    rows = np.concatenate([own, np.repeat(own[:1], most - len(own))])
    weight = (np.arange(most) < len(own)).astype(np.float32)
    return {name: x[rows] for name, x in train.items()} | {
      'example_weight': weight
    }

  count = len(next(iter(test.values())))
  rows, weight = batching.eval_rows(count, eval_batch_size, eval_examples)
  data = [*train.values(), *test.values(), *map(np.asarray, partition)]
  return batching.Task(
    name=name,
    num_examples=np.array([len(own) for own in partition], np.int64),
    batches=batches,
    eval_batches={name: x[rows] for name, x in test.items()}
    | {'example_weight': weight},
    client_names=tuple(f'client {i}' for i in range(len(partition))),
    digest=digest_lib.digest(data),
    whole=whole,
  )
