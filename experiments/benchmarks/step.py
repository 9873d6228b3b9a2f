"""The suite `step`: a step of SPSA beside the forward passes that it needs.

For every model and number of tokens: `forward` is the jitted loss; `spsa
client` is a two-sided estimate, sent as a byte; `spsa step` is that and
applying the byte. The floor of both is two forward passes. `spsa server`
applies the bytes of eight clients, in 1e9 entries times directions a second.
`sgd step` is gradient and update. `tokenise` and `take` encode lines of text,
and make batches of encoded examples: in tokens a second, to be compared with a
step's.

Memory is what a compiled program holds, and, in peaks, what a fresh process
gains, both over a forward pass: inference.
"""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import (
  floors,
  kernels,
  machine,
  memory,
  models,
  tensors,
  text,
  timing,
  torch_models,
)
from jaxfl import keys, lazy
from jaxfl import method as method_lib
from jaxfl.methods import fed_avg, spsa
from jaxfl.runtime import simulate

CLIENTS = 8
PEAK = 1.02  # of a step over inference, the master weights in both
_LIMITS = {  # of a step over two forward passes, by tokens
  f'spsa step on {name}, {tokens} tokens': ('of_floor', 1 / limit)
  for name in ('minilm', 'opt-1.3b')
  for tokens, limit in ((4096, 1.15), (8192, 1.05), (16384, 1.05))
}
TARGETS: dict[str, dict[str, timing.Target]] = {
  'cpu': _LIMITS,
  'gpu': _LIMITS,
}


class Step:
  """A model's compiled programs, and what they run on."""

  def __init__(self, name: str, tokens: int):
    self.model = models.model(name)
    self.batch = self.model.batch(tokens)
    self.method = spsa.spsa(
      self.model.loss_fn,
      keys.root(0),
      learning_rate=1e-4,
      mu=1e-3,
      forward_dtype=self.model.dtype,
      in_layers='temporary',
    )
    self.batches = jax.tree.map(lambda x: x[None], self.batch)
    self.party = method_lib.Party(np.int32(0), np.int32(0), np.float32(1))
    self.like = jax.eval_shape(lambda: models.params(name))

  def cohort(self, clients: int) -> method_lib.Party:
    return method_lib.Party(
      np.arange(clients, dtype=np.int32),
      np.zeros(clients, np.int32),
      np.ones(clients, np.float32),
    )

  def forward(self):
    inference = jax.eval_shape(
      lambda p: lazy.cast(p, self.model.dtype), self.like
    )
    return jax.jit(self.model.loss_fn).lower(inference, self.batch).compile()

  def client(self, state):
    args = state, (), self.batches, self.party
    return jax.jit(self.method.client).lower(*args).compile()

  def server(self, state, clients: int):
    message = self.method.message(state.params)
    messages = np.zeros((clients, *message.shape), message.dtype)
    args = state, messages, self.cohort(clients)
    jitted = simulate.jit_server(self.method.server, donate=True)
    return jitted.lower(*args).compile()


def operations(name: str, tokens: list[int]) -> list[timing.Operation]:
  """What there is to time for a model.

  Args:
    name: of the model.
    tokens: of batches, at least; the first is that of `sgd step`.
  """
  wait = jax.block_until_ready
  steps = {count: Step(name, count) for count in tokens}
  step = steps[tokens[0]]
  state = step.method.init(models.params(name))
  inference = lazy.cast(state.params, step.model.dtype)
  server = step.server(state, 1)
  held = [_copy(state)]  # the servers take it and leave the next
  found = _once(name, step, state, held)
  for count, step in steps.items():
    forward, client = step.forward(), step.client(state)
    on = f'{name}, {count} tokens'
    size = floors.memory(forward, 1) or 0

    def whole(step=step, client=client):
      message = client(held[0], (), step.batches, step.party)[0]
      held[0] = wait(server(held[0], message[None], step.cohort(1)))

    def two_forwards(seconds, on=on):
      return 2 * statistics.median(seconds[on, 'forward']), 'two forwards'

    make = functools.partial(
      timing.Operation,
      on=on,
      work=step.batch['tokens'].size,
      unit='tokens/s',
    )
    each = [floors.memory(program, size) for program in (client, server)]
    found += [
      make(
        name='forward',
        run=lambda f=forward, step=step: wait(f(inference, step.batch)),
        rivals=('forward, torch',),
      ),
      make(
        name='spsa client',
        run=lambda c=client, step=step: wait(
          c(state, (), step.batches, step.party)
        ),
        floor=two_forwards,
        memory=each[0],
      ),
      make(
        name='spsa step',
        run=whole,
        floor=two_forwards,
        memory=max((m for m in each if m), default=None),
        rivals=('MeZO step, torch',),
      ),
      *torch_models.operations(name, step.batch, on),
    ]
  return found


def _copy(tree):
  return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def _once(name, step, state, held):
  """What is measured at one number of tokens, or has none."""
  wait = jax.block_until_ready
  sgd = fed_avg.fed_avg(step.model.loss_fn, client_optimizer=optax.sgd(1e-3))
  first_order = jax.jit(sgd.client)
  other = sgd.init(state.params)
  shapes = {path: w.shape for path, w in keys.named_leaves(state.params)}
  entries = tensors.entries(shapes)
  server = step.server(state, CLIENTS)
  message = step.method.message(state.params)
  messages = np.ones((CLIENTS, *message.shape), message.dtype)

  def serve():
    held[0] = wait(server(held[0], messages, step.cohort(CLIENTS)))

  return [
    *kernels.operations(name, shapes, ('w + c', 'perturb rademacher')),
    timing.Operation(
      name=f'spsa server, {CLIENTS} clients',
      on=name,
      run=serve,
      work=entries * CLIENTS / 1e9,
      unit='G/s',
      floor=floors.floor(floors.Cost(entries, 2, CLIENTS), name),
      memory=floors.memory(server, 4 * entries),
    ),
    timing.Operation(
      name='sgd step',
      on=f'{name}, {step.batch["tokens"].size} tokens',
      run=lambda: wait(first_order(other, (), step.batches, step.party)),
      work=step.batch['tokens'].size,
      unit='tokens/s',
    ),
  ]


def _prepared(name: str, tokens: int, whole: bool) -> memory.Prepared:
  """A forward pass or a step in a process of its own."""
  step = Step(name, tokens)
  state = jax.tree.map(np.array, step.method.init(models.params(name)))
  _copy(state)  # compiles
  wait = jax.block_until_ready
  if not whole:
    forward = step.forward()
    make = lambda: _copy(state.params)
    return make, lambda params: wait(forward(params, step.batch))
  client, server = step.client(state), step.server(state, 1)

  def run(state):
    message = client(state, (), step.batches, step.party)[0]
    return wait(server(state, message[None], step.cohort(1)))

  return lambda: _copy(state), run


def _peak(name: str, tokens: int) -> dict[str, Any]:
  """Peak memory of a step over that of a forward pass; medians of three."""
  inference, step = [], []
  for _ in range(3):
    for whole, found in ((False, inference), (True, step)):
      prepare = functools.partial(_prepared, name, tokens, whole)
      found.append(memory.peak(prepare))
  over = None
  if None not in inference + step:
    over = statistics.median(step) / statistics.median(inference)
  return {
    'operation': 'spsa step',
    'on': f'{name}, {tokens} tokens',
    'inference_bytes': inference,
    'step_bytes': step,
    'process': over,
    'target': PEAK,
  }


def measure(
  tokens: list[int], repeats: int, predictions: dict[str, float]
) -> dict[str, Any]:
  """Rows of the suite, and the peak memory of a step.

  Args:
    tokens: numbers of tokens; if empty, those for this kind of device.
    repeats: of every operation.
    predictions: see `timing.rows`.
  """
  cpu = machine.on_cpu()
  names = ('embedded', 'minilm') if cpu else ('embedded', 'opt-1.3b')
  tokens = tokens or ([256, 1024, 4096] if cpu else [1024, 4096, 8192, 16384])
  todo = floors.operations() + text.operations()
  for name in names:
    todo += operations(name, tokens)
  rows = timing.rows(todo, repeats, TARGETS, predictions)
  peaks = [_peak(name, tokens[-1]) for name in names] if cpu else []
  return {
    'unit': 'tokens/s (perturb and server: 1e9 entries times directions)',
    'memory': 'over a forward pass: what the compiled program holds; in peaks,'
    ' what a fresh process gains',
    'rows': rows,
    'peaks': peaks,
  }
