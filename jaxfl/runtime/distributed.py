"""Several processes that run one experiment, usually one on each host.

Every process runs the same rounds and holds the same state; `mesh` says which
clients it runs. Process 0, the first, alone reads and writes files. What the
others need to know of them it tells them, with the functions of this module:
at the start of a run, for rounds that the log already holds, and when replicas
are compared. All processes must call these functions, in the same order; in a
single process they return at once.

    distributed.initialize()  # before anything else that JAX does
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxfl import log as log_lib
from jaxfl import typing as jt
from jaxfl import wire


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the processes of a run; a thin form of `jax.distributed.initialize`.

  On TPU pods, under Slurm, Open MPI and Kubernetes it needs no arguments. With
  them, no cluster is looked for.

  Args:
    coordinator_address: `host:port` of process 0.
    num_processes: of the run.
    process_id: of this process, in [0, num_processes).

  Raises:
    ValueError: if the arguments don't fit together, or if the processes can't
      be joined.
  """
  given = {
    'coordinator_address': coordinator_address,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ValueError(
      f'{", ".join(given)} go together: {", ".join(missing)} is missing'
    )
  if num_processes is not None and process_id is not None:
    if num_processes < 1:
      raise ValueError(f'num_processes must be >= 1, got {num_processes}')
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'process_id must be in [0, {num_processes}), got {process_id}'
      )
  # its watch for SIGTERM would keep the signal from the program
  if hasattr(jax.config, 'jax_enable_preemption_service'):
    jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      **given, cluster_detection_method=None if missing else 'deactivate'
    )
  except (RuntimeError, ValueError) as error:
    hint = ''
    if missing:
      hint = f'; outside of a cluster, give {", ".join(given)}'
    raise ValueError(f'processes cannot be joined: {error}{hint}') from error
  exchange('')  # connects them while they are all here; see `mesh.make`


def is_first() -> bool:
  """Whether this is the process that reads and writes files."""
  return jax.process_index() == 0


def share(tree: Any) -> Any:
  """Process 0's arrays, bit for bit, in all processes.

  Args:
    tree: pytree of arrays; in the others only structure, shapes and dtypes
      count, which must be those of process 0.

  Returns:
    The pytree of process 0, as NumPy arrays.
  """

  def one(x):
    x = np.asarray(jax.device_get(x))
    # as bytes: the transport adds zeros, which would turn -0.0 into 0.0
    row = np.frombuffer(x.tobytes(), np.uint8)
    row = np.asarray(multihost_utils.broadcast_one_to_all(row))
    return row.view(x.dtype).reshape(x.shape)

  return tree if jax.process_count() == 1 else jax.tree.map(one, tree)


def share_int(value: int) -> int:
  """The integer of process 0 in all processes."""
  return int(share(np.array([value], np.int64))[0])


def share_bytes(data: bytes) -> bytes:
  """The bytes of process 0 in all processes; what others give is ignored."""
  if jax.process_count() == 1:
    return data
  size = share_int(len(data))
  mine = data if is_first() else bytes(size)
  return share(np.frombuffer(mine, np.uint8)).tobytes() if size else b''


def exchange(text: str) -> list[str]:
  """The texts of all processes, in the order of the processes."""
  if jax.process_count() == 1:
    return [text]
  gather = multihost_utils.process_allgather
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = np.asarray(gather(np.array([data.size], np.int32)))[:, 0]
  if not sizes.max():
    return ['' for _ in sizes]
  rows = gather(np.pad(data, (0, sizes.max() - data.size)))
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]


@contextlib.contextmanager
def leave_at_once(*alike: type[BaseException]) -> Iterator[None]:
  """Ends this process at once when an error leaves the block.

  Otherwise it would wait at its end for the others, for minutes, and they for
  it. In a single process, errors pass.

  Args:
    *alike: errors that all processes raise at the same place; they pass.
  """
  try:
    yield
  except alike:
    raise
  except BaseException:
    if jax.process_count() > 1:
      traceback.print_exc()
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(1)
    raise


@contextlib.contextmanager
def together(error_type: type[Exception] = ValueError) -> Iterator[None]:
  """Runs a block in all processes; if it fails in one, it fails in all.

  So that none waits for another that has given up.

  Args:
    error_type: the errors that are told to the others. Its constructor takes a
      text.

  Raises:
    error_type: the error of this process, or else the first one of another.
  """
  own = None
  try:
    yield
  except error_type as error:
    own = error
  texts = exchange('' if own is None else str(own) or repr(own))
  if own is not None:
    raise own
  for process, text in enumerate(texts):
    if text:
      raise error_type(f'process {process}: {text}')


class SharedLog:
  """The log of process 0, for `simulate` in all processes.

  Attributes:
    num_rounds: rounds that it holds.
  """

  def __init__(self, log: log_lib.RoundLog | None):
    """`log` is open for appending in process 0, and None in the others."""
    self._log = log
    self.num_rounds = share_int(0 if log is None else log.num_rounds)

  def read(self, round: int, like: jt.Message) -> log_lib.Record:
    """As `RoundLog.read`; all processes get the round that process 0 reads."""
    spec = wire.describe(like)
    parts = [b'', b'', b'']
    if self._log is not None:
      record = self._log.read(round, like)
      lead = (len(record.ids),)
      rows = wire.pack(record.messages, spec, lead=lead)
      parts = [x.tobytes() for x in (record.ids, record.weights, rows)]
    ids, weights, rows = [share_bytes(part) for part in parts]
    rows = np.frombuffer(rows, np.uint8)
    return log_lib.Record(
      round,
      np.frombuffer(ids, np.int32),
      np.frombuffer(weights, np.float32),
      wire.unpack(rows.reshape(len(ids) // 4, -1), spec, like),
    )

  def append(self, round: int, ids, weights, messages: jt.Message) -> None:
    """As `RoundLog.append`, in process 0."""
    if self._log is not None:
      self._log.append(round, ids, weights, messages)
    self.num_rounds += 1
