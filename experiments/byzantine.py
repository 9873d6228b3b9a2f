"""Clients that lie, and what rules and probes make of them: SST-2 features.

    python -m experiments.byzantine --data_dir=DATA --jobs=2

10 clients, of which a fraction sends what `jaxfl.byzantine` says, by method and
aggregator; `probe` is the mean with weights of `jaxfl.probe`, `oracle` that of
the honest clients alone. Writes `experiments/results/byzantine.json` and
`byzantine.png`, and prints the table. Runs that the JSON file holds are not
made again: delete it to start anew.
"""

import json
import pathlib
import platform

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments import byzantine_runs
from experiments.workdir import write_json
from jaxfl import byzantine

_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where the task files are.', required=True
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds 0, 1, ...', lower_bound=1)
_JOBS = flags.DEFINE_integer('jobs', 1, 'Processes at once.', lower_bound=1)
_OUT = flags.DEFINE_string('out', 'experiments/results', 'Where results go.')
_ALL = (*byzantine.ATTACKS, byzantine_runs.TURNCOAT)


def by_cell(result):
  """The summary by (method, aggregator, attack, fraction)."""
  names = ('method', 'aggregator', 'attack', 'fraction')
  return {tuple(cell[k] for k in names): cell for cell in result['summary']}


def show(result) -> None:
  """Prints accuracies in per cent where half of the clients lie."""
  cells = by_cell(result)
  table = Table(title='accuracy, half of the clients lie')
  for name in ('method', 'aggregator', 'honest', *_ALL):
    table.add_column(name.replace('_', ' '))

  def text(cell):
    if cell is None:
      return ''
    std = '' if cell['std'] is None else f' +- {100 * cell["std"]:.1f}'
    return f'{100 * cell["accuracy"]:.1f}{std}'

  for method, aggregators in byzantine_runs.AGGREGATORS.items():
    for name in aggregators:
      row = [cells.get((method, name, None, 0.0))]
      row += [cells.get((method, name, attack, 0.5)) for attack in _ALL]
      table.add_row(method, name, *map(text, row))
  Console(width=150).print(table)


def draw(result, path: pathlib.Path) -> None:
  """The worst attack's accuracy against the fraction that lies."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  cells = by_cell(result)
  methods = [m for m in byzantine_runs.METHODS if ',' not in m]
  figure, axes = plt.subplots(
    1, len(methods), figsize=(3.6 * len(methods), 3.8), sharey=True,
    layout='constrained',
  )  # fmt: skip
  fractions = (0.0, *byzantine_runs.FRACTIONS)
  names = list(
    dict.fromkeys(n for m in methods for n in byzantine_runs.AGGREGATORS[m])
  )
  for axis, method in zip(axes, methods, strict=True):
    for name in byzantine_runs.AGGREGATORS[method]:
      worst = [
        min(
          (
            cells[key]['accuracy']
            for key in cells
            if key[:2] == (method, name)
            and key[3] == fraction
            and key[2] != byzantine_runs.TURNCOAT
          ),
          default=float('nan'),
        )
        for fraction in fractions
      ]
      axis.plot(
        fractions, worst, marker='o', ms=4, lw=1.3,
        label=name.replace('_', ' '), color=f'C{names.index(name)}',
        ls='--' if name == 'oracle' else '-',
      )  # fmt: skip
    axis.set_title(method, fontsize=10)
    axis.set_xlabel('fraction of clients that lie')
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=7)
  axes[0].set_ylabel('held-out accuracy under the worst attack')
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  path = out / 'byzantine.json'
  result = {
    'command': 'python -m experiments.byzantine --data_dir=DATA_DIR',
    'jax': jax.__version__,
    'python': platform.python_version(),
    'methods': byzantine_runs.METHODS,
    'aggregators': byzantine_runs.AGGREGATORS,
    'rows': [],
  }
  if path.exists():  # goes on
    result['rows'] = json.loads(path.read_text())['rows']
  settings = byzantine_runs.missing(
    result['rows'], _SEEDS.value, _DATA_DIR.value
  )
  for rows in byzantine_runs.run(settings, _JOBS.value):
    result['rows'] += rows
    write_json(path, result)
    print(f'{rows[0]["method"]}, seed {rows[0]["seed"]}: done', flush=True)
  result['summary'] = byzantine_runs.summarise(result['rows'])
  write_json(path, result)
  draw(result, out / 'byzantine.png')
  show(result)


if __name__ == '__main__':
  app.run(main)
