"""Entries that are studies of training runs, beside published values."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report, study_runs
from experiments.papers import budgets, common


def entry(
  title: str,
  study: str,
  *,
  published: Mapping[str, str] | None = None,
  missing: str = 'not found',
  notes: Sequence[str] = (),
) -> common.Entry:
  """An entry that runs a study of `experiments.studies`.

  Args:
    title: of the entry.
    study: its name there.
    published: text for the settings of the study by their names, and for others
      that are not run here.
    missing: text for the settings without one.
    notes: sentences for the caption.
  """

  def run(request: common.Request) -> common.Result:
    found = study_runs.run(
      study,
      {'data_dir': request.data_dir, 'model': request.model},
      seeds=request.seeds,
      jobs=request.jobs,
      runs=request.runs,
    )
    return summarise(found, published or {}, missing, notes)

  return common.Entry(title, run, draw)


def summarise(
  found: dict[str, Any],
  published: Mapping[str, str],
  missing: str,
  notes: Sequence[str],
) -> common.Result:
  """The result of a study with published values, at equal budgets too."""
  metric, settings = found['metric'], found['settings']
  equal = budgets.compare(settings, metric)
  columns = {budget: f'at equal {budget}' for budget in equal}
  rows = []
  for label, runs in settings.items():
    points = [run['curve'][-1] for run in runs['runs']]
    clients = runs['num_clients']
    mean = lambda budget, points=points, clients=clients: (
      sum(budgets.spent(point, budget, clients) for point in points)
      / len(points)
    )
    rows.append(
      common.row(
        label,
        [point[metric] for point in points],
        published=published.get(label, missing),
        bytes=mean('bytes'),
        forwards=mean('forwards'),
        seconds=sum(p['wall_s'] for p in points) / len(points),
        more={
          columns[budget]: _at(equal[budget]['settings'][label])
          for budget in equal
        },
      )
    )
  for label in (label for label in published if label not in settings):
    rows.append(
      common.row(
        label,
        [],
        published=published[label],
        more=dict.fromkeys(columns.values(), '-'),
      )
    )
  amounts = {budget: equal[budget]['amount'] for budget in equal}
  return common.result(
    found['title'],
    f'held-out {metric.replace("_", " ")}, last',
    rows,
    settings={},
    notes=[
      f'Settings are those of the study {found["study"]} of'
      ' experiments/studies.py and, but for what the first column names, ours.',
      'bytes: up and down; forwards: a backward pass counted as two; both per'
      ' client, of the whole run.',
      f'At equal bytes ({report.amount(amounts["bytes"])}) and equal forwards'
      f' ({amounts["forwards"]:,.0f}): the largest budgets that all have'
      ' spent; last evaluation within them, in parentheses its round.',
      *notes,
    ],
    seeds=[run['seed'] for run in next(iter(settings.values()))['runs']],
    study=found['study'],
    metric=metric,
    budgets=equal,
    commands={label: runs['command'] for label, runs in settings.items()},
    curves={label: _curves(runs, metric) for label, runs in settings.items()},
  )


def _at(value: Mapping[str, Any]) -> str:
  spread = '' if value['std'] is None else f' +- {value["std"]:.4f}'
  rounds = sorted(set(value['rounds']))
  return f'{value["mean"]:.4f}{spread} ({", ".join(map(str, rounds))})'


def _curves(entry: Mapping[str, Any], metric: str) -> dict[str, list]:
  """What is drawn: lists over evaluations, those of `values` for every seed."""
  curves = [run['curve'] for run in entry['runs']]
  spent = lambda budget: [
    sum(budgets.spent(p, budget, entry['num_clients']) for p in points)
    / len(points)
    for points in zip(*curves, strict=True)
  ]
  return {name: spent(name) for name in budgets.BUDGETS} | {
    'values': [[point[metric] for point in curve] for curve in curves]
  }


def draw(found: common.Result):
  """The metric against bytes and against passes, with the common budgets."""
  figure, axes = common.subplots(2, found['title'])
  for axis, (budget, meaning) in zip(
    axes, budgets.BUDGETS.items(), strict=True
  ):
    for label, curves in found['curves'].items():
      # nothing is spent at the start, which a logarithmic axis cannot show
      values = [run[1:] for run in curves['values']]
      common.band(axis, curves[budget][1:], values, label)
    start = next(iter(found['curves'].values()))['values'][0][0]
    axis.axhline(start, color='0.6', ls='--', lw=1, label='start')
    amount = found['budgets'][budget]['amount']
    axis.axvline(amount, color='0.4', ls=':', lw=1, label='common budget')
    report.log_x(axis)
    axis.set_xlabel(meaning)
  axes[0].set_ylabel(f'held-out {found["metric"].replace("_", " ")}')
  common.legend_below(figure, axes[1])
  return figure
