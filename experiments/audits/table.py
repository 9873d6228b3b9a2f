"""Runs audits, and shows what they found."""

import dataclasses
import platform
import time
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments.audits import bounds, catalog
from experiments.papers import common
from jaxfl import calibration, checks

CONFIDENCE = 0.95  # that all bounds of a table hold
SHIPPED = 'as shipped'
_FEWEST = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the flags of the same names say."""

  epsilon_dp: tuple[float, ...] = (1.0, 3.0)
  delta_dp: float = 1e-5
  num_trials: int = 2000
  seeds: int = 3
  mechanism: str = 'all'
  bug: str = 'all'


def _cases(settings: Settings) -> list[tuple[str, str, float]]:
  """Mechanism, bug and epsilon of every audit; checks the settings."""
  checks.one_of('mechanism', settings.mechanism, ('all', *catalog.MECHANISMS))
  names = (
    list(catalog.MECHANISMS)
    if settings.mechanism == 'all'
    else [settings.mechanism]
  )
  if not settings.epsilon_dp:
    raise ValueError('epsilon_dp must be one positive number or several')
  for epsilon in settings.epsilon_dp:
    calibration.check_target(epsilon, settings.delta_dp)
  for field, value, least in (
    ('seeds', settings.seeds, 1),
    ('num_trials', settings.num_trials, _FEWEST),
  ):
    if value < least:
      raise ValueError(f'{field} must be >= {least}, got {value}')
  known = [bug.__name__ for m in names for bug in catalog.MECHANISMS[m].bugs]
  checks.one_of('bug', settings.bug, dict.fromkeys(('all', 'none', *known)))
  cases = []
  for name in names:
    bugs = [bug.__name__ for bug in catalog.MECHANISMS[name].bugs]
    if settings.bug != 'all':
      bugs = [bug for bug in bugs if bug == settings.bug]
    cases += [
      (name, bug, epsilon)
      for epsilon in settings.epsilon_dp
      for bug in (SHIPPED, *bugs)
    ]
  return cases


def make(settings: Settings) -> dict[str, Any]:
  """Audits.

  Args:
    settings: of the audits.

  Returns:
    What is printed, drawn and written.

  Raises:
    ValueError: for a mistake in the settings; names the flag.
    ImportError: without dp-accounting.
  """
  cases = _cases(settings)
  alpha = (1.0 - CONFIDENCE) / len(cases)
  claims: dict[tuple[str, float], catalog.Claim] = {}
  rows = []
  for name, bug, epsilon in common.track(cases):
    mechanism = catalog.MECHANISMS[name]
    if (name, epsilon) not in claims:
      claims[name, epsilon] = mechanism.claim(epsilon, settings.delta_dp)
    claim = claims[name, epsilon]
    rows.append(
      {'mechanism': name, 'bug': bug}
      | audit(mechanism, bug, claim, settings, alpha)
    )
  return {
    'settings': dataclasses.asdict(settings),
    'confidence': CONFIDENCE,
    'bounds': 2 * len(cases),
    'rows': rows,
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


def audit(
  mechanism: catalog.Mechanism,
  bug: str,
  claim: catalog.Claim,
  settings: Settings,
  alpha: float,
) -> dict[str, Any]:
  """One mechanism or bug against one claim; guesses of all seeds together."""
  build, wrong = mechanism.shipped, 'nothing'
  for planted in mechanism.bugs:
    if planted.__name__ == bug:
      build, wrong = planted, planted.__doc__
  began = time.perf_counter()
  play = mechanism.player(build(claim.settings))
  count = settings.num_trials * mechanism.times
  scores, signs = [], []
  for seed in range(settings.seeds):
    coins = np.random.default_rng([seed, 2]).integers(2, size=count)
    signs.append(2 * coins - 1)
    scores.append(play(signs[-1], seed))
  right = (np.stack(scores) >= 0) == (np.stack(signs) > 0)
  found = bounds.evidence(
    np.concatenate(scores),
    np.concatenate(signs),
    delta=settings.delta_dp,
    alpha=alpha,
  )
  return {
    'wrong': wrong,
    'epsilon_claimed': claim.epsilon,
    'accuracy_claimed': claim.accuracy,
    **found._asdict(),
    'accuracy_of_seeds': right.mean(1).tolist(),
    'refuted': (
      found.accuracy_lower > claim.accuracy or found.epsilon_any > claim.epsilon
    ),
    'seconds': round(time.perf_counter() - began, 1),
  }


def refuted(found: dict[str, Any]) -> list[str]:
  """What is shipped, and loses more than is claimed."""
  return [
    f'{row["mechanism"]} at epsilon {row["epsilon_claimed"]:.4g}'
    for row in found['rows']
    if row['bug'] == SHIPPED and row['refuted']
  ]


def _names(row: dict[str, Any]) -> tuple[str, str]:
  """Of the mechanism and of the bug, for people."""
  title = catalog.MECHANISMS[row['mechanism']].title
  return title, row['bug'].replace('_', ' ')


def table(found: dict[str, Any]) -> Table:
  """The table of all audits."""
  settings = found['settings']
  shown = Table(
    title=f'epsilon at delta {settings["delta_dp"]:g}: claimed, and proven by'
    f' guesses (lower bounds; all {found["bounds"]} hold with'
    f' {found["confidence"]:.0%} confidence)',
    caption='right guesses: mean +- standard deviation over seeds; the best'
    ' adversary of the claim has the claimed share. epsilon: at least that of'
    ' a Gaussian mechanism of this accuracy; any: whatever the mechanism is.',
    caption_justify='left',
  )
  shown.add_column('mechanism')
  shown.add_column('planted bug')
  for name in ('trials', 'right, claimed', 'right, measured', 'at least'):
    shown.add_column(name, justify='right')
  for name in ('epsilon, claimed', 'at least', 'at least, any'):
    shown.add_column(name, justify='right')
  shown.add_column('verdict')
  for row in found['rows']:
    seeds = row['accuracy_of_seeds']
    spread = f' +- {np.std(seeds, ddof=1):.4f}' if len(seeds) > 1 else ''
    shown.add_row(
      *_names(row),
      f'{row["num_trials"]:,}',
      f'{row["accuracy_claimed"]:.4f}',
      f'{row["accuracy"]:.4f}{spread}',
      f'{row["accuracy_lower"]:.4f}',
      f'{row["epsilon_claimed"]:.3f}',
      f'{row["epsilon_gaussian"]:.3f}',
      f'{row["epsilon_any"]:.3f}',
      'REFUTED' if row['refuted'] else 'holds',
    )
  return shown


def draw(found: dict[str, Any]):
  """Claimed and proven epsilon of every audit, a panel for every claim."""
  targets, delta = (found['settings'][k] for k in ('epsilon_dp', 'delta_dp'))
  figure, axes = common.subplots(
    len(targets),
    'Epsilon that guesses prove of what is shipped and of planted bugs',
  )
  names = list(dict.fromkeys(map(_names, found['rows'])))
  figure.set_size_inches(3.6 + 3.4 * len(targets), 2.0 + 0.33 * len(names))
  largest = 60.0
  for row in found['rows']:
    claim = lambda i, row=row: abs(targets[i] - row['epsilon_claimed'])
    axis = axes[min(range(len(targets)), key=claim)]
    style = {
      'color': 'tab:red' if row['refuted'] else 'tab:green', 'ls': '', 'ms': 6
    }  # fmt: skip
    y = names.index(_names(row))
    seeds = [
      bounds.gaussian_epsilon(a, delta)
      for a in row['accuracy_of_seeds']
      if a < 1
    ]
    largest = max(largest, *seeds, row['epsilon_gaussian'])
    axis.plot(seeds, [y] * len(seeds), '|', **style | {'ms': 9}, zorder=4)
    axis.plot(row['epsilon_gaussian'], y, 'o', **style, zorder=3)
    axis.plot(row['epsilon_any'], y, 'o', **style, mfc='white', zorder=2)
  for axis, target in zip(axes, targets, strict=True):
    axis.axvline(target, color='0.3', lw=1.2, ls='--')
    axis.set_xscale('symlog', linthresh=1, linscale=0.6)
    ticks = [0, 0.5, 1, 3, 10, 40]
    axis.set_xticks(ticks, [f'{t:g}' for t in ticks])
    axis.set_xlim(-0.06, 1.2 * largest)
    axis.minorticks_off()
    axis.set_xlabel(f'epsilon at delta {delta:g}')
    axis.set_title(f'claimed: epsilon {target:g} (dashed)', fontsize=9)
  axes[0].set_yticks(range(len(names)), [': '.join(pair) for pair in names])
  axes[0].set_ylim(len(names) - 0.5, -0.5)
  handles = [
    axes[0].plot([], [], marker, ls='', color=color, mfc=fill, label=label)[0]
    for marker, color, fill, label in (
      ('o', '0.3', '0.3', 'lower bound, Gaussian mechanism'),
      ('o', '0.3', 'white', 'lower bound, any mechanism'),
      ('|', '0.3', '0.3', 'estimate of a seed; none if never wrong'),
      ('o', 'tab:green', 'tab:green', 'claim holds'),
      ('o', 'tab:red', 'tab:red', 'claim refuted'),
    )
  ]
  figure.legend(
    handles=handles,
    loc='outside lower center',
    ncols=2,
    frameon=False,
    fontsize=8,
  )
  return figure
