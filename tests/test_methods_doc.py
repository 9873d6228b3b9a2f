"""The table of docs/methods.md has the bytes that are really sent."""

import itertools
import pathlib
import re
import types
from typing import Any

import jax
import numpy as np
import pytest

from experiments import build, defaults
from experiments.config import from_mapping
from jaxfl import method as method_lib
from jaxfl import wire
from jaxfl.models import native

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'methods.md'
CLIENTS = 8
# what a method has no default for
MORE: dict[str, dict[str, Any]] = {
  'dp_gd': {},
  'dp_sgd': {'sampling_rate': 0.1},
  'diff2': {},
  'dp_sketch': {},
}


def rows():
  """The first table: method -> its cells after the name."""
  found = {}
  for line in PAGE.read_text().partition('`up` are')[0].splitlines():
    if match := re.match(r'\| `(\w+)` \| (.+) \|$', line):
      found[match[1]] = match[2].split(' | ')
  return found


@pytest.fixture(scope='module')
def params():
  _, params = native.load_embedded()
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def measured(name, params):
  """Bytes up and down, forward and backward passes."""
  settings = MORE.get(name, {})
  if name in MORE:
    settings = settings | {
      'epsilon_dp': 3.0, 'delta_dp': 1e-5, 'allow_unstable': name == 'diff2',
      'research_float_noise': name != 'dp_sketch',
    }  # fmt: skip
  config = defaults.resolve(from_mapping({'method': name, **settings}))
  sizes = [1000] * CLIENTS if name in MORE else None
  method = build.build_method(config, build.no_loss, sizes)
  zeros = lambda tree, lead=(): jax.tree.map(
    lambda x: np.zeros((*lead, *x.shape), x.dtype), tree
  )
  up = len(wire.to_bytes(zeros(method.message(params))))
  if method.receivers == 'returning':  # all coordinates have changed
    state = types.SimpleNamespace(
      changed=np.zeros(config.num_seeds, np.int32),
      coordinates=np.zeros(config.num_seeds, np.int32),
      levels=np.zeros(config.num_seeds, np.uint8),
      round=np.int32(1),
    )
    down = method.downlink(state, -1)
  else:
    ids = np.arange(1 if method.release else CLIENTS, dtype=np.int32)
    cohort = method_lib.Party(ids, ids * 0, np.ones(len(ids), np.float32))
    state = types.SimpleNamespace(params=zeros(params))
    recorded = zeros(method.recorded(params), (len(ids),))
    down = method.downlink(state, recorded, cohort)
  passes = [
    max(map(x, range(config.num_rounds))) if callable(x) else x
    for x in (method.forwards, method.backwards)
  ]
  return up, len(wire.to_bytes(down)), *passes


def test_every_method_has_a_row():
  assert list(rows()) == list(build.METHODS)


@pytest.mark.parametrize('name', build.METHODS)
def test_bytes_and_passes(name, params):
  *_, up, down, passes = rows()[name]
  number = lambda text: int(text.replace(',', ''))
  found = number(up), number(down), *map(number, passes.split(' / '))
  assert found == measured(name, params)


def test_files_that_are_named_exist():
  table = PAGE.read_text().partition('| method | module |')[2]
  lines = table.splitlines()[2:]
  for line in itertools.takewhile(lambda line: line.startswith('|'), lines):
    _, _, module, config, notebooks, _, _ = line.split('|')
    for file in re.findall(r'`(\S+/\S+)`', module + config):
      assert (ROOT / file).exists(), file
    for name in re.findall(r'`(\w+)`', notebooks):
      if (ROOT / 'notebooks').exists():
        assert (ROOT / 'notebooks' / f'{name}.ipynb').exists(), name
