"""Comparing runs at equal bytes and at equal passes, from their curves.

A budget is what the cheapest run in the comparison has spent in all, per
client. At a budget a run counts with its last evaluation within it: a run whose
first round costs more is where it started.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Curve = Sequence[Mapping[str, Any]]  # a point per evaluation

BUDGETS = {
  'bytes': 'bytes up + down, per client',
  'forwards': 'forward passes, per client (a backward is two)',
}


def spent(point: Mapping[str, Any], budget: str, num_clients: int) -> float:
  """What a run has spent at an evaluation, per client."""
  if budget == 'bytes':
    total = point['bytes_up'] + point['bytes_down']
  else:
    total = point['forwards'] + 2 * point['backwards']
  return total / num_clients


def common_budget(settings: Mapping[str, Any], budget: str) -> float:
  """The largest amount that all runs of all settings have spent."""
  return min(
    spent(run['curve'][-1], budget, entry['num_clients'])
    for entry in settings.values()
    for run in entry['runs']
  )


def within(
  curve: Curve, budget: str, amount: float, num_clients: int
) -> Mapping[str, Any]:
  """The last evaluation at which no more than an amount was spent.

  Raises:
    ValueError: if the curve does not start with nothing spent.
  """
  found = [p for p in curve if spent(p, budget, num_clients) <= amount]
  if not found:
    raise ValueError('a curve must start before anything is spent')
  return found[-1]


def compare(settings: Mapping[str, Any], metric: str) -> dict[str, Any]:
  """All settings at the largest common budgets.

  Args:
    settings: of a result of `study_runs.run`.
    metric: to compare.

  Returns:
    For each of `BUDGETS`: its amount, and per setting mean, standard deviation,
    values over seeds, and the rounds of the evaluations.
  """
  result = {}
  for budget, meaning in BUDGETS.items():
    amount = common_budget(settings, budget)
    found = {}
    for label, entry in settings.items():
      points = [
        within(run['curve'], budget, amount, entry['num_clients'])
        for run in entry['runs']
      ]
      values = [point[metric] for point in points]
      found[label] = {
        'mean': statistics.fmean(values),
        'std': statistics.stdev(values) if len(values) > 1 else None,
        'values': values,
        'rounds': [point['round'] for point in points],
      }
    result[budget] = {'of': meaning, 'amount': amount, 'settings': found}
  return result
