"""The table and the picture of `experiments.attack`."""

import textwrap
from typing import Any

import numpy as np
from rich.table import Table

from experiments import report
from experiments.papers import common

_MARKERS = 'oPDsv^X*'
_SHOWN = 11  # reconstructions beside the truth


def _by_batch(found: common.Result) -> dict[int, list[dict[str, Any]]]:
  sizes = [found['settings'][f'{name}_batch'] for name in ('small', 'large')]
  return {n: [r for r in found['rows'] if r['batch'] == n] for n in sizes}


def table(found: common.Result) -> Table:
  """A line for every wire format, with columns for both sizes of a batch."""
  shown = Table(
    title=f'What messages give away: {found["pictures"]}, {found["pixels"]}'
    f' pixels, {found["parameters"]:,} parameters',
    caption='error: of the reconstruction, over that of guessing the mean of'
    f' the pictures; mean and deviation over {found["settings"]["seeds"]}'
    f' victims. epsilon: of this one message, delta {found["delta_dp"]:g}.',
    caption_justify='left',
  )
  shown.add_column('what is sent')
  by_batch = _by_batch(found)
  for size in by_batch:
    shown.add_column(f'bytes, batch of {size}', justify='right')
    shown.add_column('error', justify='right')
    shown.add_column('PSNR, dB', justify='right')
  for lines in zip(*by_batch.values(), strict=True):
    cells = [lines[0]['label']]
    for line in lines:
      error = f'{line["error"]:.3f}'
      if line['spread'] is not None:
        error += f' +- {line["spread"]:.3f}'
      cells += [f'{line["bytes"]:,}', error, f'{line["psnr"]:.1f}']
    shown.add_row(*cells)
  return shown


def draw(found: common.Result):
  """Errors against bytes, and what the first victim's pictures come out as."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  figure = plt.figure(figsize=(11, 7.6), layout='constrained')
  figure.suptitle(
    f'Gradient inversion: {found["pictures"]}, {found["pixels"]} pixels,'
    f' network of {found["parameters"]:,} parameters,'
    f' {found["settings"]["seeds"]} victims',
    fontsize=11,
  )
  halves: Any = figure.subfigures(2, 1, height_ratios=(3.6, 1.0))
  upper, lower = halves
  axes = upper.subplots(1, 2, sharey=True)
  for axis, (size, rows) in zip(axes, _by_batch(found).items(), strict=True):
    _panel(axis, rows)
    axis.set_title(f'batch of {size}', fontsize=10)
    axis.set_xlabel('bytes of the message')
  axes[0].set_ylabel('reconstruction error\n(1: that of guessing the mean)')
  common.legend_below(upper, axes[0])
  _strip(lower, found)
  return figure


def _panel(axis: Any, rows: list[dict[str, Any]]) -> None:
  families: dict[str, list] = {}
  for row in rows:
    families.setdefault(row['family'], []).append(row)
  for row, style in zip(families.pop('no message'), ('--', ':'), strict=True):
    axis.axhline(row['error'], ls=style, color='0.4', lw=1, label=row['label'])
  for i, (family, lines) in enumerate(families.items()):
    private = lines[0]['epsilon_dp'] is not None
    axis.errorbar(
      [row['bytes'] for row in lines],
      [row['error'] for row in lines],
      [row['spread'] or 0.0 for row in lines],
      label=family,
      color=f'C{i % 10}',
      marker=_MARKERS[i % len(_MARKERS)],
      ms=6,
      mfc='white' if private else f'C{i % 10}',
      ls='--' if private else '-',
      lw=1.3,
      capsize=2,
    )
    if private and len({row['bytes'] for row in lines}) == 1:
      worst = max(lines, key=lambda row: row['epsilon_dp'])
      axis.annotate(
        f'epsilon {worst["epsilon_dp"]:g}',
        (worst['bytes'], worst['error']),
        (-6, -3),
        textcoords='offset points',
        ha='right',
        fontsize=7,
      )
  axis.set_ylim(-0.04, 1.15)
  axis.grid(alpha=0.3)
  axis.set_axisbelow(True)
  report.log_x(axis)


def _strip(figure: Any, found: common.Result) -> None:
  """The truth, and reconstructions from some of the messages."""
  rows = next(iter(_by_batch(found).values()))
  rows = [row for row in rows if row['family'] != 'no message']
  places = np.unique(np.linspace(0, len(rows) - 1, _SHOWN).astype(int))
  pictures = [('truth', found['truth'])]
  pictures += [(rows[i]['label'], rows[i]['first']) for i in places]
  axes = figure.subplots(1, len(pictures))
  side = round(found['pixels'] ** 0.5)
  for axis, (label, pixels) in zip(axes, pictures, strict=True):
    axis.imshow(
      np.reshape(pixels, (side, side)), cmap='gray', vmin=0.0, vmax=1.0
    )
    axis.set_title(textwrap.fill(label, 13), fontsize=7)
    axis.set_axis_off()
