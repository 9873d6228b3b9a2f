"""Figs. 8a to 8c of Ferret: convergence on sum_j sin(w_j)**2.

Shown is the objective of `sine` as a share of what it was at the start. What
the paper varies in its three panels could not be read; ours are (a) methods,
(b) K, the coordinates of a message, and (c) T, the local steps.
"""

import functools
from collections.abc import Callable

import numpy as np
import optax

from experiments import report
from experiments.papers import common, sine
from experiments.papers.sine import Data, Problem
from jaxfl import method as method_lib
from jaxfl.methods import fed_avg, fedkseed, ferret, spsa
from jaxfl.runtime import simulate

CLIENT_LR, STEPS, COORDINATES = 0.05, 10, 1000

Build = Callable[[Problem, Data], method_lib.Method]


def server_lr(problem: Problem, coordinates: int) -> float:
  """K / (K + d / C): the step along the mean that ends closest to it."""
  return coordinates / (coordinates + problem.size / problem.num_clients)


def of_ferret(coordinates=COORDINATES, steps=STEPS, codec='float32') -> Build:
  return lambda problem, data: ferret.ferret(
    data.loss_fn,
    data.root,
    client_optimizer=optax.sgd(CLIENT_LR),
    coordinates=coordinates,
    local_steps=steps,
    server_lr=server_lr(problem, coordinates),
    codec=codec,
  )


def of_fed_avg(steps=STEPS) -> Build:
  return lambda problem, data: fed_avg.fed_avg(
    data.loss_fn, client_optimizer=optax.sgd(CLIENT_LR), local_steps=steps
  )


def of_fedkseed(problem: Problem, data: Data) -> method_lib.Method:
  return fedkseed.fedkseed(
    data.loss_fn,
    data.root,
    learning_rate=3 / problem.size,
    mu=1e-3,
    num_seeds=4096,
    local_steps=200,
    codec='float32',
    send_indices=True,
  )


def of_spsa(problem: Problem, data: Data) -> method_lib.Method:
  directions = 200
  in_all = directions * problem.num_clients
  return spsa.spsa(
    data.loss_fn,
    data.root,
    learning_rate=0.5 * in_all / (in_all + problem.size),
    mu=1e-3,
    num_perturbations=directions,
  )


PANELS: dict[str, tuple[str, dict[str, Build]]] = {
  '8a': (
    'methods',
    {
      'FedAvg, T = 10': of_fed_avg(),
      'Ferret, T = 10, K = 1,000, float32': of_ferret(),
      'Ferret, T = 10, K = 1,000, one bit': of_ferret(codec='sign1'),
      'FedKSeed, K = 4,096, 200 steps, float32': of_fedkseed,
      'SPSA, 200 directions, one byte': of_spsa,
    },
  ),
  '8b': (
    'K, coordinates of a message',
    {f'K = {k:,}': of_ferret(k) for k in (100, 300, 1000, 3000, 10000)}
    | {'FedAvg: all entries': of_fed_avg()},
  ),
  '8c': (
    'T, local steps',
    {f'T = {t}': of_ferret(steps=t) for t in (1, 2, 5, 10, 20)},
  ),
}


def first_below(values: list[float], limit: float) -> int | None:
  """The first round after which a value is at most `limit`."""
  return next((r for r, x in enumerate(values) if x <= limit), None)


def run(
  request: common.Request, panel: str, problem: Problem | None = None
) -> common.Result:
  """One of the panels."""
  problem = problem or Problem()
  varied, builds = PANELS[panel]
  seeds = request.seed_list
  found: dict[str, list] = {label: [] for label in builds}
  for (label,) in common.track((label,) for label in builds):
    build = functools.partial(builds[label], problem)
    programs = simulate.shared_programs(build)
    for seed in seeds:
      data = sine.make(problem, seed)
      found[label].append(
        sine.one_run(build(data), programs(data), data, problem, seed)
      )
  rows = []
  for label, runs in found.items():
    curves = [r['curve'] for r in runs]
    reached = [first_below(c['share'], 0.1) for c in curves]
    rows.append(
      common.row(
        label,
        [c['share'][-1] for c in curves],
        published='not found',
        bytes=float(np.mean([c['bytes'][-1] for c in curves])),
        forwards=float(np.mean([c['forwards'][-1] for c in curves])),
        seconds=float(np.mean([r['seconds'] for r in runs])),
        more={
          'rounds to a tenth': ', '.join(str(r or 'never') for r in reached)
        },
      )
    )
  return common.result(
    f'Ferret, fig. {panel}: sum of sin(w)^2, {problem.size:,} entries;'
    f' {varied}',
    f'objective after {problem.num_rounds} rounds, as a share of the start',
    rows,
    style='.5f',
    settings={
      'panel': f'(our reading) {varied}',
      'd': problem.size,
      'clients': problem.num_clients,
      'client lr': CLIENT_LR,
      'server lr of Ferret': 'K / (K + d / clients)',
      'examples': f'{problem.num_examples} a client, shifts of standard'
      f' deviation {sine.OFFSET} between clients and {sine.NOISE} within',
      'start': 'N(0, 1)',
    }
    | _settings_of_zeroth_order(panel, problem),
    notes=[
      'bytes: up and down, per client, of all rounds, counted from frames;'
      ' forwards: per client, a backward pass counted as two; seconds: of CPU,'
      ' with a third of the compilation.',
      'The settings and curves of the paper could not be read; FedZO, with'
      ' which it compares, is not one of our methods.',
      'Ferret sends every client the messages of all; FedAvg the mean.'
      ' Differences of unlike clients do not vanish where their mean does, and'
      ' Ferret stays as far from the minimum as their reconstruction is noisy.',
      *_notes_of_zeroth_order(panel, problem),
    ],
    seeds=seeds,
    curves={k: [r['curve'] for r in runs] for k, runs in found.items()},
  )


def _settings_of_zeroth_order(panel, problem):
  if panel != '8a':
    return {}
  return {
    'mu': 1e-3,
    'lr of FedKSeed': f'3 / d = {3 / problem.size:g}',
    'lr of SPSA': 'n / (n + d) / 2 with n = 200 clients',
  }


def _notes_of_zeroth_order(panel, problem):
  if panel != '8a':
    return []
  return [
    f'FedKSeed moves in the span of its 4,096 seeds: {4096 / problem.size:.0%}'
    ' of the dimensions here.',
  ]


def draw(found: common.Result):
  """The objective against rounds, bytes and passes."""
  figure, axes = common.subplots(3, found['title'])
  labels = (
    'round',
    'bytes up + down, per client',
    'forward passes, per client (a backward is two)',
  )
  for axis, label, key in zip(
    axes, labels, (None, 'bytes', 'forwards'), strict=True
  ):
    for name, curves in found['curves'].items():
      x = list(range(len(curves[0]['share'])))
      if key is not None:
        x = curves[0][key][1:]
      shares = [c['share'][-len(x) :] for c in curves]
      common.band(axis, x, shares, name)
    axis.set_xlabel(label)
    axis.set_yscale('log')
    if key is not None:
      report.log_x(axis)
  axes[0].set_ylabel('sum of sin(w)^2, share of the start')
  common.legend_below(figure, axes[0])
  return figure
