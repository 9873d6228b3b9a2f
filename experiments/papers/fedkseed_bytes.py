"""The communication of FedKSeed: bytes of a client in a round, both ways.

K = 4,096 seeds and 200 local steps, as published. Frames are those of a run on
a small problem: their size does not depend on the model. Down go the
coordinates that changed since a client was there last; in rounds with all of
the clients these are few, at a participation of 5 % nearly all.
"""

import functools
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers import common
from jaxfl import keys, wire
from jaxfl import method as method_lib
from jaxfl.methods import fedkseed
from jaxfl.runtime import simulate

NUM_SEEDS, LOCAL_STEPS = 4096, 200
PUBLISHED = 17_984  # 4 * 4096 + (4 + 4) * 200

# what is sent up, and the arguments of `fedkseed`
FORMS: dict[str, dict[str, Any]] = {
  'float32 and indices': {'codec': 'float32', 'send_indices': True},
  'float32': {'codec': 'float32'},
  'bfloat16 and indices': {'codec': 'bfloat16', 'send_indices': True},
  'bfloat16': {'codec': 'bfloat16'},
  'one byte and indices': {'codec': 'log8', 'send_indices': True},
  'one byte': {'codec': 'log8'},
  'Pro, one byte': {'codec': 'log8', 'pro': True},
}
RUN = ('float32 and indices', 'Pro, one byte')  # others need no run, see `run`
# clients, share of them in a round
POPULATIONS = {'5 % of 200 clients': (200, 0.05), '10 of 10 clients': (10, 1.0)}


def papers_form() -> tuple[int, int]:
  """Bytes of frames with what the paper's count has in them: up and down."""
  up = {
    'indices': np.zeros(LOCAL_STEPS, np.int32),
    'projected_grads': np.zeros(LOCAL_STEPS, np.float32),
  }
  down = {'coordinates': np.zeros(NUM_SEEDS, np.float32)}
  return len(wire.to_bytes(up)), len(wire.to_bytes(down))


def loss_fn(params, batch):
  """A small quadratic with noise."""
  return 0.5 * jnp.sum(jnp.square(params['w'] - batch['x']))


def batch_fn(round: int, client: int):
  rng = np.random.default_rng([round, client])
  x = rng.normal(size=(LOCAL_STEPS, 8)).astype(np.float32)
  return {'x': x}


def method_of(form: str, root: jax.Array) -> method_lib.Method:
  return fedkseed.fedkseed(
    loss_fn,
    root,
    learning_rate=1e-3,
    mu=1e-3,
    num_seeds=NUM_SEEDS,
    local_steps=LOCAL_STEPS,
    **FORMS[form],
  )


def visits(
  form: str, place: str, num_rounds: int, seeds: Iterable[int]
) -> list[dict[str, float]]:
  """Mean bytes up and down of a client in a round that it is in, per seed."""
  build = functools.partial(method_of, form)
  programs = simulate.shared_programs(build)
  num_clients, rate = POPULATIONS[place]
  found = []
  for seed in seeds:
    method = build(keys.root(seed))
    population = simulate.Population(
      num_clients=num_clients, participation_rate=rate, seed=seed
    )
    start, up, down = time.process_time(), 0, 0
    for done in simulate.simulate(
      method,
      method.init({'w': np.zeros(8, np.float32)}),
      batch_fn,
      population,
      num_rounds=num_rounds,
      block_size=population.num_slots,
      programs=programs(keys.root(seed)),
    ):
      up += done.bytes_up
      down += done.bytes_down
    total = num_rounds * population.num_slots
    seconds = time.process_time() - start
    found.append({'up': up / total, 'down': down / total, 'seconds': seconds})
  return found


def up_bytes(form: str) -> int:
  """Bytes of a frame on the way up."""
  like = method_of(form, keys.root(0)).message({'w': np.zeros(8, np.float32)})
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
  return len(wire.to_bytes(zeros))


def run(request: common.Request, num_rounds: int = 40) -> common.Result:
  """Bytes of all forms, for both populations.

  The coordinates that change do not depend on the code of a scalar, unless
  seeds are drawn by it: down, others than Pro share a run.
  """
  seeds = request.seed_list
  theirs, down = papers_form()
  rows = [
    common.row(
      name,
      [up + down],
      published=f'{PUBLISHED:,}',
      bytes=up + down,
      more={'up': float(up), 'down': float(down)},
    )
    for name, up in (
      ("the paper's count as frames of ours", theirs),
      ('float32, all coordinates down', up_bytes('float32')),
      ('one byte, all coordinates down', up_bytes('one byte')),
    )
  ]
  runs = {
    (form, place): visits(form, place, num_rounds, seeds)
    for form, place in common.track((f, p) for f in RUN for p in POPULATIONS)
  }
  for place in POPULATIONS:
    for form in FORMS:
      found = runs[form if form in RUN else RUN[0], place]
      total = [up_bytes(form) + x['down'] for x in found]
      seconds = float(np.mean([x['seconds'] for x in found]))
      rows.append(
        common.row(
          f'{place}: {form}',
          total,
          published=f'{PUBLISHED:,}' if form == RUN[0] else '-',
          bytes=float(np.mean(total)),
          forwards=2 * LOCAL_STEPS,
          seconds=seconds if form in RUN else None,
          more={
            'up': float(up_bytes(form)),
            'down': float(np.mean([x['down'] for x in found])),
          },
        )
      )
  return common.result(
    f'FedKSeed: bytes of a client in a round, K = {NUM_SEEDS:,},'
    f' {LOCAL_STEPS} local steps',
    f'bytes up + down, mean over {num_rounds} rounds',
    rows,
    style=',.0f',
    settings={
      'populations': '; '.join(POPULATIONS),
      'rounds': num_rounds,
      'problem': 'a quadratic of 8 entries',
    },
    notes=[
      f'published: {PUBLISHED:,} B is derived from the settings (4 B for each'
      ' of 4,096 coordinates down, 8 B for each of 200 pairs up); the abstract'
      ' says under 18 kilobytes.',
      'Without "indices" these follow from the shared randomness and are not'
      ' sent. Down: coordinates (4 B each) that changed since the client was'
      ' there last, with indices or a mask, averaged over all rounds, the first'
      ' with few changes too; Pro adds a byte for every seed.',
      'forwards: of a client in a round. seconds: of CPU, of a whole run, with'
      ' compilation.',
    ],
    seeds=seeds,
  )


def draw(found: common.Result):
  """Stacked bars: up and down."""
  figure, (axis,) = common.subplots(1, found['title'])
  figure.set_size_inches(8.5, 5)
  lines = found['rows'][::-1]
  y = np.arange(len(lines))
  up = [line['more']['up'] for line in lines]
  down = [line['more']['down'] for line in lines]
  axis.barh(y, up, 0.7, color='C1', label='up')
  axis.barh(
    y,
    down,
    0.7,
    left=up,
    xerr=[line['spread'] or 0 for line in lines],
    color='C0',
    label='down',
  )
  axis.axvline(
    PUBLISHED, color='k', ls='--', lw=1, label=f'published: {PUBLISHED:,}'
  )
  axis.set_yticks(y, [line['setting'] for line in lines], fontsize=8)
  axis.set_xlabel('bytes of a client in a round')
  axis.legend(frameon=True, fontsize=8, loc='lower right')
  return figure
