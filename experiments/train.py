"""Fine-tunes a model over simulated clients and keeps a log that rebuilds it.

python -m experiments.train
python -m experiments.train --workdir=DIR --resume
python -m experiments.train --config=experiments/configs/fed_avg.py
python -m experiments.train --method=spsa --codec=sign1 --config.mu=2e-3
"""

import contextlib
import dataclasses
import datetime
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import build, report, runner
from experiments import workdir as workdir_lib
from experiments.config import Config, UsageError, from_mapping, types_of


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
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run; default runs/DATE-TIME.'
)
_RESUME = flags.DEFINE_bool('resume', False, 'Go on with the run in --workdir.')


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
  return config if there is not None else build.resolve(config), given


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  directory = pathlib.Path(_WORKDIR.value or f'runs/{stamp}')
  try:
    if _RESUME.value and not _WORKDIR.value:
      raise UsageError('--resume needs --workdir')
    workdir = workdir_lib.Workdir(directory)
    there = None
    if _RESUME.value and workdir.config.exists():
      there = workdir_lib.read_config(workdir)
    config, given = asked_for(there)
    config = workdir_lib.choose(workdir, config, given, _RESUME.value)
    summary = runner.run(config, directory)
  except (UsageError, FloatingPointError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    if workdir_lib.Workdir(directory).config.exists():
      print(
        '\nStopped; every finished round is in the log. To go on:\n'
        f'  python -m experiments.train --workdir={directory} --resume'
      )
    sys.exit(130)
  report.show(summary)
  print(
    f'{directory}/curve.png shows the run. To rebuild it from its log:\n'
    f'  python -m experiments.replay --workdir={directory}'
  )


def parse(argv: list[str]) -> list[str]:
  """Parses the flags."""
  with _config_errors():
    return app.parse_flags_with_usage(argv)


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=parse)
