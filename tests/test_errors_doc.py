"""The messages of docs/errors.md are in the code."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'errors.md'


def strings(tree):
  """All texts of a module but docstrings; what varies in them is `...`."""
  docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
  for node in ast.walk(tree):
    if node in docs:
      continue
    if isinstance(node, ast.JoinedStr):
      yield ''.join(
        part.value if isinstance(part, ast.Constant) else '...'
        for part in node.values
      )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.value


def test_every_message_is_one_of_the_code():
  texts = set()
  for folder in ('jaxfl', 'experiments', 'kernels'):
    for path in (ROOT / folder).rglob('*.py'):
      texts |= set(strings(ast.parse(path.read_text())))
  messages = re.findall(r'^### `(.+)`$', PAGE.read_text(), re.M)
  assert len(messages) > 30
  for message in messages:
    words = re.escape(message).replace(r'\.\.\.', '.*')
    missing = not any(re.search(words, text, re.S) for text in texts)
    assert not missing, f'no message of the code is like {message!r}'
