"""FedAvg, the first-order reference.

python -m experiments.train --config=experiments/configs/fed_avg.py
"""

from experiments.configs import default


def get_config():
  """The settings that differ from the default experiment."""
  config = default.get_config()
  config.method = 'fed_avg'
  return config
