"""The study of clients that lie: which runs it makes."""

from experiments import byzantine_runs


def test_runs_that_are_there_are_not_made_again():
  everything = byzantine_runs.missing([], 2, 'data')
  assert {(s.method, s.seed) for s in everything} == {
    (method, seed) for method in byzantine_runs.METHODS for seed in range(2)
  }
  rows = [
    {'method': s.method, 'seed': s.seed, **job._asdict()}
    for s in everything
    for job in s.jobs
  ]
  assert byzantine_runs.missing(rows, 2, 'data') == []
  gone = rows.pop(3)
  (left,) = byzantine_runs.missing(rows, 2, 'data')
  assert (left.method, left.seed) == (gone['method'], gone['seed'])
  assert [job._asdict() for job in left.jobs] == [
    {name: gone[name] for name in ('aggregator', 'attack', 'fraction')}
  ]
