"""Every code block of every page says how it is tested, and is.

A comment stands before it:

    <!-- test: run -->            runs here and now
    <!-- test: slow -->           flags are parsed; runs with -m slow
    <!-- test: flags, REASON -->  flags are parsed; why it does not run
    <!-- test: none, REASON -->   nothing to test, and why
    <!-- test: FILE.py -->        has a test of its own

Commands within text, and those of launchers, have their flags parsed as well.
"""

import configparser
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from experiments.launch import rehearsal
from tests import pages

BLOCKS = [block for path in pages.PAGES for block in pages.blocks(path)]
ENVIRONMENT = os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': str(pages.ROOT)}


def place(block):
  return f'{block.page}:{block.line}'


def test_every_block_has_a_marker():
  for block in BLOCKS:
    at, kind = place(block), block.kind
    assert kind, f'{at}: a code block without <!-- test: ... -->'
    assert kind in ('run', 'slow', 'flags', 'none') or kind.endswith('.py'), at
    if kind in ('flags', 'none'):
      assert block.reason, f'{at}: say why it does not run'
    if kind.endswith('.py'):
      assert (pages.ROOT / 'tests' / kind).exists(), at
    if kind in ('slow', 'flags'):
      assert block.commands, f'{at}: no command of experiments'
    if kind == 'none':
      assert not block.commands, f'{at}: commands can be parsed at least'


def test_commands_parse():
  found = [(place(b), c) for b in BLOCKS for c in b.commands]
  for path in pages.PAGES:
    codes = map(pages.command, pages.inline_code(path))
    # a bare name within text may lack flags that it needs
    found += [(path.name, c) for c in codes if c and c[1]]
  for launcher in rehearsal.LAUNCHERS:
    host = rehearsal.hosts(launcher, 2, 'runs/a', ['--method=spsa'])[1]
    text = (
      host.command[-1] if launcher == 'tpu_vm' else shlex.join(host.command)
    )
    text = text[text.index('-m experiments.train') :]
    found.append((launcher, pages.command(f'python {text}')))
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-m', 'tests.check_commands'],
    cwd=pages.ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True,
    input=json.dumps([c for _, c in found]),
  )  # fmt: skip
  errors = json.loads(done.stdout)
  wrong = [
    f'{at}: {" ".join([c[0], *c[1]])}\n{error}'
    for (at, c), error in zip(found, errors, strict=True)
    if error
  ]
  assert not wrong, '\n'.join(wrong)


def test_modules_and_extras_exist():
  for path in pages.PAGES:
    for module, _ in filter(None, map(pages.command, pages.inline_code(path))):
      file = module.replace('.', '/') + '.py'
      assert (pages.ROOT / file).exists(), f'{path.name}: {module}'
  setup = configparser.ConfigParser()
  setup.read(pages.ROOT / 'setup.cfg')
  for block in BLOCKS:
    for name in block.extras:
      assert name in setup['options.extras_require'], place(block)


@pytest.mark.parametrize('path', pages.PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
  for link in pages.links(path):
    if '://' in link:
      continue
    target, _, anchor = link.partition('#')
    file = (path.parent / target).resolve() if target else path
    assert file.exists(), link
    if anchor:
      assert anchor in pages.anchors(file), link


def test_the_method_has_30_lines():
  page = 'docs/new_method.md'
  method = next(block for block in BLOCKS if block.page == page)
  lines = [line for line in method.text.splitlines() if line]
  assert len(lines) <= 30


def with_blocks(kind):
  """The pages that have some of a kind."""
  names = sorted({block.page for block in BLOCKS if block.kind == kind})
  return pytest.mark.parametrize('page', names)


@with_blocks('run')
def test_blocks_run(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = {}
  for block in BLOCKS:
    if (block.page, block.kind) != (page, 'run'):
      continue
    if block.language == 'python':
      exec(compile(block.text, place(block), 'exec'), names)
    else:
      run_commands(block, pages.ROOT)


def run_commands(block, directory):
  """Runs the commands of `experiments` in a block."""
  for module, arguments in block.commands:
    newest = max(pathlib.Path(directory, 'runs').glob('*'), default=None)
    arguments = [a.replace('runs/DATE-TIME', str(newest)) for a in arguments]
    done = subprocess.run(
      [sys.executable, '-m', module, *arguments],
      cwd=directory, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, f'{place(block)}: {done.stderr[-3000:]}'


@pytest.mark.slow
@with_blocks('slow')
def test_slow_blocks_run(page, tmp_path):
  # commands write their results beside the code
  ignore = shutil.ignore_patterns('__pycache__')
  shutil.copytree(
    pages.ROOT / 'experiments', tmp_path / 'experiments', ignore=ignore
  )
  for block in BLOCKS:
    if (block.page, block.kind) == (page, 'slow'):
      run_commands(block, tmp_path)
