"""FedJAX on the small task, run by a python that has it; prints JSON.

    VENV/bin/python -m experiments.benchmarks.fedjax_side CLIENTS ROUNDS REPEATS

`fed_avg` is FedJAX's own; SPSA is written with its `for_each_client`: a client
sends the projected gradients of its steps, and the server applies them.
"""

import importlib.metadata
import json
import sys
import time

import fedjax  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
from fedjax.algorithms import fed_avg  # pyright: ignore[reportMissingImports]

from experiments.benchmarks import tiny

# FedJAX 0.0.17 of 2023 uses a name that JAX has removed
if not hasattr(jax, 'tree_map'):
  jax.tree_map = jax.tree_util.tree_map  # pyright: ignore[reportAttributeAccessIssue]


def run_fed_avg(clients):
  """A function of the number of rounds."""
  grad = jax.grad(tiny.loss_fn)
  algorithm = fed_avg.federated_averaging(
    lambda params, batch, rng: grad(params, batch),
    fedjax.optimizers.sgd(tiny.RATE),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(
      batch_size=tiny.BATCH, num_steps=tiny.STEPS, num_epochs=None
    ),
  )

  def run(rounds):
    state = algorithm.init(jax.tree_util.tree_map(jnp.asarray, tiny.params()))
    for _ in range(rounds):
      state, _ = algorithm.apply(state, clients)
    jax.block_until_ready(state.params)

  return run


def run_spsa(clients):
  """The same, a client's direction for each step."""

  def draw(params, rng):
    leaves, tree = jax.tree_util.tree_flatten(params)
    keys = jax.random.split(rng, len(leaves))
    return tree.unflatten(
      [
        jax.random.rademacher(key, leaf.shape, jnp.float32)
        for key, leaf in zip(keys, leaves)  # noqa: B905
      ]
    )

  def moved(params, z, scale):
    return jax.tree_util.tree_map(lambda w, z: w + scale * z, params, z)

  def client_step(state, batch):
    rng, use = jax.random.split(state['rng'])
    z = draw(state['params'], use)
    plus, minus = (
      tiny.loss_fn(moved(state['params'], z, mu), batch)
      for mu in (tiny.MU, -tiny.MU)
    )
    gradient = (plus - minus) / (2 * tiny.MU)
    return {**state, 'rng': rng}, gradient

  for_each = fedjax.for_each_client(
    lambda params, rng: {'params': params, 'rng': rng},
    client_step,
    lambda params, state: (),
    with_step_result=True,
  )

  @jax.jit
  def server(params, rng, gradients):
    def body(i, carry):
      params, rng = carry
      rng, use = jax.random.split(rng)
      scale = -tiny.RATE * gradients[i] / (len(clients) * tiny.STEPS)
      return moved(params, draw(params, use), scale), rng

    return jax.lax.fori_loop(0, tiny.STEPS, body, (params, rng))[0]

  hparams = fedjax.ShuffleRepeatBatchHParams(
    batch_size=tiny.BATCH, num_steps=tiny.STEPS, num_epochs=None
  )

  def run(rounds):
    params = jax.tree_util.tree_map(jnp.asarray, tiny.params())
    rngs = {client: rng for client, _, rng in clients}
    for _ in range(rounds):
      batches = [
        (client, dataset.shuffle_repeat_batch(hparams), rng)
        for client, dataset, rng in clients
      ]
      sent = list(for_each(params, batches))
      for client, _, gradients in sent:
        params = server(params, rngs[client], jnp.stack(gradients))
    jax.block_until_ready(params)

  return run


def main(num_clients: int, rounds: int, repeats: int) -> None:
  clients = [
    (i, fedjax.ClientDataset(tiny.data(i)), jax.random.PRNGKey(i))
    for i in range(num_clients)
  ]
  seconds = {}
  runs = {'fed_avg': run_fed_avg(clients), 'spsa': run_spsa(clients)}
  for run in runs.values():
    run(1)  # compiles
  for _ in range(repeats):
    for name, run in runs.items():
      start = time.perf_counter()
      run(rounds)
      seconds.setdefault(name, []).append(time.perf_counter() - start)
  versions = {
    name: importlib.metadata.version(name) for name in ('fedjax', 'jax')
  }
  print(json.dumps({'seconds': seconds, 'versions': versions}))


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
