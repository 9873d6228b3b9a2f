"""Writes the tables of docs/performance.md from the committed results.

    python -m tests.make_performance_tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, NAME being
that of a file in experiments/results without its ending.
"""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'performance.md'
RESULTS = ROOT / 'experiments' / 'results'
SECTION = re.compile(r'(<!-- table: (\w+) -->\n).*?(<!-- end -->)', re.S)


def number(x) -> str:
  """Three digits, without an exponent."""
  if x is None:
    return ''
  return f'{x:,.0f}' if abs(x) >= 100 else f'{x:.3g}'


def percent(share) -> str:
  if share is None:
    return ''
  return f'{share:.0%}' if share >= 0.01 else f'{share:.1%}'


def table(name: str) -> str:
  """The table of a result; a line of text where there is none yet."""
  path = RESULTS / f'{name}.json'
  if not path.exists():
    return 'Not measured yet.\n'
  found = json.loads(path.read_text())
  machine = found['machine']
  device = machine['cpu'] if machine['backend'] == 'cpu' else machine['device']
  cores = '' if machine['backend'] != 'cpu' else f', {machine["cores"]} core'
  lines = [f'**{found["note"]}**\n'] if 'note' in found else []
  lines += [
    f'{device}{cores}, JAX {machine["jax"]}. {found["unit"]}; medians.\n',
    '| operation | on | ours | floor | of the floor | beside |',
    '|---|---|---|---|---|---|',
  ]
  for row in found['rows']:
    if row.get('floor_rate') is None and not row['rivals']:
      continue  # what floors are made of
    beside = ', '.join(
      f'{number(rival["ours"])} x {of}' for of, rival in row['rivals'].items()
    )
    cells = (
      row['operation'], row['on'], number(row['rate']),
      number(row.get('floor_rate')), percent(row.get('of_floor')), beside,
    )  # fmt: skip
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def filled(page: str) -> str:
  """The page with the tables of today's results."""
  return SECTION.sub(lambda m: f'{m[1]}{table(m[2])}{m[3]}', page)


if __name__ == '__main__':
  PAGE.write_text(filled(PAGE.read_text()))
