"""Whether this device updates weights to the bits that other devices have.

    python -m experiments.digests

Takes about a minute on two cores. A model of 10.5 M parameters takes 1,000
exact updates, in the way of each method: its server applies messages whose
bytes are drawn from a counter, so that no loss, and no rounding of a device,
comes in. The digest of the weights must be the one in results/digests.json,
which a CPU wrote and which the tests compare for ever; the command prints where
it is not, and exits with 1. `--write` writes the file anew: for a new method or
after a change of the seed contract, which breaks every log.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments import build
from jaxfl import digest, keys
from jaxfl import method as method_lib
from jaxfl.methods import fedkseed, ferret, spsa

_WRITE = flags.DEFINE_bool('write', False, 'Write the file anew.')
PATH = pathlib.Path(__file__).parent / 'results' / 'digests.json'
SHAPES = {
  'embed': (16384, 256),
  'layers/attention': (8, 256, 1024),
  'layers/down': (8, 1024, 256),
  'layers/norm': (8, 256),
  'layers/up': (8, 256, 1024),
}
_ROOT = keys.root(20260)


def words(name: str, count: int) -> np.ndarray:
  """uint32[count] that depend on the name and nothing else."""
  key = np.asarray(keys.stream(_ROOT, name))
  counter = np.arange(count, dtype=np.uint32)
  return keys.threefry2x32(key[:1], key[1:], np.zeros_like(counter), counter)[0]


def params() -> dict[str, np.ndarray]:
  """Multiples of 2**-24 in [-1/16, 1/16)."""

  def tensor(path, shape):
    bits = words(path, int(np.prod(shape))) >> np.uint32(11)
    w = bits.astype(np.int32) - np.int32(1 << 20)
    return (w.astype(np.float32) * np.float32(2.0**-24)).reshape(shape)

  return {path: tensor(path, shape) for path, shape in SHAPES.items()}


class Case(NamedTuple):
  """A method, and how many rounds of how many clients make 1,000 updates."""

  method: method_lib.Method
  rounds: int
  clients: int


def _spsa(distribution):
  return Case(
    spsa.spsa(
      build.no_loss,
      _ROOT,
      learning_rate=1e-3,
      mu=1e-3,
      num_perturbations=50,
      codec='linear8',
      codec_scale=1.0,
      distribution=distribution,
    ),
    rounds=5,
    clients=4,
  )


def _fedkseed(distribution):
  return Case(
    fedkseed.fedkseed(
      build.no_loss,
      _ROOT,
      learning_rate=1e-3,
      mu=1e-3,
      local_steps=25,
      codec='linear8',
      codec_scale=1.0,
      distribution=distribution,
    ),
    rounds=10,
    clients=4,
  )


def _ferret(distribution):
  return Case(
    ferret.ferret(
      build.no_loss,
      _ROOT,
      client_optimizer=optax.sgd(1.0),
      coordinates=500,
      server_lr=0.01,
      distribution=distribution,
      max_block_size=1 << 17,
    ),
    rounds=1,
    clients=2,
  )


CASES: dict[str, Callable[[], Case]] = {
  'spsa rademacher': lambda: _spsa('rademacher'),
  'spsa rank4': lambda: _spsa('rank4'),
  'fedkseed rademacher': lambda: _fedkseed('rademacher'),
  'fedkseed walsh': lambda: _fedkseed('walsh'),
  'ferret rademacher': lambda: _ferret('rademacher'),
  'ferret walsh': lambda: _ferret('walsh'),
}


def messages_of(case: Case, round: int):
  """The messages of a round: random codes, and norms below 1/8."""
  like = case.method.message(params_like())

  def leaf(path, x):
    shape = (case.clients, *x.shape)
    bits = words(f'{path} {round}', int(np.prod(shape))).reshape(shape)
    if x.dtype == jnp.bfloat16:
      return jnp.asarray(bits & np.uint32(0x7F), jnp.bfloat16) / 1024
    return bits.astype(x.dtype)

  return jax.tree_util.tree_map_with_path(
    lambda path, x: leaf(keys.path_str(path), x), like
  )


def params_like():
  """The shapes alone."""
  return {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in SHAPES.items()
  }


def run(name: str) -> str:
  """The digest of the weights after a case's updates.

  Raises:
    ValueError: if weights have left their range.
  """
  case = CASES[name]()
  server = jax.jit(case.method.server, donate_argnums=0)
  state = jax.tree.map(jnp.array, case.method.init(params()))
  for round in range(case.rounds):
    cohort = method_lib.Party(
      np.arange(case.clients, dtype=np.int32),
      np.full(case.clients, round, np.int32),
      np.ones(case.clients, np.float32),
    )
    state = server(state, messages_of(case, round), cohort)
  if problem := case.method.check(state):
    raise ValueError(f'{name}: {problem}')
  return digest.digest(state.params)


def expected() -> dict[str, str]:
  """The committed digests."""
  return json.loads(PATH.read_text())['digests']


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  device = jax.devices()[0]
  found, wrong = {}, 0
  known = {} if _WRITE.value else expected()
  for name in CASES:
    found[name] = run(name)
    equal = known.get(name) == found[name]
    wrong += not equal
    verdict = '' if _WRITE.value else 'equal' if equal else 'DIFFERENT'
    print(f'{name:22}{found[name][:16]}  {verdict}', flush=True)
  if _WRITE.value:
    entry = {
      'parameters': sum(int(np.prod(s)) for s in SHAPES.values()),
      'updates': 1000,
      'device': device.device_kind,
      'jax': jax.__version__,
      'digests': found,
    }
    PATH.write_text(json.dumps(entry, indent=2) + '\n')
  elif wrong:
    sys.exit(f'{wrong} digests on {device.device_kind} are not those of {PATH}')


if __name__ == '__main__':
  app.run(main)
