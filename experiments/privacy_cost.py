"""What a private run costs; see `experiments.privacy`."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from experiments.config import UsageError
from experiments.papers import common
from jaxfl import accounting, calibration, checks, discrete, events
from jaxfl import plan as plan_lib

MECHANISMS = ('gaussian', *events.LAWS)
_DIFF2 = ('restart_interval', 'budget_share', 'local_steps')
_LOCAL = ('num_clients', 'sampling_rate', 'local_share')
_INTEGERS = ('sensitivity', 'num_scalars')
_POINTS = 24  # rounds at which the slow accountants are asked
_NAMES = {'gdp': 'closed form', 'pld': 'PLD', 'rdp': 'RDP'}


def _setting(default: Any, text: str) -> Any:
  """A field with the text of its flag."""
  return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the flags of the same names say."""

  epsilon_dp: float | None = _setting(None, 'Of the whole run.')
  delta_dp: float | None = _setting(None, 'Of the whole run.')
  num_examples: int | None = _setting(
    None, 'Of all clients; delta_dp must be below one over it.'
  )
  num_rounds: int | None = _setting(None, 'Of the run.')
  mechanism: str = _setting(
    'gaussian', f'What the noise is: {", ".join(MECHANISMS)}.'
  )
  restart_interval: int = _setting(
    1, 'Rounds from one full gradient to the next; 1: DP-GD.'
  )
  budget_share: float = _setting(0.5, 'Of the budget, for full gradients.')
  local_steps: int = _setting(1, "Of a round's client; 1: no local routine.")
  num_clients: int | None = _setting(
    None, 'Who take turns in the local routine.'
  )
  sampling_rate: float | None = _setting(
    None,
    'Of secret Poisson samples: of local minibatches, or without local steps of'
    ' DP-SGD.',
  )
  local_share: float = _setting(0.2, 'Of the budget, for local steps.')
  sensitivity: int = _setting(
    1, 'Of an integer, see jaxfl.discrete.sensitivity.'
  )
  num_scalars: int = _setting(1, 'Integers of a round.')


class Run(NamedTuple):
  """A calibrated run, and how it is described.

  Attributes:
    rounds: events of every round.
    adjacency: of `plan.ADJACENCIES`.
    lines: what is printed about it.
  """

  rounds: list[events.Round]
  adjacency: str
  lines: dict[str, str]


def _integers(epsilon: float, delta: float, settings: Settings) -> Run:
  law, rounds = settings.mechanism, settings.num_rounds
  if not rounds or rounds < 1:
    raise UsageError(f'num_rounds must be >= 1, got {rounds}')
  scalars = settings.num_scalars
  event = calibration.integer_noise(
    epsilon,
    delta,
    law=law,
    sensitivity=settings.sensitivity,
    count=rounds * scalars,
  )
  each = events.IntegerNoise(law, event.scale, event.sensitivity, scalars)
  if law == 'discrete_gaussian':
    std, pmf = event.scale, discrete.gaussian_pmf(event.scale)
  else:
    std, pmf = math.sqrt(event.scale), discrete.skellam_pmf(event.scale)
  width = discrete.bits_needed(0, pmf)
  lines = {
    'mechanism': f'{law.replace("_", " ")} noise, {scalars} integers a round',
    'sampler': 'none: all examples',
    'standard deviation': f'{std:.4f}, sensitivity {event.sensitivity}',
    'bits of the noise': f'{width}; sums of codes need more',
  }
  return Run([(each,)] * rounds, 'replace', lines)


def _dp_sgd(epsilon: float, delta: float, settings: Settings) -> Run:
  for name in ('restart_interval', 'budget_share'):
    if getattr(settings, name) != getattr(Settings, name):
      raise UsageError(
        f'{name} is of DIFF2, whose sampling_rate needs local_steps'
      )
  rounds, rate = settings.num_rounds, settings.sampling_rate
  assert rate is not None
  plan = calibration.dp_sgd(
    epsilon, delta, num_rounds=rounds or 0, sampling_rate=rate
  )
  lines = {
    'mechanism': 'Gaussian noise, DP-SGD',
    'sampler': f'Poisson, rate {rate:.4g}, secret',
    'noise multiplier, sum': f'{plan.noise_multiplier:.4f}',
  }
  return Run(plan.rounds(), plan.adjacency, lines)


def _diff2(epsilon: float, delta: float, settings: Settings) -> Run:
  names = ['num_rounds', 'restart_interval', 'budget_share']
  local = settings.local_steps > 1
  calibrate = calibration.diff2_local if local else calibration.diff2
  if local:
    names += ['local_steps', *_LOCAL]
  plan = calibrate(
    epsilon, delta, **{name: getattr(settings, name) for name in names}
  )
  interval = plan.restart_interval
  kind = 'DP-GD' if interval == 1 else f'DIFF2, restart every {interval} rounds'
  lines = {
    'mechanism': f'Gaussian noise, {kind}',
    'sampler': 'none: all examples',
    'noise multiplier, gradient': f'{plan.noise_multiplier:.4f}',
  }
  if plan.noise_multiplier_diff:
    lines['noise multiplier, difference'] = f'{plan.noise_multiplier_diff:.4f}'
  if local:
    lines['mechanism'] += f', {plan.local_steps} local steps'
    lines['sampler'] = f'local: Poisson, rate {plan.sampling_rate:.4g}, secret'
    lines['noise multiplier, local'] = f'{plan.noise_multiplier_local:.4f}'
  return Run(plan.rounds(), plan.adjacency, lines)


def make(settings: Settings) -> dict[str, Any]:
  """Calibrates a run and accounts for it.

  Args:
    settings: of the run.

  Returns:
    What is printed, drawn and written.

  Raises:
    UsageError, ValueError: for a mistake in the settings; names the flag.
    ImportError: without dp-accounting.
  """
  epsilon, delta = calibration.check_target(
    settings.epsilon_dp, settings.delta_dp, settings.num_examples
  )
  checks.one_of('mechanism', settings.mechanism, MECHANISMS)
  gaussian = settings.mechanism == 'gaussian'
  if settings.local_steps < 1:
    raise UsageError(f'local_steps must be >= 1, got {settings.local_steps}')
  local = gaussian and settings.local_steps > 1
  sampled = gaussian and not local and settings.sampling_rate is not None
  unused = (_INTEGERS if gaussian else _DIFF2) + (() if local else _LOCAL)
  if sampled:
    unused = tuple(name for name in unused if name != 'sampling_rate')
  for name in unused:
    if getattr(settings, name) != getattr(Settings, name):
      raise UsageError(
        f'{name} does not apply to mechanism {settings.mechanism}'
        + (' without local_steps' if gaussian and name in _LOCAL else '')
      )
  make_run = _integers
  if gaussian:
    make_run = _dp_sgd if sampled else _diff2
  run = make_run(epsilon, delta, settings)
  total = len(run.rounds)
  after = sorted(
    {1, *(-(-total * i // _POINTS) for i in range(1, _POINTS + 1))}
  )
  spent = {
    name: accounting.spent(run.rounds, delta, name, after=after).tolist()
    for name in ('pld', 'rdp')
  }
  if gaussian and not local and not sampled:
    closed = accounting.spent(run.rounds, delta, 'gdp', after=after)
    spent = {'gdp': closed.tolist(), **spent}
  bound = 'C' if run.adjacency == 'drop' else '2 C'
  lines = {
    'target': f'epsilon {epsilon:g} at delta {delta:g}',
    'unit': 'one example of one client',
    'adjacency': plan_lib.ADJACENCIES[run.adjacency],
    **run.lines,
  }
  if gaussian:
    lines['relative to'] = f'{bound} / (clients * smallest client), C the clip'
  if sampled:
    lines['relative to'] = 'C, the clip; sums are divided by a public number'
  if local:
    lines['relative to'] += '; local: C of an example'
  return {
    'settings': dataclasses.asdict(settings),
    'lines': lines,
    'events': events.as_dicts(run.rounds),
    'rounds': after,
    'epsilon': spent,
  }


def tables(found: dict[str, Any]) -> list[Table]:
  """The guarantee, and epsilon after some rounds."""
  guarantee = Table(show_header=False)
  for name, text in found['lines'].items():
    guarantee.add_row(name, text)
  spent = Table(title='epsilon spent')
  spent.add_column('after round', justify='right')
  for name in found['epsilon']:
    spent.add_column(_NAMES[name], justify='right')
  after = found['rounds']
  places = np.unique(np.rint(np.linspace(0, len(after) - 1, 9)).astype(int))
  for i in places:
    values = [f'{column[i]:.4f}' for column in found['epsilon'].values()]
    spent.add_row(f'{after[i]:,}', *values)
  return [guarantee, spent]


def draw(found: dict[str, Any]):
  """Epsilon against rounds, as a figure."""
  settings = found['settings']
  figure, (axis,) = common.subplots(1, found['lines']['mechanism'])
  styles = {'gdp': '-', 'pld': 'o', 'rdp': '--'}
  for name, values in found['epsilon'].items():
    axis.plot(
      found['rounds'], values, styles[name], label=_NAMES[name], ms=4, lw=1.4
    )
  axis.axhline(settings['epsilon_dp'], color='0.6', lw=1, label='target')
  axis.set_xlabel('rounds')
  axis.set_ylabel(f'epsilon at delta {settings["delta_dp"]:g}')
  axis.set_ylim(0)
  common.legend_below(figure, axis)
  return figure
