"""Runs of DIFF2 and DP-GD on one task, compiled once for many settings.

Rounds are those of `runtime.simulate` with one client at a time, without frames
and log: the same programs on the same batches, which stay on the device. Noise
is of a seed, so that figures of public data can be made again; a private run
takes it from the operating system.
"""

import functools
import hashlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers.diff2_tasks import Task
from jaxfl import calibration, gdp, noise
from jaxfl import method as method_lib
from jaxfl import plan as plan_lib
from jaxfl import typing as jt
from jaxfl.methods import diff2 as diff2_method

DELTA = 1e-5
MICROBATCH = 64
LOCAL_BATCH = 64  # mean size of a sample of local steps
MEASURES = ('loss', 'gradient', 'test')


class Setting(NamedTuple):
  """What is tuned; from `clip_norm_diff` on, DIFF2's own."""

  num_rounds: int
  learning_rate: float
  clip_norm: float
  clip_norm_diff: float = 1.0
  restart_interval: int = 1
  budget_share: float = 0.5
  local_steps: int = 1

  def text(self) -> str:
    """For tables."""
    shown = f'R {self.num_rounds}, lr {self.learning_rate:g}'
    shown += f', C1 {self.clip_norm:.3g}'
    if self.restart_interval == 1:
      return shown
    shown += f', C2 {self.clip_norm_diff:g}, T {self.restart_interval}'
    shown += f', share {self.budget_share:g}'
    return shown if self.local_steps == 1 else f'{shown}, K {self.local_steps}'


class Programs:
  """Programs of one task, compiled once for all seeds and multipliers.

  A client's program depends on T alone, as clips reach it as state; with local
  steps, on all settings and on the noise of these steps.
  """

  def __init__(self, task: Task):
    self.task = task
    alone = lambda batch: jax.tree.map(lambda x: x[None], batch)
    self.blocks = [alone(batch) for batch in task.clients]
    # on the host, for the samples of local steps
    first = lambda batch: jax.tree.map(lambda x: np.asarray(x[0]), batch)
    self.examples = [first(batch) for batch in task.clients]
    self._clients: dict[Any, Any] = {}
    self._servers: dict[tuple, Any] = {}
    grads = jax.value_and_grad(task.loss_fn)

    @jax.jit
    def measure(params, train, test):
      loss, gradient = grads(params, train)
      squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(gradient)]
      held_out = loss if test is None else task.loss_fn(params, test)
      return loss, sum(squares), held_out

    self._measure = measure

  def of(self, setting: Setting, epsilon: float, method: method_lib.Method):
    """Compiled client, of a block of one, without its loss; and server."""
    local = setting.local_steps > 1
    key = (setting, epsilon) if local else setting.restart_interval
    if key not in self._clients:
      over = jax.vmap(method.client, (None, 0, 0, 0))
      self._clients[key] = jax.jit(lambda *args: over(*args)[0])
    server = (*setting[1:5], local)
    if server not in self._servers:
      self._servers[server] = jax.jit(method.server)
    return self._clients[key], self._servers[server]

  def measure(self, params) -> dict[str, float]:
    """Exact values of `MEASURES`; private."""
    values = self._measure(params, self.task.train, self.task.test)
    found = dict(zip(MEASURES, map(float, values), strict=True))
    if self.task.test is None:
      del found['test']
    return found | {'loss': found['loss'] - self.task.floor}


def plan_of(task: Task, setting: Setting, epsilon: float) -> plan_lib.Plan:
  """Multipliers of a setting, at the target."""
  return _plan(setting._replace(learning_rate=0.0), epsilon, task.sizes)


@functools.cache
def _plan(setting, epsilon, sizes):
  settings: dict[str, Any] = {
    'num_rounds': setting.num_rounds,
    'restart_interval': setting.restart_interval,
    'budget_share': setting.budget_share,
  }
  if setting.local_steps == 1:
    return calibration.diff2(epsilon, DELTA, **settings)
  return calibration.diff2_local(
    if_dropped(epsilon),
    DELTA,
    local_steps=setting.local_steps,
    num_clients=len(sizes),
    sampling_rate=LOCAL_BATCH / min(sizes),
    **settings,
  )


def if_dropped(epsilon: float) -> float:
  """Epsilon for a dropped example, of Gaussian noise for a replaced one.

  The guarantee of local steps is for examples that are dropped, which move a
  sum half as far. So that all methods have one guarantee in common, local
  steps get what the others give to a dropped example.
  """
  return gdp.epsilon_of(gdp.mu_of(epsilon, DELTA) / 2, DELTA)


def build(task: Task, setting: Setting, epsilon: float) -> method_lib.Method:
  """The method; DP-GD if all rounds restart."""
  return diff2_method.diff2(
    task.loss_fn,
    plan=plan_of(task, setting, epsilon),
    learning_rate=setting.learning_rate,
    clip_norm=setting.clip_norm,
    clip_norm_diff=setting.clip_norm_diff,
    num_examples=task.sizes,
    microbatch_size=MICROBATCH,
    research_float_noise=True,
  )


def stable(task: Task, setting: Setting, epsilon: float) -> bool:
  """Whether `diff2` would start; known before a run."""
  growth = plan_lib.noise_growth(
    plan_of(task, setting, epsilon),
    learning_rate=setting.learning_rate * setting.local_steps,
    clip_norm_diff=setting.clip_norm_diff,
    num_params=task.num_params,
    num_examples=task.num_examples,
  )
  return growth < 1


def noise_of(seed: int, text: str) -> noise.NoiseKey:
  """Noise that can be drawn again: of public data only."""
  entropy = hashlib.sha256(f'{seed} {text}'.encode()).digest()
  return noise.NoiseKey(entropy, run='figure')


class Round:
  """Rounds of a method, compiled."""

  def __init__(self, programs: Programs, setting: Setting, epsilon: float):
    self.method = build(programs.task, setting, epsilon)
    self._programs = programs
    self._ids = np.arange(len(programs.blocks), dtype=np.int32)
    self._client, self._server = programs.of(setting, epsilon, self.method)
    self._exchanges = plan_of(programs.task, setting, epsilon).exchanges

  def messages(self, state: Any) -> jt.Message:
    """Of all clients about all their examples, stacked, on the host."""
    blocks = zip(self._programs.blocks, self._ids, strict=True)
    return self._sent(state, [(block, i) for block, i in blocks])

  def all(self, state: Any, round: int, key: noise.NoiseKey) -> Any:
    """Clients, release and server: the next state."""
    state = self._apply(state, self.messages(state), self._ids, key)
    if self._exchanges == 1:
      return state
    exchange = self._exchanges * round + 1
    (turn,) = self.method.turn(exchange, self._ids)
    assert self.method.prepare is not None
    examples = self._programs.examples[turn]
    batch = self.method.prepare(state.params, examples, exchange, turn, key)
    block = jax.tree.map(lambda x: x[None], batch)
    sent = self._sent(state, [(block, turn)])
    return self._apply(state, sent, self._ids[turn : turn + 1], key)

  def _sent(self, state, blocks):
    sent = [self._client(state, (), x, _party([i])) for x, i in blocks]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *jax.device_get(sent))

  def _apply(self, state, messages, ids, key):
    assert self.method.release is not None
    released = self.method.release.make(state, messages, _party(ids), key)
    released = jax.tree.map(lambda x: np.asarray(x)[None], released)
    return self._server(state, released, _party([0]))


def _party(ids) -> method_lib.Party:
  ids = np.asarray(ids, np.int32)
  weights = np.ones(len(ids), np.float32)
  return method_lib.Party(ids, np.zeros(len(ids), np.int32), weights)


def one_run(
  programs: Programs,
  setting: Setting,
  epsilon: float,
  seed: int,
  num_points: int = 12,
) -> dict[str, Any]:
  """Trains.

  Returns:
    Lists `round` and `MEASURES` at `num_points` rounds and the start, seconds
    of CPU in all, whether it failed, and the state at the end. A run fails, and
    ends, where its loss is not finite or above ten times that at the start, or
    its weights have left their range.
  """
  task, begin = programs.task, time.process_time()
  step = Round(programs, setting, epsilon)
  key = noise_of(seed, f'{setting} {epsilon}')
  total = setting.num_rounds
  points = {-(-total * i // num_points) for i in range(num_points + 1)}
  state = step.method.init(task.init(seed))
  found: dict[str, Any] = {'round': [0]}
  start = programs.measure(state.params)
  found |= {name: [value] for name, value in start.items()}
  failed = False
  for round in range(total):
    state = step.all(state, round, key)
    if round + 1 not in points:
      continue
    now = programs.measure(state.params)
    found['round'].append(round + 1)
    for name, value in now.items():
      found[name].append(value)
    failed = bool(step.method.check(state))
    failed |= not now['loss'] < 10 * start['loss']
    if failed:
      break
  seconds = time.process_time() - begin
  return found | {'seconds': seconds, 'failed': failed, 'state': state}
