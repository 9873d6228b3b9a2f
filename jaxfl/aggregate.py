"""Robust merging: what the values of many clients amount to, if some lie.

    merged = aggregator.merge(values, weight, ids)   # [C, N], [C], [C] -> [N]

for values that are comparable entry by entry: of shared directions (DeComFL),
or vectors (FedAvg). Where every client has directions of its own, entry n of
one client says nothing about entry n of another, and only rules for one client
at a time make sense: `aggregator.limit`.

    name           merged                                            source
    mean           by weight
    median         of every entry                                    [1], def. 1
    trimmed_mean   without the largest and smallest share            [1], def. 2
    krum           the client nearest to its n - f - 2 neighbours    [2]
    multi_krum     the mean of the n - f best ones                   [2]
    sign_vote      the sign of the majority, times `clip_value`      [3]

All but the two means by weight count every client once, whatever its weight: a
weight of 0 is an absent client. Every rule gives the same bits on every device
and in every order of clients: medians and trimmed means sort the values first,
votes are integers, sums follow the order of values or of ids, products are
rounded once (`grid.shrink`), and the distances of Krum are sums of integers
(`exact_norm`, 12 bits). Of vectors of several million entries, Krum needs C**2
passes.

References:
  [1] Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning:
  towards optimal statistical rates", ICML 2018, arXiv:1803.01498.
  [2] Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with
  adversaries: Byzantine tolerant gradient descent", NeurIPS 2017,
  arXiv:1703.02757; it leaves open how many `multi_krum` takes.
  [3] Bernstein, Zhao, Azizzadenesheli, Anandkumar, "signSGD with majority vote
  is communication efficient and fault tolerant", ICLR 2019, arXiv:1810.05291.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import checks, exact_norm, grid
from jaxfl import method as method_lib

NAMES = (
  'mean', 'median', 'trimmed_mean', 'krum', 'multi_krum', 'sign_vote'
)  # fmt: skip
_LARGEST = np.float32(2.0**90)  # of what distances are taken of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregator:
  """A rule and its numbers.

  Attributes:
    name: one of `NAMES`.
    trim_fraction: of `trimmed_mean`: share that is left out on either side.
    num_byzantine: of the two forms of Krum: f, how many clients may lie; the
      theorem asks for 2 f + 2 < n clients.
    clip_value: of `mean`: bound of |value|, or of the norm of a client's
      vector; None for no bound. Of `sign_vote`: the size of a step, default 1.

  Raises:
    ValueError: naming the attribute that is wrong.
  """

  name: str = 'mean'
  trim_fraction: float = 0.25
  num_byzantine: int = 1
  clip_value: float | None = None

  def __post_init__(self):
    checks.one_of('aggregator', self.name, NAMES)
    if not 0 <= self.trim_fraction < 0.5:
      raise ValueError(
        f'trim_fraction must be in [0, 0.5), got {self.trim_fraction}'
      )
    if self.num_byzantine < 0:
      raise ValueError(f'num_byzantine must be >= 0, got {self.num_byzantine}')
    if self.clip_value is None:
      return
    if self.name not in ('mean', 'sign_vote'):
      raise ValueError(
        f'clip_value is for aggregator mean or sign_vote, got {self.name!r}'
      )
    if not 2.0**-100 <= self.clip_value <= 2.0**100:
      raise ValueError(
        f'clip_value must be in [2**-100, 2**100], got {self.clip_value}'
      )

  @property
  def plain(self) -> bool:
    """Whether this is the mean and nothing else."""
    return self.name == 'mean' and self.clip_value is None

  @property
  def _vote(self) -> np.float32:
    return np.float32(1.0 if self.clip_value is None else self.clip_value)

  def merge(
    self,
    values: jax.Array,
    weight: jax.Array,
    ids: jax.Array,
    *,
    vectors: bool = False,
  ) -> jax.Array:
    """Merges the values of clients, float32[N].

    Args:
      values: float32[C, N]; what is not finite is left out, and by Krum the
        whole client.
      weight: float32[C], whole numbers; 0 for absent clients.
      ids: int32[C], distinct.
      vectors: whether `clip_value` bounds the norm of a client's values.
    """
    if self.name == 'median':
      return median(values, weight)
    if self.name == 'trimmed_mean':
      return trimmed_mean(values, weight, self.trim_fraction)
    if self.name in ('krum', 'multi_krum'):
      return krum(
        values, weight, ids, self.num_byzantine, multi=self.name == 'multi_krum'
      )
    if self.name == 'sign_vote':
      return sign_vote(values, weight) * self._vote
    if self.clip_value is not None:
      clip = clip_norm if vectors else clip_entries
      values = clip(values, self.clip_value)
    return mean(values, weight, ids)

  def limit(
    self, values: jax.Array, weight: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Values and weights under the rules for one client at a time.

    `mean` clips values; `sign_vote` leaves their signs and one vote a client.

    Args:
      values: float32[C, ...].
      weight: float32[...], whole numbers.
    """
    if self.name == 'sign_vote':
      votes = jnp.where(jnp.isfinite(values), jnp.sign(values), values)
      return votes * self._vote, (weight > 0).astype(jnp.float32)
    if self.clip_value is not None:
      values = clip_entries(values, self.clip_value)
    return values, weight

  def check_own_directions(self, method: str, *, signs: bool = True) -> None:
    """Raises ValueError for rules that compare clients entry by entry."""
    if self.name == 'mean' or (signs and self.name == 'sign_vote'):
      return
    raise ValueError(
      f'aggregator {self.name} does not apply to {method}: every client has'
      ' directions of its own, so that values of two clients are not'
      ' comparable; use mean with clip_value'
      + (', sign_vote' if signs else '')
      + ' or weights of trust, or method decomfl, whose clients share their'
      ' directions'
    )


def _present(values, weight):
  """bool[C, N]: what counts."""
  return jnp.isfinite(values) & (jnp.asarray(weight) > 0)[:, None]


def _ordered_sum(terms):
  """Sums rows one by one: float sums in a given order."""
  add = lambda total, term: (total + term, None)
  return jax.lax.scan(add, jnp.zeros(terms.shape[1]), terms)[0]


def mean(values: jax.Array, weight: jax.Array, ids: jax.Array) -> jax.Array:
  """The mean by weight of every entry, float32[N]; see `Aggregator.merge`.

  One rounded product and one rounded sum per client, in the order of ids.
  """
  present = jnp.asarray(weight)[:, None]
  weight = jnp.where(jnp.isfinite(values), present, 0.0)
  part = jax.vmap(method_lib.fractions, in_axes=1, out_axes=1)(weight)
  terms = grid.shrink(jnp.where(weight > 0, values, 0.0), part)
  return _ordered_sum(terms[jnp.argsort(jnp.asarray(ids))])


def _sorted(values, weight):
  """Values in ascending order, absent ones last, and int32[N] of others."""
  present = _present(values, weight)
  values = jnp.where(present, grid.positive_zero(values), jnp.inf)
  return jnp.sort(values, axis=0), present.sum(0, dtype=jnp.int32)


def median(values: jax.Array, weight: jax.Array) -> jax.Array:
  """The median of every entry, float32[N]; zero where nobody is.

  Of an even number, the mean of the middle two: halves are exact.
  """
  ordered, count = _sorted(values, weight)
  at = lambda i: jnp.take_along_axis(ordered, jnp.maximum(i, 0)[None], 0)[0]
  middle = 0.5 * at((count - 1) // 2) + 0.5 * at(count // 2)
  return jnp.where(count > 0, middle, 0.0)


def trimmed_mean(
  values: jax.Array, weight: jax.Array, fraction: float
) -> jax.Array:
  """The mean of every entry without its extremes, float32[N].

  Of n values, the floor(fraction n) largest and as many smallest are left out;
  the rest is summed up in ascending order.
  """
  ordered, count = _sorted(values, weight)
  num_clients = values.shape[0]
  cuts = [math.floor(fraction * n) for n in range(num_clients + 1)]
  cut = jnp.asarray(np.array(cuts, np.int32))[count][None]
  count = count[None]
  place = jnp.arange(num_clients)[:, None]
  kept = (place >= cut) & (place < count - cut)
  left = (count - 2 * cut).astype(jnp.uint32)
  part = method_lib.quotients(jnp.minimum(left, 1), left)
  return _ordered_sum(grid.shrink(jnp.where(kept, ordered, 0.0), part))


def krum(
  values: jax.Array,
  weight: jax.Array,
  ids: jax.Array,
  num_byzantine: int,
  *,
  multi: bool = False,
) -> jax.Array:
  """The values of the client whose neighbours are nearest, float32[N].

  The score of a client is the sum of its n - f - 2 smallest squared distances
  to others (one at least), in ascending order; equal scores go by id. `multi`:
  the mean by weight of the n - f best clients.
  """
  order = jnp.argsort(jnp.asarray(ids))
  values, weight = values[order], jnp.asarray(weight)[order]
  valid = _present(values, weight).all(1)
  rows = jnp.where(valid[:, None], values, 0.0)
  rows = jnp.clip(rows, -_LARGEST, _LARGEST)
  distance = jax.lax.map(
    lambda row: jax.vmap(exact_norm.exact_norm)(rows - row[None]), rows
  )
  distance = jnp.minimum(distance, 2.0**60)  # whose square is finite
  others = valid[None] & valid[:, None] & ~jnp.eye(len(order), dtype=bool)
  ordered = jnp.sort(jnp.where(others, distance, jnp.inf), axis=1)
  count = valid.sum(dtype=jnp.int32)
  near = jnp.clip(count - num_byzantine - 2, 1, jnp.maximum(count - 1, 1))
  place = jnp.arange(len(order))
  ordered = jnp.where(jnp.isfinite(ordered), ordered, 0.0)
  squares = grid.shrink(ordered, ordered)
  squares = jnp.where(place[None] < near, squares, 0.0)
  score = jnp.where(valid, _ordered_sum(squares.T), jnp.inf)
  best = jnp.argsort(score)  # stable
  chosen = jnp.maximum(count - num_byzantine, 1) if multi else 1
  taken = jnp.zeros(len(order), bool).at[best].set(place < chosen) & valid
  return mean(rows, jnp.where(taken, weight, 0.0), jnp.arange(len(order)))


def sign_vote(values: jax.Array, weight: jax.Array) -> jax.Array:
  """The sign that most clients have, float32[N] of -1, 0, 1."""
  signs = jnp.where(_present(values, weight), jnp.sign(values), 0.0)
  return jnp.sign(signs.astype(jnp.int32).sum(0)).astype(jnp.float32)


def clip_entries(values: jax.Array, bound: float) -> jax.Array:
  """Values with |value| at most `bound`; what is not finite stays so."""
  clipped = jnp.clip(values, -np.float32(bound), np.float32(bound))
  return jnp.where(jnp.isfinite(values), clipped, values)


def clip_norm(values: jax.Array, bound: float) -> jax.Array:
  """Rows whose norm, to 12 bits, is at most `bound`, by one product each."""
  finite = jnp.all(jnp.isfinite(values), axis=1)
  rows = jnp.where(finite[:, None], values, 0.0)
  rows = jnp.clip(rows, -_LARGEST, _LARGEST)
  norms = jax.vmap(exact_norm.exact_norm)(rows)
  factor = jax.vmap(_ratio, (None, 0))(np.float32(bound), norms)
  clipped = grid.shrink(rows, factor[:, None])
  inside = (norms <= bound)[:, None]
  return jnp.where(inside | ~finite[:, None], values, clipped)


def _ratio(small, large):
  """small / large to 12 bits, for small <= large, the same on every device."""
  (a, i), (b, j) = jnp.frexp(small), jnp.frexp(jnp.maximum(small, large))
  # mantissas of 12 bits: a in [2**11, 2**12), b in [2**12, 2**13)
  whole = lambda x, bits: jnp.floor(x * np.float32(2.0**bits))
  quotient = method_lib.quotients(
    whole(a, 12).astype(jnp.uint32), whole(b, 13).astype(jnp.uint32)
  )
  return quotient * grid.power_of_two(jnp.clip(i - j + 1, -120, 1))
