"""What the tests of Hugging Face checkpoints share."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxfl.models import hf, transformer

FIXTURES = pathlib.Path(__file__).parent / 'hf'
NAMES = sorted(x.name for x in FIXTURES.iterdir())


@functools.cache
def checkpoint(name):
  return hf.load(FIXTURES / name)


def reference(name):
  """Tokens, mask, perhaps segment types, and logits."""
  with np.load(FIXTURES / name / 'reference.npz') as data:
    return dict(data)


def logits(found, data):
  """Compiled without optimisation, which takes a third of the time."""
  args = (found.params, data['tokens'], data['mask'], data.get('types'))
  apply = jax.jit(functools.partial(transformer.logits, found.config))
  quick = {'xla_backend_optimization_level': 0}
  return np.asarray(apply.lower(*args).compile(quick)(*args))


def random_params(config, seed=0):
  """Normal parameters of every shape."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape, np.float32), shapes
  )


def at_real(x, data):
  """What padding computes means nothing."""
  return x[data['mask'] > 0] if x.ndim == 3 else x


def changed(name, target, *, tensors=None, remove=(), **fields):
  """A copy of a fixture with other fields and tensors.

  Args:
    name: the fixture.
    target: directory to make.
    tensors: new tensors, or a function of the old ones.
    remove: names of fields to leave out.
    **fields: new fields of config.json.

  Returns:
    The target.
  """
  shutil.copytree(FIXTURES / name, target)
  path = target / 'config.json'
  old = json.loads(path.read_text())
  kept = {x: y for x, y in (old | fields).items() if x not in remove}
  path.write_text(json.dumps(kept))
  if tensors is not None:
    file = target / 'model.safetensors'
    found = load_file(file)
    new = tensors(found) if callable(tensors) else found | tensors
    save_file({x: np.ascontiguousarray(y) for x, y in new.items()}, file)
  return target
