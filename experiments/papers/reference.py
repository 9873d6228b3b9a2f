"""Published numbers of large models: for reference, not run here."""

from collections.abc import Mapping, Sequence

from experiments.papers import common


def entry(
  title: str,
  columns: Sequence[str],
  published: Mapping[str, Sequence[str]],
  notes: Sequence[str] = (),
) -> common.Entry:
  """An entry that shows a table of a paper.

  Args:
    title: of the entry.
    columns: tasks and models.
    published: the numbers of every method, in the order of `columns`.
    notes: sentences for the caption.
  """

  def run(request: common.Request) -> common.Result:
    del request  # Unused: nothing is run.
    rows = [
      common.row(f'{column}: {method}', [], published=values[i])
      for i, column in enumerate(columns)
      for method, values in published.items()
    ]
    return common.result(
      f'{title}: published, not run here',
      'not run here, these models are too large',
      rows,
      settings={},
      notes=notes,
    )

  return common.Entry(f'{title} (reference only)', run, None)
