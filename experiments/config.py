"""The settings of an experiment, checked before any work starts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxfl import codecs, perturb, schedules
from jaxfl.methods import spsa


class UsageError(Exception):
  """A mistake of the user's; the message says which setting and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """All settings. None means the default of the chosen method."""

  method: str = 'spsa'
  model: str = 'embedded'
  dataset: str = 'python_text'
  num_clients: int = 8
  participation_rate: float = 1.0
  dropout_rate: float = 0.0
  weighting: str = 'uniform'
  num_rounds: int = 60
  batch_size: int = 2
  sequence_length: int = 128
  learning_rate: float | None = None
  schedule: str = 'constant'
  warmup_rounds: int = 0
  weight_decay: float = 0.0
  # spsa
  num_perturbations: int = 16
  mu: float = 1e-3
  mu_schedule: str = 'constant'
  codec: str = 'log8'
  codec_scale: float = 16.0
  distribution: str = 'rademacher'
  sides: str = 'two_sided'
  scaling: str = 'mean'
  weights: str = 'grid'
  forward_dtype: str | None = None
  # fed_avg, fed_sgd
  local_steps: int = 8
  server_lr: float = 1.0
  server_momentum: float = 0.0
  # the run
  seed: int = 0
  eval_every: int = 5
  snapshot_every: int = 20
  block_size: int = 1


_CHOICES = {
  'weighting': ('uniform', 'examples'),
  'schedule': schedules.NAMES,
  'mu_schedule': schedules.NAMES,
  'codec': codecs.CODECS,
  'distribution': perturb.DISTRIBUTIONS,
  'sides': spsa.SIDES,
  'scaling': spsa.SCALINGS,
  'weights': spsa.WEIGHTS,
  'forward_dtype': (None, 'bfloat16', 'float16', 'float32'),
}
_POSITIVE = (
    'num_clients', 'num_rounds', 'batch_size', 'sequence_length',
    'learning_rate', 'num_perturbations', 'mu', 'codec_scale', 'local_steps',
    'server_lr', 'eval_every', 'snapshot_every', 'block_size',
)  # fmt: skip
_NOT_NEGATIVE = ('warmup_rounds', 'weight_decay', 'seed')
_BELOW_ONE = ('dropout_rate', 'server_momentum')


def from_mapping(values: Mapping[str, Any]) -> Config:
  """Builds and checks a `Config`.

  Args:
    values: settings by name; those that are missing keep their defaults.

  Raises:
    UsageError: naming the setting that is unknown, of a wrong type or out of
      range.
  """
  fields = {f.name: f for f in dataclasses.fields(Config)}
  for name in values:
    if name not in fields:
      raise UsageError(
        f'unknown setting {name!r}; there are: {", ".join(sorted(fields))}'
      )
  typed: dict[str, Any] = {
    name: _typed(name, value, fields[name].type)
    for name, value in values.items()
  }
  config = Config(**typed)
  _check(config)
  return config


def _typed(name, value, kind):
  """The value as its field's type; ints pass for floats."""
  kinds = kind.__args__ if hasattr(kind, '__args__') else (kind,)
  if value is None and type(None) in kinds:
    return None
  if float in kinds and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(value, bool) or not isinstance(value, kinds):
    expected = ' or '.join(k.__name__ for k in kinds if k is not type(None))
    raise UsageError(f'{name} must be of type {expected}, got {value!r}')
  return value


def _check(config: Config):
  """Raises UsageError for values out of range."""
  for name, choices in _CHOICES.items():
    if (value := getattr(config, name)) not in choices:
      names = ', '.join(str(c) for c in choices if c)
      raise UsageError(f'{name} must be one of {names}; got {value!r}')
  for f in dataclasses.fields(config):
    value = getattr(config, f.name)
    if not isinstance(value, int | float):
      continue
    if not math.isfinite(value):
      raise UsageError(f'{f.name} must be finite, got {value}')
    if f.name in _POSITIVE and not value > 0:
      raise UsageError(f'{f.name} must be > 0, got {value}')
    if f.name in _NOT_NEGATIVE and not value >= 0:
      raise UsageError(f'{f.name} must be >= 0, got {value}')
    if f.name in _BELOW_ONE and not 0 <= value < 1:
      raise UsageError(f'{f.name} must be in [0, 1), got {value}')
  if not 0 < config.participation_rate <= 1:
    raise UsageError(
      f'participation_rate must be in (0, 1], got {config.participation_rate}:'
      f' it is a share of the {config.num_clients} clients, and no more can be'
      ' sampled than exist'
    )
  if config.seed >= 2**64:
    raise UsageError(f'seed must be below 2**64, got {config.seed}')
  if config.warmup_rounds > config.num_rounds:
    raise UsageError(
      f'warmup_rounds ({config.warmup_rounds}) must not exceed num_rounds'
      f' ({config.num_rounds})'
    )
