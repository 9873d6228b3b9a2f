"""The README's example runs as it stands and learns."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.fast_compile

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_the_example_runs_and_learns(capsys):
  text = README.read_text()
  (code,) = re.findall(
    r'<!-- test: test_readme.py -->\n```python\n(.*?)```', text, re.S
  )
  exec(compile(code, 'README.md', 'exec'), {})
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert [line[0] for line in lines] == ['100', '200', '300']
  assert float(lines[-1][1]) < 0.5 * float(lines[0][1])
