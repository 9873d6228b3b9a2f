"""What a private run guarantees, in words and in `privacy.json`."""

from typing import Any

from experiments import build
from experiments.config import Config
from jaxfl import accounting, calibration
from jaxfl import plan as plan_lib

_SAMPLER = 'none: every client takes part in every round, with all its examples'
_MECHANISM = 'Gaussian noise, added by an aggregator that clients trust'
_CAVEATS = (
  'The noise is of floats and only resembles the mechanism: research use.',
  'Covered are the weights and the log. Whoever sees messages, or choices made'
  ' after looking at private losses, knows more.',
)
_SCALED = (
  'Features are scaled by what the data hold (feature_scaling), which the'
  ' guarantee does not cover; auto and none are covered.'
)


def describe(config: Config, num_examples) -> dict[str, Any]:
  """The guarantee of a run, as JSON can hold it.

  Args:
    config: resolved, of a private method.
    num_examples: of the clients.
  """
  plan = build.plan_of(config)
  scaled = config.feature_scaling in ('minmax', 'standard')
  return {
    'epsilon_dp': config.epsilon_dp,
    'delta_dp': config.delta_dp,
    'unit': config.privacy_unit,
    'adjacency': plan_lib.ADJACENCIES[plan.adjacency].replace(
      'example', config.privacy_unit
    ),
    'mechanism': _MECHANISM,
    'sampler': _SAMPLER,
    'num_examples': [int(n) for n in num_examples],
    'plan': plan._asdict(),
    'epsilon_spent_if_all_rounds_run': spent(config, config.num_rounds),
    'caveats': [*_CAVEATS, *([_SCALED] if scaled else [])],
  }


def spent(config: Config, rounds: int) -> float:
  """Epsilon after so many rounds, by the closed form."""
  plan = build.plan_of(config)
  _, delta = calibration.check_target(config.epsilon_dp, config.delta_dp)
  found = accounting.spent(plan.rounds(), delta, 'gdp', after=[rounds])
  return float(found[0])


def text(found: dict[str, Any]) -> str:
  """Lines to show before a run."""
  plan = found['plan']
  noise = f'{plan["noise_multiplier"]:.4g}'
  if plan['noise_multiplier_diff']:
    noise += f' and {plan["noise_multiplier_diff"]:.4g} for differences'
  return '\n'.join(
    (
      f'private: epsilon_dp {found["epsilon_dp"]:g}, delta_dp'
      f' {found["delta_dp"]:g} in {plan["num_rounds"]} rounds;'
      f' {found["adjacency"]}',
      f'{found["mechanism"]}, {noise} times the sensitivity; sampler:'
      f' {found["sampler"]}',
      *found['caveats'],
    )
  )
