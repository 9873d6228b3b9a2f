"""Writes the test vectors of docs/seed_contract.md, computed by jaxfl.

    python -m tests.make_seed_vectors

A change of the file is a change of the contract: it breaks every log.
"""

import hashlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import codecs, digest, grid, keys, perturb, pool, wire
from jaxfl import method as method_lib
from jaxfl.methods import fedkseed, spsa

PATH = pathlib.Path(__file__).parents[1] / 'docs' / 'seed_contract.json'
SEED = 2**40 + 17
ROOT = keys.root(SEED)
KAT = (
  ((0, 0), (0, 0)),
  ((2**32 - 1,) * 2, (2**32 - 1,) * 2),
  ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)),
)
PATHS = ('', 'layers/0/mlp/w', 'head/bias')
FIELDS = (
  ('rademacher', 'layers/0/mlp/w', (70, 5)),
  ('rademacher', 'head/bias', (40,)),
  ('popcount16', 'layers/0/mlp/w', (3, 7, 5)),
  ('walsh', 'layers/0/mlp/w', (40, 130)),
  ('walsh', 'head/bias', (40,)),
  ('rank1', 'layers/0/mlp/w', (3, 7, 5)),
  ('rank4', 'layers/0/mlp/w', (3, 7, 5)),
  ('rank16', 'head/bias', (40,)),
)
VALUES = (0.0, 1.0, -1.0, 0.3, -0.011, 7.5, -200.0, 1e-6, 1e9, math.nan)


def ints(x):
  return np.asarray(x).tolist()


def floats(x):
  """A list for JSON, with None for what is not finite."""
  return [v if math.isfinite(v) else None for v in np.asarray(x).tolist()]


def threefry(key, counter):
  word = lambda x: np.array([x], np.uint32)
  pair = keys.threefry2x32(*map(word, (*key, *counter)))
  return [int(x[0]) for x in pair]


def chains():
  direction = keys.fold(ROOT, 3, 1000, 2)
  path = PATHS[1]
  return {
    'root': ROOT,
    'spsa: party 3, round 1000, sample 2': direction,
    'leaf of it, layers/0/mlp/w': keys.leaf_key(direction, path),
    'pool: seed 4097': keys.fold(ROOT, 4097),
    'decomfl: round 1000, sample 2': keys.fold(
      keys.stream(ROOT, 'cohort'), 1000, 2
    ),
    'walsh leaf: seed 4097, layers/0/mlp/w': perturb.walsh_keys(ROOT, 1, path)[
      :2
    ],
    'walsh shifts: seed 4097, layers/0/mlp/w': perturb.walsh_keys(
      ROOT, 1, path
    )[2:],
    'codec: party 3, round 1000': keys.stream(
      keys.fold(ROOT, 3, 1000), 'codec'
    ),
    'decay: round 1000': keys.fold(keys.stream(ROOT, 'decay'), 1000),
  }


def one_field(distribution, path, shape):
  direction = keys.fold(ROOT, 3, 1000, 2)
  if distribution == 'walsh':
    direction = jnp.append(ROOT, jnp.uint32(4097 + 300))
  z = perturb.field(direction, path, shape, distribution=distribution)
  integers = np.asarray(z / perturb.FIELD_UNIT[distribution]).astype(np.int8)
  return {
    'distribution': distribution,
    'direction': ints(direction),
    'path': path,
    'shape': shape,
    'first': ints(integers.reshape(-1)[:16]),
    'sha256_int8': hashlib.sha256(integers.tobytes()).hexdigest(),
  }


def gaussian():
  direction = keys.fold(ROOT, 3, 1000, 2)
  z = perturb.field(direction, PATHS[1], (2, 4), distribution='gaussian')
  return {
    'direction': ints(direction),
    'path': PATHS[1],
    'shape': (2, 4),
    'values': [round(x, 5) for x in ints(z.reshape(-1))],
  }


def one_codec(name):
  scale = 16.0
  code = codecs.codec(name, scale)
  key = keys.stream(keys.fold(ROOT, 3, 1000), 'codec')
  values = jnp.array(VALUES[:-1] if name == 'sign1' else VALUES, jnp.float32)
  sent = jax.jit(code.encode)(values, key)
  return {
    'codec': name,
    'scale': scale,
    'values': floats(values),
    'key': ints(key),
    'code': np.asarray(sent).tobytes().hex(),
    'decoded': floats(code.decode(sent, len(values))),
  }


def units():
  direction = keys.fold(ROOT, 3, 1000, 2)
  found = []
  for coefficient, e in ((0.25, 22), (-1.7e-7, 22), (3e-8, 20), (-1.1, 15)):
    coefficient = np.float32(coefficient)
    unit = grid.to_units(
      coefficient[None], {PATHS[1]: jnp.int32(e)}, direction[None]
    )
    found.append(
      {
        'coefficient': float(coefficient),
        'exponent': e,
        'direction': ints(direction),
        'path': PATHS[1],
        'unit': int(unit[PATHS[1]][0]),
      }
    )
  return found


def decay():
  e, rate = 20, codecs.round_significant(3e-4)
  key = keys.fold(keys.stream(ROOT, 'decay'), 1000)
  w = np.array([0, 1, -5, 12345, -999_999, 8_000_000])
  params = {PATHS[1]: jnp.asarray(w * 2.0**-e, jnp.float32)}
  new = grid.decay(params, {PATHS[1]: jnp.int32(e)}, jnp.float32(rate), key)
  return {
    'steps': ints(w),
    'exponent': e,
    'rate': rate,
    'key': ints(key),
    'path': PATHS[1],
    'after': ints((np.asarray(new[PATHS[1]], np.float64) * 2**e).astype(int)),
  }


def pool_units():
  exponents = {'a': jnp.int32(22), 'b': jnp.int32(15)}
  coordinates = np.array([0, 31, 32, -32, -33, 12_345_678], np.int32)
  found = []
  for distribution in ('rademacher', 'popcount16', 'rank16'):
    of = pool.units(jnp.asarray(coordinates), exponents, distribution)
    for name, e in exponents.items():
      found.append(
        {
          'distribution': distribution,
          'exponent': int(e),
          'largest_exponent': 22,
          'coordinates': ints(coordinates),
          'units': ints(of[name]),
        }
      )
  return found


def message():
  return {
    'coordinates': np.array([5, -1, 127], np.int8),
    'norms': np.array([0.5, 2.0], np.float32),
  }


def spsa_round():
  rng = np.random.default_rng(0)
  params = {
    'layer/w': rng.normal(0, 0.5, (3, 5)).astype(np.float32),
    'bias': rng.normal(0, 3.0, (4,)).astype(np.float32),
  }
  settings = {
    'learning_rate': 0.01,
    'num_perturbations': 3,
    'codec': 'log8',
    'codec_scale': 16.0,
    'distribution': 'rademacher',
  }
  method = spsa.spsa(lambda *args: None, ROOT, mu=1e-3, **settings)
  messages = np.array([[64, 70, 184], [0, 128, 31], [191, 60, 61]], np.uint8)
  ids, weights = np.array([2, 5, 11]), np.array([1, 3, 2])
  cohort = method_lib.Party(
    ids.astype(np.int32), np.zeros(3, np.int32), weights.astype(np.float32)
  )
  state = jax.jit(method.server)(method.init(params), messages, cohort)
  assert method.check(state) is None
  return {
    'seed': SEED,
    'round': 0,
    **settings,
    'ids': ints(ids),
    'weights': ints(weights),
    'messages': [row.tobytes().hex() for row in messages],
    'params': {
      path: {'shape': x.shape, 'values': ints(x.reshape(-1))}
      for path, x in params.items()
    },
    'after': {
      path: ints(np.asarray(x).reshape(-1)) for path, x in state.params.items()
    },
    'digest': digest.digest(state.params),
  }


def fedkseed_round():
  """On a tensor with a Walsh block, and on one without."""
  shapes = {'w': (32, 128), 'b': (3,)}
  values = lambda shape: (np.arange(math.prod(shape)) % 97 - 48) / 64
  params = {
    path: values(shape).astype(np.float32).reshape(shape)
    for path, shape in shapes.items()
  }
  settings = {
    'learning_rate': 0.01,
    'num_seeds': 5000,
    'local_steps': 3,
    'codec': 'linear8',
    'codec_scale': 16.0,
    'distribution': 'walsh',
  }
  method = fedkseed.fedkseed(lambda *args: None, ROOT, mu=1e-3, **settings)
  messages = np.array([[64, -70, 127], [-128, 31, 5]], np.int8)
  ids, weights = np.array([2, 11]), np.array([1, 2])
  cohort = method_lib.Party(
    ids.astype(np.int32), np.zeros(2, np.int32), weights.astype(np.float32)
  )
  state = jax.jit(method.server)(method.init(params), messages, cohort)
  assert method.check(state) is None
  moved = np.flatnonzero(state.coordinates)
  return {
    'seed': SEED,
    'round': 0,
    **settings,
    'ids': ints(ids),
    'weights': ints(weights),
    'messages': [row.tobytes().hex() for row in messages],
    'shapes': shapes,
    'entry_i': '((i mod 97) - 48) / 64',
    'coordinates': [[int(k), int(state.coordinates[k])] for k in moved],
    'digest': digest.digest(state.params),
  }


def make():
  weights = [1, 3, 2, 0, 2**24 - 1]
  return {
    'spec': keys.SPEC,
    'seed': SEED,
    'threefry': [
      {'key': k, 'counter': c, 'words': threefry(k, c)} for k, c in KAT
    ],
    'tensor_id': {path: keys.tensor_id(path) for path in PATHS},
    'keys': {name: ints(key) for name, key in chains().items()},
    'uniform': int(
      keys.uniform(keys.fold(ROOT, 3, 1000, 2)) * np.float32(2**24)
    ),
    'fields': [one_field(*args) for args in FIELDS],
    'gaussian': gaussian(),
    'fractions': {
      'weights': weights,
      'parts': ints(method_lib.fractions(jnp.asarray(weights, jnp.float32))),
    },
    'exponents': [
      [x, int(grid.exponents({'a': np.array([x], np.float32)})['a'])]
      for x in (0.0, 0.125, 0.9, 1.0, 3.5, 1000.0)
    ],
    'units': units(),
    'decay': decay(),
    'pool_units': pool_units(),
    'codecs': [one_codec(name) for name in codecs.CODECS],
    'frame': wire.to_bytes(message()).hex(),
    'digest': digest.digest(message()),
    'spsa': spsa_round(),
    'fedkseed': fedkseed_round(),
  }


def text(vectors) -> str:
  """JSON with one vector a line."""
  lines = []
  for name, value in vectors.items():
    if isinstance(value, list):
      rows = ',\n  '.join(json.dumps(row) for row in value)
      lines.append(f'"{name}": [\n  {rows}\n]')
    else:
      lines.append(f'"{name}": {json.dumps(value)}')
  return '{\n' + ',\n'.join(lines) + '\n}\n'


if __name__ == '__main__':
  PATH.write_text(text(make()))
