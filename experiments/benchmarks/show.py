"""A suite's results as a table and as a picture."""

import pathlib
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def _number(x: float | None) -> str:
  """Three digits, without an exponent."""
  if x is None:
    return ''
  if x == 0 or abs(x) >= 100:
    return f'{x:,.0f}'
  return f'{x:.3f}' if abs(x) < 1 else f'{x:.3g}'


def _target(row: Row) -> str:
  if 'target' not in row:
    return ''
  kind, value = row['target']['kind'], row['target']['value']
  text = {
    'rate': f'>= {value:g}',
    'seconds': f'<= {value:g} s',
    'of_floor': f'floor >= {value:.0%}',
  }[kind]
  met = row['target'].get('met')
  return text + {True: ': met', False: ': missed', None: ''}[met]


def table(found: dict[str, Any]) -> Table:
  """A line for every row; rates, as medians over repeats."""
  machine = found['machine']
  shown = Table(
    title=f'{found["suite"]}: {found["unit"]}\n{machine["device"]},'
    f' {machine["cpu"]}, cores: {machine["cores"]}, jax {machine["jax"]}',
    caption=_caption(found),
    caption_justify='left',
  )
  shown.add_column('operation')
  shown.add_column('on')
  for name in (
    'ours', 'floor', 'of floor', 'predicted', 'seconds', 'memory',
  ):  # fmt: skip
    shown.add_column(name, justify='right')
  shown.add_column('beside')
  shown.add_column('target')
  for row in found['rows']:
    share = row.get('of_floor')
    rivals = [
      f'{r["ours"]:.3g} x {name} ({_number(r["rate"])})'
      for name, r in row['rivals'].items()
    ]
    shown.add_row(
      row['operation'],
      row['on'],
      _number(row['rate']),
      _number(row.get('floor_rate')),
      '' if share is None else f'{share:.0%}',
      _number(row.get('predicted')),
      _number(row['seconds']),
      _number(row['memory']),
      '\n'.join(rivals),
      _target(row),
    )
  return shown


def _caption(found):
  lines = [f'memory: {found["memory"]}'] if 'memory' in found else []
  for peak in found.get('peaks', ()):
    values = [
      f'{name} {_number(value)}'
      for name, value in peak.items()
      if isinstance(value, float)
    ]
    lines.append(f'{peak["operation"]}, {peak["on"]}: {", ".join(values)}')
  return '\n'.join(lines + found.get('notes', []))


_COLORS = {'floor': '0.75', 'ours': 'tab:blue', 'competitor': 'tab:orange'}


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  """Bars of ours, the best rival and the floor, a panel for each `on`."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import patches
  from matplotlib import pyplot as plt

  panels: dict[str, list[Row]] = {}
  for row in found['rows']:
    if row['on'] != 'core':  # what floors are counted from
      panels.setdefault(row['on'], []).append(row)
  heights = [len(rows) + 2 for rows in panels.values()]
  figure, axes = plt.subplots(
    len(panels),
    1,
    figsize=(9, 0.32 * sum(heights) + 1),
    squeeze=False,
    layout='constrained',
    gridspec_kw={'height_ratios': heights},
  )
  for axis, (on, rows) in zip(axes[:, 0], panels.items(), strict=True):
    _bars(axis, rows)
    axis.set_title(on, fontsize=9, loc='left')
  handles = [patches.Patch(color=color) for color in _COLORS.values()]
  figure.legend(
    handles, _COLORS, loc='outside upper right', ncols=3, fontsize=8
  )
  axes[-1, 0].set_xlabel(found['unit'])
  machine = found['machine']
  figure.suptitle(
    f'{found["suite"]}: {machine["device"]}, {machine["cpu"]},'
    f' jax {machine["jax"]}',
    fontsize=10,
  )
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _bars(axis, rows):
  rivals = [
    max((r['rate'] for r in row['rivals'].values()), default=None)
    for row in rows
  ]
  floors = [row.get('floor_rate') for row in rows]
  bars = floors, [row['rate'] for row in rows], rivals
  for i, (values, color) in enumerate(zip(bars, _COLORS.values(), strict=True)):
    places = [(n, v) for n, v in enumerate(values) if v is not None]
    axis.barh(
      [n + 0.27 * (i - 1) for n, _ in places],
      [v for _, v in places],
      height=0.25,
      color=color,
    )
  axis.set_yticks(range(len(rows)), [row['operation'] for row in rows])
  axis.tick_params(labelsize=7)
  axis.set_ylim(len(rows) - 0.5, -0.5)
  axis.set_xscale('log')
  axis.grid(axis='x', alpha=0.3)
