"""Which client has which examples.

A partition is a list of int64 index arrays, ascending, one per client: every
index from 0 to N - 1 in exactly one of them. It is a function of its arguments
(Philox keyed by the seed); `digest` tells partitions apart.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxfl.data import batching

KINDS = ('iid', 'dirichlet', 'by_label', 'by_column')
ATTEMPTS = 1000  # draws of `dirichlet` before it gives up
_NOBODY = 2**32 - 1  # a client id that is not a client's: our own stream


def _generator(seed: int, attempt: int = 0) -> np.random.Generator:
  return batching.generator(seed, _NOBODY, attempt)


def _check(num_examples: int, num_clients: int, each: int = 1) -> None:
  if num_clients < 1:
    raise ValueError(f'num_clients must be positive, got {num_clients}')
  if num_clients * each > num_examples:
    raise ValueError(
      f'{num_clients} clients with at least {each} examples each need '
      f'{num_clients * each} examples, there are {num_examples}'
    )


def iid(num_examples: int, num_clients: int, seed: int) -> list[np.ndarray]:
  """Shuffled and dealt out: sizes differ by one at most.

  Raises:
    ValueError: if there are more clients than examples.
  """
  _check(num_examples, num_clients)
  order = _generator(seed).permutation(num_examples)
  return [np.sort(order[i::num_clients]) for i in range(num_clients)]


def _members(values: Sequence[Any]) -> dict[Any, np.ndarray]:
  """The indices int64[*] of every value, values in order of appearance."""
  places: dict[Any, list[int]] = {}
  for i, value in enumerate(values):
    places.setdefault(value, []).append(i)
  return {value: np.array(x, np.int64) for value, x in places.items()}


def dirichlet(
  labels: Sequence[Any],
  num_clients: int,
  seed: int,
  *,
  alpha: float,
  min_size: int = 1,
) -> list[np.ndarray]:
  """Label skew: every label's examples in Dirichlet(alpha) shares.

  For every label, shares q ~ Dirichlet(alpha, ..., alpha) over the clients say
  how its shuffled examples are cut up: q_i N rounded, so that every example
  is given away once. Large alpha is iid; small alpha gives clients of few
  labels, and of unequal sizes. Draws repeat, each with a stream of its own,
  until every client has `min_size` examples.

  Args:
    labels: of every example, N of them.
    num_clients: how many clients.
    seed: in [0, 2**64).
    alpha: concentration, positive.
    min_size: the least number of examples of a client.

  Raises:
    ValueError: if there are too few examples, or if `ATTEMPTS` draws did not
      give every client enough.

  References:
    Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution
    for Federated Visual Classification, 2019, arXiv:1909.06335 (Dirichlet
    label skew, there with clients of equal size). Yurochkin et al.: Bayesian
    Nonparametric Federated Learning of Neural Networks, ICML 2019,
    arXiv:1905.12022 (shares per label over the clients, as here).
  """
  if min_size < 1:
    raise ValueError(f'min_size must be positive, got {min_size}')
  _check(len(labels), num_clients, min_size)
  if not (alpha > 0 and np.isfinite(alpha)):
    raise ValueError(f'alpha must be positive and finite, got {alpha}')
  members = list(_members(labels).values())
  sizes = np.array([len(x) for x in members])
  best = -1
  for attempt in range(ATTEMPTS):
    rng = _generator(seed, attempt)
    shares = rng.dirichlet(np.full(num_clients, alpha), len(members))
    # int64[labels, num_clients - 1]: where each label's examples are cut
    cuts = np.rint(np.cumsum(shares, 1)[:, :-1] * sizes[:, None]).astype(int)
    cuts = np.minimum(cuts, sizes[:, None])
    ends = np.concatenate([cuts, sizes[:, None]], 1)
    smallest = int(np.diff(ends, axis=1, prepend=0).sum(0).min())
    best = max(best, smallest)
    if smallest >= min_size:
      pieces = [
        np.split(rng.permutation(x), cut)
        for x, cut in zip(members, cuts, strict=True)
      ]
      return [
        np.sort(np.concatenate(parts)) for parts in zip(*pieces, strict=True)
      ]
  raise ValueError(
    f'{ATTEMPTS} Dirichlet draws with alpha={alpha} gave no {num_clients} '
    f'clients of at least {min_size} examples each (the best: {best}); take a '
    'larger alpha, a smaller min_size or fewer clients'
  )


def by_label(
  labels: Sequence[Any],
  num_clients: int,
  seed: int,
  *,
  labels_per_client: int = 2,
) -> list[np.ndarray]:
  """Sorted by label, cut into equal shards, some shards to every client.

  A shard in which one label ends and the next begins has both, so a client may
  have a few examples of more than `labels_per_client` labels.

  Args:
    labels: of every example, N of them; comparable with each other.
    num_clients: how many clients.
    seed: in [0, 2**64).
    labels_per_client: shards that a client gets.

  Raises:
    ValueError: if there are fewer examples than shards.

  References:
    McMahan et al.: Communication-Efficient Learning of Deep Networks from
    Decentralized Data, AISTATS 2017, arXiv:1602.05629, section 3.
  """
  if labels_per_client < 1:
    raise ValueError(
      f'labels_per_client must be positive, got {labels_per_client}'
    )
  _check(len(labels), num_clients, labels_per_client)
  rng = _generator(seed)
  members = _members(labels)
  order = [rng.permutation(members[x]) for x in sorted(members)]
  shards = np.array_split(
    np.concatenate(order), num_clients * labels_per_client
  )
  dealt = rng.permutation(len(shards)).reshape(num_clients, labels_per_client)
  return [np.sort(np.concatenate([shards[i] for i in x])) for x in dealt]


def by_column(
  values: Sequence[Any], num_clients: int | None = None
) -> list[np.ndarray]:
  """A client per value (a task, a category, a speaker); nothing is random.

  Values are sorted by how many examples they have, most first, then by the
  value; value k goes to client k modulo `num_clients`, so with as many clients
  as values each has one, with fewer they are shared out in rounds.

  Args:
    values: of every example, N of them; comparable with each other.
    num_clients: how many clients; as many as there are values if None.

  Raises:
    ValueError: if there are more clients than values.
  """
  members = _members(values)
  _check(len(values), 1)
  count = len(members) if num_clients is None else num_clients
  if not 1 <= count <= len(members):
    raise ValueError(
      f'num_clients must be from 1 to {len(members)}, the number of values of '
      f'the column, got {num_clients}'
    )
  ranked = sorted(members, key=lambda x: (-len(members[x]), x))
  return [
    np.sort(np.concatenate([members[x] for x in ranked[i::count]]))
    for i in range(count)
  ]


def column_values(
  rows: Sequence[Mapping[str, Any]], column: str
) -> list[str | int]:
  """The values of a column, all integers or else all as text.

  Raises:
    ValueError: if a row has no such column or no value in it.
  """
  values = []
  for number, row in enumerate(rows, 1):
    if row.get(column) is None:
      raise ValueError(
        f'cannot partition by column {column!r}: row {number} has none; its '
        f'columns are {sorted(k for k, v in row.items() if v is not None)}; '
        'name one with --partition_column'
      )
    values.append(row[column])
  plain = all(type(value) is int for value in values)
  return values if plain else [str(value) for value in values]


def partition(
  kind: str,
  rows: Sequence[Mapping[str, Any]],
  *,
  num_clients: int | None,
  seed: int = 0,
  alpha: float = 0.5,
  min_size: int = 1,
  column: str | None = None,
  labels_per_client: int = 2,
) -> list[np.ndarray]:
  """The partition of that kind.

  Args:
    kind: 'iid', 'dirichlet', 'by_label' or 'by_column'.
    rows: the examples, N of them.
    num_clients: how many clients; None, for by_column: one per value.
    seed: in [0, 2**64); not for by_column.
    alpha: of `dirichlet`.
    min_size: examples that a client must have; checked for every kind.
    column: what `dirichlet` and `by_label` take for the label ('label' if
      None), and what `by_column` takes.
    labels_per_client: of `by_label`.

  Returns:
    int64 index arrays, one per client.

  Raises:
    ValueError: for an unknown kind, a column that is not there, or clients
      that cannot all have enough examples.
  """
  if kind not in KINDS:
    raise ValueError(f'partition must be one of {KINDS}, got {kind!r}')
  if min_size < 1:
    raise ValueError(f'min_size must be positive, got {min_size}')
  if kind == 'by_column':
    if not column:
      raise ValueError(
        "partition 'by_column' needs the name of a column (--partition_column)"
      )
    parts = by_column(column_values(rows, column), num_clients)
  elif num_clients is None:
    raise ValueError(f'partition {kind!r} needs num_clients')
  elif kind == 'iid':
    parts = iid(len(rows), num_clients, seed)
  else:
    values = column_values(rows, column or 'label')
    split: Callable[..., list[np.ndarray]] = (
      dirichlet if kind == 'dirichlet' else by_label
    )
    options = (
      {'alpha': alpha, 'min_size': min_size}
      if kind == 'dirichlet'
      else {'labels_per_client': labels_per_client}
    )
    parts = split(values, num_clients, seed, **options)
  smallest = min(len(part) for part in parts)
  if smallest < min_size:
    raise ValueError(
      f'partition {kind!r}: a client has {smallest} examples, min_size is '
      f'{min_size}; take fewer clients or a smaller min_size'
    )
  return parts


def digest(parts: Sequence[np.ndarray]) -> str:
  """sha256 of a partition, in hexadecimal: sizes and indices, 8 bytes each."""
  h = hashlib.sha256()
  for part in parts:
    h.update(len(part).to_bytes(8, 'little'))
    h.update(np.ascontiguousarray(part, '<i8').tobytes())
  return h.hexdigest()


def client_names(
  parts: Sequence[np.ndarray], values: Sequence[Any]
) -> tuple[str, ...]:
  """The values that each client has, most frequent first, joined by '+'."""
  names = []
  for part in parts:
    members = _members([values[i] for i in part])
    ranked = sorted(members, key=lambda x: (-len(members[x]), str(x)))
    names.append('+'.join(map(str, ranked)))
  return tuple(names)


def describe(
  parts: Sequence[np.ndarray],
  values: Sequence[Any] | None = None,
  label_names: Sequence[str] = (),
  *,
  max_clients: int = 10,
) -> str:
  """A few lines to print: sizes, digest, and how labels fall on clients.

  Args:
    parts: the partition.
    values: label or column value of every example, None to leave them out.
    label_names: what integer values are called.
    max_clients: clients that get a line of their own.
  """
  sizes = np.array([len(part) for part in parts])
  lines = [
    f'{len(parts)} clients, {sizes.sum()} examples: min {sizes.min()}, median '
    f'{np.median(sizes):g}, max {sizes.max()}; split {digest(parts)[:16]}'
  ]
  if values is not None:
    for client, part in enumerate(parts[:max_clients]):
      members = _members([values[i] for i in part])
      ranked = sorted(members, key=lambda x: (-len(members[x]), str(x)))
      texts = [
        f'{label_names[x] if label_names else x} {len(members[x])}'
        for x in ranked[:10]
      ]
      more = [f'{len(ranked) - 10} more'] if len(ranked) > 10 else []
      lines.append(f'  client {client}: {", ".join(texts + more)}')
    if len(parts) > max_clients:
      lines.append(f'  and {len(parts) - max_clients} more clients')
  return '\n'.join(lines)
