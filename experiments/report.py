"""A run's results as people read them: a table and a picture."""

import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxfl import metrics


def amount(num_bytes: float) -> str:
  """Bytes as people read them."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if num_bytes < 1000 or unit == 'GB':
      digits = 0 if unit == 'B' else 1
      return f'{num_bytes:,.{digits}f} {unit}'
    num_bytes /= 1000
  raise AssertionError


def table(summary: dict[str, Any]) -> Table:
  """The summary of a run."""
  result = Table(
    title=f'{summary["method"]} on {summary["task"]}, seed {summary["seed"]}'
  )
  result.add_column('')
  result.add_column('value', justify='right')
  for name in summary['before']:
    before, after = summary['before'][name], summary['after'][name]
    best = summary['best'][name]
    result.add_row(
      f'held-out {name.replace("_", " ")}',
      f'{before:.4f} -> {after:.4f} (best {best["value"]:.4f} after'
      f' {best["round"]})',
    )
  clients, rounds = summary['num_clients'], summary['rounds']
  result.add_row('clients, rounds', f'{clients}, {rounds}')
  result.add_row('parameters trained', f'{summary["num_params"]:,}')
  if summary['num_frozen']:
    result.add_row('parameters frozen', f'{summary["num_frozen"]:,}')
  result.add_row('bytes up, all clients', amount(summary['bytes_up']))
  result.add_row('bytes down, all clients', amount(summary['bytes_down']))
  if summary['projected_grads']:
    per_grad = summary['bytes_up'] / summary['projected_grads']
    result.add_row('projected gradients', f'{summary["projected_grads"]:,}')
    result.add_row('bytes up per projected gradient', f'{per_grad:.2f}')
  if 'epsilon_spent' in summary:
    result.add_row('epsilon_dp spent', f'{summary["epsilon_spent"]:.3f}')
  result.add_row('bytes in the log', amount(summary['bytes_log']))
  result.add_row('forward passes', f'{summary["forwards"]:,}')
  result.add_row('backward passes', f'{summary["backwards"]:,}')
  result.add_row('seconds', f'{summary["wall_s"]:.1f}')
  result.add_row('digest', summary['digest'][:16])
  return result


def show(summary: dict[str, Any]) -> None:
  """Prints the table."""
  Console(width=78).print(table(summary))


def curve(rows: list[metrics.Row], metric: str, path: pathlib.Path) -> None:
  """Draws a metric against rounds and against bytes up.

  Args:
    rows: of one run.
    metric: the name to draw.
    path: of the PNG file to write.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  rows = [row for row in rows if row.metric == metric]
  figure, axes = plt.subplots(
    1, 2, figsize=(9, 3.6), sharey=True, layout='constrained'
  )
  values = [row.value for row in rows]
  panels = [
    ('round', [row.round for row in rows]),
    ('bytes up, all clients [kB]', [row.bytes_up / 1000 for row in rows]),
  ]
  for axis, (label, x) in zip(axes, panels, strict=True):
    axis.plot(x, values, marker='.', color='tab:blue', label='fine-tuned')
    axis.axhline(values[0], color='0.6', ls='--', lw=1, label='base model')
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel(f'held-out {metric.replace("_", " ")}')
  axes[0].legend(frameon=False)
  first = rows[0]
  figure.suptitle(f'{first.method} on {first.task}, seed {first.seed}')
  figure.savefig(path, dpi=120)
  plt.close(figure)


def log_x(axis: Any) -> None:
  """A logarithmic axis with few labels, once everything is drawn."""
  from matplotlib import ticker

  axis.set_xscale('log')
  low, high = axis.get_xlim()
  subs = (1.0, 3.0) if high / low < 2000 else (1.0,)
  axis.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
  axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=' '))
  axis.xaxis.set_minor_formatter(ticker.NullFormatter())
