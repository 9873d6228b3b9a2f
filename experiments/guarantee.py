"""What a private run guarantees, in words and in `privacy.json`."""

from typing import Any

from experiments import plans
from experiments.config import Config
from jaxfl import accounting, calibration
from jaxfl import plan as plan_lib

_SAMPLER = 'none: every client takes part in every round, with all its examples'
_FLOATS = (
  'The noise is of floats and only resembles the mechanism: research use.'
)
_RELEASES = (
  'Covered are weights and log. Messages to the aggregator are not, nor choices'
  ' made after looking at private losses.'
)
_MESSAGES = (
  'Covered are messages, weights and log; choices made after looking at private'
  ' losses are not.'
)
_SCALED = (
  'Features are scaled by what the data hold (feature_scaling), which the'
  ' guarantee does not cover; auto and none are covered.'
)


def _words(plan: plans.Plan) -> tuple[str, str, bool, str]:
  """Mechanism, sampler, whether noise is of floats, and the accountant."""
  if isinstance(plan, plan_lib.ScalarPlan):
    floats = plan.law == 'gaussian'
    law = 'Gaussian' if floats else 'discrete Gaussian'
    return (
      f'{law} noise, added by every client to each of its {plan.num_scalars}'
      ' scalars of a round: nobody is trusted',
      _SAMPLER,
      floats,
      'gdp' if floats else 'pld',
    )
  if isinstance(plan, plan_lib.SketchPlan):
    return (
      f'discrete Gaussian noise on {plan.coordinates} coordinates, added by an'
      ' aggregator that clients trust',
      _SAMPLER,
      False,
      'rdp',
    )
  trusted = 'Gaussian noise, added by an aggregator that clients trust'
  if isinstance(plan, plan_lib.SampledPlan):
    sampler = f'Poisson, rate {plan.sampling_rate:g}, secret'
    return trusted, sampler, True, 'pld'
  if plan.local_steps == 1:
    return trusted, _SAMPLER, True, 'gdp'
  return (
    f'{trusted}, and by the client whose turn it is to its local steps',
    f'local steps: Poisson, rate {plan.sampling_rate:g}, secret; otherwise all'
    ' examples',
    True,
    'pld',
  )


def describe(config: Config, num_examples) -> dict[str, Any]:
  """The guarantee of a run, as JSON can hold it.

  Args:
    config: resolved, of a private method.
    num_examples: of the clients.
  """
  plan = plans.of(config)
  mechanism, sampler, floats, accountant = _words(plan)
  scaled = config.feature_scaling in ('minmax', 'standard')
  scalars = isinstance(plan, plan_lib.ScalarPlan)
  return {
    'epsilon_dp': config.epsilon_dp,
    'delta_dp': config.delta_dp,
    'unit': config.privacy_unit,
    'adjacency': plan_lib.ADJACENCIES[plan.adjacency].replace(
      'example', config.privacy_unit
    ),
    'mechanism': mechanism,
    'sampler': sampler,
    'accountant': accountant,
    'num_examples': [int(n) for n in num_examples],
    'plan': plan._asdict(),
    'epsilon_spent_if_all_rounds_run': spent(config, config.num_rounds),
    'caveats': [
      *([_FLOATS] if floats else []),
      _MESSAGES if scalars else _RELEASES,
      *([_SCALED] if scaled else []),
    ],
  }


def spent(config: Config, rounds: int) -> float:
  """Epsilon after so many rounds, which a turn of a client is one of."""
  plan = plans.of(config)
  _, delta = calibration.check_target(config.epsilon_dp, config.delta_dp)
  done = -(-rounds // getattr(plan, 'exchanges', 1))
  *_, accountant = _words(plan)
  return float(
    accounting.spent(plan.rounds(), delta, accountant, after=[done])[0]
  )


def text(found: dict[str, Any]) -> str:
  """Lines to show before a run."""
  plan = found['plan']
  noise = f'{plan["noise_multiplier"]:.4g}'
  for name, of in (('diff', 'differences'), ('local', 'local steps')):
    if value := plan.get(f'noise_multiplier_{name}'):
      noise += f', {value:.4g} for {of}'
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
