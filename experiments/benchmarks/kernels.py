"""The suite `kernels`: directions, updates, projections and pools.

Rates are in 1e9 entries (times directions, where there are several) a second.
Buffers are donated, and all operations on a set of tensors share one copy. To
add a row, add a line to `entries`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import (
  floors,
  machine,
  memory,
  tensors,
  timing,
  torch_loops,
)
from jaxfl import blocks, perturb, pool
from jaxfl.master import Master

FEW, MANY = 64, 4096  # directions
_SCALE, _EXPONENT = np.float32(1e-3), np.int32(20)

TARGETS: dict[str, dict[str, timing.Target]] = {
  'cpu': {
    'perturb rademacher': ('rate', 5.0),
    f'replay rademacher K={FEW}': ('rate', 10.0),
    f'replay rademacher K={MANY}': ('rate', 10.0),
    f'project rademacher K={FEW}': ('rate', 8.0),
    f'project rademacher K={MANY}': ('rate', 8.0),
    f'pool rebuild walsh K={MANY}': ('rate', 1000.0),
    f'Ferret project + reconstruct K={FEW}': ('seconds', 0.1),
  },
  'gpu': {  # 1.3e9 parameters on an H200
    'perturb rademacher': ('of_floor', 0.85),
    f'replay rademacher K={MANY}': ('seconds', 1.0),
    f'pool rebuild walsh K={MANY}': ('seconds', 0.01),
  },
}


class Entry(NamedTuple):
  """A row: a function of weights and inputs, and what it needs at least."""

  name: str
  function: Callable[[Any, dict], Any]
  cost: floors.Cost
  rivals: tuple[str, ...] = ()
  updates: bool = True  # returns new weights, or has them first in a tuple
  pooled: int | None = None  # directions, where one pass does for all
  shown: bool = True


# The rows on sets of many tensors, each of which takes long to compile.
BRIEF = (
  'w + c',
  'perturb rademacher',
  f'replay rademacher K={FEW}',
  f'project rademacher K={FEW}',
  f'pool rebuild rademacher K={FEW}',
)


def inputs(shapes: tensors.Shapes) -> dict[str, Any]:
  """Arguments of all operations, so that nothing is a constant."""
  rng = np.random.default_rng(0)
  units = rng.integers(-99, 100, MANY, dtype=np.int32)
  return {
    'keys': jnp.asarray(rng.integers(2**32, size=(MANY, 2), dtype=np.uint32)),
    'scales': jnp.full(MANY, _SCALE),
    'units': dict.fromkeys(shapes, jnp.asarray(units)),
    'exponents': dict.fromkeys(shapes, jnp.asarray(_EXPONENT)),
    'coordinates': jnp.asarray(units * 1000),
  }


def _sampled(draw, params, x):
  """What one does with `jax.random`: a key and an array for every tensor."""
  keys = jax.random.split(jax.random.wrap_key_data(x['keys'][0]), len(params))
  return {
    path: w + x['scales'][0] * draw(key, w.shape, jnp.float32)
    for (path, w), key in zip(params.items(), keys, strict=True)
  }


def _replay_int(count, distribution, params, x):
  units = {path: value[:count] for path, value in x['units'].items()}
  return perturb.replay_int(
    params, x['keys'][:count], units, x['exponents'], distribution=distribution
  )


def _pool(count, distribution, x):
  """The directions of a pool's first seeds."""
  return pool.directions(x['keys'][0], jnp.arange(count), distribution)


def _perturb(distribution, params, x):
  direction = _pool(1, distribution, x)[0]
  return perturb.perturb(
    params, direction, x['scales'][0], distribution=distribution
  )


def _rebuild(count, distribution, params, x):
  fits = {path: jnp.zeros((), bool) for path in params}
  return pool.rebuild(
    Master(params, x['exponents'], fits),
    jnp.int32(pool.ONE),
    _pool(count, distribution, x),
    x['coordinates'][:count],
    distribution=distribution,
  )


def _pool_project(count, distribution, params, x):
  """Coordinates along all seeds of a pool, of every tensor."""
  size = max(w.size for w in params.values())
  parts = blocks.partition(params, max_size=size, distribution=distribution)
  counts = jnp.full(len(parts), count, jnp.int32)
  directions = _pool(len(parts) * count, distribution, x)
  return blocks.project(
    params, parts, counts, directions, distribution=distribution
  )


def _ferret(params, x):
  """Whole directions: a client projects, the server adds them up again."""
  directions = x['keys'][:FEW]
  gamma = perturb.project(params, directions) * np.float32(1 / FEW)
  return perturb.replay(params, directions, gamma)


def _ferret_blocks(distribution, max_size, params, x):
  """The same as the method has it: every block has directions of its own."""
  kind = {'distribution': distribution}
  parts = blocks.partition(params, max_size=max_size, **kind)
  counts = jnp.full(len(parts), FEW, jnp.int32)
  directions = _pool(len(parts) * FEW, distribution, x)
  gamma = blocks.project(params, parts, counts, directions, **kind) / FEW
  step = blocks.reconstruct(
    params, parts, counts[None], directions[None], gamma[None], **kind
  )
  return jax.tree.map(jnp.add, params, step)


def entries(shapes: tensors.Shapes) -> Iterable[Entry]:
  """The rows on a set of tensors."""
  cost = functools.partial(floors.Cost, tensors.entries(shapes))
  torch = tuple(torch_loops.LOOPS)
  yield Entry(
    'w + c', lambda w, x: jax.tree.map(lambda w: w + x['scales'][0], w), cost()
  )
  for name, draw in (
    ('rademacher', jax.random.rademacher),
    ('normal', jax.random.normal),
  ):
    function = functools.partial(_sampled, draw)
    yield Entry(f'jax.random.{name}', function, cost(), shown=False)
  for name in (*perturb.DISTRIBUTIONS, 'walsh'):
    sampler = 'normal' if name == 'gaussian' else 'rademacher'
    yield Entry(
      f'perturb {name}',
      functools.partial(_perturb, name),
      cost(2, 1, name),
      (f'jax.random.{sampler}', torch[0]),
    )
  for count in (FEW, MANY):
    slow = () if count > FEW else ('popcount16', 'gaussian')
    for name in ('rademacher', *slow):
      yield Entry(
        f'replay {name} K={count}',
        lambda w, x, d=name, n=count: perturb.replay(
          w, x['keys'][:n], x['scales'][:n], distribution=d
        ),
        cost(2, count, name),
        (torch[1],),
      )
      yield Entry(
        f'project {name} K={count}',
        lambda w, x, d=name, n=count: perturb.project(
          w, x['keys'][:n], distribution=d
        ),
        cost(1, count, name),
        (torch[2],),
        updates=False,
      )
    yield Entry(
      f'replay_int rademacher K={count}',
      functools.partial(_replay_int, count, 'rademacher'),
      cost(2, count),
      (torch[1],),
    )
    yield Entry(
      f'replay_int rank1 K={count}',
      functools.partial(_replay_int, count, 'rank1'),
      cost(),
      (torch[1],),
      pooled=count,
    )
    yield Entry(
      f'project rank1 K={count}',
      lambda w, x, n=count: perturb.project(
        w, x['keys'][:n], distribution='rank1'
      ),
      cost(1),
      (torch[2],),
      updates=False,
      pooled=count,
    )
    yield Entry(
      f'pool rebuild rademacher K={count}',
      functools.partial(_rebuild, count, 'rademacher'),
      cost(2, count),
      (torch[1],),
    )
  yield Entry(
    f'pool rebuild walsh K={MANY}',
    functools.partial(_rebuild, MANY, 'walsh'),
    cost(2, 1, 'walsh'),
    (torch[1],),
    pooled=MANY,
  )
  yield Entry(
    f'pool project walsh K={MANY}',
    functools.partial(_pool_project, MANY, 'walsh'),
    cost(1, 1, 'walsh'),
    (torch[2],),
    updates=False,
    pooled=MANY,
  )
  yield Entry(
    f'Ferret project + reconstruct K={FEW}',
    _ferret,
    cost(3, 2 * FEW),
    (torch[3],),
  )
  size = tensors.entries(shapes)
  for name, distribution, max_size in (
    ('in blocks', 'rademacher', max(1 << 14, size // 512)),
    ('in blocks, walsh', 'walsh', max(1 << 14, size // 512)),
    ('whole, walsh', 'walsh', size),
  ):
    yield Entry(
      f'Ferret project + reconstruct {name} K={FEW}',
      functools.partial(_ferret_blocks, distribution, max_size),
      cost(3, 2 * FEW if distribution == 'rademacher' else 2, distribution),
      (torch[3],),
      pooled=None if distribution == 'rademacher' else 2 * FEW,
    )


class Held:
  """Weights that operations take over and give back."""

  def __init__(self, params):
    self.params = params

  def call(self, compiled, entry: Entry, x):
    result = jax.block_until_ready(compiled(self.params, x))
    if not isinstance(result, tuple):
      self.params = result if entry.updates else self.params
      return
    self.params, *_, overflow = result
    if any(map(bool, jax.tree.leaves(overflow))):
      # what is off its grid is not updated: that would be timed
      raise RuntimeError(f'{entry.name}: weights have left their grid')


def _compile(entry, shapes, x):
  like = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
  donated = (0,) if entry.updates else ()
  function = jax.jit(entry.function, donate_argnums=donated)
  return function.lower(like, x).compile()


def _zeros(shapes):
  return {path: jnp.zeros(shape) for path, shape in shapes.items()}


def operations(
  on: str, shapes: tensors.Shapes, names: tuple[str, ...] = ()
) -> list[timing.Operation]:
  """What there is to time on a set of tensors, the torch loops with it.

  Args:
    on: name of the set.
    shapes: of the tensors.
    names: of the rows; all if there are none.
  """
  x = inputs(shapes)
  # floats would put the weights off the grid of the integers
  floats, integers = Held(_zeros(shapes)), Held(_zeros(shapes))
  size = tensors.entries(shapes)
  found = []
  for entry in entries(shapes):
    if names and entry.name not in names:
      continue
    compiled = _compile(entry, shapes, x)
    exact = entry.name.startswith(('replay_int', 'pool rebuild'))
    held = integers if exact else floats
    directions = entry.pooled or max(1.0, entry.cost.directions)
    has_floor = entry.shown and entry.name != 'w + c'
    found.append(
      timing.Operation(
        name=entry.name,
        on=on,
        run=functools.partial(held.call, compiled, entry, x),
        work=size * directions / 1e9,
        unit='G/s',
        rivals=entry.rivals,
        floor=floors.floor(entry.cost, on) if has_floor else None,
        memory=floors.memory(compiled, 4 * size),
        shown=entry.shown,
      )
    )
  wanted = {rival for operation in found for rival in operation.rivals}
  if torch_loops.device():
    weights = torch_loops.zeros(shapes)
    for name, (loop, count) in torch_loops.LOOPS.items():
      if name not in wanted:
        continue
      both = 2 if 'project +' in name else 1

      def run(loop=loop):
        loop(weights)
        torch_loops.wait()

      found.append(
        timing.Operation(
          name=name,
          on=on,
          run=run,
          work=size * count * both / 1e9,
          unit='G/s',
          shown=False,
        )
      )
  return found


def _prepared(name: str, shapes: tensors.Shapes) -> memory.Prepared:
  """One operation in a process of its own: makes weights, runs on them."""
  x = inputs(shapes)
  entry = next(e for e in entries(shapes) if e.name == name)
  compiled = _compile(entry, shapes, x)
  make = jax.jit(lambda: _zeros(shapes)).lower().compile()
  return make, lambda params: jax.block_until_ready(compiled(params, x))


def measure(
  params: float, repeats: int, predictions: dict[str, float]
) -> dict[str, Any]:
  """Rows of the suite, and the peak memory of some operations.

  Args:
    params: entries of the large sets of tensors, about.
    repeats: of every operation.
    predictions: see `timing.rows`.
  """
  sets = {
    'matrix': tensors.matrix(params),
    'transformer': tensors.transformer(params),
    'embedded': tensors.embedded(),
  }
  todo = floors.operations()
  for on, shapes in sets.items():
    todo += operations(on, shapes, () if on == 'matrix' else BRIEF)
  rows = timing.rows(todo, repeats, TARGETS, predictions)
  size = 4 * tensors.entries(sets['transformer'])
  peaks = []
  for name in ('replay', 'project', 'pool rebuild') if machine.on_cpu() else ():
    name = f'{name} rademacher K={FEW}'
    prepare = functools.partial(_prepared, name, sets['transformer'])
    found = memory.peak(prepare)
    over = None if found is None else found / size
    peaks.append({'operation': name, 'on': 'transformer', 'process': over})
  return {
    'unit': 'G/s: 1e9 entries, times directions, a second',
    'entries': {on: tensors.entries(shapes) for on, shapes in sets.items()},
    'memory': 'over the size of the weights: what the compiled program holds;'
    ' in peaks, what a fresh process gains',
    'rows': rows,
    'peaks': peaks,
  }
