"""Checkpoints: the base once, then sparse snapshots, caches of the log.

A snapshot after round r holds the public state, private client states and the
ledger. It is usable if it can be read, if it has the digest that it records,
and if the log's chain had the recorded digest after round r. Anything else is
skipped: the log alone is the truth.
"""

import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jaxfl import digest as digest_lib
from jaxfl import keys
from jaxfl import log as log_lib
from jaxfl import typing as jt

_FORMAT = 1


class Snapshot(NamedTuple):
  """What a run needs to go on after `round` rounds."""

  round: int
  state: Any
  local: Any
  ledger: dict[str, float]  # running totals: bytes, passes, seconds


class Snapshots:
  """The snapshots of a run in a directory; the newest few are kept."""

  def __init__(self, directory: str | pathlib.Path, *, keep: int = 2):
    path = pathlib.Path(directory).absolute()
    path.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      path,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=False, multiprocessing_options=_alone()
      ),
    )

  def save(self, snapshot: Snapshot, log: log_lib.RoundLog) -> None:
    """Saves in the background; the log must hold the snapshot's rounds."""
    self._manager.save(
      snapshot.round,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(jax.device_get(_tree(snapshot.state))),
        local=ocp.args.StandardSave(
          jax.tree.map(np.array, _tree(snapshot.local))
        ),
        meta=ocp.args.JsonSave(
          {
            'format': _FORMAT,
            'round': snapshot.round,
            'digest': digest_lib.digest([snapshot.state, snapshot.local]),
            'log': log.digest_at(snapshot.round),
            'ledger': snapshot.ledger,
          }
        ),
      ),
      force=True,
    )

  def newest(
    self, state: Any, local: Any, log: log_lib.RoundLog
  ) -> Snapshot | None:
    """The newest usable snapshot.

    Args:
      state: a state of the run, for structure, shapes and dtypes.
      local: likewise, private client states.
      log: the run's log.

    Returns:
      A `Snapshot`, or None if there is none; warns for each one skipped.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        return self._restore(step, state, local, log)
      except Exception as error:
        logging.warning('snapshot of round %d skipped: %s', step, error)
    return None

  def _restore(self, step, state, local, log):
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(_tree(state)),
      local=ocp.args.StandardRestore(_tree(local)),
      meta=ocp.args.JsonRestore(),
    )
    restored = self._manager.restore(step, args=args)
    meta = restored['meta']
    if meta['format'] != _FORMAT:
      raise ValueError(f'format {meta["format"]}, expected {_FORMAT}')
    if step > log.num_rounds or meta['log'] != log.digest_at(step):
      raise ValueError('it does not belong to this log')
    found = _untree(state, restored['state'])
    writable = jax.tree.map(np.array, _untree(local, restored['local']))
    if digest_lib.digest([found, writable]) != meta['digest']:
      raise ValueError('its contents do not have the recorded digest')
    return Snapshot(step, found, writable, meta['ledger'])

  def close(self) -> None:
    """Waits until all saves are on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def save_base(directory: str | pathlib.Path, params: jt.Params) -> None:
  """Writes the parameters that a run starts from; they are on disk after it.

  What a crash has left of an earlier attempt is removed.
  """
  path = pathlib.Path(directory).absolute()
  for remains in [path, *path.parent.glob(f'{path.name}.orbax-*')]:
    shutil.rmtree(remains, ignore_errors=True)
  with _checkpointer() as checkpointer:
    checkpointer.save(path, _by_path(params))
  for entry in [*path.rglob('*'), path, path.parent]:
    handle = os.open(entry, os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)


def load_base(
  directory: str | pathlib.Path, spec: list, digest: str
) -> dict[str, Any]:
  """Reads the base and compares it with the digest that the log names.

  Args:
    directory: that `save_base` wrote.
    spec: `[path, dtype, shape]` of every parameter, from the log's header.
    digest: of the base, from the log's header.

  Returns:
    The parameters by path, `{'layers/w': float32[...]}`: they have the same
    directions and the same digest as the tree that was saved.

  Raises:
    ValueError: if it is missing, damaged, or another base.
  """
  path = pathlib.Path(directory).absolute()
  # told where to put them, Orbax doesn't ask for the devices they were saved on
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = {
    name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=here)
    for name, dtype, shape in spec
  }
  try:
    with _checkpointer() as checkpointer:
      found = checkpointer.restore(path, _by_path(shapes))
  except Exception as error:
    raise ValueError(f'{path}: no usable base checkpoint: {error}') from error
  params = _untree(shapes, found)
  if (got := digest_lib.digest(params)) != digest:
    raise ValueError(
      f'{path}: digest {got[:12]}, but the log starts from {digest[:12]}'
    )
  return params


def _alone() -> ocp.options.MultiprocessingOptions:
  """One process of several writes and reads, without waiting for others."""
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  this = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=this, active_processes={this}
  )


def _checkpointer() -> ocp.StandardCheckpointer:
  return ocp.StandardCheckpointer(multiprocessing_options=_alone())


def _by_path(params) -> dict[str, Any]:
  """`_tree` of the leaves in the order of their paths."""
  return _tree(dict(sorted(keys.named_leaves(params))))


def _tree(tree) -> dict[str, Any]:
  """Leaves by number: any pytree, NamedTuples and optax states too.

  An empty tree gets one placeholder, because there must be something to save.
  """
  leaves = jax.tree.leaves(tree) or [np.zeros(1, np.uint8)]
  return {f'{i:05d}': x for i, x in enumerate(leaves)}


def _untree(like, found: dict[str, Any]) -> Any:
  """The inverse of `_tree`, with the structure of `like`."""
  treedef = jax.tree.structure(like)
  leaves = [found[k] for k in sorted(found)][: treedef.num_leaves]
  return jax.tree.unflatten(treedef, leaves)
