"""The settings of an experiment as flags; importing it defines them."""

import contextlib
import dataclasses
import sys

from absl import app, flags
from ml_collections import config_flags

from experiments import defaults
from experiments.config import Config, from_mapping, types_of


@contextlib.contextmanager
def _config_errors():
  """config_flags raises bare exceptions, some as soon as it is defined."""
  try:
    yield
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    inner: BaseException = error
    while inner.args and isinstance(inner.args[0], BaseException):
      inner = inner.args[0]
    words = str(inner.args[-1] if inner.args else inner).split()
    sys.exit(f'error: --config: {" ".join(words)}')


with _config_errors():
  _CONFIG = config_flags.DEFINE_config_file(
    'config', 'experiments/configs/default.py', 'File with get_config().'
  )


def _define(field: dataclasses.Field) -> flags.FlagHolder:
  """The flag of a setting; None unless it is given."""
  kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
  kinds |= {float: flags.DEFINE_float, bool: flags.DEFINE_bool}
  define = kinds[types_of(field)[0]]
  default = '' if field.default is None else f' Default {field.default!r}.'
  return define(field.name, None, field.metadata['help'] + default)


_SETTINGS = {f.name: _define(f) for f in dataclasses.fields(Config)}


def asked_for(there: Config | None) -> tuple[Config, set[str]]:
  """The settings of the command line, and which of them were given there.

  Args:
    there: of the run to go on with, if there is one; in place of the defaults.

  Raises:
    UsageError: naming the setting that is wrong.
  """
  with _config_errors():
    values = _CONFIG.value.to_dict()
  given = set(config_flags.get_override_values(flags.FLAGS['config']))
  if flags.FLAGS['config'].present:
    given |= set(values)
    there = None  # a config file has all the settings
  if there is not None:
    own = dataclasses.asdict(there)
    values = own | {name: values[name] for name in given}
  for name, flag in _SETTINGS.items():
    if flag.value is not None:
      values[name] = flag.value
      given.add(name)
  config = from_mapping(values)
  return config if there is not None else defaults.resolve(config), given


def parse(argv: list[str]) -> list[str]:
  """Parses the flags."""
  with _config_errors():
    return app.parse_flags_with_usage(argv)
