"""The defaults of `experiments.config.Config`, as a config file."""

import dataclasses

from ml_collections import config_dict

from experiments.config import Config


def get_config() -> config_dict.ConfigDict:
  """All settings with their defaults; None takes that of the method."""
  values = dataclasses.asdict(Config())
  kinds = {'learning_rate': float, 'forward_dtype': str}
  for name, kind in kinds.items():
    values[name] = config_dict.placeholder(kind)
  return config_dict.ConfigDict(values)
