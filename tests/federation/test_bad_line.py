"""The study of bad lines: its plan, its table and its picture; no processes."""

import time

import pytest

from experiments import bad_line_report, bad_line_runs
from experiments.federation import paced, process

pytestmark = pytest.mark.fast_compile

Settings = bad_line_runs.Settings


def test_the_pipeline_covers_a_segment_that_is_lost_twice():
  # 0.3 s, then timeouts of 0.3 and 0.6 s, in steps of 0.5 s; and one more
  assert Settings().ahead == 4
  assert Settings(pipeline=2).ahead == 2
  assert Settings(round_trip=0.0).ahead == 3  # a timeout is 0.2 s at least


def test_rounds_fill_the_minutes():
  assert Settings().rounds(bad=True, pipelined=True) == 1200
  assert Settings().rounds(bad=False, pipelined=False) == 1200
  assert Settings().rounds(bad=True, pipelined=False) == 750


@pytest.mark.parametrize('seed', range(5))
def test_plan(seed):
  settings = Settings(seed=seed)
  events = bad_line_runs.plan(settings)
  assert events == bad_line_runs.plan(settings)
  assert [e.at for e in events] == sorted(e.at for e in events)
  of = lambda kind: [e for e in events if e.kind == kind]
  assert [int(e.at // 60) for e in of('kill')] == list(range(10))
  assert all(2 <= e.down_s <= 5 for e in of('kill'))
  joins = {e.client: e.at for e in of('join')}
  assert len(joins) == 2
  assert all(60 <= at <= 300 for at in joins.values())
  assert all(joins.get(e.client, -60) + 30 <= e.at for e in of('kill'))
  (end,) = of('coordinator')
  assert 240 <= end.at <= 360


def test_plans_differ():
  plans = {tuple(bad_line_runs.plan(Settings(seed=s))) for s in range(3)}
  assert len(plans) == 3


def row(line, pipeline, rate, **changes):
  curve = {'round': [0, 10, 20], 'seconds': [0, 5, 11], 'messages': [8, 8, 7]}
  events = [
    {'kind': kind, 'client': None, 'at': 6.0}
    for kind in ('kill', 'coordinator', 'join')
  ]
  fields = {
    'line': line, 'pipeline': pipeline, 'rate': rate, 'rounds': 30,
    'closed': 30, 'messages': 7.5, 'line_up': [1000, 2000], 'hung': None,
    'line_down': [5, 5], 'lost_segments': 17, 'equal': True, 'curve': curve,
    'refused': {'late': 3, 'repeated': 4, 'damaged': 2},
    'events': events if line == 'bad' else [],
  }  # fmt: skip
  return fields | changes


def test_table_and_picture(tmp_path):
  rows = [
    row('clean', 4, 2.0),
    row('clean', 0, 1.9),
    row('bad', 4, 1.94),
    row('bad', 0, None, hung='5 of 30 rounds are closed', equal=False),
  ]
  bad_line_report.compare(rows)
  assert [r['of_clean'] for r in rows] == [1.0, 1.0, 0.97, None]
  found = bad_line_report.table({'rows': rows})
  cells = dict(
    zip((c.header for c in found.columns), found.columns, strict=True)
  )
  of = lambda name: list(cells[name].cells)
  assert of('line')[2:] == ['bad, s = 4', 'bad, no pipeline']
  assert of('of clean') == ['100.0 %', '100.0 %', '97.0 %', '']
  assert of('late') == ['3'] * 4
  assert of('rejected') == ['2'] * 4
  assert of('kills') == ['0', '0', '2', '2']
  assert of('digests') == ['equal', 'equal', 'equal', 'hung']
  bad_line_report.draw({'rows': rows}, tmp_path / 'picture.png')
  assert (tmp_path / 'picture.png').stat().st_size > 10_000


def test_a_step_takes_its_time():
  start = time.monotonic()
  assert paced.paced(lambda x: x + 1, 0.05)(1) == 2
  assert 0.05 <= time.monotonic() - start < 0.5


def test_a_process_starts_again(tmp_path):
  child = process.Process(tmp_path / 'a' / 'out.txt', 'this', [])
  assert not child.running
  assert child.code is None
  child.end()  # of nothing
  child.start()
  with open(child.output) as out:
    while child.running:
      time.sleep(0.01)
    first = out.read()
  assert 'Beautiful is better than ugly.' in first
  assert child.code == 0
  child.start()
  while child.running:
    time.sleep(0.01)
  assert child.last_words() == (first + first).strip()
