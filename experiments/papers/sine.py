"""A problem with known minima: sum_j sin(w_j)**2, with clients and noise.

Clients hold examples x, and the loss of one is sum_j sin(w_j - x_j)**2. The
objective is the sum at x = 0.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import keys
from jaxfl import method as method_lib
from jaxfl.runtime import simulate


class Problem(NamedTuple):
  """Sizes of the problem and its run."""

  shape: tuple[int, int] = (100, 100)
  num_clients: int = 8
  num_examples: int = 32  # of a client
  num_rounds: int = 30

  @property
  def size(self) -> int:
    return self.shape[0] * self.shape[1]


OFFSET, NOISE = 0.1, 0.1  # standard deviations of clients and of examples


class Data(NamedTuple):
  """Examples and start of a seed; arrays, which programs take as arguments."""

  root: jax.Array  # uint32[2], of the directions
  examples: jax.Array  # float32[clients, examples, R, C], zero on average
  start: jax.Array  # float32[R, C]

  def loss_fn(self, params, batch):
    """sum_j sin(w_j - x_j)**2 of one example, which a batch names."""
    x = self.examples[batch['client'], batch['example']]
    return jnp.sum(jnp.square(jnp.sin(params['w'] - x)))


def make(problem: Problem, seed: int) -> Data:
  """N(0, 1) at the start; examples are those of unlike clients."""
  rng = np.random.default_rng([seed, 1])
  clients, examples, shape = (
    problem.num_clients,
    problem.num_examples,
    problem.shape,
  )
  x = OFFSET * rng.normal(size=(clients, 1, *shape))
  x = x + NOISE * rng.normal(size=(clients, examples, *shape))
  x -= x.mean((0, 1), keepdims=True)
  start = rng.normal(size=shape).astype(np.float32)
  return Data(keys.root(seed), jnp.asarray(x, jnp.float32), jnp.asarray(start))


def batches(problem: Problem, seed: int, num_batches: int) -> simulate.BatchFn:
  """Minibatches of one example each, drawn evenly."""

  def batch(round, client):
    rng = np.random.default_rng([seed, 2, round, client])
    chosen = rng.integers(problem.num_examples, size=num_batches)
    return {
      'client': np.full(num_batches, client, np.int32),
      'example': chosen.astype(np.int32),
    }

  return batch


@jax.jit
def objective(params):
  return jnp.sum(jnp.square(jnp.sin(params['w'])))


def one_run(
  method: method_lib.Method,
  programs: simulate.Programs,
  data: Data,
  problem: Problem,
  seed: int,
) -> dict[str, Any]:
  """The curve; totals are per client, bytes in both directions."""
  state = method.init({'w': data.start})
  first = float(objective(state.params))
  curve = {'share': [1.0], 'bytes': [0.0], 'forwards': [0.0]}
  total_bytes = total_forwards = 0
  start = time.process_time()
  for done in simulate.simulate(
    method,
    state,
    batches(problem, seed, method.num_batches),
    simulate.Population(num_clients=problem.num_clients, seed=seed),
    num_rounds=problem.num_rounds,
    block_size=problem.num_clients,
    programs=programs,
  ):
    total_bytes += done.bytes_up + done.bytes_down
    total_forwards += done.forwards + 2 * done.backwards
    curve['share'].append(float(objective(done.state.params)) / first)
    curve['bytes'].append(total_bytes / problem.num_clients)
    curve['forwards'].append(total_forwards / problem.num_clients)
  return {'curve': curve, 'seconds': time.process_time() - start}
