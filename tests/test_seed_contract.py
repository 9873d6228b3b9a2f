"""docs/seed_contract.json, against jaxfl and against plain Python."""

import hashlib
import json
import math
import struct

import pytest

from jaxfl import keys
from tests import make_seed_vectors
from tests import plain_contract as plain

TEXT = make_seed_vectors.PATH.read_text()
VECTORS = json.loads(TEXT)
ROOT = plain.root(VECTORS['seed'])


def by(*names):
  """Parameters of a list of vectors, called by some of their fields."""
  return lambda vector: ' '.join(str(vector[name]) for name in names)


def test_jaxfl_has_these_vectors():
  assert make_seed_vectors.text(make_seed_vectors.make()) == TEXT
  assert VECTORS['spec'] == keys.SPEC


def test_threefry():
  for vector in VECTORS['threefry']:
    words = plain.threefry(tuple(vector['key']), *vector['counter'])
    assert list(words) == vector['words']
  # the known answers of Random123 for 20 rounds
  assert VECTORS['threefry'][0]['words'] == [0x6B200159, 0x99BA4EFE]
  assert VECTORS['threefry'][1]['words'] == [0x1CB996FC, 0xBB002BE7]
  assert VECTORS['threefry'][2]['words'] == [0xC4923A9C, 0x483DF7A0]


def test_keys():
  path = 'layers/0/mlp/w'
  walsh = lambda name: plain.leaf_key(
    plain.fold(plain.stream(ROOT, name), 1), path
  )
  direction = plain.fold(ROOT, 3, 1000, 2)
  party = plain.fold(ROOT, 3, 1000)
  expected = [
    ROOT,
    direction,
    plain.leaf_key(direction, path),
    plain.fold(ROOT, 4097),
    plain.fold(plain.stream(ROOT, 'cohort'), 1000, 2),
    walsh('walsh'),
    walsh('walsh shifts'),
    plain.stream(party, 'codec'),
    plain.fold(plain.stream(ROOT, 'decay'), 1000),
  ]
  assert list(VECTORS['keys'].values()) == [list(key) for key in expected]
  assert VECTORS['uniform'] == plain.uniform(direction)
  for path, number in VECTORS['tensor_id'].items():
    assert plain.tensor_id(path) == number


@pytest.mark.parametrize(
  'vector', VECTORS['fields'], ids=by('distribution', 'shape')
)
def test_field(vector):
  z = plain.field(
    tuple(vector['direction']), vector['path'], vector['shape'],
    vector['distribution'],
  )  # fmt: skip
  assert z[:16] == vector['first']
  digest = hashlib.sha256(struct.pack(f'{len(z)}b', *z)).hexdigest()
  assert digest == vector['sha256_int8']


def test_gaussian():
  vector = VECTORS['gaussian']
  z = plain.field(
    tuple(vector['direction']), vector['path'], vector['shape'], 'gaussian'
  )
  assert z == pytest.approx(vector['values'], abs=2e-5)


def test_fractions():
  vector = VECTORS['fractions']
  assert plain.fractions(vector['weights']) == vector['parts']


def test_grid():
  for largest, e in VECTORS['exponents']:
    assert plain.exponent(largest) == e
  for vector in VECTORS['units']:
    unit = plain.to_units(
      vector['coefficient'], vector['exponent'], tuple(vector['direction']),
      vector['path'],
    )  # fmt: skip
    assert unit == vector['unit']
  vector = VECTORS['decay']
  after = plain.decay(
    vector['steps'], vector['exponent'], vector['rate'], tuple(vector['key']),
    vector['path'],
  )  # fmt: skip
  assert after == vector['after']


def test_pool_units():
  for vector in VECTORS['pool_units']:
    found = [
      plain.pool_units(
        x, vector['exponent'], vector['largest_exponent'],
        vector['distribution'],
      )
      for x in vector['coordinates']
    ]  # fmt: skip
    assert found == vector['units']


@pytest.mark.parametrize('vector', VECTORS['codecs'], ids=by('codec'))
def test_codec(vector):
  name, scale = vector['codec'], vector['scale']
  values = [math.nan if x is None else x for x in vector['values']]
  code = plain.encode(name, scale, values, tuple(vector['key']))
  assert code.hex() == vector['code']
  assert plain.decode(name, scale, code, len(values)) == vector['decoded']


def test_frame_and_digest():
  leaves = [
    ('norms', 'float32', (2,), struct.pack('<2f', 0.5, 2.0)),
    ('coordinates', 'int8', (3,), struct.pack('3b', 5, -1, 127)),
  ]
  assert plain.frame(leaves).hex() == VECTORS['frame']
  assert plain.digest(leaves) == VECTORS['digest']


def test_a_round_of_spsa():
  vector = VECTORS['spsa']
  found = plain.spsa_round(vector)
  for path, (total, e, _) in found.items():
    assert [math.ldexp(x, -e) for x in total] == vector['after'][path]
  assert plain.digest_of_weights(found) == vector['digest']


def test_a_round_of_fedkseed():
  vector = VECTORS['fedkseed']
  coordinates, found = plain.fedkseed_round(vector)
  assert sorted(map(list, coordinates.items())) == vector['coordinates']
  assert len(coordinates) == 5  # one of six values is rejected
  assert plain.digest_of_weights(found) == vector['digest']
