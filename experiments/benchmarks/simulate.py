"""The suite `simulate`: clients a second, on a task so small that speed is
that of the simulator.

Clients have a network of 2,410 parameters and four batches of 16: FedAvg takes
four steps on them, SPSA measures four directions. `simulate` runs blocks of
clients under `vmap`, and encodes, counts and decodes every message. The floor
is one program for all clients at once, and the server's, called without any of
that. Competitors: a plain Python loop over a jitted client, without messages in
bytes, and FedJAX, whose clients run one by one, in an environment of its own
(`pip install fedjax`), right after the others and on the same core.
"""

import functools
import json
import pathlib
import statistics
import subprocess
from typing import Any

import jax
import numpy as np
import optax

from experiments.benchmarks import timing, tiny
from jaxfl import keys
from jaxfl import method as method_lib
from jaxfl.methods import fed_avg, spsa
from jaxfl.runtime import simulate

ROUNDS = 5  # in one call
_ROOT = pathlib.Path(__file__).parents[2]


def methods() -> dict[str, method_lib.Method]:
  """The two workloads, by their names in `fedjax_side`."""
  return {
    'fed_avg': fed_avg.fed_avg(
      tiny.loss_fn,
      client_optimizer=optax.sgd(tiny.RATE),
      local_steps=tiny.STEPS,
    ),
    'spsa': spsa.spsa(
      tiny.loss_fn,
      keys.root(0),
      learning_rate=tiny.RATE,
      mu=tiny.MU,
      num_perturbations=tiny.STEPS,
    ),
  }


def _batches(client: int) -> dict[str, np.ndarray]:
  split = lambda x: x.reshape(tiny.STEPS, tiny.BATCH, *x.shape[1:])
  return {name: split(x) for name, x in tiny.data(client).items()}


def _cohort(clients: int) -> method_lib.Party:
  return method_lib.Party(
    np.arange(clients, dtype=np.int32),
    np.zeros(clients, np.int32),
    np.ones(clients, np.float32),
  )


def operations(
  name: str, method: method_lib.Method, clients: int
) -> list[timing.Operation]:
  """What there is to time for a method.

  Args:
    name: of the method.
    method: the method.
    clients: of a round; all that there are.
  """
  data = [_batches(i) for i in range(clients)]
  stacked = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *data))
  start = method.init(tiny.params())
  programs = simulate.compile_method(method)
  one, server = jax.jit(method.client), jax.jit(method.server)
  everyone = _cohort(clients)

  def ours(block_size):
    rounds = simulate.simulate(
      method,
      start,
      lambda round, client: data[client],
      simulate.Population(num_clients=clients),
      num_rounds=ROUNDS,
      block_size=block_size,
      programs=programs,
    )
    for done in rounds:
      jax.block_until_ready(done.state)

  def plain():
    state = start
    for _ in range(ROUNDS):
      messages = []
      for i in range(clients):
        party = jax.tree.map(lambda x, i=i: x[i], everyone)
        messages.append(one(state, (), data[i], party)[0])
      messages = jax.tree.map(lambda *x: np.stack(x), *messages)
      state = server(state, messages, everyone)
    jax.block_until_ready(state)

  def bare():
    state = start
    for _ in range(ROUNDS):
      messages = programs.client(state, (), stacked, everyone)[0]
      state = server(state, messages, everyone)
    jax.block_until_ready(state)

  def floor(seconds):
    return statistics.median(seconds[name, 'one program']), 'one program'

  make = functools.partial(
    timing.Operation, on=name, work=clients * ROUNDS, unit='clients/s'
  )
  return [
    make(name='one program', run=bare, shown=False),
    make(name='plain loop', run=plain, shown=False),
    *(
      make(
        name=f'simulate, blocks of {size}',
        run=functools.partial(ours, size),
        floor=floor,
        rivals=('plain loop',),
      )
      for size in sorted({1, min(8, clients), clients})
    ),
  ]


def _side(python: str, clients: int, repeats: int) -> dict[str, Any]:
  """What `fedjax_side` prints, run by another Python.

  Raises:
    RuntimeError: if it fails, with what it said.
  """
  args = [str(x) for x in (clients, ROUNDS, repeats)]
  done = subprocess.run(
    [python, '-m', 'experiments.benchmarks.fedjax_side', *args],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f'fedjax_python={python} failed:\n{done.stderr}')
  return json.loads(done.stdout.splitlines()[-1])


def measure(
  clients: int,
  fedjax_python: str | None,
  repeats: int,
  predictions: dict[str, float],
) -> dict[str, Any]:
  """Rows of the suite.

  Args:
    clients: of a round.
    fedjax_python: a python that has FedJAX, or None: it is not measured.
    repeats: of every operation.
    predictions: see `timing.rows`.
  """
  todo = []
  for name, method in methods().items():
    todo += operations(name, method, clients)
  rows = timing.rows(todo, repeats, {}, predictions)
  notes = ['FedJAX was not measured: no --fedjax_python']
  if fedjax_python:
    side = _side(fedjax_python, clients, repeats)
    for row in rows:
      seconds = statistics.median(side['seconds'][row['on']])
      theirs = clients * ROUNDS / seconds
      row['rivals']['FedJAX'] = {'rate': theirs, 'ours': row['rate'] / theirs}
    versions = side['versions']
    notes = [f'FedJAX {versions["fedjax"]} with jax {versions["jax"]}']
  return {
    'unit': 'clients/s',
    'clients': clients,
    'rounds': ROUNDS,
    'rows': rows,
    'notes': notes,
  }
