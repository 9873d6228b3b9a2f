"""From settings to what a private run releases, and under which noise.

All raise ValueError naming the setting that is missing or out of range, and
ImportError without dp-accounting where the noise needs it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.config import Config
from jaxfl import calibration, plan

NumExamples = Sequence[int] | np.ndarray | None  # of the clients
Plan = plan.Plan | plan.ScalarPlan | plan.SketchPlan | plan.SampledPlan


def target(config: Config, num_examples: NumExamples) -> tuple[float, float]:
  """Epsilon and delta, checked against the number of what is protected."""
  count = None
  if num_examples is not None:
    by_client = config.privacy_unit == 'client'
    count = len(num_examples) if by_client else sum(map(int, num_examples))
  return calibration.check_target(config.epsilon_dp, config.delta_dp, count)


def scalars(
  config: Config, num_examples: NumExamples = None
) -> plan.ScalarPlan:
  """Of spsa and fedkseed."""
  count = config.num_perturbations if config.method == 'spsa' else None
  count = count or config.local_steps
  assert count is not None  # `defaults.resolve` has filled it in
  return calibration.scalars(
    *target(config, num_examples),
    num_rounds=config.num_rounds,
    num_scalars=count,
    law='gaussian' if config.codec == 'float32' else 'discrete_gaussian',
  )


def sketch(config: Config, num_examples: NumExamples = None) -> plan.SketchPlan:
  """Of dp_sketch."""
  return calibration.sketch(
    *target(config, num_examples),
    num_rounds=config.num_rounds,
    coordinates=config.coordinates,
  )


def dp_sgd(
  config: Config, num_examples: NumExamples = None
) -> plan.SampledPlan:
  """Of dp_sgd."""
  goal = target(config, num_examples)
  if config.sampling_rate is None:
    raise ValueError('dp_sgd needs sampling_rate, of its samples')
  return calibration.dp_sgd(
    *goal, num_rounds=config.num_rounds, sampling_rate=config.sampling_rate
  )


def diff2(config: Config, num_examples: NumExamples = None) -> plan.Plan:
  """Of dp_gd and diff2."""
  goal = target(config, num_examples)
  shared: dict[str, Any] = {
    'restart_interval': 1
    if config.method == 'dp_gd'
    else config.restart_interval,
    'budget_share': config.budget_share,
  }
  local_steps = config.local_steps or 1
  if local_steps == 1:
    for name in ('sampling_rate', 'local_share'):
      if getattr(config, name) != getattr(Config, name):
        raise ValueError(f'{name} is of local steps: set local_steps, too')
    return calibration.diff2(*goal, num_rounds=config.num_rounds, **shared)
  if config.sampling_rate is None:
    raise ValueError('local_steps need sampling_rate, of their samples')
  return calibration.diff2_local(
    *goal,
    num_rounds=-(-config.num_rounds // 2),  # of two exchanges each
    local_steps=local_steps,
    num_clients=config.num_clients,
    sampling_rate=config.sampling_rate,
    local_share=config.local_share,
    **shared,
  )


def of(config: Config) -> Plan:
  """Of the method of a resolved config."""
  kinds = {
    'dp_gd': diff2, 'diff2': diff2, 'dp_sgd': dp_sgd, 'dp_sketch': sketch
  }  # fmt: skip
  return kinds.get(config.method, scalars)(config)
