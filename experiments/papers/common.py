"""What the entries of `experiments.paper` are made of: rows, tables, pictures.

An entry runs and returns a result that JSON can hold; the table and the picture
are functions of the result alone.
"""

import json
import pathlib
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from experiments import progress

Result = dict[str, Any]


class Request(NamedTuple):
  """What the user asked for.

  Attributes:
    seeds: 0, 1, ..., seeds - 1; None for the entry's own number.
    data_dir: where the files of the tasks are.
    dataset: a csv file, for entries that take any.
    target: its column to predict.
    model: directory of the model, for studies that ask for one.
    jobs: runs of a study at once.
    runs: directory of the runs of a study.
  """

  seeds: int | None = None
  data_dir: str | None = None
  dataset: str | None = None
  target: str | None = None
  model: str | None = None
  jobs: int = 1
  runs: str = 'runs'

  @property
  def seed_list(self) -> range:
    """The seeds of entries that are no studies: three by default."""
    return range(self.seeds or 3)


class Entry(NamedTuple):
  """A figure, a table or a claim of a paper.

  Attributes:
    title: a line for the list of entries.
    run: request -> result.
    draw: result -> matplotlib figure; None if there is nothing to draw.
  """

  title: str
  run: Callable[[Request], Result]
  draw: Callable[[Result], Any] | None


def row(
  setting: str,
  values: Sequence[float],
  *,
  published: str = '-',
  bytes: float | None = None,
  forwards: float | None = None,
  seconds: float | None = None,
  more: Mapping[str, float | str] | None = None,
) -> dict[str, Any]:
  """A line of the table.

  Args:
    setting: what it is of.
    values: the measured value for every seed; none if nothing was run.
    published: what the paper has, as text.
    bytes: see the title of the result for what they are of.
    forwards: passes over a minibatch, likewise.
    seconds: likewise.
    more: further columns.
  """
  values = [float(x) for x in values]
  return {
    'setting': setting,
    'published': published,
    'ours': statistics.fmean(values) if values else None,
    'spread': statistics.stdev(values) if len(values) > 1 else None,
    'values': values,
    'bytes': bytes,
    'forwards': forwards,
    'seconds': seconds,
    'more': dict(more or {}),
  }


def result(
  title: str,
  measure: str,
  rows: Sequence[dict[str, Any]],
  *,
  settings: Mapping[str, Any],
  notes: Sequence[str],
  style: str = '.4f',
  seeds: Sequence[int] = (),
  **data: Any,
) -> Result:
  """A result that JSON can hold.

  Args:
    title: of table and picture.
    measure: what the columns `ours` and `spread` are of, with their unit.
    rows: of `row`, all with the same further columns.
    settings: those of ours that the paper does not state.
    notes: sentences for the table's caption.
    style: format of the measured numbers.
    seeds: of the runs.
    **data: what the picture needs besides.
  """
  return {
    'title': title,
    'measure': measure,
    'rows': list(rows),
    'settings_of_ours': dict(settings),
    'notes': list(notes),
    'style': style,
    'seeds': list(seeds),
    'jax': jax.__version__,
    'python': platform.python_version(),
    **data,
  }


def _text(value: Any, style: str) -> str:
  if value is None:
    return '-'
  return value if isinstance(value, str) else format(value, style)


def table(found: Result) -> Table:
  """The table of a result."""
  settings = ', '.join(
    f'{k.replace("_", " ")} {v}' for k, v in found['settings_of_ours'].items()
  )
  notes = list(found['notes'])
  if settings:
    notes.append(
      f'Settings of ours, which the paper does not state: {settings}.'
    )
  shown = Table(
    title=f'{found["title"]}\nours: {found["measure"]}',
    caption='\n'.join(notes),
    caption_justify='left',
  )
  more = list(found['rows'][0]['more']) if found['rows'] else []
  shown.add_column('setting')
  shown.add_column('published')
  names = ['ours', 'spread', 'bytes', 'forwards', 'seconds', *more]
  for name in names:
    shown.add_column(name, justify='right')
  style = found['style']
  for line in found['rows']:
    shown.add_row(
      line['setting'],
      line['published'],
      _text(line['ours'], style) if line['values'] else 'not run here',
      _text(line['spread'], style),
      _text(line['bytes'], ',.0f'),
      _text(line['forwards'], ',.0f'),
      _text(line['seconds'], ',.1f'),
      *(_text(line['more'][name], style) for name in more),
    )
  return shown


def show(found: Result) -> None:
  """Prints the table, as wide as it needs to be where there is no terminal."""
  console = Console()
  if not console.is_terminal:
    console = Console(width=170)
  console.print(table(found))


def to_json(found: Result) -> str:
  """JSON with every list of numbers on a line."""
  text = json.dumps(found, indent=2)
  one_line = lambda match: ' '.join(match[0].split())
  return re.sub(r'\[[^][{}"]*\]', one_line, text) + '\n'


def write(found: Result, entry: Entry, stem: pathlib.Path) -> None:
  """Writes the JSON file, and the picture if there is one."""
  stem.parent.mkdir(parents=True, exist_ok=True)
  stem.with_name(stem.name + '.json').write_text(to_json(found))
  if entry.draw is not None:
    figure = entry.draw(found)
    figure.savefig(stem.with_name(stem.name + '.png'), dpi=120)


def track(items: Iterable[Any]) -> Iterator[Any]:
  """The items, with progress on standard error."""
  items = list(items)
  with progress.bar(len(items), 0, 'part') as advance:
    for done, item in enumerate(items, 1):
      yield item
      advance(done, ' '.join(map(str, item)))


def subplots(num_panels: int, title: str, *, sharey: bool = True):
  """A figure, and its axes in a row."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(
    1,
    num_panels,
    figsize=(1.2 + 4.2 * num_panels, 3.9),
    sharey=sharey,
    layout='constrained',
    squeeze=False,
  )
  figure.suptitle(title, fontsize=10)
  for axis in axes[0]:
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
  return figure, list(axes[0])


def legend_below(figure: Any, axis: Any) -> None:
  """The legend of one of the axes, below all of them."""
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc='outside lower center',
    ncols=min(len(labels), 5),
    frameon=False,
    fontsize=8,
  )


def band(
  axis: Any,
  x: Sequence[float],
  runs: Sequence[Sequence[float]],
  label: str,
  **style: Any,
) -> None:
  """The mean over seeds as a line, and one standard deviation as a band.

  Args:
    axis: to draw on.
    x: the positions.
    runs: the values at the positions, for every seed.
    label: of the line.
    **style: of the line.
  """
  columns = list(zip(*runs, strict=True))
  mean = [statistics.fmean(c) for c in columns]
  (line,) = axis.plot(x, mean, label=label, lw=1.4, **style)
  if len(runs) > 1:
    std = [statistics.stdev(c) for c in columns]
    axis.fill_between(
      x,
      [m - s for m, s in zip(mean, std, strict=True)],
      [m + s for m, s in zip(mean, std, strict=True)],
      color=line.get_color(),
      alpha=0.25,
      lw=0,
    )
