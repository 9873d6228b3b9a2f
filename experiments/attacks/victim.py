"""A client that is attacked: a small network, a batch, shared directions.

What many wire formats are made of is computed once for a victim: `DIRECTIONS`
shared directions and the projected gradients along them. A message of K scalars
is the first K, as a method with `num_perturbations=K` sends them; so is a
message of one scalar in each of K rounds in which the weights do not change.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attacks.images import NUM_LABELS
from jaxfl import keys, method, objectives, perturb
from jaxfl import typing as jt
from jaxfl.methods import spsa
from jaxfl.models import mlp

DIRECTIONS = 1024  # more than the network has parameters
HIDDEN = 12
MU = 1e-3  # radius of finite differences

loss_fn = objectives.classification_loss(
  lambda params, batch: mlp.outputs(params, batch['features'])
)


Build = Callable[[jax.Array], method.Method]


class Victim(NamedTuple):
  """One client with one batch, and what is computed of it.

  Attributes:
    params: of `mlp`, d numbers.
    x: float32[B, D].
    labels: int32[B].
    root: uint32[2], the run's shared key.
    trial: number of the victim, and of the round; private noise is of it, too.
    directions: uint32[DIRECTIONS, 2], those of `spsa` and `ferret`.
    rows: float32[DIRECTIONS, d], the directions themselves.
    scalars: float32[DIRECTIONS], projected gradients of the batch.
    scalars_of_examples: float32[B, DIRECTIONS], of every example.
  """

  params: jt.Params
  x: Any
  labels: Any
  root: Any = np.zeros(2, np.uint32)
  trial: int = 0
  directions: Any = None
  rows: Any = None
  scalars: Any = None
  scalars_of_examples: Any = None


def flat(tree: jt.Params) -> jax.Array:
  """All entries of a pytree as one vector, leaves in their order."""
  return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def gradient(params: jt.Params, x: jt.Array, labels: jt.Array) -> jax.Array:
  """The gradient of the mean loss, float32[d]."""
  return flat(jax.grad(loss_fn)(params, {'features': x, 'label': labels}))


def gradients(params: jt.Params, x: jt.Array, labels: jt.Array) -> jax.Array:
  """Those of single examples, float32[B, d]."""
  one = lambda x, label: gradient(params, x[None], label[None])
  return jax.vmap(one)(x, labels)


@functools.partial(jax.jit, static_argnames='build')
def _message(build, state, x, labels, root, trial):
  made = build(root)
  repeat = lambda x: jnp.broadcast_to(x, (made.num_batches, *x.shape))
  batches = jax.tree.map(repeat, {'features': x, 'label': labels})
  party = method.Party(jnp.int32(0), jnp.int32(trial), jnp.float32(1.0))
  return made.client(state, (), batches, party)[0]


def message(build: Build, victim: Victim) -> jt.Message:
  """What a method's client sends; all its minibatches are the batch.

  Args:
    build: root uint32[2] -> method; equal functions share a program.
    victim: its batch may be traced.
  """
  params, *rest = victim[:5]
  return _message(build, build(victim.root).init(params), *rest)


def spsa_of(root: jax.Array) -> method.Method:
  """The method of the scalars."""
  return spsa.spsa(
    loss_fn,
    root,
    learning_rate=1.0,
    mu=MU,
    num_perturbations=DIRECTIONS,
    codec='float32',
    weights='float32',
  )


@jax.jit
def _rows(params, directions):
  def row(direction):
    return flat(
      [
        perturb.field(direction, path, leaf.shape)
        for path, leaf in keys.named_leaves(params)
      ]
    )

  return jax.lax.map(row, directions)


def make(x: np.ndarray, labels: np.ndarray, trial: int) -> Victim:
  """A victim with fresh weights and directions; all are functions of `trial`.

  Args:
    x: float32[B, D].
    labels: int32[B].
    trial: >= 0.
  """
  params = mlp.init(jax.random.key(trial), x.shape[1], HIDDEN, NUM_LABELS)
  victim = Victim(params, x, labels, keys.root(trial), trial)
  base = keys.fold(victim.root, 0, trial)
  directions = keys.fold(base[None], jnp.arange(DIRECTIONS))
  each = [
    message(spsa_of, victim._replace(x=one[None], labels=label[None]))
    for one, label in zip(x, labels, strict=True)
  ]
  return victim._replace(
    directions=directions,
    rows=_rows(params, directions),
    scalars=message(spsa_of, victim) if len(x) > 1 else each[0],
    scalars_of_examples=jnp.stack(each),
  )
