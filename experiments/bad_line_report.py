"""The table and the picture of `experiments.bad_line`."""

import pathlib

from rich.table import Table

from experiments import report


def name_of(row) -> str:
  pipeline = f's = {row["pipeline"]}' if row['pipeline'] else 'no pipeline'
  return f'{row["line"]}, {pipeline}'


def compare(rows) -> None:
  """Adds to every row its rate beside that of the clean line."""
  clean = {r['pipeline']: r['rate'] for r in rows if r['line'] == 'clean'}
  for row in rows:
    beside = clean.get(row['pipeline'])
    known = beside and row['rate']
    row['of_clean'] = row['rate'] / beside if known else None


def table(result) -> Table:
  """A row for every condition."""
  found = Table(title='rounds a second')
  for name in (
    'line', 'rounds', 'rounds/s', 'of clean', 'messages a round', 'line up',
    'line down', 'lost', 'late', 'rejected', 'kills', 'digests',
  ):  # fmt: skip
    found.add_column(name, justify='left' if name == 'line' else 'right')
  for row in result['rows']:
    refused = dict(row['refused'])
    late = refused.pop('late', 0)
    refused.pop('repeated', None)  # no fault
    share, rate = row['of_clean'], row['rate']
    found.add_row(
      name_of(row),
      f'{row["closed"]} of {row["rounds"]}',
      '' if rate is None else f'{rate:.3f}',
      '' if share is None else f'{100 * share:.1f} %',
      f'{row["messages"]:.2f}',
      report.amount(sum(row['line_up'])),
      report.amount(sum(row['line_down'])),
      str(row['lost_segments']),
      str(late),
      str(sum(refused.values())),
      str(sum(event['kind'] != 'join' for event in row['events'])),
      'hung' if row['hung'] else 'equal' if row['equal'] else 'DIFFER',
    )
  return found


def draw(result, path: pathlib.Path) -> None:
  """Rates as bars; rounds against time, with what was done to the runs."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  rows = result['rows']
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4), width_ratios=(2, 3), layout='constrained'
  )
  marks = {'kill': 'x', 'coordinator': 's', 'join': '^'}
  said = {
    'kill': 'client killed',
    'coordinator': 'coordinator killed',
    'join': 'client joins',
  }
  for k, row in enumerate(rows):
    bar = left.barh(k, row['rate'] or 0.0, color=f'C{k}')
    text = f'{row["rate"] or 0.0:.2f}'
    if row['line'] == 'bad' and row['of_clean'] is not None:
      text += f' ({100 * row["of_clean"]:.0f} %)'
    left.bar_label(bar, [text], padding=3, fontsize=8)
    curve = row['curve']
    right.plot(
      curve['seconds'], curve['round'], lw=1.2, color=f'C{k}',
      label=name_of(row),
    )  # fmt: skip
    for event in row['events']:
      behind = sum(t <= event['at'] for t in curve['seconds'])
      height = curve['round'][max(0, behind - 1)]
      right.plot(
        event['at'], height, marker=marks[event['kind']], color=f'C{k}', ls='',
        label=said[event['kind']],
      )  # fmt: skip
  left.set_yticks(range(len(rows)), [name_of(row) for row in rows])
  left.invert_yaxis()
  left.margins(x=0.25)
  left.set_xlabel('rounds a second')
  right.set_xlabel('seconds after the first round')
  right.set_ylabel('rounds')
  right.grid(alpha=0.3)
  handles, labels = right.get_legend_handles_labels()
  unique = dict(zip(labels, handles, strict=True))
  right.legend(unique.values(), unique.keys(), frameon=False, fontsize=8)
  figure.savefig(path, dpi=120)
  plt.close(figure)
