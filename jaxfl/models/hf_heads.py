"""Which head a Hugging Face checkpoint gets, and what of it is new."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jaxfl.models.config import Config
from jaxfl.models.hf_files import Stored, read_json
from jaxfl.models.hf_names import Layout

HEADS = ('lm', 'mlm', 'classify', 'none')
POOLS = ('first', 'mean', 'last')
POOL_FIELD = 'jaxfl_pool'  # in config.json: a classifier transformers lacks
_HEAD_FIELDS = (
  'num_labels', 'pool', 'head_dense', 'head_bias', 'output_bias',
)  # fmt: skip
_SENTENCE_POOLS = {
  'pooling_mode_mean_tokens': 'mean',
  'pooling_mode_cls_token': 'first',
  'pooling_mode_lasttoken': 'last',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
  """The caller's choices, None for the checkpoint's own."""

  head: str | None = None
  num_labels: int | None = None
  pool: str | None = None

  def __post_init__(self):
    if self.head not in (None, *HEADS):
      raise ValueError(
        f'head is {self.head!r}, expected one of {", ".join(HEADS)}'
      )
    if self.pool not in (None, *POOLS):
      raise ValueError(
        f'pool is {self.pool!r}, expected one of {", ".join(POOLS)}'
      )
    if self.num_labels is not None and self.num_labels < 1:
      raise ValueError(f'num_labels is {self.num_labels}, expected >= 1')


def without_head(config: Config) -> Config:
  """The same model with the head `none`."""
  plain = {
    field.name: field.default
    for field in dataclasses.fields(Config)
    if field.name in _HEAD_FIELDS
  }
  return dataclasses.replace(config, head='none', **plain)  # pyright: ignore[reportArgumentType]


def check_savable(config: Config) -> None:
  """Refuses heads that no checkpoint has.

  Raises:
    ValueError: naming the field.
  """
  if config.output_bias != (config.head == 'mlm'):
    raise ValueError(
      f'output_bias is {config.output_bias}, which a Hugging Face checkpoint '
      f'with the head {config.head} does not have'
    )
  if config.head == 'classify' and not is_native(config):
    for name, expected in (
      ('head_dense', False),
      ('head_bias', not config.causal),
    ):
      if getattr(config, name) != expected:
        raise ValueError(
          f'{name} must be {expected} for a classifier with the pool '
          f'{config.pool}'
        )
  if config.head == 'none' and config.embed_dim:
    raise ValueError(
      f'a model with embed_dim {config.embed_dim} can only be saved with a head'
    )


def native_pool(config: Config) -> str:
  """What the classifiers of transformers read."""
  return 'last' if config.causal else 'first'


def is_native(config: Config) -> bool:
  """Whether transformers has this classifier."""
  return (
    config.pool == native_pool(config)
    and config.head_dense != config.causal
    and config.head_bias != config.causal
  )


def own_head(fields: Mapping[str, Any], layout: Layout, where: str):
  """The head that `architectures` names, None if there is no such field."""
  names = fields.get('architectures') or []
  names = names if isinstance(names, list) else [names]
  for name in names:
    if name not in tuple(layout.architectures):
      raise ValueError(
        f'{where}: architectures has {name!r}, expected one of '
        f'{", ".join(layout.architectures)}'
      )
  if POOL_FIELD in fields:
    return 'classify'
  return layout.architectures[names[0]] if names else None


def num_labels(fields: Mapping[str, Any], where: str) -> int:
  """The number of classes of a config.json; 2 if it does not say."""
  names = fields.get('id2label')
  found = fields.get('num_labels') or (2 if names is None else names)
  found = len(found) if isinstance(found, dict) else found
  if not isinstance(found, int) or found < 1:
    raise ValueError(
      f'{where}: num_labels or id2label is {found!r}, expected classes'
    )
  return found


def choose(
  config: Config,
  layout: Layout,
  fields: Mapping[str, Any],
  tensors: Mapping[str, Stored],
  wish: Wish,
  directory: str,
) -> tuple[Config, frozenset[str]]:
  """The config with its head, and the modules that must be made anew.

  Args:
    config: the model without a head.
    layout: names of its family.
    fields: of config.json.
    tensors: of the checkpoint, by their names without prefix.
    wish: the caller's choices.
    directory: the checkpoint's.

  Raises:
    ValueError: if the wish can't be met.
  """
  where = os.path.join(directory, 'config.json')
  own = own_head(fields, layout, where)
  head = wish.head or own
  if head is None:
    raise ValueError(f'{where}: architectures is missing; ask for a head')
  if head != 'classify':
    for name in ('num_labels', 'pool'):
      if getattr(wish, name) is not None:
        raise ValueError(f'{name} is for the head classify, not for {head}')
  if head == 'classify':
    return _classifier(
      config, layout, fields, tensors, wish, own == 'classify', directory
    )
  if head in ('lm', 'mlm') and (head == 'lm') != config.causal:
    raise ValueError(
      f'{where}: a {fields["model_type"]} has no {head} head; ask for '
      f'{"lm" if config.causal else "mlm"}'
    )
  if head == 'mlm':
    _check_mlm(config, layout, tensors, where)
  return dataclasses.replace(
    config, head=head, output_bias=head == 'mlm'
  ), frozenset()


def _check_mlm(config, layout, tensors, where):
  if layout.output_bias not in tensors:
    raise ValueError(
      f'{os.path.dirname(where)} has no masked-LM head: there is no tensor '
      f'{layout.output_bias}'
    )
  if not config.tie_embeddings:
    raise ValueError(
      f'{where}: tie_word_embeddings false is not supported with the head mlm'
    )
  if layout.prefix == 'roberta.' and config.activation != 'gelu':
    raise ValueError(
      f'{where}: the masked-LM head has the activation gelu, hidden_act is '
      f'{config.activation}'
    )


def _classifier(config, layout, fields, tensors, wish, trained, directory):
  where = os.path.join(directory, 'config.json')
  if wish.num_labels is None and not trained:
    raise ValueError(
      f'{directory} has no classifier: num_labels must be given for a new one'
    )
  pool, dense = _trained_pool(config, fields, where) if trained else (None, 0)
  same = trained and wish.pool in (None, pool)
  if not same:
    pool, dense = wish.pool, wish.pool == 'first' and not config.causal
  if pool is None:
    pool = _sentence_pool(directory)
    if pool is None:
      pool, dense = native_pool(config), not config.causal
  config = dataclasses.replace(
    config,
    head='classify',
    num_labels=wish.num_labels or num_labels(fields, where),
    pool=pool,
    head_dense=bool(dense),
    head_bias=not config.causal,
  )
  out = tensors.get(layout.slot('head/out/kernel', config).name)
  if same and (
    wish.num_labels is None or out is None or out.shape[0] == wish.num_labels
  ):
    return config, frozenset()
  if not dense:
    return config, frozenset(['head/out'])
  slot = layout.slot('head/dense/kernel', config)
  if slot.base and slot.name in tensors:  # the pooler of BERT
    return config, frozenset(['head/out'])
  return config, frozenset(['head/out', 'head/dense'])


def _trained_pool(config, fields, where):
  """The pooling of the checkpoint's classifier, and whether it is dense."""
  pool = fields.get(POOL_FIELD)
  if pool is None:
    return native_pool(config), not config.causal
  if pool not in POOLS:
    raise ValueError(
      f'{where}: {POOL_FIELD} is {pool!r}, expected one of {", ".join(POOLS)}'
    )
  return pool, False


def _sentence_pool(directory):
  """The pooling of a sentence-transformers directory, None for another one."""
  path = os.path.join(directory, '1_Pooling', 'config.json')
  if not os.path.isfile(path):
    return None
  fields = read_json(path)
  modes = [
    name
    for name, value in fields.items()
    if name.startswith('pooling_mode_') and value is True
  ]
  if len(modes) != 1 or modes[0] not in _SENTENCE_POOLS:
    raise ValueError(
      f'{path}: the pooling {", ".join(modes) or "(none)"} is not supported '
      f'(one of {", ".join(_SENTENCE_POOLS)} is); give pool='
    )
  return _SENTENCE_POOLS[modes[0]]
