"""What each of two processes does in `test_two_processes`.

python -m tests.two_processes PROCESS_ID PORT DIRECTORY
"""

import contextlib
import json
import pathlib
import sys

import numpy as np

from jaxfl.runtime import distributed


def refused(call, *args):
  """The text of the ValueError that a call raises."""
  try:
    call(*args)
  except ValueError as error:
    return str(error)
  raise AssertionError('nothing was refused')


def main(process_id: int, port: str, directory: pathlib.Path) -> None:
  distributed.initialize(f'127.0.0.1:{port}', 2, process_id)
  # not before: these modules compute
  import jax

  from jaxfl.log import RoundLog
  from jaxfl.runtime import mesh as mesh_lib
  from jaxfl.runtime import mesh_clients
  from tests import test_mesh as common
  from tests import test_two_processes as test

  found = {}

  # what processes tell each other
  @distributed.together()
  def fails_in_one():
    if process_id == 1:
      raise ValueError('no data here')

  found['together'] = refused(fails_in_one)
  found['exchange'] = distributed.exchange('é' * process_id)
  found['bytes'] = distributed.share_bytes(b'\x00\xff' * (3 - process_id)).hex()
  mine = {
    'a': np.array([-0.0, process_id, np.nan], np.float32),
    'b': np.array(2**40 + process_id, np.int64),
    'c': np.array([process_id == 0]),
  }
  shared = distributed.share(mine)
  found['share'] = [
    [x.tobytes().hex(), x.dtype.name, list(x.shape)]
    for x in jax.tree.leaves(shared)
  ]

  # meshes
  found['shape'] = dict(mesh_lib.make(None, 2).shape)
  found['odd'] = refused(mesh_lib.make, 3)
  found['large'] = refused(mesh_lib.make, 2, 3)
  mesh = mesh_lib.make()
  found['processes'] = [d.process_index for d in mesh.devices.flat]
  rows = np.full((2, 2), process_id + 7, np.uint8)
  split = mesh_clients.split(mesh, rows)
  gather = mesh_clients.gather(mesh).lower(split).compile()
  found['collectives'] = common.collectives(gather)
  found['gathered'] = np.asarray(gather(split)).tolist()

  # runs: the first half of it, then all of it with the first half from the log
  def run(name, num_rounds, **more):
    method, loaded = common.built(name), set()
    batch_fn = common.table.batch_fn(method.num_batches)

    def own(round, client):
      loaded.add((round, client))
      return batch_fn(round, client)

    rounds = common.run(
      method, mesh_lib.compile_method(method, mesh), num_rounds,
      batch_fn=own, **test.COHORT, **more,
    )  # fmt: skip
    return [r[0] for r in common.facts(rounds)], sorted(loaded)

  path = directory / 'rounds.log'
  header = test.header(common.built('spsa'))
  for num_rounds in (2, 5):
    with contextlib.ExitStack() as stack:
      log = None
      if distributed.is_first():
        new = not path.exists()
        log = RoundLog.create(path, header) if new else RoundLog.open(path, 'a')
        stack.enter_context(log)
      digests, loaded = run('spsa', num_rounds, log=distributed.SharedLog(log))
    found[f'spsa {num_rounds}'] = {'digests': digests, 'loaded': loaded}
  found['fed_avg'] = run('fed_avg', 3)[0]

  counting = common.Counting.build()
  programs = mesh_lib.compile_method(counting, mesh)
  found['private'] = refused(common.run, counting, programs)
  out = directory / f'{process_id}.json'
  out.write_text(json.dumps(found))

  # an error in one process ends both
  def broken(round, client):
    if round == 1 and process_id == 1:
      raise RuntimeError('a client broke')
    return common.table.batch_fn(2)(round, client)

  method = common.built('spsa')
  with distributed.leave_at_once():
    common.run(method, mesh_lib.compile_method(method, mesh), batch_fn=broken)


if __name__ == '__main__':
  main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
