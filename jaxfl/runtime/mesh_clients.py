"""The clients of a round on a mesh: shared out, run, and their messages moved.

Processes take consecutive parts of the cohort, in whole blocks. A block is what
the simulator would run at once; a process runs as many blocks at once as it has
client devices, if their batches have equal shapes. Messages move as bytes, the
payload of their frames: no compiler widens them on the way.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfl import wire
from jaxfl.runtime import simulate

CLIENTS = 'clients'  # the axis of the mesh


def gather(mesh: Mesh) -> Any:
  """The program that moves messages, and nothing else, to all devices.

  Args:
    mesh: from `mesh.make`.

  Returns:
    uint8[S, N] -> the same; the argument is split along S over `clients`, the
    result is whole on every device. A compiled identity.
  """
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.jit(lambda rows: rows, out_shardings=whole)


def split(mesh: Mesh, rows: np.ndarray) -> jax.Array:
  """The rows of this process as its part of an argument of `gather`."""
  sharding = NamedSharding(mesh, PartitionSpec(CLIENTS))
  return jax.make_array_from_process_local_data(sharding, rows)


def check_private(mesh: Mesh, local: Any) -> None:
  """Raises ValueError for private client states on several processes.

  A client runs where the cohort of a round puts it: its private state would
  have to follow it to another process.
  """
  processes = _processes(mesh)
  if len(processes) > 1 and jax.tree.leaves(local):
    raise ValueError(
      'a method with private client states runs in one process only, not in'
      f' {len(processes)}: they must not leave the process that made them'
    )


def run_clients(
  mesh: Mesh,
  gather: Any,
  like: Any,
  programs: simulate.Programs,
  state: Any,
  local: Any,
  batch_fn: simulate.BatchFn,
  population: simulate.Population,
  round: int,
  ids: np.ndarray,
  block_size: int,
):
  """`simulate.run_clients` on a mesh.

  `batch_fn` is called for the clients of this process only. Arguments after the
  first three are those of the simulator.

  Args:
    mesh: from `mesh.make`.
    gather: the compiled program.
    like: params -> shape of a message.

  Returns:
    Messages [C, ...] of all clients `ids`, new local states, and the mean loss
    of the clients of this process; None if it has none.

  Raises:
    ValueError: see `check_private`.
  """
  check_private(mesh, local)
  if not len(ids):
    return (), local, None
  processes = _processes(mesh)
  share = lambda n: -(-n // (block_size * len(processes))) * block_size
  n = share(len(ids))
  parts = [ids[i * n : (i + 1) * n] for i in range(len(processes))]
  own = parts[processes.index(jax.process_index())]
  blocks = simulate.blocks(batch_fn, population, round, own, block_size)
  width = mesh.local_mesh.shape[CLIENTS]
  done = _run(programs, state, local, blocks, width)
  # slots for a full cohort: nothing is compiled again for a smaller one
  slots = -(-share(population.num_slots) // width) * width
  spec = wire.describe(like(state.params))
  rows = [wire.pack(x, spec, lead=loss.shape) for x, loss in done]
  rows.append(np.zeros((slots - len(own), wire.payload_bytes(spec)), np.uint8))
  arrived = np.asarray(gather(split(mesh, np.concatenate(rows))))
  present = np.concatenate(
    [i * slots + np.arange(len(part)) for i, part in enumerate(parts)]
  )
  messages = wire.unpack(arrived[present], spec, like(state.params))
  losses = [loss for _, loss in done]
  return (
    messages,
    local,
    float(np.concatenate(losses).mean()) if losses else None,
  )


def _run(programs, state, local, blocks, width):
  """Messages and losses of every block; changes `local`."""
  done, waiting = {}, {}

  def run(group):
    # left-over devices repeat what others do
    filled = [group[i % len(group)][1] for i in range(width)]
    stack = lambda *xs: np.concatenate(xs)
    batches = jax.tree.map(stack, *[block.batches for block in filled])
    party = jax.tree.map(stack, *[block.party for block in filled])
    mine = jax.tree.map(lambda x: x[party.id], local)
    message, mine, metrics = programs.client(state, mine, batches, party)
    result = jax.device_get((message, mine, metrics['loss']))
    size = len(party.id) // width
    for row, (number, block) in enumerate(group):
      rows = slice(row * size, row * size + len(block.ids))
      message, mine, loss = jax.tree.map(lambda x, r=rows: x[r], result)
      simulate.put_back(local, block.ids, mine)
      done[number] = message, loss

  for number, block in enumerate(blocks):
    leaves, structure = jax.tree.flatten(block.batches)
    shapes = structure, *((x.shape, x.dtype) for x in leaves)
    group = waiting.setdefault(shapes, [])
    group.append((number, block))
    if len(group) == width:
      run(waiting.pop(shapes))
  for group in waiting.values():
    run(group)
  return [done[number] for number in sorted(done)]


def _processes(mesh: Mesh) -> list[int]:
  return sorted({device.process_index for device in mesh.devices.flat})
