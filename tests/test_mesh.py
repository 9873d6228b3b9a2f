"""The mesh: the simulator's bits, and nothing but messages between devices."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxfl import digest, keys, log, methods, perturb, wire
from jaxfl import method as method_lib
from jaxfl.methods import fed_avg, spsa
from jaxfl.runtime import mesh as mesh_lib
from jaxfl.runtime import mesh_clients, replay, simulate
from tests import methods_table as table
from tests.test_simulate import Counting

METHODS = {
  path.stem for path in pathlib.Path(methods.__file__).parent.iterdir()
}
# one case of every method; the others are slow tests
CASES = [
  pytest.param(name, marks=[] if name in METHODS else pytest.mark.slow)
  for name in table.CASES
]
OPS = (
  'all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute'
  '|ragged-all-to-all|reduce-scatter'
)
PARAMS = {'w': np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)}


def loss_fn(params, batch):
  return jnp.sum(jnp.square(params['w'] - 0.25)) + jnp.mean(batch['noise'])


built = functools.cache(lambda name: table.CASES[name].build(loss_fn))
simulated = functools.cache(simulate.compile_method)


def run(method, programs, num_rounds=3, *, params=PARAMS, **changes):
  """Rounds of a small run; 5 slots, of which some stay empty."""
  settings = {
    'num_clients': 6, 'participation_rate': 0.84, 'dropout_rate': 0.2,
    'weights': (1, 2, 3, 4, 5, 6), 'block_size': 2, 'log': None,
    'batch_fn': table.batch_fn(method.num_batches),
  } | changes  # fmt: skip
  more = {name: settings.pop(name) for name in ('block_size', 'log')}
  batch_fn = settings.pop('batch_fn')
  return list(
    simulate.simulate(
      method, method.init(params), batch_fn, simulate.Population(**settings),
      num_rounds=num_rounds, programs=programs, **more,
    )
  )  # fmt: skip


def facts(rounds):
  """What must not depend on the runtime."""
  return [
    (digest.digest(r.state), r.loss, r.bytes_up, r.bytes_down) for r in rounds
  ]


def arguments(method, num_clients, params=PARAMS):
  """Of a client program: state, local, batches, party."""
  state = method.init(params)
  batch_fn = table.batch_fn(method.num_batches)
  batches = [batch_fn(0, i) for i in range(num_clients)]
  ids = np.arange(num_clients, dtype=np.int32)
  ones = np.ones(num_clients, np.float32)
  party = method_lib.Party(ids, 0 * ids, ones)
  return state, (), jax.tree.map(lambda *xs: np.stack(xs), *batches), party


def compiled(program, *args):
  """A program compiled for some arguments."""
  jitted = program.jitted.lower(*program.place(*args)).compile()
  return mesh_lib.Program(jitted, program.place)


def collectives(executable):
  """(dtype, number of elements) of all collectives' results in the HLO."""
  results = re.findall(
    rf' = (.*?) (?:{OPS})(?:-start)?\(', executable.as_text()
  )
  arrays = [a for r in results for a in re.findall(r'(\w+)\[([\d,]*)\]', r)]
  size = lambda dims: math.prod(int(n) for n in dims.split(',') if n)
  return sorted((dtype, size(dims)) for dtype, dims in arrays)


def test_collectives_are_found():
  mesh = mesh_lib.make(8)
  total = jax.jit(
    jax.shard_map(
      lambda x: jax.lax.psum(x, 'clients'), mesh=mesh,
      in_specs=PartitionSpec('clients'), out_specs=PartitionSpec(),
    )
  )  # fmt: skip
  x = jnp.zeros((16, 3))
  assert collectives(total.lower(x).compile()) == [('f32', 6)]


@pytest.mark.parametrize('num_devices', [1, 2, 4])
def test_digests_are_those_of_the_simulator(num_devices):
  """5 clients in blocks of 2: left-over devices, left-over slots."""
  method, seen, runs = built('spsa'), {}, {}
  programs = mesh_lib.compile_method(method, mesh_lib.make(num_devices))
  for name, programs_of_name in (
    ('simulator', simulated(method)), ('mesh', programs)
  ):  # fmt: skip
    seen[name] = []

    def batch_fn(round, client, calls=seen[name]):
      calls.append((round, client))
      return table.batch_fn(method.num_batches)(round, client)

    runs[name] = facts(run(method, programs_of_name, batch_fn=batch_fn))
  assert runs['mesh'] == runs['simulator']
  assert len({r[0] for r in runs['mesh']}) == 3
  # left-over devices load nothing
  assert seen['mesh'] == seen['simulator']
  # cohorts of other sizes, and the state of init, compile nothing again
  assert programs.client.jitted._cache_size() == 1
  assert programs.server.jitted._cache_size() == 1


@pytest.mark.parametrize('name', CASES)
def test_only_messages_cross(name):
  """All that moves between devices in a run, from the compiled programs."""
  method, mesh = built(name), mesh_lib.make(8)
  gather, sent = mesh_clients.gather(mesh), []

  def spy(messages):
    sent.append(messages)
    return gather(messages)

  programs = mesh_lib.compile_method(method, mesh)
  state, local, batches, party = arguments(method, 16)
  like = method.message(state.params)
  messages = jax.tree.map(lambda x: np.zeros((5, *x.shape), x.dtype), like)
  cohort = jax.tree.map(lambda x: x[:5], party)
  programs = simulate.Programs(
    client=compiled(programs.client, state, local, batches, party),
    server=compiled(programs.server, state, messages, cohort),
    run_clients=functools.partial(
      mesh_clients.run_clients, mesh, spy, method.message
    ),
  )
  there = run(method, programs, 2)
  here = run(method, simulated(method), 2)
  if table.CASES[name].exact:
    assert facts(there) == facts(here)
  else:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      there[-1].state, here[-1].state,
    )  # fmt: skip
  assert len(sent) == 2  # once a round
  assert collectives(programs.client.jitted) == []
  assert collectives(programs.server.jitted) == []
  # one slot on each device
  size = wire.payload_bytes(wire.describe(like))
  assert collectives(gather.lower(sent[0]).compile()) == [('u8', 8 * size)]


def test_rounds_in_which_nobody_answers():
  method = built('fed_avg')
  few = {'num_clients': 2, 'weights': None, 'dropout_rate': 0.7}
  programs = mesh_lib.compile_method(method, mesh_lib.make(8))
  there = run(method, programs, 6, **few)
  here = run(method, simulated(method), 6, **few)
  assert {0} < {r.forwards for r in there}
  assert [r.loss is None for r in there] == [r.loss is None for r in here]
  assert there[-1].bytes_up == here[-1].bytes_up


def test_private_states_follow_their_clients():
  method, more = Counting.build(), {'block_size': 1, 'params': table.params()}
  programs = mesh_lib.compile_method(method, mesh_lib.make(4))
  here = run(method, simulated(method), 4, **more)[-1]
  there = run(method, programs, 4, **more)[-1]
  assert len(np.unique(here.local['rounds'])) > 1
  np.testing.assert_array_equal(here.local['rounds'], there.local['rounds'])


def test_clients_are_widened_in_their_blocks_only():
  """The loss tells to which length a client's texts are padded."""

  def loss_fn(params, batch):
    return jnp.sum(params['w']) * batch['mask'].shape[-1]

  def batches(round, client):
    del round  # Unused.
    return {'mask': np.ones((1, 3, [2, 8, 4, 8, 2, 8][client]), np.int8)}

  method = fed_avg.fed_avg(loss_fn, client_optimizer=optax.sgd(0.1))
  more = {'params': {'w': np.ones(4, np.float32)}, 'batch_fn': batches}
  programs = mesh_lib.compile_method(method, mesh_lib.make(4))
  ends = [
    facts(run(method, p, 2, block_size=b, **more))
    for p, b in ((None, 1), (programs, 1), (None, 2))
  ]
  assert ends[0] == ends[1]
  assert ends[0] != ends[2]


def test_frozen_tensors_are_arguments_on_the_mesh():
  frozen = {'shift': np.linspace(0, 1, 5, dtype=np.float32)}

  def build(frozen):
    def loss_fn(params, batch):
      shifted = params['w'] - frozen['shift'][None]
      return jnp.sum(jnp.square(shifted)) + jnp.mean(batch['noise'])

    return fed_avg.fed_avg(loss_fn, client_optimizer=optax.sgd(0.1))

  method, both = build(frozen), {'build': build, 'frozen': frozen}
  mesh = mesh_lib.make(2)
  here = run(method, simulate.compile_method(method, **both), 2)
  there = run(method, mesh_lib.compile_method(method, mesh, **both), 2)
  assert facts(here) == facts(there)
  with pytest.raises(ValueError, match='frozen is missing'):
    mesh_lib.compile_method(method, mesh, build=build)


def test_pmap_gives_the_messages_of_the_mesh():
  method = built('fed_avg')
  state, local, batches, party = arguments(method, 8)
  mine = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), (batches, party))
  pmapped = mesh_lib.pmap_client(method, jax.devices()[:4])
  message, _, metrics = pmapped(state, local, *mine)
  programs = mesh_lib.compile_method(method, mesh_lib.make(4))
  other, _, others = programs.client(state, local, batches, party)
  assert message['w'].shape == (4, 2, 3, 5)
  np.testing.assert_array_equal(message['w'].reshape(8, 3, 5), other['w'])
  np.testing.assert_array_equal(metrics['loss'].reshape(8), others['loss'])


# Weights that are split over a second axis.


@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((), ()),
    ((8,), ()),  # vectors
    ((3, 5), ()),  # nothing divides
    ((0, 4), ()),
    ((7, 6), (None, 'model')),
    ((64, 6), (None, 'model')),  # 32 rows each are half a group
    ((128, 6), ('model',)),
    ((128, 256), (None, 'model')),  # the longer one
    ((127, 5), ()),
    ((128, 5), ('model',)),
    ((2, 64, 5), ('model',)),
    ((12, 64, 130), (None, None, 'model')),
  ],
)
def test_tensors_are_split_in_whole_groups_of_rows(shape, spec):
  assert mesh_lib.spec_of(shape, 2) == PartitionSpec(*spec)
  assert mesh_lib.spec_of(shape, 1) == PartitionSpec()


WIDE = {
  'embed': np.linspace(-1, 1, 128 * 6).reshape(128, 6).astype(np.float32),
  'w': np.linspace(-1, 1, 6 * 10).reshape(6, 10).astype(np.float32),
}


def wide_loss(params, batch):
  rows = params['embed'][jnp.arange(16) * 8]
  out = jnp.tanh(rows @ params['w'])
  return jnp.mean(jnp.square(out - jnp.mean(batch['noise'])))


WIDE_SPSA = spsa.spsa(wide_loss, table.ROOT, learning_rate=0.05, mu=0.01)


@functools.cache
def wide_programs():
  """On 2 x 2 devices, compiled for the rounds of `run`."""
  programs = mesh_lib.compile_method(WIDE_SPSA, mesh_lib.make(2, 2))
  state, _, _, cohort = arguments(WIDE_SPSA, 5, WIDE)
  messages = np.zeros((5, 1), np.uint8)
  return programs._replace(
    client=compiled(programs.client, *arguments(WIDE_SPSA, 4, WIDE)),
    server=compiled(programs.server, state, messages, cohort),
  )


def test_split_weights_stay_replicas(tmp_path):
  method, mesh = WIDE_SPSA, mesh_lib.make(2, 2)
  header = log.Header(
    spec=keys.SPEC,
    base_digest=digest.digest(WIDE),
    config={},
    params=wire.describe(WIDE),
    message=wire.describe(method.message(WIDE)),
  )
  with log.RoundLog.create(tmp_path / 'log', header) as live:
    end = run(method, wide_programs(), log=live, params=WIDE)[-1].state
  for name, spec in (('embed', ('model',)), ('w', (None, 'model'))):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    assert end.params[name].sharding.is_equivalent_to(sharding, 2)
  # all copies of all parts
  for x in jax.tree.leaves(end):
    whole = np.asarray(x)
    for shard in x.addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[shard.index])
  # one device replays what four have done, bit for bit
  with log.RoundLog.open(tmp_path / 'log') as read:
    *_, (_, again) = replay.replay(
      simulated(method).server, method.init(WIDE), read,
      method.message(WIDE), num_slots=5,
    )  # fmt: skip
  assert digest.digest(end) == digest.digest(again)
  assert digest.digest(end.params) != digest.digest(method.init(WIDE).params)


def test_split_weights_exchange_no_directions():
  """Activations and losses within a client; is a weight out of its range?"""
  inside = collectives(wide_programs().client.jitted)
  assert {dtype for dtype, _ in inside} == {'f32'}
  flags = collectives(wide_programs().server.jitted)
  assert {dtype for dtype, _ in flags} == {'pred'}


@pytest.mark.parametrize(
  ('shape', 'spec', 'silent'),
  [
    ((128, 6), ('model',), True),
    ((7, 6), (None, 'model'), True),
    ((64, 6), ('model',), False),  # half a group of rows each
  ],
)
def test_directions_of_split_tensors_need_no_communication(shape, spec, silent):
  mesh = mesh_lib.make(1, 2)
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  assert (mesh_lib.spec_of(shape, 2) == sharding.spec) is silent
  add = jax.jit(perturb.perturb, out_shardings={'w': sharding})
  params = {'w': jax.device_put(np.zeros(shape, np.float32), sharding)}
  found = collectives(add.lower(params, table.ROOT, 0.5).compile())
  assert (found == []) is silent


def test_split_first_order_method_is_close():
  method = fed_avg.fed_avg(wide_loss, client_optimizer=optax.sgd(0.1))
  programs = mesh_lib.compile_method(method, mesh_lib.make(2, 2))
  here = run(method, simulate.compile_method(method), params=WIDE)[-1].state
  there = run(method, programs, params=WIDE)[-1].state
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), here, there
  )


def test_whole_trees_are_taken_from_one_device():
  mesh = mesh_lib.make(2, 2)
  put = lambda x, *spec: jax.device_put(
    x, NamedSharding(mesh, PartitionSpec(*spec))
  )
  x = np.arange(8, dtype=np.float32).reshape(4, 2)
  one = mesh_lib.on_one_device({'x': put(x), 'y': x})
  assert one['x'].devices() == {jax.devices()[0]}
  np.testing.assert_array_equal(one['x'], x)
  split = mesh_lib.on_one_device({'x': put(x), 'y': put(x, 'model')})
  assert all(len(v.devices()) == 4 for v in split.values())


# Mistakes.


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((0,), 'num_client_devices must be >= 1, got 0'),
    ((1, 0), 'num_model_devices must be >= 1, got 0'),
    ((9,), r'num_client_devices=9 with .* needs 9 devices .*there are 8'),
    ((4, 3), r'num_client_devices=4 with num_model_devices=3 needs 12'),
    ((None, 3), 'num_model_devices=3 does not divide the 8 devices'),
  ],
)
def test_meshes_that_do_not_fit_are_refused(shape, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.make(*shape)


def test_a_mesh_takes_all_devices_unless_told_otherwise():
  assert dict(mesh_lib.make().shape) == {'clients': 8, 'model': 1}
  assert dict(mesh_lib.make(None, 2).shape) == {'clients': 4, 'model': 2}
  assert dict(mesh_lib.make(2, 3).shape) == {'clients': 2, 'model': 3}


def test_a_model_axis_that_splits_nothing_is_refused():
  programs = mesh_lib.compile_method(built('spsa'), mesh_lib.make(1, 2))
  with pytest.raises(ValueError, match='num_model_devices=2: no tensor of the'):
    run(built('spsa'), programs)
