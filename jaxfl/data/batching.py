"""What a task is, and batches that are functions of their address.

A client's batches of a round are drawn by Philox under the key
`(seed, client, round)`: no state is carried, so a run that resumes, a client
that comes back and a simulation in another order see the same examples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
  """Data of all clients, in the same form for every task.

  `num_batches` and `batch_size` are numbers of batches and of examples.

  Attributes:
    name: what the task is.
    num_examples: int64[num_clients], how many examples every client has.
    batches: `(seed, client_id, round, num_batches, batch_size)` -> a dict of
      arrays [num_batches, batch_size, ...], a function of its arguments alone.
    eval_batches: a dict of arrays [num_batches, batch_size, ...] of examples
      that no client has.
    client_names: what the clients are called, in the order of their ids.
    digest: sha256 of all the data, in hexadecimal.
    whole: `client_id` -> all examples of a client, a dict of arrays
      [max(num_examples), ...] with `example_weight`, float32, which is 0 for
      what fills up; None for tasks whose examples can't be listed.
  """

  name: str
  num_examples: np.ndarray  # int64[num_clients]
  batches: Callable[[int, int, int, int, int], dict[str, np.ndarray]]
  eval_batches: dict[str, np.ndarray]
  client_names: tuple[str, ...]
  digest: str
  whole: Callable[[int], dict[str, np.ndarray]] | None = None


def generator(seed: int, client_id: int, round: int) -> np.random.Generator:
  """A generator of its own for every `(seed, client, round)`.

  Args:
    seed: in [0, 2**64).
    client_id: in [0, 2**32).
    round: in [0, 2**32).

  Raises:
    ValueError: if a number is out of its range.
  """
  if not (0 <= seed < 2**64 and 0 <= client_id < 2**32 and 0 <= round < 2**32):
    raise ValueError(f'out of range: {seed=}, {client_id=}, {round=}')
  key = np.array([seed, int(client_id) << 32 | int(round)], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))


class Windows:
  """Texts of which an example is any stretch of `length + 1` bytes.

  Args:
    texts: uint8[N] each, with N > length.
    length: target bytes of an example.
  """

  def __init__(self, texts: Sequence[np.ndarray], length: int):
    sizes = np.array([len(text) for text in texts])
    self._text = np.concatenate(texts)
    self._ends = np.cumsum(sizes - length)  # of the starts that are possible
    self._shift = np.arange(len(texts)) * length  # from rank to position
    self._offsets = np.arange(length + 1)

  def draw(self, rng: np.random.Generator, shape: tuple[int, ...]):
    """Examples uint8[*shape, length + 1], every start equally likely."""
    rank = rng.integers(0, self._ends[-1], size=shape)
    text = np.searchsorted(self._ends, rank, side='right')
    start = rank + self._shift[text]
    return self._text[start[..., None] + self._offsets]


def window_batches(
  clients: Sequence[Sequence[np.ndarray]], length: int
) -> Callable[[int, int, int, int, int], dict[str, np.ndarray]]:
  """The `batches` of a `Task` on text.

  Args:
    clients: the texts uint8[N] of every client, with N > length.
    length: target bytes of an example.

  Returns:
    A function as `Task.batches` with `{'tokens': uint8[..., length + 1]}`.
  """
  windows = [Windows(texts, length) for texts in clients]

  def batches(seed, client_id, round, num_batches, batch_size):
    rng = generator(seed, client_id, round)
    return {'tokens': windows[client_id].draw(rng, (num_batches, batch_size))}

  return batches


def pick(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
  """Draws int64[size] in [0, count), none again before all have come."""
  if count >= size:
    return rng.choice(count, size, replace=False)
  rounds = [rng.permutation(count) for _ in range(-(-size // count))]
  return np.concatenate(rounds)[:size]


def eval_rows(
  count: int, batch_size: int, examples: int | None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Which examples are evaluated, in batches of one size.

  Args:
    count: examples that there are.
    batch_size: examples in a batch; the last is filled up.
    examples: how many are evaluated, drawn by the seed without replacement; all
      if None.
    seed: of that draw.

  Returns:
    Indices int64[N, B], and float32[N, B], 1 for an example, 0 for a filler.
  """
  rows = np.arange(count)
  if examples is not None and examples < count:
    # words of the key that no client's batches use
    rng = generator(seed, 2**32 - 1, 2**32 - 1)
    rows = np.sort(rng.choice(count, examples, replace=False))
  batch_size = min(batch_size, len(rows))
  missing = -len(rows) % batch_size
  filled = np.concatenate([rows, np.repeat(rows[:1], missing)])
  weight = (np.arange(len(filled)) < len(rows)).astype(np.float32)
  return filled.reshape(-1, batch_size), weight.reshape(-1, batch_size)
