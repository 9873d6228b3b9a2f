"""A linear problem, its clients, and runs of private methods on it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfl import method as method_lib
from jaxfl import noise
from jaxfl.runtime import simulate

DIM = 5
ENTROPY = bytes(range(32))


def loss_fn(params, batch):
  return jnp.mean((batch['x'] @ params['w'] - batch['y']) ** 2)


def params():
  return {'w': np.zeros(DIM, np.float32)}


def data(sizes: Sequence[int]) -> list[dict[str, np.ndarray]]:
  """All examples of every client, filled up to one length."""
  rng = np.random.default_rng(0)
  clients = []
  for n in sizes:
    x = rng.normal(size=(max(sizes), DIM)).astype(np.float32)
    weight = (np.arange(max(sizes)) < n).astype(np.float32)
    clients.append({'x': x, 'y': x.sum(1) / 2, 'example_weight': weight})
  return clients


def whole(sizes: Sequence[int]) -> dict[str, np.ndarray]:
  """The examples of all clients."""
  pairs = list(zip(data(sizes), sizes, strict=True))
  return {k: np.concatenate([c[k][:n] for c, n in pairs]) for k in ('x', 'y')}


def key():
  return noise.NoiseKey(ENTROPY, run='test')


def party(count: int, round: int = 0) -> method_lib.Party:
  """The cohort of all clients."""
  return method_lib.Party(
    np.arange(count, dtype=np.int32),
    np.full(count, round, np.int32),
    np.ones(count, np.float32),
  )


def run(
  method: method_lib.Method,
  sizes: Sequence[int],
  *,
  num_rounds: int,
  block_size: int = 2,
) -> list[Any]:
  """The rounds of all clients, with noise that can be drawn again."""
  clients, own = data(sizes), key()
  assert method.prepare is not None
  prepare = method.prepare
  return list(
    simulate.simulate(
      method,
      method.init(params()),
      lambda round, i: prepare(params(), clients[i], round, i, own),
      simulate.Population(num_clients=len(sizes)),
      num_rounds=num_rounds,
      block_size=block_size,
      noise=own,
    )
  )
