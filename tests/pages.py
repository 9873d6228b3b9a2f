"""The Markdown of the repository: code blocks with their markers, commands."""

import itertools
import pathlib
import re
import shlex
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  path
  for pattern in (
    '*.md', 'docs/*.md', 'experiments/*.md', 'notebooks/*.md', 'jaxfl/**/*.md'
  )
  for path in ROOT.glob(pattern)
)  # fmt: skip
MARKER = re.compile(r'<!-- test: (\S+?)(?:, (.+))? -->')
COMMAND = re.compile(r'^python -m (experiments[.\w]*)(.*)$')


class Block(NamedTuple):
  """A code block."""

  page: str
  line: int
  language: str  # '' for indented ones
  text: str
  kind: str | None  # of its marker
  reason: str | None

  @property
  def commands(self) -> list[tuple[str, list[str]]]:
    """Its commands of `experiments`: module and flags."""
    text = self.text.replace('\\\n', ' ')
    parts = [p.strip() for line in text.splitlines() for p in line.split('&&')]
    return [found for part in parts if (found := command(part))]

  @property
  def extras(self) -> list[str]:
    """What it installs of ours: `pip install -e '.[this,that]'`."""
    found = re.findall(r"pip install .*?-e '\.\[([\w,]+)\]'", self.text)
    return [name for names in found for name in names.split(',')]


def command(text: str) -> tuple[str, list[str]] | None:
  """Module and flags of a command of `experiments`."""
  if not (match := COMMAND.match(text)):
    return None
  return match[1], shlex.split(match[2], comments=True)


def parsed(path: pathlib.Path):
  return MarkdownIt().enable('table').parse(path.read_text())


def blocks(path: pathlib.Path) -> list[Block]:
  """The code blocks of a page."""
  found, previous = [], None
  for token in parsed(path):
    if token.type in ('fence', 'code_block'):
      marker = None
      if previous is not None and previous.type == 'html_block':
        marker = MARKER.fullmatch(previous.content.strip())
      found.append(
        Block(
          str(path.relative_to(ROOT)), (token.map or [0])[0] + 1, token.info,
          token.content, marker and marker[1], marker and marker[2],
        )
      )  # fmt: skip
    previous = token
  return found


def inline_code(path: pathlib.Path) -> list[str]:
  """Code within text and tables."""
  return [
    child.content
    for token in parsed(path)
    for child in token.children or ()
    if child.type == 'code_inline'
  ]


def slug(heading: str) -> str:
  """The anchor that GitHub gives to a heading."""
  kept = re.sub(r'[^\w\- ]', '', heading.strip().lower())
  return kept.replace(' ', '-')


def anchors(path: pathlib.Path) -> set[str]:
  tokens = parsed(path)
  return {
    slug(inline.content.replace('`', ''))
    for token, inline in itertools.pairwise(tokens)
    if token.type == 'heading_open'
  }


def links(path: pathlib.Path) -> list[str]:
  """Targets of links and pictures."""
  return [
    str(child.attrs.get('href') or child.attrs['src'])
    for token in parsed(path)
    for child in token.children or ()
    if child.type in ('link_open', 'image')
  ]
