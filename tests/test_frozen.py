"""Training a part of a model: frozen tensors are arguments, not constants."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfl import adapters, digest, keys, log, wire
from jaxfl.methods import fed_avg, spsa
from jaxfl.runtime import replay, simulate

pytestmark = pytest.mark.fast_compile

ROOT = keys.root(11)
IN, HIDDEN, OUT, CLIENTS = 6, 37, 2, 4
RNG = np.random.default_rng(3)
PARAMS = {
  'layers': {
    'kernel': RNG.normal(0, 0.5, (IN, HIDDEN)).astype(np.float32),
    'bias': RNG.normal(0, 0.5, HIDDEN).astype(np.float32),
  },
  'head': {'kernel': RNG.normal(0, 0.3, (HIDDEN, OUT)).astype(np.float32)},
}
ADAPTERS = {
  'lora': adapters.lora(rank=2, targets=('layers/kernel',), also=('head/*',)),
  'head': adapters.head_only(),
}


def forward(params, x):
  hidden = jnp.tanh(
    x @ params['layers']['kernel'] + params['layers']['bias'][None]
  )
  return hidden @ params['head']['kernel']


def loss_fn(params, batch):
  error = jnp.square(forward(params, batch['x']) - batch['y']).sum(-1)
  mask = batch['mask'].astype(jnp.float32)
  return jnp.sum(error * mask) / jnp.sum(mask)


@functools.cache
def data():
  """Targets of a model whose first layer has moved by a matrix of rank 1."""
  rng = np.random.default_rng(4)
  move = np.outer(rng.normal(size=IN), rng.normal(size=HIDDEN)) * 0.4
  layers = PARAMS['layers']
  teacher = PARAMS | {
    'layers': layers | {'kernel': (layers['kernel'] + move).astype(np.float32)}
  }
  x = rng.normal(size=(CLIENTS, 16, IN)).astype(np.float32)
  return x, np.stack([np.asarray(forward(teacher, each)) for each in x])


def batch_fn(num_batches):
  def batches(round, client):
    del round  # Unused: all examples, always.
    x, y = (np.stack([a[client]] * num_batches) for a in data())
    return {'x': x, 'y': y, 'mask': np.ones(x.shape[:2], np.int8)}

  return batches


def builder(method, adapter):
  """frozen -> the method on the trainable part of the toy model."""

  def build(frozen):
    loss = lambda t, batch: loss_fn(adapter.merge(frozen, t), batch)
    if method == 'spsa':
      return spsa.spsa(
        loss, ROOT, learning_rate=5e-3, mu=1e-3, num_perturbations=2
      )
    return fed_avg.fed_avg(
      loss, client_optimizer=optax.sgd(0.05), local_steps=2
    )

  return build


def run(method, trainable, programs, num_rounds, log=None):
  return list(
    simulate.simulate(
      method, method.init(trainable), batch_fn(method.num_batches),
      simulate.Population(num_clients=CLIENTS), num_rounds=num_rounds,
      block_size=2, programs=programs, log=log,
    )
  )  # fmt: skip


def setup(method, adapter):
  """Method, trainable, frozen, and the programs with frozen as arguments."""
  trainable, frozen = ADAPTERS[adapter].init(PARAMS, ROOT)
  build = builder(method, ADAPTERS[adapter])
  programs = simulate.compile_method(build(frozen), build=build, frozen=frozen)
  return build(frozen), trainable, frozen, programs


def lowered(client, method, trainable):
  """StableHLO of a client program."""
  if isinstance(client, functools.partial):
    client = functools.partial(client.func.lower, *client.args)
  else:
    client = client.lower
  one = batch_fn(method.num_batches)(0, 0)
  party = simulate.method_lib.Party(
    np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32)
  )
  batches = jax.tree.map(lambda x: x[None], one)
  return client(method.init(trainable), (), batches, party).as_text()


@pytest.mark.parametrize('name', ['spsa', 'fed_avg'])
@pytest.mark.parametrize('adapter', ADAPTERS)
def test_frozen_tensors_are_arguments(name, adapter):
  method, trainable, _, programs = setup(name, adapter)
  frozen_shape = f'tensor<{IN}x{HIDDEN}xf32>'
  constant = re.compile(r'dense<(?:"0x|\[).*> : ' + frozen_shape)
  argument = re.compile(rf'%arg\d+: {frozen_shape}')
  signature = lambda text: re.search(r'func public @main\((.*)', text)[0]
  inside = lowered(simulate.compile_method(method).client, method, trainable)
  outside = lowered(programs.client, method, trainable)
  assert constant.search(inside)  # else the next line could not fail
  assert not constant.search(outside)
  assert argument.search(signature(outside))
  assert not argument.search(signature(inside))
  numbers = IN * HIDDEN * 8  # hexadecimal digits of the tensor
  assert max(map(len, re.findall(r'"0x(\w*)"', outside)), default=0) < numbers


@pytest.mark.parametrize('name', ['spsa', 'fed_avg'])
@pytest.mark.parametrize('adapter', ADAPTERS)
def test_arguments_give_the_bits_of_constants(name, adapter):
  method, trainable, _, programs = setup(name, adapter)
  a = run(method, trainable, programs, 3)
  b = run(method, trainable, simulate.compile_method(method), 3)
  for x, y in zip(a, b, strict=True):
    assert digest.digest(x.state) == digest.digest(y.state)
    assert (x.bytes_up, x.bytes_down) == (y.bytes_up, y.bytes_down)
  assert digest.digest(a[0].state.params) != digest.digest(a[2].state.params)
  assert programs.client.func._cache_size() == 1


def test_low_rank_spsa_converges_and_replays_bit_for_bit(tmp_path):
  method, trainable, frozen, programs = setup('spsa', 'lora')
  start = method.init(trainable)
  header = log.Header(
    spec=keys.SPEC, base_digest=digest.digest(trainable), config={},
    params=wire.describe(trainable),
    message=wire.describe(method.message(start.params)),
  )  # fmt: skip
  with log.RoundLog.create(tmp_path / 'rounds.log', header) as live:
    rounds = run(method, trainable, programs, 300, log=live)
  assert rounds[0].bytes_up < CLIENTS * 40  # two bytes and a frame each
  merge = ADAPTERS['lora'].merge
  x, y = (a.reshape(-1, a.shape[-1]) for a in data())
  whole = {'x': x, 'y': y, 'mask': np.ones(len(x))}
  final = rounds[-1].state.params
  after = loss_fn(merge(frozen, final), whole)
  assert after < 0.25 * loss_fn(PARAMS, whole)
  with log.RoundLog.open(tmp_path / 'rounds.log') as read:
    *_, (_, state) = replay.replay(
      programs.server, method.init(trainable), read,
      method.message(start.params), num_slots=CLIENTS,
    )  # fmt: skip
  assert digest.digest(state) == digest.digest(rounds[-1].state)
  exported = merge(frozen, final)
  assert jax.tree.structure(exported) == jax.tree.structure(PARAMS)
  moved = exported['layers']['kernel'] - PARAMS['layers']['kernel']
  assert np.linalg.matrix_rank(moved, tol=1e-4) == 2


@pytest.mark.parametrize('given', ['build', 'frozen'])
def test_build_and_frozen_go_together(given):
  method, _, frozen, _ = setup('fed_avg', 'head')
  both = {'build': lambda frozen: method, 'frozen': frozen}
  with pytest.raises(ValueError, match='build and frozen go together'):
    simulate.compile_method(method, **{given: both[given]})
