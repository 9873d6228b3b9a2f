"""The figures of docs/performance.md are those of the committed results."""

from tests import make_performance_tables as made


def test_tables_are_those_of_the_results():
  page = made.PAGE.read_text()
  assert len(made.SECTION.findall(page)) >= 3
  assert made.filled(page) == page, 'python -m tests.make_performance_tables'
