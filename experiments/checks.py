"""Whether settings, a model and data fit each other; said before a run."""

import numpy as np

from experiments.config import Config
from jaxfl import keys
from jaxfl import typing as jt
from jaxfl.data import examples
from jaxfl.models import config as model_config

# settings of rows that some forms do not read
_OF_FORMS = {
  'template': ('head', 'words', 'candidates'),
  'words': ('words', 'candidates'),
  'pool': ('head',),
  'length_normalised': ('candidates',),
  'generate_examples': ('lm',),
  'max_new_tokens': ('lm',),
}


def form(config: Config, chosen: str) -> None:
  """Raises ValueError for settings that the form of the data does not read."""
  for name, forms in _OF_FORMS.items():
    if getattr(config, name) != getattr(Config, name) and chosen not in forms:
      raise ValueError(
        f'{name} does not apply to form {chosen}; it is for form'
        f' {" or ".join(forms)}'
      )


def finite(params: jt.Params) -> None:
  """Raises ValueError naming a parameter with entries that are not finite."""
  for path, x in keys.named_leaves(params):
    if not np.isfinite(x).all():
      raise ValueError(f'parameter {path!r} has entries that are not finite')


def tokens(encoded: examples.Examples, shape: model_config.Config) -> None:
  """Raises ValueError if a token is none of the model's."""
  used = [x for x in (encoded.tokens, encoded.label_ids) if x is not None]
  largest = max(int(x.max(initial=0)) for x in used)
  if largest >= shape.vocab_size:
    raise ValueError(
      f'the tokenizer gives the token {largest}, and the model has'
      f' {shape.vocab_size} tokens: they are not of one checkpoint'
    )


def length(config: Config, shape: model_config.Config) -> None:
  """Raises ValueError if text is longer than the model."""
  if shape.max_positions and config.sequence_length > shape.max_positions:
    raise ValueError(
      f'sequence_length is {config.sequence_length}, the model has'
      f' {shape.max_positions} positions'
    )


def room(
  config: Config, shape: model_config.Config, prompts: examples.Examples
) -> None:
  """Raises ValueError if answers may leave the positions of the model.

  Args:
    config: of the run.
    shape: of the model.
    prompts: what is answered, as it is padded.
  """
  longest = prompts.buckets[-1]
  total = longest + config.max_new_tokens
  if shape.max_positions and total > shape.max_positions:
    raise ValueError(
      f'max_new_tokens is {config.max_new_tokens}, the prompts are of up to'
      f' {longest} tokens (padded), and the model has {shape.max_positions}'
      ' positions; lower sequence_length or max_new_tokens'
    )
