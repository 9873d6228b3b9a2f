"""FedAvg, the first-order reference: every parameter crosses the wire.

python -m experiments.train --config=experiments/configs/fed_avg.py
"""

from experiments.configs import default


def get_config():
  """The settings that differ from the default experiment."""
  config = default.get_config()
  config.method = 'fed_avg'
  config.num_rounds = 20
  config.batch_size = 4
  config.eval_every = 2
  return config
