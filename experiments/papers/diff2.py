"""Entries of DIFF2: private gradient descent by differences, beside DP-GD.

"DIFF2: differential private optimization via gradient differences for nonconvex
distributed learning", Murata and Suzuki, ICML 2023,
https://arxiv.org/abs/2302.03884. The paper measures one hidden layer of ten
softplus units on tables, ten clients, epsilon 3 and 5 at delta 1e-5, and 2,000
rounds; ours are fewer, and noise is proportional to the root of their number.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.config import UsageError
from experiments.papers import common, diff2_tasks
from experiments.papers import diff2_compare as comparing
from experiments.papers import diff2_tune as tuning
from experiments.papers.diff2_compare import Protocol
from experiments.papers.diff2_runs import Setting
from experiments.papers.diff2_tasks import Task
from jaxfl.data import known_tables, tables


def grid(
  rounds: Sequence[int], rates: Sequence[float], clips: Sequence[float]
) -> tuple[Setting, ...]:
  """All combinations."""
  combinations = itertools.product(rounds, rates, clips)
  return tuple(itertools.starmap(Setting, combinations))


def of_table(num_rounds: int, **changes: Any) -> Protocol:
  """The protocol of tables, which all have the same grids."""
  settings = {
    'rates': (0.25, 0.177, 0.125),
    'clips': (1.0, 3.0, 10.0),
    'curvatures': (3.0, 10.0, 30.0),
    'intervals': (6, 20),
    'first': (10.0, 20),  # C2 and T while rate and clip are chosen
  } | changes
  curvature, interval = settings['first']
  first = Setting(
    0, 0.0, 0.0, clip_norm_diff=curvature, restart_interval=interval
  )
  own = {
    'clip_norm_diff': settings['curvatures'],
    'restart_interval': settings['intervals'],
  }
  common_grid = grid((num_rounds,), settings['rates'], settings['clips'])
  return Protocol(
    rule=tuning.Rule(common_grid),
    kinds=(tuning.DP_GD, tuning.diff2('DIFF2-GD', first, **own)),
  )


def with_local_steps(protocol: Protocol) -> Protocol:
  """The protocol with the routine of local steps as a third method."""
  first = Setting(
    0, 0.0, 0.0, clip_norm_diff=10.0, restart_interval=6, local_steps=4
  )
  local = tuning.diff2(
    'DIFF2, local steps',
    first,
    clip_norm_diff=(3.0, 10.0),
    local_steps=(2, 4, 8),
  )
  return dataclasses.replace(protocol, kinds=(*protocol.kinds, local))


def of_location(
  task: Task, rounds: Sequence[int], tuning_seeds: int = 3
) -> Protocol:
  """The protocol of the problems with known bounds: nothing is clipped.

  Few random steps decide how far slow directions get: all settings are tried
  on all tuning seeds.
  """
  assert task.clip_norm is not None
  assert task.clip_norm_diff is not None
  first = Setting(
    0, 0.0, 0.0, clip_norm_diff=task.clip_norm_diff, restart_interval=20
  )
  own = tuning.diff2(
    'DIFF2-GD',
    first,
    restart_interval=(5, 20),
    budget_share=(0.2, 0.5, 0.8),
  )
  return Protocol(
    rule=tuning.Rule(
      grid(rounds, (0.5, 1.0, 2.0), (task.clip_norm,)),
      seeds=tuning_seeds,
      screening=tuning_seeds,
    ),
    kinds=(tuning.DP_GD, own),
    epsilons=(3.0,),
    published=('not in the paper', 'not in the paper'),
  )


def _run(
  request: common.Request, make: Callable[[common.Request], Any]
) -> common.Result:
  try:
    task, protocol = make(request)
  except (OSError, ValueError) as error:
    raise UsageError(str(error)) from error
  seeds = range(request.seeds or 5)
  found = comparing.compare(task, protocol, seeds)
  return comparing.summarise(task, protocol, found, seeds)


def _known(name: str, protocol: Protocol, request: common.Request):
  if request.data_dir is None:
    raise UsageError(f'{name} needs --data_dir, the folder where its files are')
  table = known_tables.load(name, request.data_dir)
  return diff2_tasks.of_table(name.replace('_', ' '), table), protocol


def _csv(request: common.Request):
  if request.dataset is None or request.target is None:
    raise UsageError(
      'csv needs --dataset, a csv file, and --target, its column to predict'
    )
  table = tables.scale(tables.load_csv(request.dataset, request.target), 'none')
  return diff2_tasks.of_table('csv', table), of_table(300)


def _location(stiff: bool, request: common.Request):
  del request  # Unused: it needs no data.
  task = diff2_tasks.of_location(stiff=stiff)
  rounds = (300, 1000) if stiff else (10, 30, 100)
  return task, of_location(task, rounds)


def _entry(title: str, make: Callable[..., Any], *args: Any) -> common.Entry:
  run = functools.partial(_run, make=functools.partial(make, *args))
  return common.Entry(title, run, comparing.draw)


_TABLE = 'DIFF2 and DP-GD at epsilon 3 and 5'

ENTRIES = {
  'california_housing': _entry(
    f'{_TABLE}: California Housing', _known, 'california_housing', of_table(400)
  ),
  'gas_turbine': _entry(
    f'{_TABLE}: Gas Turbine', _known, 'gas_turbine', of_table(200)
  ),
  'blogfeedback': _entry(
    f'{_TABLE}: BlogFeedback',
    _known,
    'blogfeedback',
    of_table(
      20,
      rates=(0.25, 0.125),
      clips=(1.0, 3.0),
      curvatures=(10.0, 30.0),
      intervals=(5, 20),
    ),
  ),
  'gas_sensor': _entry(
    f'{_TABLE}: gas sensors, six classes',
    _known,
    'gas_sensor',
    dataclasses.replace(
      of_table(  # few examples: larger C2 and T let the noise grow
        100,
        rates=(1.0, 0.5, 0.25),
        clips=(1.0, 3.0),
        curvatures=(1.0, 3.0),
        intervals=(3, 6),
        first=(3.0, 6),
      ),
      published=('not in the paper', 'not in the paper'),
    ),
  ),
  'local_steps': _entry(
    f'{_TABLE}: the routine of local steps, California Housing, few rounds',
    _known,
    'california_housing',
    with_local_steps(of_table(100)),
  ),
  'csv': _entry(f'{_TABLE}: your own table (--dataset, --target)', _csv),
  'stiff': _entry(
    'DIFF2 and DP-GD: a stiff problem, by theory a win',
    _location,
    True,
  ),
  'isotropic': _entry(
    'DIFF2 and DP-GD: the same without slow directions, by theory a tie',
    _location,
    False,
  ),
}
