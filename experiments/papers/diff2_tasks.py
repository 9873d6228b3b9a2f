"""What DIFF2 and DP-GD are compared on: tables, and a stiff problem.

Tables are split evenly over clients and train one hidden layer of ten softplus
units with squared loss, as in the experiments of DIFF2; with cross-entropy if
their target is a class.

The other problem is made for its theory. Example b in R^d and weights x have

    loss(x, b) = sum_j k_j log(1 + (x_j - b_j)^2 / 2)

so that the gradient of an example has entries of at most k_j / sqrt(2), however
far it lies, and the curvature of an example is at most max k, of the order of
that of the mean. DIFF2 wins where three things meet: the bound of an example,
which DP-GD pays for in every round, is much larger than the mean gradient; the
bound of differences is close to the curvature of the mean; and the run is long.
`stiff` has k = 1 in nine directions of ten, and 0.01 in the others: those need
many rounds, while all the others are at the level of the noise. `isotropic` has
k = 1 in all of them: a short run does, with little noise, and differences have
nothing to save.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import typing as jt
from jaxfl.data import tables
from jaxfl.models import mlp

HIDDEN_UNITS = 10
SLOW = 0.01  # k of the slow directions
CENTRE = 3.0  # distance of the centre from the start, in every direction


class Task(NamedTuple):
  """Data of clients, and a loss.

  Attributes:
    name: for titles.
    clients: batches of every client, as `diff2` takes them: all its examples
      and `example_weight`, with a leading axis of one, of equal lengths.
    sizes: examples of every client.
    train: all examples of the clients, without padding.
    test: held-out examples, or None.
    loss_fn: params, batch -> float[], a mean over the examples.
    init: seed -> params.
    floor: what a loss is shown above of.
    clip_norm: the largest norm of an example's gradient, if there is one.
    clip_norm_diff: the largest curvature of an example, likewise.
  """

  name: str
  clients: list[jt.Batch]
  sizes: tuple[int, ...]
  train: jt.Batch
  test: jt.Batch | None
  loss_fn: jt.LossFn
  init: Callable[[int], jt.Params]
  floor: float = 0.0
  clip_norm: float | None = None
  clip_norm_diff: float | None = None

  @property
  def num_params(self) -> int:
    leaves = jax.tree.leaves(jax.eval_shape(lambda: self.init(0)))
    return sum(x.size for x in leaves)

  @property
  def num_examples(self) -> int:
    """Clients times the size of the smallest: what noise is divided by."""
    return len(self.sizes) * min(self.sizes)


def deal(
  examples: dict[str, np.ndarray], num_clients: int
) -> tuple[list[jt.Batch], tuple[int, ...]]:
  """Splits examples evenly over clients, at random but always alike.

  Returns:
    `Task.clients`, on the device, and `Task.sizes`.
  """
  (count,) = {len(x) for x in examples.values()}
  order = np.random.default_rng(0).permutation(count)
  parts = np.array_split(order, num_clients)
  longest = max(map(len, parts))
  clients = []
  for rows in parts:
    filled = np.resize(rows, longest)
    batch = {name: x[filled][None] for name, x in examples.items()}
    real = np.arange(longest) < len(rows)
    batch['example_weight'] = real.astype(np.float32)[None]
    clients.append(jax.device_put(batch))
  return clients, tuple(map(len, parts))


def _squared_loss(params, batch):
  predicted = mlp.outputs(params, batch['features'])[:, 0]
  return jnp.mean(jnp.square(predicted - batch['targets']))


def _cross_entropy(params, batch):
  scores = jax.nn.log_softmax(mlp.outputs(params, batch['features']))
  own = jnp.take_along_axis(scores, batch['targets'][:, None], axis=1)
  return -jnp.mean(own)


def of_table(name: str, table: tables.Table, num_clients: int = 10) -> Task:
  """A table with a target that is a number or a class.

  Raises:
    ValueError: if it has fewer rows than clients.
  """
  num_classes = len(table.label_names)
  rows, features = table.x_train.shape
  if rows < num_clients:
    raise ValueError(f'{name} has {rows} rows for {num_clients} clients')
  part = lambda x, y: {
    'features': np.asarray(x, np.float32),
    'targets': np.asarray(y, np.int32 if num_classes else np.float32),
  }
  train = part(table.x_train, table.y_train)
  clients, sizes = deal(train, num_clients)
  return Task(
    name=name,
    clients=clients,
    sizes=sizes,
    train=jax.device_put(train),
    test=jax.device_put(part(table.x_test, table.y_test)),
    loss_fn=_cross_entropy if num_classes else _squared_loss,
    init=lambda seed: mlp.init(
      jax.random.key(seed), features, HIDDEN_UNITS, num_classes or 1
    ),
  )


def of_location(
  *,
  stiff: bool,
  dimensions: int = 50,
  num_examples: int = 20_000,
  num_clients: int = 10,
) -> Task:
  """The problem of the module's docstring; `Task.floor` is its minimum."""
  rng = np.random.default_rng(1)
  k = np.ones(dimensions)
  if stiff:
    k[-(dimensions // 10) :] = SLOW
  centre = CENTRE * rng.choice([-1.0, 1.0], dimensions)
  b = centre + rng.standard_t(2, (num_examples, dimensions))
  train = {'b': b.astype(np.float32)}
  clients, sizes = deal(train, num_clients)
  loss_fn = location_loss(k)
  return Task(
    name='stiff' if stiff else 'isotropic',
    clients=clients,
    sizes=sizes,
    train=jax.device_put(train),
    test=None,
    loss_fn=loss_fn,
    init=lambda seed: {'x': np.zeros(dimensions, np.float32)},
    floor=_minimum(loss_fn, k, train),
    clip_norm=float(np.sqrt(np.sum(k**2) / 2)),
    clip_norm_diff=float(k.max()),
  )


def location_loss(k: np.ndarray) -> jt.LossFn:
  """Mean over a batch of sum_j k_j log(1 + (x_j - b_j)^2 / 2)."""
  weights = np.asarray(k, np.float32)[None, :]

  def loss_fn(params: Any, batch: jt.Batch) -> jax.Array:
    far = params['x'][None, :] - batch['b']
    losses = jnp.sum(weights * jnp.log1p(jnp.square(far) / 2), axis=1)
    return jnp.mean(losses)

  return loss_fn


def _minimum(loss_fn: jt.LossFn, k: np.ndarray, train: jt.Batch) -> float:
  """The smallest loss: gradient descent, each direction at its own rate."""
  train = jax.device_put(train)

  @jax.jit
  def descend(x):
    step = lambda _, x: (
      x - jax.grad(loss_fn)({'x': x}, train)['x'] / jnp.asarray(k, jnp.float32)
    )
    return jax.lax.fori_loop(0, 200, step, x)

  x = descend(jnp.zeros(len(k), jnp.float32))
  return float(jax.jit(loss_fn)({'x': x}, train))
