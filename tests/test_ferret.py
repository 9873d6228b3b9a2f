"""Ferret: its equations, what it sends, what it refuses, what it stores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfl import allocation, blocks, digest, keys, wire
from jaxfl import method as method_lib
from jaxfl.methods import fed_avg, ferret
from tests import methods_table as table
from tests import reference

pytestmark = pytest.mark.fast_compile

ROOT = keys.root(5)
SHAPES = {'a': (130, 3), 'b': (), 'c': (2, 4, 5)}
NUM_SLOTS = 40


def normals(shapes=None, seed=0):
  rng = np.random.default_rng(seed)
  make = lambda shape: rng.normal(size=shape).astype(np.float32)
  return {name: make(shape) for name, shape in (shapes or SHAPES).items()}


def linear(params, batch):
  """A loss whose gradient is the batch."""
  return sum(
    jnp.vdot(x, g)
    for x, g in zip(
      jax.tree.leaves(params), jax.tree.leaves(batch), strict=True
    )
  )


def build(loss_fn=linear, **changes):
  settings = {
    'client_optimizer': optax.sgd(1.0), 'coordinates': NUM_SLOTS,
    'max_block_size': 256,
  }  # fmt: skip
  return ferret.ferret(loss_fn, ROOT, **(settings | changes))


def cohort_of(ids, rounds=(0,), weights=(1.0,)):
  filled = lambda x, dtype: np.broadcast_to(x, len(ids)).astype(dtype)
  return method_lib.Party(
    np.array(ids, np.int32),
    filled(rounds, np.int32),
    filled(weights, np.float32),
  )


def messages_of(method, state, deltas, cohort):
  """The messages of clients whose local training gives these deltas."""
  stacked = jax.tree.map(lambda *xs: np.stack(xs)[:, None], *deltas)
  over_clients = jax.jit(jax.vmap(method.client, (None, None, 0, 0)))
  messages, _, _ = over_clients(state, (), stacked, cohort)
  return jax.device_get(messages)


@functools.cache
def small():
  """A method with float coordinates, its start and two messages."""
  method = build(codec='float32', server_lr=0.5)
  state = method.init(normals(seed=9))
  cohort = cohort_of([3, 8], weights=[1, 3])
  deltas = [normals(seed=1), normals(seed=2)]
  return method, state, cohort, deltas, messages_of(
    method, state, deltas, cohort
  )  # fmt: skip


def parts_of(params):
  parts = blocks.partition(params, max_size=256)
  factors = allocation.factors('bytes', [b.size for b in parts], 'rademacher')
  return parts, factors


def rectangle(tensors, block):
  x = tensors[block.path]
  x = x.reshape(-1, x.shape[-1] if x.ndim else 1)
  (row, col), (rows, cols) = block.offset, block.shape
  return x[row : row + rows, col : col + cols]


def vectors(party, round, parts, counts):
  """(slot, block, v) for every slot, from the definitions in NumPy."""
  slot = 0
  for block, count in zip(parts, counts, strict=True):
    for k in range(count):
      key = tuple(int(x) for x in ROOT)
      for word in (party, round, k):
        key = reference.fold(key, word)
      z = reference.field(
        key, block.path, block.shape, 'rademacher', block.offset
      )
      yield slot, block, z
      slot += 1


def test_a_message_is_what_the_equations_say():
  method, state, _, deltas, messages = small()
  parts, factors = parts_of(state.params)
  assert len(parts) == 5
  for i, (party, delta) in enumerate(zip([3, 8], deltas, strict=True)):
    norms = messages['norms'][i].astype(np.float32)
    exact = [np.linalg.norm(rectangle(delta, b)) for b in parts]
    np.testing.assert_allclose(norms, exact, rtol=2.0**-8)
    counts = np.asarray(allocation.counts(norms, factors, NUM_SLOTS))
    g = messages['coordinates'][i]
    for slot, block, v in vectors(party, 0, parts, counts):
      expected = np.sum(v * rectangle(delta, block))
      np.testing.assert_allclose(
        g[slot] * norms[parts.index(block)], expected, rtol=1e-4, atol=1e-5
      )
  assert method.projected_grads == NUM_SLOTS


def test_a_step_is_what_the_equations_say():
  method, state, cohort, _, messages = small()
  parts, factors = parts_of(state.params)
  expected = {k: np.array(x, np.float64) for k, x in state.params.items()}
  for i, (party, part) in enumerate([(3, 0.25), (8, 0.75)]):
    norms = messages['norms'][i].astype(np.float32)
    counts = np.asarray(allocation.counts(norms, factors, NUM_SLOTS))
    for slot, block, v in vectors(party, 0, parts, counts):
      own = parts.index(block)
      gamma = norms[own] * messages['coordinates'][i, slot] / counts[own]
      rectangle(expected, block)[...] -= 0.5 * part * gamma * v
  after = jax.jit(method.server)(state, messages, cohort)
  # every coordinate is rounded once, to a unit of about 2**-21
  for name, x in expected.items():
    unit = 2.0 ** -float(state.exponents[name])
    assert np.abs(after.params[name] - x).max() < 2 * NUM_SLOTS * unit
    assert np.abs(after.params[name] - state.params[name]).max() > 0.01
  assert int(after.round) == 1
  assert method.check(after) is None


def test_a_server_optimizer_gets_the_mean_reconstruction():
  method, state, cohort, _, messages = small()
  expected = jax.jit(method.server)(state, messages, cohort)
  sgd = build(codec='float32', server_optimizer=optax.sgd(0.5))
  start = sgd.init(normals(seed=9))
  found = jax.jit(sgd.server)(start, messages, cohort)
  for name, x in found.params.items():
    np.testing.assert_allclose(x, expected.params[name], atol=1e-4)


def test_delta_is_that_of_any_client_optimizer():
  steps = 3
  settings = {
    'client_optimizer': optax.adam(0.01), 'local_steps': steps
  }  # fmt: skip
  batches = table.batch_fn(steps)(0, 0)
  party = method_lib.Party(np.int32(0), np.int32(0), np.float32(1))
  whole = fed_avg.fed_avg(table.loss_fn, **settings)
  state = whole.init(table.params())
  delta, _, expected = jax.jit(whole.client)(state, (), batches, party)
  method = build(table.loss_fn, **settings)
  state = method.init(table.params())
  message, _, metrics = jax.jit(method.client)(state, (), batches, party)
  exact = [np.linalg.norm(x) for x in jax.tree.leaves(delta)]
  found = np.asarray(message['norms'], np.float32)
  np.testing.assert_allclose(found, exact, rtol=2.0**-8)
  np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=1e-6)


@pytest.mark.parametrize(
  ('distribution', 'codec'),
  [
    ('rademacher', 'sign1'),
    ('walsh', 'sign1'),
    pytest.param('popcount16', 'sign1', marks=pytest.mark.slow),
    pytest.param('gaussian', 'sign1', marks=pytest.mark.slow),
    pytest.param('rademacher', 'linear8', marks=pytest.mark.slow),
  ],
)
def test_slope_is_one(distribution, codec):
  """<rec, delta> = |delta|^2; its deviation over 80,000 slots is 0.005."""
  delta = {'w': normals({'w': (40, 6)})['w'] / 8}  # inside of the grid
  method = build(coordinates=80_000, codec=codec, distribution=distribution)
  state = method.init(jax.tree.map(np.zeros_like, delta))
  cohort = cohort_of([0])
  messages = messages_of(method, state, [delta], cohort)
  after = jax.jit(method.server)(state, messages, cohort)
  assert method.check(after) is None
  slope = -np.vdot(after.params['w'], delta['w']) / np.vdot(*[delta['w']] * 2)
  assert abs(slope - 1) < 0.01


def test_as_many_walsh_directions_as_entries_lose_nothing():
  """They are a basis: the server takes the step of the mean difference."""
  shape = {'w': (32, 128)}
  method = build(
    coordinates=4096,
    max_block_size=4096,
    codec='float32',
    distribution='walsh',
  )
  state = method.init({'w': np.zeros(shape['w'], np.float32)})
  deltas = [normals(shape, seed=1), normals(shape, seed=2)]
  cohort = cohort_of([3, 8], weights=[1, 3])
  messages = messages_of(method, state, deltas, cohort)
  after = jax.jit(method.server)(state, messages, cohort)
  mean = 0.25 * deltas[0]['w'] + 0.75 * deltas[1]['w']
  # half a grid step and a 1/400 of the norm, which is sent as a bfloat16
  error = np.linalg.norm(after.params['w'] + mean) / np.linalg.norm(mean)
  assert error < 0.005


def test_rounds_and_clients_have_their_own_directions():
  delta = {'w': normals({'w': (64, 32)})['w']}
  method = build(coordinates=128, max_block_size=4096, codec='float32')
  state = method.init({'w': np.zeros((64, 32), np.float32)})
  cohort = cohort_of([0, 1, 0], rounds=[0, 0, 1])
  messages = messages_of(method, state, [delta] * 3, cohort)
  server = jax.jit(method.server)
  noise = []
  for i in range(3):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], (messages, cohort))
    after = server(state._replace(round=one[1].round[0]), *one)
    noise.append(np.ravel(-after.params['w'] - delta['w']))
  correlation = np.corrcoef(noise) - np.eye(3)
  assert np.abs(correlation).max() < 4 / np.sqrt(2048)
  assert np.linalg.norm(noise, axis=1).min() > 3 * np.linalg.norm(delta['w'])


def test_blocks_of_a_large_tensor_are_apart():
  """What one block does not change is not touched, nor paid for."""
  method, state, cohort, _, _ = small()
  parts, factors = parts_of(state.params)
  delta = jax.tree.map(np.zeros_like, normals())
  own = next(b for b in parts if b.path == 'a' and b.offset == (64, 0))
  rectangle(delta, own)[...] = 1.0
  messages = messages_of(method, state, [delta, delta], cohort)
  used = messages['norms'][0] > 0
  assert [b for b, u in zip(parts, used, strict=True) if u] == [own]
  counts = allocation.counts(messages['norms'][0], factors, NUM_SLOTS)
  np.testing.assert_array_equal(counts, NUM_SLOTS * used)
  after = jax.jit(method.server)(state, messages, cohort)
  step = jax.tree.map(lambda a, b: np.array(a - b), after.params, state.params)
  assert np.abs(rectangle(step, own)).min() > 0
  rectangle(step, own)[...] = 0
  assert not any(x.any() for x in jax.tree.leaves(step))


def test_server_lr_may_be_a_schedule():
  constant, state, cohort, _, messages = small()
  schedule = lambda r: [0.25, 0.5][r]
  scheduled = build(codec='float32', server_lr=schedule, num_rounds=2)
  server = jax.jit(scheduled.server)
  end = lambda round: digest.digest(
    server(state._replace(round=jnp.int32(round)), messages, cohort).params
  )
  expected = jax.jit(constant.server)(state, messages, cohort).params
  assert end(0) != digest.digest(expected)
  assert end(1) == end(2) == digest.digest(expected)


def test_a_message_costs_its_coordinates_and_two_bytes_a_block():
  params = normals()
  payload = lambda **kw: wire.payload_bytes(
    wire.describe(build(**kw).message(params))
  )
  assert payload(coordinates=800) == 101 + 2 * 5
  assert payload(coordinates=800, codec='linear8') == 800 + 2 * 5
  assert payload(coordinates=800, max_block_size=1 << 20) == 101 + 2 * 3


@pytest.mark.parametrize('norm', [np.nan, np.inf, -1.0, 2.0**101])
def test_a_message_out_of_range_is_as_good_as_absent(norm):
  method, state, cohort, _, messages = small()
  server = jax.jit(method.server)
  expected = server(state, messages, cohort_of([3, 8], weights=[1, 0]))
  norms = messages['norms'].copy()
  norms[1, 2] = norm
  found = server(state, messages | {'norms': norms}, cohort)
  assert digest.digest(found) == digest.digest(expected)
  g = messages['coordinates'].copy()
  g[1, 7] = 3e38  # the product with a norm is not finite
  norms[1] = 2.0**99
  damaged = {'norms': norms, 'coordinates': g}
  found = server(state, damaged, cohort)
  assert digest.digest(found) == digest.digest(expected)


def test_a_client_that_diverged_is_as_good_as_absent():
  method, state, *_ = small()
  cohort = cohort_of([3, 8])
  far = jax.tree.map(lambda x: np.float32(1e25) * x, normals(seed=2))
  messages = messages_of(method, state, [normals(seed=1), far], cohort)
  server = jax.jit(method.server)
  absent = cohort._replace(weight=np.array([1, 0], np.float32))
  assert digest.digest(server(state, messages, cohort)) == digest.digest(
    server(state, messages, absent)
  )


def test_a_step_out_of_range_is_reported():
  method, state, cohort, _, messages = small()
  norms = messages['norms'].copy()
  norms[0, 0] = 2.0**90
  after = jax.jit(method.server)(state, messages | {'norms': norms}, cohort)
  assert 'weights left their range in: a;' in str(method.check(after))


def test_no_basis_is_stored():
  """K d floats would be 17 GB; the programs need a few of K + d."""
  size, num = 1 << 18, 1 << 14
  params = {'w': np.zeros((512, 512), np.float32)}
  method = build(coordinates=num, max_block_size=1 << 14, codec='linear8')
  state = method.init(params)
  party = jax.eval_shape(lambda: method_lib.Party(*map(jnp.int32, range(3))))
  wide = lambda n, tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), tree
  )
  client = jax.jit(method.client).lower(state, (), wide(1, params), party)
  memory: Any = client.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 8 * (size + num)
  num_parties = 4
  server = jax.jit(method.server).lower(
    state, wide(num_parties, method.message(params)), wide(num_parties, party)
  )
  memory = server.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 8 * (size + num_parties * num)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'local_steps': 0}, 'local_steps must be >= 1, got 0'),
    ({'coordinates': 0}, r'coordinates must be in \[1, 2\*\*30\), got 0'),
    ({'coordinates': 2**30}, r'coordinates must be in .*, got 1073741824'),
    ({'max_block_size': 63}, 'max_block_size must be >= 64, got 63'),
    ({'allocation': 'even'}, "allocation must be one of bytes, .*, got 'even'"),
    ({'codec': 'log9'}, "codec must be one of log8, .*, got 'log9'"),
    ({'distribution': 'cauchy'}, "distribution must be one of .*'cauchy'"),
    ({'distribution': 'rank1'}, "distribution must be one of .*'rank1'"),
    ({'server_lr': 0.0}, 'server_lr must be > 0, got 0.0'),
    ({'server_lr': -1.0}, 'server_lr must be 0 or in .*, got -1.0'),
    ({'server_lr': lambda r: 1.0}, 'server_lr is a schedule: num_rounds'),
    (
      {'server_lr': 0.5, 'server_optimizer': optax.sgd(1.0)},
      'server_lr does not apply to a server_optimizer',
    ),
  ],
)
def test_mistakes_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    build(**changes)


def test_fewer_coordinates_than_blocks():
  method = build(coordinates=4)
  for f in (method.init, method.message):
    with pytest.raises(ValueError, match='coordinates must be >= 5.* got 4'):
      f(normals())
