"""Notebooks: what all have in common, names that exist, and that they run."""

import ast
import functools
import importlib
import json
import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
COLAB = (
  'https://colab.research.google.com/github/jaxfl/jaxfl/blob/main/notebooks'
)
# In the order in which they are meant to be read. All of them take six minutes
# of CPU, so that only the first runs without `-m slow`.
NAMES = (
  'quickstart',
  'bring_your_own_model',
  'one_byte',
  'fedkseed_and_ferret',
  'privacy',
  'kernels',
  'federation',
)
ABSOLUTE = re.compile(r'(^|[\s\'"`(=])(/\w[\w.-]*/\w|[A-Za-z]:\\)')

each = pytest.mark.parametrize('name', NAMES)


@functools.cache
def read(name):
  return nbformat.read(ROOT / 'notebooks' / f'{name}.ipynb', as_version=4)


def code(name):
  return [cell.source for cell in read(name).cells if cell.cell_type == 'code']


def test_there_are_no_others():
  found = {path.stem for path in (ROOT / 'notebooks').glob('*')}
  assert found - {'.ipynb_checkpoints'} == set(NAMES)


@each
def test_it_is_stripped_and_has_one_form(name):
  path = ROOT / 'notebooks' / f'{name}.ipynb'
  notebook = read(name)
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  text = json.dumps(
    json.loads(path.read_text()), indent=1, ensure_ascii=False, sort_keys=True
  )
  assert path.read_text() == text + '\n'
  for i, cell in enumerate(notebook.cells):
    assert cell.id == f'{name.replace("_", "-")}-{i:02d}'
    assert not cell.metadata
    if cell.cell_type == 'code':
      assert not cell.outputs
      assert cell.execution_count is None


@each
def test_it_starts_with_badge_installation_and_size(name):
  title, install, size, *_ = read(name).cells
  assert title.source.startswith('# ')
  assert f']({COLAB}/{name}.ipynb)' in title.source
  assert title.source.count('colab.research.google.com') == 2  # and the image
  assert f'[{name}]({COLAB}/{name}.ipynb)' in (ROOT / 'README.md').read_text()
  first = code(NAMES[0])
  assert install.source == first[0]
  assert size.source == first[1]


@each
def test_it_has_no_paths_of_a_machine(name):
  for cell in read(name).cells:
    assert not ABSOLUTE.search(cell.source), cell.source


@each
def test_every_plot_has_labels(name):
  drawn = [source for source in code(name) if 'plt.show()' in source]
  assert drawn
  for source in drawn:
    for label in ('xlabel(', 'ylabel('):
      assert label in source, f'{label} in\n{source}'


@each
def test_names_of_jaxfl_exist(name):
  tree = ast.parse('\n'.join(code(name)))
  modules = {}  # local name -> module
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      ours = [x.name for x in node.names if x.name.startswith('jaxfl')]
      assert not ours, 'from jaxfl import ... is what this test reads'
    if isinstance(node, ast.ImportFrom) and node.module.startswith('jaxfl'):
      for x in node.names:
        modules[x.asname or x.name] = _named(node.module, x.name)
  used = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      used.add((node.value.id, node.attr))
  for local, attribute in used:
    if type(modules.get(local)).__name__ == 'module':
      assert hasattr(modules[local], attribute), f'{local}.{attribute}'
  assert modules


def _named(module, name):
  """What `from module import name` gives."""
  parent = importlib.import_module(module)
  if not hasattr(parent, name):
    importlib.import_module(f'{module}.{name}')
  return getattr(parent, name)


def execute(name, directory, monkeypatch):
  monkeypatch.setenv('JAXFL_NOTEBOOK_SIZE', 'small')
  monkeypatch.setenv('PYTHONPATH', os.fspath(ROOT))
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # one device, as on Colab
  notebook = nbformat.from_dict(json.loads(json.dumps(read(name))))
  NotebookClient(
    notebook,
    timeout=600,
    kernel_name='python3',
    resources={'metadata': {'path': os.fspath(directory)}},
  ).execute()
  return notebook


@pytest.mark.parametrize(
  'name',
  [NAMES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in NAMES[1:])],
)
def test_it_runs(name, tmp_path, monkeypatch):
  notebook = execute(name, tmp_path, monkeypatch)
  assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
  errors = [
    output.text
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
    if output.output_type == 'stream' and output.name == 'stderr'
  ]
  assert errors == []
