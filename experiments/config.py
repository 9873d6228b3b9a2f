"""The settings of an experiment, checked before any work starts."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from jaxfl import (
  aggregate,
  allocation,
  codecs,
  estimators,
  lazy,
  master,
  objectives,
  perturb,
  schedules,
)
from jaxfl.data import tables
from jaxfl.methods import diff2, spsa


class UsageError(Exception):
  """A mistake of the user's; the message says which setting and what to do."""


def _setting(default: Any, text: str) -> Any:
  """A field with the text of its flag."""
  return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """All settings; each is a flag. None means the default of what it belongs to.

  The text of a field is in its metadata, as `help`.
  """

  method: str = _setting('spsa', 'Name of the method.')
  # the model
  model: str = _setting(
    'embedded',
    "'embedded' (for images: 'cnn', the default there), a directory in Hugging"
    " Face's layout or one written by experiments.pretrain, or a hub id.",
  )
  dtype: str = _setting(
    'float32',
    'Of the frozen weights and the forward pass; int8: of the frozen matrices'
    ' of the layers alone.',
  )
  hidden_units: int | None = _setting(
    None, 'Of a hidden layer; without it tables have 10 and features none.'
  )
  pool: str | None = _setting(
    None, 'What a classification head reads: first, mean or last position.'
  )
  adapter: str = _setting(
    'full', 'What is trained: full, lora, head, bias (and the head).'
  )
  lora_rank: int = _setting(8, 'Rank of a LoRA pair.')
  lora_alpha: float = _setting(16.0, 'The pair is scaled by this / rank.')
  lora_targets: str = _setting(
    '*attention/[qv]/kernel', 'Patterns of parameter paths, with commas.'
  )
  # the data
  dataset: str = _setting(
    'python_text',
    "'python_text', a task such as sst2 or dolly, mnist, fashion_mnist, a table"
    ' such as california_housing, a directory of text or of idx files, a csv,'
    ' json, jsonl, parquet or npz file, or a hub id.',
  )
  data_dir: str | None = _setting(None, 'Where the files of the tasks are.')
  target: str | None = _setting(
    None, 'Column to predict from the numbers in the others, of your own csv.'
  )
  feature_scaling: str = _setting(
    'auto',
    'Of tables: auto (constants where they are known, else none), none, or what'
    ' no privacy guarantee covers, minmax and standard (by the data).',
  )
  columns: str | None = _setting(
    None, "Columns of your own data: 'text=sentence,label=sentiment'."
  )
  train_split: str = _setting(
    'train', "Split to train on, of a folder or the hub: 'train[:10%]'."
  )
  test_split: str | None = _setting(
    None, 'Split held out; by default test or validation, or a tenth of train.'
  )
  label_names: str | None = _setting(
    None,
    'Names of the labels of your own data, in their order, with commas; with'
    ' target, that it is one of them and no number.',
  )
  template: str | None = _setting(
    None, "Prompt of your own data: '{text} It was {answer}'."
  )
  words: str | None = _setting(
    None, 'Label words of your own data, in the order of the labels.'
  )
  form: str = _setting(
    'auto',
    'auto, head (classifier), words (one label word), candidates (likelihood'
    ' of whole answers) or lm (loss on the response).',
  )
  length_normalised: bool = _setting(
    True, 'Score candidates by the mean log-likelihood of a token, not the sum.'
  )
  sequence_length: int = _setting(128, 'Tokens of an example, at most.')
  partition: str = _setting(
    'iid', 'Of examples over clients: iid, dirichlet, label or column.'
  )
  dirichlet_alpha: float = _setting(0.5, 'Small: unlike clients.')
  min_examples: int = _setting(1, 'Of a client, under a dirichlet partition.')
  labels_per_client: int = _setting(2, 'Under a label partition.')
  partition_column: str | None = _setting(
    None, 'One client per value, under a column partition.'
  )
  # who takes part
  num_clients: int = _setting(8, 'Clients in all.')
  participation_rate: float = _setting(1.0, 'Share of them in a round.')
  dropout_rate: float = _setting(0.0, 'Share of those that send nothing.')
  weighting: str = _setting('uniform', 'Of clients: uniform or examples.')
  # the optimisation
  objective: str = _setting(
    'loss', 'loss, accuracy (classes) or f1 (responses); zeroth order.'
  )
  num_rounds: int = _setting(60, 'Rounds.')
  batch_size: int = _setting(2, 'Examples in a minibatch.')
  learning_rate: float | None = _setting(None, 'Learning rate.')
  schedule: str = _setting(
    'constant', "Of the learning rate; for ferret, of the server's."
  )
  warmup_rounds: int = _setting(0, 'Rounds of linear warm-up.')
  weight_decay: float = _setting(0.0, 'Decoupled weight decay.')
  local_steps: int | None = _setting(
    None,
    'Steps of a client in a round; fed_avg and ferret: 8, fedkseed: 16,'
    ' decomfl: 1. Of diff2: above 1, every second round is a turn of one client'
    ' that takes them by itself; 1.',
  )
  # zeroth order: spsa, fedkseed, fedkseed_pro, decomfl
  num_perturbations: int | None = _setting(
    None, 'Directions of an estimate; spsa: 16 a round, decomfl: 16 a step.'
  )
  mu: float = _setting(1e-3, 'Perturbation radius.')
  mu_schedule: str = _setting('constant', 'Of mu.')
  codec: str | None = _setting(
    None,
    'Code of a projected gradient or coordinate; log8, and for ferret sign1.',
  )
  codec_scale: float = _setting(16.0, 'Range of the codecs that have one.')
  distribution: str = _setting('rademacher', 'Of the directions.')
  sides: str = _setting('two_sided', 'two_sided or one_sided.')
  scaling: str = _setting('mean', 'Of the projected gradients: mean or sum.')
  weights: str = _setting('grid', 'grid (exact) or float32.')
  forward_dtype: str | None = _setting(
    None, 'In which the loss sees the trained weights.'
  )
  in_layers: str = _setting(
    'auto',
    'How transformers perturb their weights: temporary (a layer at a time),'
    ' split (x W + mu x z), or none (all before the forward pass). auto is'
    ' temporary, but none for objective f1.',
  )
  forwards_at_once: int = _setting(
    1,
    'Forward passes that run as one batch: 2 for both sides of a direction,'
    ' 2 n for n directions of num_perturbations.',
  )
  # fedkseed, fedkseed_pro
  num_seeds: int = _setting(4096, 'Seeds of the pool.')
  send_indices: bool = _setting(
    False, 'Send the index of every seed, as the paper does; it is redundant.'
  )
  importance_weight: bool = _setting(
    False, 'Weigh the steps of fedkseed_pro by 1 / (num_seeds p): no bias.'
  )
  # first order: fed_avg, fed_sgd, ferret
  client_optimizer: str = _setting('sgd', 'Of the local steps: sgd or adamw.')
  server_optimizer: str = _setting(
    'sgd', 'Takes the mean of the clients as its gradient: sgd or adam.'
  )
  server_lr: float | None = _setting(
    None, 'Learning rate of the server; fed_avg: 1, ferret: 0.1.'
  )
  server_momentum: float = _setting(0.0, 'Momentum of a server with sgd.')
  # ferret
  coordinates: int = _setting(8192, 'Coordinates of a message.')
  allocation: str = _setting(
    'bytes', 'Of coordinates to blocks: bytes, compute or paper.'
  )
  max_block_size: int = _setting(
    1 << 14, 'Entries of a block; larger tensors are cut.'
  )
  # clients that may lie: spsa, fedkseed, decomfl, ferret, fed_avg, fed_sgd
  aggregator: str = _setting(
    'mean',
    'How values of clients are merged: mean; sign_vote (not ferret); where they'
    ' are comparable (decomfl, fed_avg, fed_sgd) also median, trimmed_mean,'
    ' krum and multi_krum.',
  )
  trim_fraction: float = _setting(
    0.25, 'Of a trimmed mean: what it leaves out on either side.'
  )
  num_byzantine: int = _setting(
    1, 'Clients that may lie, for krum and multi_krum.'
  )
  clip_value: float | None = _setting(
    None,
    'Bound of a value; for fed_avg and fed_sgd of the norm of a client, for'
    ' ferret of that of a block. Of a sign vote: the size of a step.',
  )
  # private: dp_gd, dp_sgd, diff2, dp_sketch; spsa, fedkseed with epsilon_dp
  epsilon_dp: float | None = _setting(
    None,
    'Privacy budget of the whole run, at delta_dp; makes spsa, fedkseed and'
    ' fedkseed_pro private.',
  )
  delta_dp: float | None = _setting(
    None, 'Below one over the number of examples.'
  )
  privacy_unit: str = _setting(
    'record', 'What is protected: a record or a client, replaced by another.'
  )
  clip_norm: float = _setting(
    1.0, "Bound of an example's gradient, projected gradient or sketch."
  )
  clip_norm_diff: float = _setting(
    1.0, 'Bound of a difference of gradients, over the length of the step.'
  )
  restart_interval: int = _setting(
    20, 'Rounds from one whole gradient to the next; the rest are differences.'
  )
  budget_share: float = _setting(0.5, 'Of the budget, for whole gradients.')
  sampling_rate: float | None = _setting(
    None, 'Of secret Poisson samples: dp_sgd, and local steps of diff2.'
  )
  local_share: float = _setting(
    0.2, 'Of the budget, for the local steps of diff2.'
  )
  microbatch_size: int = _setting(64, 'Gradients that a client holds at once.')
  allow_unstable: bool = _setting(
    False, 'Run although the noise of differences grows without end.'
  )
  research_float_noise: bool = _setting(
    False,
    'Float noise, which only resembles the mechanism; gradients have no other,'
    ' nor does codec float32.',
  )
  # the run
  seed: int = _setting(0, 'Seed of the run, 64 bits.')
  eval_every: int = _setting(5, 'Rounds between evaluations.')
  eval_examples: int = _setting(512, 'Held-out examples; 0 for all.')
  eval_batch_size: int = _setting(32, 'Examples of an evaluation at once.')
  generate_examples: int = _setting(
    0, 'Held-out examples to answer at every evaluation, for Rouge-L.'
  )
  max_new_tokens: int = _setting(32, 'Of an answer.')
  snapshot_every: int = _setting(20, 'Rounds between snapshots.')
  block_size: int = _setting(1, 'Clients that are simulated at once.')


_CHOICES = {
  'aggregator': aggregate.NAMES,
  'weighting': ('uniform', 'examples'),
  'schedule': schedules.NAMES,
  'mu_schedule': schedules.NAMES,
  'codec': (None, *codecs.CODECS),
  'distribution': (*perturb.DISTRIBUTIONS, 'walsh'),
  'sides': estimators.SIDES,
  'scaling': spsa.SCALINGS,
  'weights': master.WEIGHTS,
  'forward_dtype': (None, 'bfloat16', 'float16', 'float32'),
  'dtype': ('float32', 'bfloat16', 'int8'),
  'in_layers': ('auto', 'none', *lazy.FORMS),
  'pool': (None, 'first', 'mean', 'last'),
  'adapter': ('full', 'lora', 'head', 'bias'),
  'feature_scaling': tables.SCALINGS,
  'form': ('auto', 'head', 'words', 'candidates', 'lm'),
  'allocation': allocation.ALLOCATIONS,
  'client_optimizer': ('sgd', 'adamw'),
  'server_optimizer': ('sgd', 'adam'),
  'partition': ('iid', 'dirichlet', 'label', 'column'),
  'objective': objectives.OBJECTIVES,
  'privacy_unit': diff2.UNITS,
}
_POSITIVE = (
    'num_clients', 'num_rounds', 'batch_size', 'sequence_length',
    'learning_rate', 'num_perturbations', 'mu', 'codec_scale', 'local_steps',
    'server_lr', 'eval_every', 'snapshot_every', 'block_size', 'lora_rank',
    'lora_alpha', 'dirichlet_alpha', 'labels_per_client', 'eval_batch_size',
    'max_new_tokens', 'num_seeds', 'coordinates', 'max_block_size',
    'clip_norm', 'clip_norm_diff', 'restart_interval', 'microbatch_size',
    'hidden_units', 'clip_value',
)  # fmt: skip
_NOT_NEGATIVE = (
    'warmup_rounds', 'weight_decay', 'seed', 'eval_examples', 'min_examples',
    'generate_examples', 'num_byzantine',
)  # fmt: skip
_BELOW_ONE = ('dropout_rate', 'server_momentum')


def types_of(field: dataclasses.Field) -> tuple[Any, ...]:
  """The types of a setting, without None."""
  kinds = typing.get_args(field.type) or (field.type,)
  return tuple(kind for kind in kinds if kind is not type(None))


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
    name: _typed(fields[name], value) for name, value in values.items()
  }
  config = Config(**typed)
  _check(config)
  return config


def _typed(field, value):
  """The value as its field's type; ints pass for floats."""
  kinds = types_of(field)
  if value is None and field.default is None:
    return None
  if float in kinds and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(value, bool) != (kinds == (bool,)) or not isinstance(
    value, kinds
  ):
    expected = ' or '.join(kind.__name__ for kind in kinds)
    raise UsageError(f'{field.name} must be of type {expected}, got {value!r}')
  return value


def _check(config: Config):
  """Raises UsageError for values out of range."""
  for name, choices in _CHOICES.items():
    if (value := getattr(config, name)) not in choices:
      names = ', '.join(str(c) for c in choices if c)
      raise UsageError(f'{name} must be one of {names}; got {value!r}')
  for f in dataclasses.fields(config):
    value = getattr(config, f.name)
    if isinstance(value, str) and not value.strip():
      raise UsageError(f'{f.name} must not be empty')
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
  if not 0 <= config.trim_fraction < 0.5:
    raise UsageError(
      f'trim_fraction must be in [0, 0.5), got {config.trim_fraction}'
    )
  if config.seed >= 2**64:
    raise UsageError(f'seed must be below 2**64, got {config.seed}')
  if config.warmup_rounds > config.num_rounds:
    raise UsageError(
      f'warmup_rounds ({config.warmup_rounds}) must not exceed num_rounds'
      f' ({config.num_rounds})'
    )
