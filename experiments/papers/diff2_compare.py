"""DIFF2 beside DP-GD: tuning, runs, the table and the picture."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from experiments import progress
from experiments.papers import common, diff2_tune
from experiments.papers import diff2_runs as runs
from experiments.papers.diff2_runs import Setting
from experiments.papers.diff2_tasks import Task
from experiments.papers.diff2_tune import Kind, Rule

_NAMES = {
  'loss': 'train loss',
  'gradient': 'squared gradient norm',
  'test': 'test loss',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """What is compared, on one task.

  Attributes:
    rule: how all of them are tuned.
    kinds: the methods; DP-GD first.
    epsilons: ascending; the first is the one that is tuned for.
    published: of DP-GD and of others, for the table.
  """

  rule: Rule
  kinds: tuple[Kind, ...]
  epsilons: tuple[float, ...] = (3.0, 5.0)
  published: tuple[str, str] = ('not found', 'lower; figures not found')


def compare(
  task: Task, protocol: Protocol, seeds: Sequence[int]
) -> dict[str, Any]:
  """Tunes and runs all methods.

  Returns:
    `runs`: for every label, its method, epsilon, setting and runs by seed;
    `tuning`: for every method, what was tried.
  """
  programs = runs.Programs(task)
  found: dict[str, Any] = {'runs': {}, 'tuning': {}}
  rule = protocol.rule
  tuning_seeds = diff2_tune.TUNING_SEEDS[: rule.seeds]
  each = len(protocol.epsilons) * (len(seeds) + rule.seeds * rule.finalists)
  each += (len(rule.grid) - rule.finalists) * rule.screening
  own = [len(kind.own(kind.start(rule.grid[0]))) for kind in protocol.kinds]
  total = each * len(protocol.kinds) + sum(own) * rule.screening
  counter = itertools.count()
  with progress.bar(total, 0, 'run') as bar:
    advance = lambda text: bar(next(counter), text)
    for kind in protocol.kinds:
      first, *others = protocol.epsilons
      tuned = diff2_tune.tune(programs, kind, rule, first, advance)
      found['tuning'][kind.name] = {
        'settings': len(tuned.tried),
        'refused': tuned.refused,
        f'epsilon {first:g}': tuned.tried,
      }
      best = {first: tuned.best}
      for epsilon in others:
        scores = diff2_tune.compete(
          programs, tuned.finalists, epsilon, advance, tuning_seeds
        )
        best[epsilon] = diff2_tune.best_of(scores, kind.name)
        found['tuning'][kind.name][f'epsilon {epsilon:g}'] = {
          setting.text(): values for setting, values in scores.items()
        }
      for epsilon, setting in best.items():
        done = []
        for seed in seeds:
          advance(f'{kind.name} {epsilon:g} seed {seed}')
          done.append(runs.one_run(programs, setting, epsilon, seed))
          del done[-1]['state']
        found['runs'][f'{kind.name}, epsilon {epsilon:g}'] = {
          'method': kind.name,
          'epsilon': epsilon,
          'setting': setting.text(),
          'passes': _passes(task, setting),
          'runs': done,
        }
  return found


def _passes(task: Task, setting: Setting) -> float:
  """Of a client over all its examples, a backward pass counted as two."""
  rounds = setting.num_rounds
  full = -(-rounds // setting.restart_interval)
  turns = rounds / len(task.sizes) * (setting.local_steps - 1)
  local = turns * runs.LOCAL_BATCH / min(task.sizes)
  return 3 * (full + 2 * (rounds - full) + 2 * local)


def _ends(entry: dict[str, Any], measure: str) -> list[float]:
  return [run[measure][-1] for run in entry['runs']]


def _against(values: Sequence[float], reference: Sequence[float]) -> str:
  """A ratio of medians, and how many seeds are lower."""
  ratio = statistics.median(values) / statistics.median(reference)
  lower = sum(a < b for a, b in zip(values, reference, strict=True))
  return f'{ratio:.2f} x ({lower} of {len(values)} lower)'


def _text(values: Sequence[float]) -> str:
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{statistics.fmean(values):.3g} +- {spread:.1g}'


def summarise(
  task: Task, protocol: Protocol, found: dict[str, Any], seeds: Sequence[int]
) -> common.Result:
  """The result of `compare`."""
  rows, rule = [], protocol.rule
  for label, entry in found['runs'].items():
    reference = found['runs'][f'DP-GD, epsilon {entry["epsilon"]:g}']
    measures = [m for m in runs.MEASURES if m in entry['runs'][0]]
    same = entry is reference
    more = {_NAMES[m]: _text(_ends(entry, m)) for m in measures[1:]}
    for m in measures:
      pair = (_ends(entry, m), _ends(reference, m))
      more[f'{m} against DP-GD'] = '-' if same else _against(*pair)
    failed = sum(diff2_tune.score(run) == math.inf for run in entry['runs'])
    more['seeds that failed'] = str(failed)
    more['tuned setting'] = entry['setting']
    rows.append(
      common.row(
        label,
        _ends(entry, 'loss'),
        published=protocol.published[not same],
        forwards=entry['passes'],
        seconds=statistics.fmean(run['seconds'] for run in entry['runs']),
        more=more,
      )
    )
  tried = {k: v['settings'] for k, v in found['tuning'].items()}
  refused = sum(v['refused'] for v in found['tuning'].values())
  first = next(iter(found['runs'].values()))['runs']
  start = statistics.fmean(run['loss'][0] for run in first)
  loss = 'train loss above its minimum' if task.floor else 'train loss'
  return common.result(
    f'DIFF2 and DP-GD: {task.name}, {sum(task.sizes):,} examples,'
    f' {len(task.sizes)} clients, {task.num_params:,} parameters',
    f'{loss} at the end (start {start:.4g})',
    rows,
    style='.5f',
    settings={
      'tuned': ', '.join(f'{n} settings of {k}' for k, n in tried.items())
      + f' ({refused} refused, as their noise would grow)',
    },
    notes=[
      f'Epsilon is at delta {runs.DELTA:g}. forwards: per client, passes over'
      ' all its examples, a backward pass counted as two; seconds:'
      ' of CPU, a run. Against DP-GD: medians.',
      'One rule for all methods: least train loss, below that at the start, on'
      f' tuning seeds {diff2_tune.TUNING_SEEDS[: rule.seeds]}; first on the'
      f' common grid and {rule.screening} of the seeds, then what a method has'
      f' of its own; {rule.finalists} finalists on all of these seeds, at each'
      ' epsilon. Tuning looks at private losses, which no guarantee covers.',
      'R: rounds, lr: learning rate, C1 and C2: clips of a gradient and of a'
      ' difference over the step, T: restart interval, share: of the budget,'
      ' for restarts, K: local steps.',
      *_notes_of_local_steps(protocol),
    ],
    seeds=seeds,
    loss=loss,
    tuning=found['tuning'],
    curves=found['runs'],
  )


def _notes_of_local_steps(protocol: Protocol) -> list[str]:
  first = protocol.rule.grid[0]
  if all(kind.start(first).local_steps == 1 for kind in protocol.kinds):
    return []
  pairs = ', '.join(
    f'{runs.if_dropped(e):.2f} at {e:g}' for e in protocol.epsilons
  )
  return [
    'Epsilon is for an example that is replaced. The guarantee of local steps'
    ' is for one that is dropped, and is what the other methods give to such a'
    f' one: {pairs}. Samples have {runs.LOCAL_BATCH} examples on average.'
  ]


def draw(found: common.Result):
  """Measures against rounds; lines are means, bands the range over seeds.

  Of runs that did not fail.
  """
  entries = found['curves']
  names = _NAMES | {'loss': found['loss']}
  measures = [m for m in names if m in next(iter(entries.values()))['runs'][0]]
  figure, axes = common.subplots(len(measures), found['title'], sharey=False)
  colours = {name: f'C{i}' for i, name in enumerate(found['tuning'])}
  for axis, measure in zip(axes, measures, strict=True):
    for label, entry in entries.items():
      ended = [run for run in entry['runs'] if not run['failed']]
      if not ended:
        continue
      rounds = ended[0]['round']
      columns = list(zip(*(run[measure] for run in ended), strict=True))
      mean = [statistics.fmean(c) for c in columns]
      style = '--' if entry['epsilon'] > 3 else '-'
      colour = colours[entry['method']]
      axis.plot(rounds, mean, style, color=colour, label=label, lw=1.4)
      low, high = map(min, columns), map(max, columns)
      axis.fill_between(
        rounds, list(low), list(high), color=colour, alpha=0.15, lw=0
      )
    axis.set_yscale('log')
    axis.set_xlabel('rounds')
    axis.set_ylabel(names[measure])
  common.legend_below(figure, axes[0])
  return figure
