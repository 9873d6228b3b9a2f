"""Differences that clients would send, cut into blocks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import defaults, problem
from experiments.config import Config
from jaxfl import blocks, keys
from jaxfl import method as method_lib
from jaxfl.methods import fed_avg

CUT = 1 << 14
LOCAL_STEPS, CLIENT_LR, BATCH = 8, 0.3, 2
WHOLE = 1 << 30  # max_size of blocks that are never cut


def llama_like(layers=4, dim=64, mlp=172, vocab=1000) -> dict:
  """Shapes of a decoder with gated feed-forward layers; a scaled LLaMA."""
  shapes = {'embed': (vocab, dim), 'head': (dim, vocab), 'norm': (dim,)}
  for i in range(layers):
    shapes |= {f'{i}/{name}': (dim, dim) for name in 'qkvo'}
    shapes |= {f'{i}/{name}': (dim, mlp) for name in ('gate', 'up')}
    shapes |= {f'{i}/down': (mlp, dim)}
    shapes |= {f'{i}/norm{j}': (dim,) for j in (1, 2)}
  return shapes


def normal_delta(shapes: dict, seed: int) -> dict[str, jax.Array]:
  """Independent entries of equal scale."""
  rng = np.random.default_rng([seed, 3])
  return {
    path: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for path, shape in shapes.items()
  }


class Clients:
  """Clients of FedAvg on the embedded model and Python source."""

  def __init__(self):
    self._config = defaults.resolve(Config(dataset='python_text'))
    self._problem = problem.build(self._config)
    method = fed_avg.fed_avg(
      functools.partial(self._problem.loss_fn, self._problem.frozen),
      client_optimizer=optax.sgd(CLIENT_LR),
      local_steps=LOCAL_STEPS,
    )
    self._state = method.init(self._problem.params)
    self._client = jax.jit(method.client)

  def delta(self, client: int) -> dict[str, jax.Array]:
    """What a client sends in the first round, by path."""
    one = self._problem.task.batches(0, client, 0, LOCAL_STEPS, BATCH)
    party = method_lib.Party(np.int32(client), np.int32(0), np.float32(1))
    delta = self._client(self._state, (), one, party)[0]
    return dict(keys.named_leaves(delta))


class Case(NamedTuple):
  """A difference, cut into blocks."""

  name: str
  parts: list[jax.Array]  # matrices, one per block

  @property
  def sizes(self) -> np.ndarray:
    return np.array([part.size for part in self.parts])

  def norms(self) -> np.ndarray:
    """float32[L] of 8 significant bits, as they are sent."""
    found = jnp.stack([jnp.linalg.norm(part) for part in self.parts])
    return np.asarray(found.astype(jnp.bfloat16).astype(jnp.float32))


def cut(name: str, delta: dict[str, jax.Array], max_size: int) -> Case:
  """The blocks of a difference."""
  parts = []
  for block in blocks.partition(delta, max_size=max_size):
    (r, c), (h, w) = block.offset, block.shape
    x = delta[block.path]
    x = x.reshape(-1, x.shape[-1] if x.ndim else 1)
    parts.append(x[r : r + h, c : c + w])
  return Case(name, parts)


def cases(seed: int, clients: Clients | None) -> list[Case]:
  """The differences of a seed."""
  found = {'LLaMA-like': normal_delta(llama_like(), seed)}
  if clients is not None:
    found['FedAvg client'] = clients.delta(seed % 8)
  return [
    cut(f'{name}, {kind}', delta, size)
    for name, delta in found.items()
    for kind, size in (('whole tensors', WHOLE), ('cut', CUT))
  ]
