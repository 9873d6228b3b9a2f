"""All papers with their figures, by name."""

from experiments.config import UsageError
from experiments.papers import (
  common,
  comparison,
  decomfl,
  diff2,
  fedkseed,
  ferret,
)

PAPERS = {
  'ferret': ferret.ENTRIES,
  'fedkseed': fedkseed.ENTRIES,
  'decomfl': decomfl.ENTRIES,
  'diff2': diff2.ENTRIES,
  'comparison': comparison.ENTRIES,
}


def names() -> str:
  """All papers with their figures, on a line."""
  return '; '.join(
    f'{paper}: {", ".join(entries)}' for paper, entries in PAPERS.items()
  )


def find(paper: str, figure: str | None) -> common.Entry:
  """The entry of that name.

  Raises:
    UsageError: naming the choices.
  """
  if paper not in PAPERS:
    raise UsageError(
      f'paper must be list or one of {", ".join(PAPERS)}; got {paper!r}'
    )
  if figure not in PAPERS[paper]:
    raise UsageError(
      f'figure of {paper} must be one of {", ".join(PAPERS[paper])}; got'
      f' {figure!r}'
    )
  return PAPERS[paper][figure]
