"""The settings of the studies; see `experiments.study` and README.md."""

from typing import Any, NamedTuple


class Study(NamedTuple):
  """Settings to compare.

  Attributes:
    title: of table and picture.
    settings: what every setting is called, and the flags of its runs.
    metrics: to report; the first is drawn.
    x: what it is drawn against, from the fields of a result row.
    seeds: how many.
    needs: flags that the user must give: data_dir, model.
    log_x: whether the axes are logarithmic.
  """

  title: str
  settings: dict[str, dict[str, Any]]
  metrics: tuple[str, ...]
  x: tuple[str, ...] = ('forwards', 'bytes_up')
  seeds: int = 3
  needs: tuple[str, ...] = ('data_dir',)
  log_x: bool = False


_HEAD = {
  'dataset': 'minilm_sst2',
  'num_clients': 8,
  'num_perturbations': 8,
  'num_rounds': 1000,
  'batch_size': 32,
  'mu': 0.01,
  'learning_rate': 0.1,
  'schedule': 'linear',
  'eval_every': 50,
  'snapshot_every': 500,
  'block_size': 8,
}
_SMALL = {'num_perturbations': 1, 'learning_rate': 0.03}

_ENCODER = {
  'dataset': 'sst2',
  'form': 'head',
  'sequence_length': 48,
  'num_clients': 4,
  'num_perturbations': 1,
  'num_rounds': 120,
  'batch_size': 16,
  'mu': 1e-3,
  'learning_rate': 8e-4,
  'eval_examples': 256,
  'eval_every': 20,
  'snapshot_every': 40,
}

_TREC = {
  'dataset': 'trec',
  'template': '{text}\n{answer}',
  'words': 'A,E,D,H,L,N',
  'form': 'words',
  'sequence_length': 64,
  'num_clients': 8,
  'batch_size': 8,
  'eval_examples': 0,
}
_DOLLY = {
  'dataset': 'dolly',
  'sequence_length': 128,
  'num_clients': 8,
  'partition': 'dirichlet',
  'partition_column': 'category',
  'batch_size': 4,
  'eval_examples': 0,
}
_BYTE_SPSA = {'num_perturbations': 4, 'num_rounds': 60, 'eval_every': 5}
_BYTE_FED_AVG = {
  'method': 'fed_avg',
  'local_steps': 8,
  'num_rounds': 10,
  'eval_every': 1,
}

# SST-2 by MiniLM features, 8 clients whose labels are unevenly spread
_UNLIKE = {
  'dataset': 'minilm_sst2',
  'num_clients': 8,
  'batch_size': 32,
  'partition': 'dirichlet',
  'dirichlet_alpha': 0.5,
  'block_size': 8,
  'eval_every': 20,
  'snapshot_every': 1000,
}
_POOL = _UNLIKE | {
  'method': 'fedkseed',
  'mu': 0.01,
  'local_steps': 8,
  'learning_rate': 0.0125,
  'num_rounds': 300,
}
_FIRST_ORDER = _UNLIKE | {
  'local_steps': 8,
  'learning_rate': 1.0,
  'num_rounds': 100,
  'eval_every': 5,
}
_FERRET = _FIRST_ORDER | {
  'method': 'ferret',
  'coordinates': 256,
  'server_lr': 0.3,
}
_MNIST = {
  'dataset': 'mnist',
  'num_clients': 5,
  'batch_size': 32,
  'eval_examples': 0,
  'eval_batch_size': 500,
  'eval_every': 5,
}
# SST-2 by MiniLM features, evenly spread; all examples in every round
_HIDDEN = {
  'dataset': 'minilm_sst2',
  'num_clients': 8,
  'block_size': 8,
  'eval_every': 10,
  'snapshot_every': 1000,
}
_HIDDEN_SPSA = _HIDDEN | {
  'num_perturbations': 8,
  'mu': 0.01,
  'learning_rate': 0.4,
  'schedule': 'linear',
}
_BUDGET = {'delta_dp': 1e-5, 'clip_norm': 4.0, 'microbatch_size': 865}
# epsilon and rounds: more than these do not fit the byte
_PRIVATE_ROUNDS = {1: 40, 3: 100, 8: 300}
_EPSILON_3 = _BUDGET | {'epsilon_dp': 3.0, 'num_rounds': 100}
_GRADIENTS = _HIDDEN | {
  'epsilon_dp': 3.0,
  'delta_dp': 1e-5,
  'clip_norm': 2.0,
  'num_rounds': 30,
  'learning_rate': 1.0,
  'microbatch_size': 128,
  'eval_every': 3,
}
# rounds and steps of about 2,400 steps in all
_STEPS = {1: 2400, 4: 600, 16: 150, 64: 38}
# the default task, where every client has a package of its own
_TEXT_POOL = {'method': 'fedkseed', 'num_rounds': 30, 'eval_every': 5}
_TEXT_FERRET = {'method': 'ferret', 'num_rounds': 20, 'eval_every': 2}
_SHORT_TEXT = {
  'num_rounds': 10,
  'batch_size': 2,
  'eval_examples': 256,
  'eval_every': 5,
}
# 480 steps in all
_TEXT_STEPS = {4: 120, 16: 30, 64: 8}

STUDIES = {
  'default': Study(
    'The default experiment: the embedded model on Python source, 8 clients',
    {
      'one-byte SPSA': {},
      'FedAvg': {'config': 'experiments/configs/fed_avg.py'},
    },
    ('bits_per_byte', 'accuracy'),
    needs=(),
    log_x=True,
  ),
  'byte_trec': Study(
    'The embedded model on TREC by label words, 8 clients',
    {
      'one-byte SPSA': _TREC | _BYTE_SPSA | {'learning_rate': 0.005},
      'FedAvg': _TREC | _BYTE_FED_AVG | {'learning_rate': 0.1},
    },
    ('accuracy', 'macro_f1', 'loss'),
    log_x=True,
  ),
  'byte_dolly': Study(
    'The embedded model on Dolly instructions, 8 clients, Dirichlet(0.5)',
    {
      'one-byte SPSA': _DOLLY | _BYTE_SPSA | {'learning_rate': 0.007},
      'FedAvg': _DOLLY | _BYTE_FED_AVG | {'learning_rate': 0.1},
    },
    ('loss', 'accuracy'),
    log_x=True,
  ),
  'minilm_head': Study(
    'A head of 770 parameters on MiniLM features of SST-2, 8 clients',
    {
      'one byte, 64,000 directions': _HEAD,
      'float32, 64,000 directions': _HEAD | {'codec': 'float32'},
      'one bit, 64,000 directions': _HEAD
      | {'codec': 'sign1', 'codec_scale': 0.5},
      'one byte, 8,000 directions': _HEAD | _SMALL,
      'float32, 8,000 directions': _HEAD | _SMALL | {'codec': 'float32'},
    },
    ('accuracy', 'loss'),
  ),
  'minilm_full': Study(
    'MiniLM-L6, all 22.6 M parameters, on SST-2, 4 clients',
    {
      'one byte, signs, grid': _ENCODER,
      'float32, Gaussian': _ENCODER
      | {'codec': 'float32', 'distribution': 'gaussian', 'weights': 'float32'},
    },
    ('loss', 'accuracy'),
    needs=('data_dir', 'model'),
  ),
  'fedkseed_seeds': Study(
    'FedKSeed by the size of its pool; SST-2 features, Dirichlet(0.5)',
    {f'K = {k}': _POOL | {'num_seeds': k} for k in (16, 64, 256, 1024, 4096)},
    ('accuracy', 'loss'),
    x=('forwards', 'bytes_down'),
  ),
  'fedkseed_steps': Study(
    'FedKSeed by its local steps, 2,400 a client; SST-2 features,'
    ' Dirichlet(0.5)',
    {
      f'{steps} local steps': _POOL
      | {
        'local_steps': steps,
        'num_rounds': rounds,
        'eval_every': max(1, rounds // 15),
      }
      for steps, rounds in _STEPS.items()
    },
    ('accuracy', 'loss'),
    log_x=True,
  ),
  'fedkseed_codec': Study(
    'FedKSeed by the code of a coordinate; SST-2 features, Dirichlet(0.5)',
    {
      'one byte': _POOL,
      'one byte, stochastic': _POOL | {'codec': 'log8_stochastic'},
      '16 bits': _POOL | {'codec': 'bfloat16'},
      'float32': _POOL | {'codec': 'float32'},
    },
    ('accuracy', 'loss'),
  ),
  'fedkseed_text': Study(
    'FedKSeed by pool and local steps; the embedded model on Python source',
    {
      f'K = {k}, 16 local steps': _TEXT_POOL | {'num_seeds': k}
      for k in (64, 512, 4096)
    }
    | {
      f'K = 4096, {steps} local steps': _TEXT_POOL
      | {
        'local_steps': steps,
        'num_rounds': rounds,
        'eval_every': max(1, rounds // 6),
      }
      for steps, rounds in _TEXT_STEPS.items()
      if steps != 16
    },
    ('bits_per_byte', 'accuracy'),
    needs=(),
  ),
  'private_sst2': Study(
    'Private scalars, sketches and gradients; SST-2 features, 8 clients',
    {
      f'one byte, epsilon {epsilon}': _HIDDEN_SPSA
      | _BUDGET
      | {'epsilon_dp': float(epsilon), 'num_rounds': rounds}
      for epsilon, rounds in _PRIVATE_ROUNDS.items()
    }
    | {
      'one byte, no privacy': _HIDDEN_SPSA
      | {'batch_size': 865, 'num_rounds': 300},
      '16 bits, epsilon 3': _HIDDEN_SPSA | _EPSILON_3 | {'codec': 'linear16'},
      'float32, epsilon 3': _HIDDEN_SPSA
      | _EPSILON_3
      | {'codec': 'float32', 'research_float_noise': True},
      'FedKSeed, one byte, epsilon 3': _HIDDEN
      | _EPSILON_3
      | {
        'method': 'fedkseed',
        'local_steps': 8,
        'mu': 0.01,
        'learning_rate': 0.05,
        'schedule': 'linear',
      },
      'sketch of 64, epsilon 3': _GRADIENTS
      | {'method': 'dp_sketch', 'coordinates': 64},
      'DP-GD, epsilon 3': _GRADIENTS
      | {'method': 'dp_gd', 'research_float_noise': True},
    },
    ('accuracy', 'loss'),
    x=('bytes_up', 'forwards'),
    log_x=True,
  ),
  'ferret_coordinates': Study(
    'Ferret by the coordinates of a message; SST-2 features, Dirichlet(0.5)',
    {
      f'K = {k}': _FERRET | {'coordinates': k, 'server_lr': lr}
      # about K / (K + d / C) or below, with 770 entries and 8 clients
      for k, lr in ((16, 0.15), (64, 0.3), (256, 0.3), (1024, 0.3))
    },
    ('accuracy', 'loss'),
    log_x=True,
  ),
  'methods_sst2': Study(
    'All methods; SST-2 features, 8 clients, Dirichlet(0.5)',
    {
      'SPSA': _UNLIKE
      | {
        'num_perturbations': 8,
        'mu': 0.01,
        'learning_rate': 0.1,
        'num_rounds': 300,
      },
      'FedKSeed': _POOL,
      'FedKSeed-Pro': _POOL | {'method': 'fedkseed_pro'},
      'DeComFL': _UNLIKE
      | {
        'method': 'decomfl',
        'num_perturbations': 8,
        'mu': 0.01,
        'learning_rate': 0.08,
        'num_rounds': 300,
      },
      'Ferret': _FERRET,
      'FedAvg': _FIRST_ORDER | {'method': 'fed_avg'},
    },
    ('accuracy', 'loss'),
    log_x=True,
  ),
  'methods_text': Study(
    'All methods; the embedded model on Python source, 8 clients',
    {
      'SPSA': {'num_rounds': 30},
      'FedKSeed': _TEXT_POOL,
      'FedKSeed-Pro': _TEXT_POOL | {'method': 'fedkseed_pro'},
      'DeComFL': {'method': 'decomfl', 'num_rounds': 30},
      'Ferret': _TEXT_FERRET,
      'FedAvg': {'config': 'experiments/configs/fed_avg.py'},
    },
    ('bits_per_byte', 'accuracy'),
    needs=(),
    log_x=True,
  ),
  'low_rank_text': Study(
    'One-byte SPSA by rank of the directions; the embedded model on Python'
    ' source',
    {
      name: _SHORT_TEXT | {'distribution': distribution}
      for name, distribution in (('signs', 'rademacher'), ('rank 1', 'rank1'))
    },
    ('bits_per_byte', 'accuracy'),
    x=('forwards',),
    needs=(),
  ),
  'decomfl_mnist': Study(
    'DeComFL and FedAvg; a CNN of 28,938 parameters on MNIST, 5 clients',
    {
      'DeComFL': _MNIST
      | {
        'method': 'decomfl',
        'num_perturbations': 20,
        'mu': 1e-3,
        'learning_rate': 5e-3,
        'schedule': 'linear',
        'num_rounds': 150,
      },
      'FedAvg': _MNIST
      | {
        'method': 'fed_avg',
        'local_steps': 10,
        'learning_rate': 0.1,
        'num_rounds': 20,
      },
    },
    ('accuracy', 'loss'),
    log_x=True,
  ),
}
