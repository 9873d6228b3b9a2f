"""A run as a file of its own, and the weights of such a file.

See `experiments.export` for what there is in it, and which form is chosen.
"""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import models, progress, replayer, run_log, seeds_file
from experiments import workdir as workdir_lib
from experiments.config import UsageError, from_mapping
from jaxfl import checkpoint, digest, keys, master, pool, wire
from jaxfl import typing as jt
from jaxfl.models import native

# the settings that say what a run's base is
_BASE = (
  'model', 'dtype', 'pool', 'adapter', 'lora_rank', 'lora_alpha',
  'lora_targets', 'seed',
)  # fmt: skip
_LARGE = 1 << 20  # entries of a part that is rebuilt alone, at least


def make(directory: str | pathlib.Path, form: str = 'auto') -> seeds_file.Seeds:
  """What a file says of a run.

  Args:
    directory: of the run, which may be unfinished.
    form: `auto` or one of `seeds_file.FORMS`.

  Raises:
    UsageError: if there is no run, it is damaged, its base has no name, or
      there is no such form.
  """
  workdir = workdir_lib.Workdir(directory)
  state, rounds, header = replayer.rebuild_state(directory)
  if not workdir.model.exists():
    raise UsageError(
      f'{workdir.path} trained a small network that is no model of its own; its'
      ' weights are written by experiments.replay --out=NAME.safetensors'
    )
  found = digest.digest(state.params)
  live = replayer.live_digest(workdir, rounds)
  if live not in (None, found):
    raise UsageError(f'rebuilt {found}, but the live run had {live}')
  if form == 'auto':
    form = _smallest(workdir, state, header)
  settings = run_log.settings_of(header)
  seeds = seeds_file.Seeds(
    form=form,
    base={name: settings[name] for name in _BASE},
    shape=json.loads(workdir.model.read_text()),
    base_digest=header.base_digest,
    frozen_digest=header.config['frozen_digest'],
    rounds=rounds,
    digest=found,
    payload=b'',
  )
  if form == 'log':
    return dataclasses.replace(seeds, payload=workdir.log.read_bytes())
  if form == 'weights':
    payload = wire.to_bytes(jax.device_get(state.params))
    return dataclasses.replace(seeds, payload=payload)
  if not hasattr(state, 'coordinates'):
    raise UsageError(
      f'form {form} is for seed pools (fedkseed), and method'
      f' {settings["method"]} has none; use log or weights'
    )
  seeds = _pool(seeds, state, settings['distribution'])
  base = checkpoint.load_base(workdir.base, header.params, header.base_digest)
  again = digest.digest(weights(seeds, base))
  if form == 'bytes':
    return dataclasses.replace(seeds, digest=again)
  if again != found:  # a sum in one pass may leave its range
    raise UsageError('the coordinates do not give the weights; use form log')
  return seeds


def _smallest(workdir, state, header) -> str:
  """The exact form of the fewest bytes, before they are packed."""
  sizes = {
    'log': workdir.log.stat().st_size,
    'weights': wire.payload_bytes(header.params),
  }
  if hasattr(state, 'coordinates'):
    sizes['coordinates'] = 4 * len(state.coordinates)
  return min(sizes, key=lambda form: sizes[form])


def _pool(seeds, state, distribution: str) -> seeds_file.Seeds:
  """Adds the coordinates of a state, rounded if the form says so."""
  coordinates, shift = np.asarray(state.coordinates), 0
  if seeds.form == 'bytes':
    coordinates, shift = seeds_file.round_to_bytes(coordinates)
  return dataclasses.replace(
    seeds,
    payload=coordinates.astype(coordinates.dtype.newbyteorder('<')).tobytes(),
    distribution=distribution,
    base_scale=int(state.base_scale),
    shift=shift,
  )


def load_base(
  seeds: seeds_file.Seeds, base_model: str | None = None
) -> models.Base:
  """The base that a file names.

  Args:
    seeds: of the file.
    base_model: where it is; None for where the run had it.

  Raises:
    UsageError: if there is none, or it has another digest.
  """
  moved = {} if base_model is None else {'model': base_model}
  config = from_mapping(seeds.base | moved)
  try:
    shape = native.from_json(seeds.shape, 'shape')
    base = models.load_base(config, shape, seeds.frozen_digest)
  except (ValueError, OSError) as error:
    raise UsageError(f'base {config.model!r}: {error}') from error
  found = digest.digest(base.trainable)
  if found != seeds.base_digest:
    raise UsageError(
      f'base {config.model!r} has the digest {found[:16]}, and the file is for'
      f' {seeds.base_digest[:16]}: another base, or another version of it'
    )
  return base


def weights(seeds: seeds_file.Seeds, base: jt.Params) -> dict[str, Any]:
  """The trained weights, by path.

  Args:
    seeds: of the file.
    base: what was trained, at the start; it has the file's digest.

  Raises:
    UsageError: if the payload does not fit the base.
  """
  base = dict(sorted(keys.named_leaves(base)))
  if seeds.form == 'log':
    return _replayed(seeds, base)
  if seeds.form == 'weights':
    return wire.from_bytes(seeds.payload, max_bytes=len(seeds.payload))
  held = _from_pool(seeds, base)
  if error := master.check(held.overflow):
    raise UsageError(error)
  return held.params


def _replayed(seeds, base):
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'rounds.log'
    path.write_bytes(seeds.payload)
    state, *_ = replayer.follow(path, lambda header: base, seeds.rounds)
  return state.params


def _from_pool(seeds, base):
  """One pass over the pool, see `jaxfl.pool`, for parts of the model.

  As many parts at once as there are cores: the threads of one program wait for
  each other after every few directions, and another's fill the gaps.
  """
  coordinates = seeds.coordinates
  directions = pool.directions(
    keys.root(seeds.base['seed']),
    np.arange(len(coordinates)),
    seeds.distribution,
  )
  if seeds.distribution != 'walsh':  # a seed costs a pass there
    (used,) = np.nonzero(coordinates)
    directions, coordinates = directions[used], coordinates[used]
  held = master.init(base)
  q = pool.exponent(held.exponents)
  rebuild = _program(seeds.distribution)

  def run(paths):
    some = master.Master(*({path: x[path] for path in paths} for x in held))
    return jax.block_until_ready(
      rebuild(
        some,
        jnp.int32(seeds.base_scale),
        directions,
        jnp.asarray(coordinates),
        q=q,
      )
    )

  parts = _parts(base)
  threads = futures.ThreadPoolExecutor(_cores())
  try:
    waiting = [threads.submit(run, paths) for paths in parts]
    with progress.bar(len(parts), 0, 'part of the weights') as advance:
      for done, part in enumerate(futures.as_completed(waiting), 1):
        part.result()  # or its error, at once
        advance(done, '')
  finally:
    threads.shutdown(cancel_futures=True)  # what runs can't be stopped
  merge = lambda trees: {path: x for tree in trees for path, x in tree.items()}
  found = [part.result() for part in waiting]
  return master.Master(*map(merge, zip(*found, strict=True)))


def _cores():
  """How many parts are rebuilt at once."""
  if jax.default_backend() != 'cpu':
    return 1
  known = hasattr(os, 'sched_getaffinity')  # not on macOS
  return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def _parts(base):
  """Lists of paths, the largest tensors first; small ones are put together."""
  parts, size = [], _LARGE
  for path in sorted(base, key=lambda path: -base[path].size):
    if size >= _LARGE:
      parts.append([])
      size = 0
    parts[-1].append(path)
    size += base[path].size
  return parts


@functools.cache
def _program(distribution):
  """`pool.rebuild`, over the base that it is given."""
  rebuild = functools.partial(pool.rebuild, distribution=distribution)
  return jax.jit(rebuild, donate_argnums=0)
