"""Parses commands of `experiments` as they would be, without running them.

    python -m tests.check_commands < COMMANDS

reads a JSON list of `[module, flags]` and prints one of errors, '' for none.
Every command has a process of its own, forked from one that has imported what
they share: their flags would collide in one.
"""

import importlib
import inspect
import json
import os
import runpy
import sys
import tempfile
import traceback

from absl import app, flags

SHARED = (
  'build', 'defaults', 'report', 'runner', 'papers.catalog', 'benchmarks.step',
  'federation.local', 'federation.provisioning', 'federation.roles',
)  # fmt: skip
PLACEHOLDER = 'NAME'


def check(module, arguments):
  """Raises SystemExit or another exception for a command that is wrong."""
  rest = []

  def parse(main, flags_parser=None):
    """In place of `app.run`."""
    for argument in sys.argv[1:]:
      name, _, value = argument.removeprefix('--').partition('=')
      if value == PLACEHOLDER:  # any value will do
        parser = flags.FLAGS[name].parser
        values = {'method': ['spsa']}.get(name, [value])
        values = getattr(parser, 'enum_values', values)
        sys.argv[sys.argv.index(argument)] = f'--{name}={values[0]}'
    rest.extend((flags_parser or flags.FLAGS)(sys.argv)[1:])
    if 'len(argv) > 1' not in inspect.getsource(main):
      rest.clear()  # it takes arguments that are no flags

  app.run = parse
  sys.argv = [module, *(a for a in arguments if a != '--help')]
  runpy.run_module(module, run_name='__main__', alter_sys=False)
  if rest:
    sys.exit(f'unexpected arguments: {" ".join(rest)}')
  if settings := sys.modules.get('experiments.setting_flags'):
    from experiments import build

    config, _ = settings.asked_for(None)
    if config.epsilon_dp is None:  # calibration takes a while
      build.build_method(config, build.no_loss)
  if module == 'experiments.paper':
    from experiments.papers import catalog

    paper, figure = flags.FLAGS.paper, flags.FLAGS.figure
    if paper != 'list' and PLACEHOLDER not in (paper, figure):
      catalog.find(paper, figure)


def error_of(module, arguments) -> str:
  """What is wrong with a command, from a process of its own."""
  with tempfile.TemporaryFile('w+') as said:
    pid = os.fork()
    if not pid:
      os.dup2(said.fileno(), 2)
      os.dup2(said.fileno(), 1)
      try:
        check(module, arguments)
      except SystemExit as end:
        print(end.code, file=sys.stderr, flush=True)
        os._exit(1)
      except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
      os._exit(0)
    _, status = os.waitpid(pid, 0)
    said.seek(0)
    return said.read()[-2000:] or 'failed' if status else ''


if __name__ == '__main__':
  for name in SHARED:
    importlib.import_module(f'experiments.{name}')
  print(json.dumps([error_of(*command) for command in json.load(sys.stdin)]))
