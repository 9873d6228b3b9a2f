"""Measures ours beside competitors and beside what the machine allows.

    python -m experiments.benchmark --suite=kernels
    python -m experiments.benchmark --suite=step
    python -m experiments.benchmark --suite=simulate --fedjax_python=PYTHON

On a CPU, everything runs on one core, to which the process pins itself; about
five minutes for a suite on an idle machine. On an accelerator nothing is
pinned; `--suite=kernels --params=1.3e9` is the size that its targets are for.
Operations take turns; rates are medians over repeats. Each suite prints a table
and writes it as JSON and as a picture to experiments/results/. What was
expected, and why, is in results/benchmark_predictions.json.

Competitors: the loops of MeZO, FedKSeed and Ferret in PyTorch, if torch is
installed (for `step`, transformers too), `jax.random`, a plain loop over
clients, and FedJAX from an environment of its own.
"""

import json
import pathlib

from absl import app, flags, logging
from rich.console import Console

from experiments.benchmarks import kernels, machine, show, simulate, step

_RESULTS = pathlib.Path(__file__).with_name('results')
_SUITE = flags.DEFINE_enum(
  'suite', 'kernels', ['kernels', 'step', 'simulate'], 'What to measure.'
)
_OUT = flags.DEFINE_string(
  'out', None, 'JSON file; default: results/benchmark_SUITE.json.'
)
_REPEATS = flags.DEFINE_integer(
  'repeats', 7, 'Repeats; operations of more than 2 s have 3 at most.', 1
)
_PARAMS = flags.DEFINE_float(
  'params', 1e7, 'kernels: entries of the large sets of tensors.', 1
)
_TOKENS = flags.DEFINE_list(
  'tokens', [], 'step: tokens of a batch; default by the kind of device.'
)
_CLIENTS = flags.DEFINE_integer('clients', 64, 'simulate: clients a round.', 1)
_FEDJAX = flags.DEFINE_string(
  'fedjax_python', None, 'simulate: a python that has fedjax.'
)


def predictions(suite: str) -> dict[str, float]:
  """What was expected of this kind of device, by row."""
  path = _RESULTS / 'benchmark_predictions.json'
  kind = 'cpu' if machine.on_cpu() else 'gpu'
  found = json.loads(path.read_text('utf-8'))[kind][suite]
  return {row['operation']: row['rate'] for row in found if 'rate' in row}


def run(suite: str) -> dict:
  """A suite's results."""
  expected = predictions(suite)
  if suite == 'kernels':
    return kernels.measure(_PARAMS.value, _REPEATS.value, expected)
  if suite == 'step':
    tokens = [int(count) for count in _TOKENS.value]
    return step.measure(tokens, _REPEATS.value, expected)
  return simulate.measure(
    _CLIENTS.value, _FEDJAX.value, _REPEATS.value, expected
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  if any(not count.isdigit() or int(count) < 1 for count in _TOKENS.value):
    raise app.UsageError(f'--tokens must be numbers, got {_TOKENS.value}')
  machine.pin()
  suite = _SUITE.value
  out = pathlib.Path(_OUT.value or _RESULTS / f'benchmark_{suite}.json')
  description = machine.describe()
  found = {'suite': suite, 'machine': description, **run(suite)}
  Console(width=160).print(show.table(found))
  if description['torch'] is None:
    print('torch is not installed: no competitor in it')
  out.write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')
  show.draw(found, out.with_suffix('.png'))


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
