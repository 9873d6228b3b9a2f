"""Clients on a device mesh, of one host or of many; only messages cross.

A mesh has two axes. Clients are spread over `clients`; over `model`, the
weights of a replica may be split. A round has three programs, compiled apart:

  * client: `shard_map` over this host's part of the mesh. Every device runs
    blocks of clients under `vmap`, with the shapes and thus the bits of the
    simulator. There is no communication along `clients` in it.
  * gather: the messages, and nothing else, move to all devices. It is the only
    program in which hosts meet, and it runs once a round.
  * server: every host steps its own replica, without communication along
    `clients`.

A host loads the batches of its own clients only. Its state is in no array that
other hosts share: it can be looked at, saved and evaluated as on one host.

    mesh = mesh_lib.make(num_client_devices=8)
    programs = mesh_lib.compile_method(method, mesh)
    simulate.simulate(method, ..., programs=programs)

With one model device, digests are those of the simulator with the same
`block_size`. With more, a loss is summed in another order: its last bits, and
with them a message, may differ from the simulator's; replicas agree all the
same, and the log replays. Directions and exact updates need no communication
along `model`, see `spec_of`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfl import method as method_lib
from jaxfl.runtime import mesh_clients, simulate
from jaxfl.runtime.mesh_clients import CLIENTS

MODEL = 'model'
_WHOLE_ROWS = 64  # rows of a tensor that share a hash, see `jaxfl.kernels.xla`


def make(
  num_client_devices: int | None = None, num_model_devices: int = 1
) -> Mesh:
  """A mesh over the devices of all processes.

  More client devices than clients are allowed; what is left over repeats work.

  Args:
    num_client_devices: length of the axis `clients`; default: all devices. Each
      process has the same share of it.
    num_model_devices: length of the axis `model`, within a process.

  Returns:
    A mesh whose first axis is ordered by process.

  Raises:
    ValueError: if that many devices are not there or cannot be shared out.
  """
  for name, n in (
    ('num_client_devices', num_client_devices),
    ('num_model_devices', num_model_devices),
  ):
    if n is not None and n < 1:
      raise ValueError(f'{name} must be >= 1, got {n}')
  found: dict[int, list] = {}
  for device in jax.devices():
    found.setdefault(device.process_index, []).append(device)
  processes = [found[index] for index in sorted(found)]
  each = min(len(devices) for devices in processes)
  if num_client_devices is None:
    if each % num_model_devices:
      raise ValueError(
        f'num_model_devices={num_model_devices} does not divide the {each}'
        ' devices of a process'
      )
    num_client_devices = each // num_model_devices * len(processes)
  rows, rest = divmod(num_client_devices, len(processes))
  if rest:
    raise ValueError(
      f'num_client_devices={num_client_devices} is not a multiple of the'
      f' {len(processes)} processes'
    )
  if rows * num_model_devices > each:
    raise ValueError(
      f'num_client_devices={num_client_devices} with'
      f' num_model_devices={num_model_devices} needs'
      f' {rows * num_model_devices} devices in each of {len(processes)}'
      f' processes; there are {each}'
    )
  devices = [
    device
    for devices in processes
    for device in devices[: rows * num_model_devices]
  ]
  shape = (num_client_devices, num_model_devices)
  mesh = Mesh(np.array(devices).reshape(shape), (CLIENTS, MODEL))
  if len(processes) > 1:
    # connects all devices now: the first time, some transports don't wait long
    zeros = mesh_clients.split(mesh, np.zeros(rows, np.uint8))
    jax.block_until_ready(mesh_clients.gather(mesh)(zeros))
  return mesh


def spec_of(shape: tuple[int, ...], num_model_devices: int) -> PartitionSpec:
  """How a tensor is split over the axis `model`.

  Along its last dimension, or along its first one in pieces of whole groups of
  64 rows (see `jaxfl.kernels.xla`); along the longer one if both can be split.
  Then no part of a direction is needed on two devices. Vectors, and what does
  not divide, are not split.
  """
  n = num_model_devices
  if n == 1 or len(shape) < 2 or not math.prod(shape):
    return PartitionSpec()
  last = shape[-1] % n == 0
  first = shape[0] % n == 0
  first = first and math.prod(shape[:-1]) // n % _WHOLE_ROWS == 0
  if first and (shape[0] > shape[-1] or not last):
    return PartitionSpec(MODEL)
  if last:
    return PartitionSpec(*[None] * (len(shape) - 1), MODEL)
  return PartitionSpec()


class Program:
  """A compiled program that first puts its arguments on the mesh.

  Attributes:
    jitted: the program itself, a function under `jax.jit`.
    place: arguments -> arguments on the mesh.
  """

  def __init__(self, jitted: Any, place: Callable[..., tuple]):
    self.jitted, self.place = jitted, place

  def __call__(self, *args):
    return self.jitted(*self.place(*args))


def compile_method(
  method: method_lib.Method,
  mesh: Mesh,
  *,
  build: Callable[[Any], method_lib.Method] | None = None,
  frozen: Any = None,
  donate: bool = False,
) -> simulate.Programs:
  """Compiles a method for a mesh.

  Args:
    method: the method.
    mesh: from `make`.
    build: see `simulate.compile_method`.
    frozen: pytree of arrays; split over `model` like the parameters.
    donate: see `simulate.compile_method`.

  Returns:
    Programs with which `simulate.simulate` runs on the mesh. Of several
    processes, every one must run it. A log is written by one of them; the
    others read it (see `distributed.SharedLog`). The loss of a round is the
    mean over the clients of the process.

  Raises:
    ValueError: if only one of `build` and `frozen` is given. In a round: if no
      tensor can be split over `model`, or if a method with private client
      states runs on several processes.
  """
  simulate.check_frozen(build, frozen)
  here, num_model = mesh.local_mesh, mesh.shape[MODEL]
  put = lambda tree, spec: jax.device_put(tree, NamedSharding(here, spec))
  shardings = functools.partial(
    jax.tree.map,
    lambda x: NamedSharding(here, spec_of(np.shape(x), num_model)),
  )
  held = ()  # the first argument of the client's program, if there is `frozen`
  if build is not None:
    held = (jax.device_put(frozen, shardings(frozen)),)

  def put_state(state):
    leaves = jax.tree.leaves((shardings(state), shardings(held)))
    if num_model > 1 and all(x.is_fully_replicated for x in leaves):
      raise ValueError(
        f'num_model_devices={num_model}: no tensor of the model can be split'
        ' in so many pieces'
      )
    return jax.device_put(state, shardings(state))

  def client(*args):
    *held, state, local, batches, party = args
    run = (build(*held) if build else method).client
    return jax.vmap(run, (None, 0, 0, 0))(state, local, batches, party)

  def server(state, messages, cohort):
    new = method.server(state, messages, cohort)
    return jax.lax.with_sharding_constraint(new, shardings(new))

  whole, split = PartitionSpec(), PartitionSpec(CLIENTS)
  sharded = jax.shard_map(
    client,
    mesh=here,
    in_specs=(*(whole for _ in held), whole, split, split, split),
    out_specs=split,
    # within a client, the partitioner splits the work over `model`
    axis_names={CLIENTS} if num_model > 1 else set(here.axis_names),
    check_vma=False,  # checked, the gradient of the state sums over clients
  )
  programs = simulate.Programs(
    client=Program(
      jax.jit(sharded, out_shardings=NamedSharding(here, split)),
      lambda state, *rest: (*held, put_state(state), *put(rest, split)),
    ),
    server=Program(
      simulate.jit_server(server, donate),
      lambda state, *rest: (put_state(state), *put(rest, whole)),
    ),
  )
  run = functools.partial(
    mesh_clients.run_clients, mesh, mesh_clients.gather(mesh), method.message
  )
  return programs._replace(run_clients=run)


def pmap_client(
  method: method_lib.Method, devices: Sequence[Any] | None = None
) -> Callable[..., Any]:
  """`method.client` under `jax.pmap`, for those who ask for it by name.

  `pmap` is in maintenance mode; the mesh is what we build on. The bits are the
  same.

  Args:
    method: the method.
    devices: one per row of the arguments; default: those of this process.

  Returns:
    state, local[D, B], batches[D, B], party[D, B] -> message[D, B], local,
    metrics: B clients on each of D devices.
  """
  over_clients = jax.vmap(method.client, in_axes=(None, 0, 0, 0))
  return jax.pmap(
    over_clients,
    axis_name=CLIENTS,
    in_axes=(None, 0, 0, 0),
    devices=devices or jax.local_devices(),
  )


def on_one_device(tree: Any) -> Any:
  """A tree that is whole on every device, on one of them, without a copy.

  One that is split stays as it is.
  """
  arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
  if not all(x.is_fully_replicated for x in arrays):
    return tree
  one = lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x
  return jax.tree.map(one, tree)
