"""The log: what is written is read, and mistakes of the caller."""

import os
import tracemalloc

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxfl import log as log_lib
from jaxfl import wire
from tests.log.tools import (
  FAST,
  ONE_BYTE,
  TREE,
  assert_rounds,
  make_header,
  make_rounds,
  parse_records,
  write_log,
)

# What is written is read.


@pytest.mark.parametrize('like', [ONE_BYTE, TREE, ()], ids=str)
def test_round_trip_and_a_second_reader(path, no_fsync, like):
  rounds = make_rounds(like, [0, 0, 3, 3, 1, 200, 200, 0, 4] + [4] * 130)
  data = write_log(path, rounds, like, reopen_at=(0, 2, 64, 100))
  with log_lib.RoundLog.open(path) as log:
    assert_rounds(log, rounds, like)
    assert [record.round for record in log] == list(range(len(rounds)))
    for name in ('base_digest', 'config', 'params', 'message', 'spec'):
      assert getattr(log.header, name) == getattr(make_header(like), name)
    digest = log.digest
  spec = wire.describe(like)
  records, chain = parse_records(data, wire.payload_bytes(spec))
  assert chain.hex() == digest
  of_rounds = [record for record in records if record[2] != 3]
  for expected, found in zip(rounds, of_rounds, strict=True):
    ids, weights, messages = expected
    assert (list(ids), list(weights)) == (found[3], found[4])
    rows = wire.pack(messages, spec, lead=(len(ids),))
    assert rows.tobytes() == found[5]
  seals = [record[1] for record in records if record[2] == 3]
  assert seals == [2, 64, 100, 128, 139]
  assert log_lib.verify(path) == (len(rounds), digest, 0)


def test_messages_without_like(path, no_fsync):
  rounds = make_rounds(TREE, [2])
  write_log(path, rounds, TREE)
  with log_lib.RoundLog.open(path) as log:
    flat = log.read(0).messages
    assert sorted(flat) == ['a', 'b/0', 'b/1']
    np.testing.assert_array_equal(flat['b/1'], rounds[0][2]['b'][1])
    with pytest.raises(ValueError, match="'a': .* no such leaf"):
      log.read(0, {'b': TREE['b']})
    with pytest.raises(IndexError):
      log.read(1)
  with pytest.raises(ValueError, match='closed'):
    log.read(0)


def test_reading_while_writing(path, no_fsync):
  rounds = make_rounds(ONE_BYTE, [2, 2, 3, 3, 2])
  with log_lib.RoundLog.create(path, make_header()) as log:
    for r, (ids, weights, messages) in enumerate(rounds):
      log.append(r, ids, weights, messages)
      assert_rounds(log, rounds[: r + 1], ONE_BYTE)
      with log_lib.RoundLog.open(path) as reader:
        assert_rounds(reader, rounds[: r + 1], ONE_BYTE)
        assert reader.digest == log.digest


def test_digest_depends_on_rounds_and_header_only(tmp_path, no_fsync):
  rounds = make_rounds(ONE_BYTE, [2] * 70)
  digests = set()
  for name, reopen_at in (('a', ()), ('b', (0, 1, 64, 65)), ('c', (69,))):
    write_log(str(tmp_path / name), rounds, reopen_at=reopen_at)
    digests.add(log_lib.verify(tmp_path / name).digest)
  assert len(digests) == 1
  with log_lib.RoundLog.create(
    tmp_path / 'd', make_header(config={'lr': 1})
  ) as log:
    for r, round in enumerate(rounds):
      log.append(r, *round)
  assert log_lib.verify(tmp_path / 'd').digest not in digests


def test_golden_chain(path, no_fsync):
  """The chain of two rounds, from a header without compression's whims."""
  data = write_log(path, [([5, 7], [1, 2], np.array([[8], [9]], np.uint8))] * 2)
  records, _ = parse_records(data, 1)
  first, second = records[0][0], records[1][0]
  cohort = '05010102'
  assert data[first + 4 : second - 1].hex() == (
    '040000' + '020000' + data[first + 10 : first + 12].hex() + cohort + '0809'
  )
  assert data[second : second + 3].hex() == '010809'
  assert len(data) == second + 4 + 33


def test_twenty_thousand_rounds(path, no_fsync):
  ids, weights = np.arange(8), np.ones(8)
  messages = np.random.default_rng(0).integers(0, 256, (20_000, 8, 1), np.uint8)
  with log_lib.RoundLog.create(path, make_header()) as log:
    for r, message in enumerate(messages):
      log.append(r, ids, weights, message)
  size = os.path.getsize(path)
  assert size - 20_000 <= 200_000  # the tags tell that the cohort is the same
  with log_lib.RoundLog.open(path) as log:
    assert log.num_rounds == 20_000
    np.testing.assert_array_equal(log.read(12_345).messages, messages[12_345])


def test_large_messages_are_not_kept_in_memory(path, no_fsync):
  like = jax.ShapeDtypeStruct((25_000,), np.float32)
  message = np.ones((1, 25_000), np.float32)
  write_log(path, [([0], [1], message)] * 100, like)
  tracemalloc.start()
  try:
    log_lib.verify(path)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000  # of 10 MB
  finally:
    tracemalloc.stop()


@FAST
@hypothesis.given(
  st.lists(
    st.tuples(
      st.sets(st.integers(0, 2**31 - 1), max_size=6), st.integers(0, 2**24 - 1)
    ),
    max_size=4,
  )
)
def test_any_cohort(tmp_path, no_fsync, cohorts):
  path = str(tmp_path / 'any.log')
  if os.path.exists(path):
    os.unlink(path)
  rounds = []
  for ids, weight in cohorts:
    size = len(ids)
    weights = [weight] * size if weight % 2 else [weight, *range(size)][:size]
    rounds.append((sorted(ids), weights, np.zeros((size, 1), np.uint8)))
  write_log(path, rounds)
  with log_lib.RoundLog.open(path) as log:
    assert_rounds(log, rounds, ONE_BYTE)


# Mistakes of the caller.


def _append(log, **changes):
  call = {
    'round': 0,
    'ids': [1, 5],
    'weights': [1, 2],
    'messages': np.zeros((2, 1), np.uint8),
  }
  log.append(**{**call, **changes})


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'round': 1}, 'next is round 0'),
    ({'ids': [5, 1]}, 'ascending'),
    ({'ids': [5, 5]}, 'ascending'),
    ({'ids': [-1, 5]}, 'ascending'),
    ({'ids': [1, 2**31]}, 'ascending'),
    ({'ids': [1.0, 5.0]}, 'integers'),
    ({'ids': [1]}, r'not \[C\]'),
    ({'weights': [1, 0.5]}, 'whole'),
    ({'weights': [1, -1]}, 'whole'),
    ({'weights': [1, np.nan]}, 'whole'),
    ({'weights': [1, 2**24]}, 'whole'),
    ({'messages': np.zeros((3, 1), np.uint8)}, r'uint8\[3, 1\], expected'),
    ({'messages': np.zeros((2, 1), np.int8)}, r'int8\[2, 1\], expected'),
    ({'messages': {'a': np.zeros((2, 1), np.uint8)}}, "leaf ''"),
  ],
)
def test_append_refuses_and_writes_nothing(path, no_fsync, changes, match):
  with log_lib.RoundLog.create(path, make_header()) as log:
    size = os.path.getsize(path)
    with pytest.raises(ValueError, match=match):
      _append(log, **changes)
    assert os.path.getsize(path) == size
    _append(log)
  with log_lib.RoundLog.open(path) as log:
    assert log.num_rounds == 1
    with pytest.raises(ValueError, match='not open for appending'):
      _append(log, round=1)


def test_an_existing_file_is_not_replaced(path, tmp_path, no_fsync):
  log_lib.RoundLog.create(path, make_header()).close()
  with pytest.raises(FileExistsError):
    log_lib.RoundLog.create(path, make_header())
  assert os.listdir(tmp_path) == ['run.log']
  with pytest.raises(FileNotFoundError):
    log_lib.RoundLog.open(path + '.other')
  with pytest.raises(ValueError, match='mode'):
    log_lib.RoundLog.open(path, 'w')


@pytest.mark.parametrize(
  ('config', 'error'),
  [({'x': float('nan')}, ValueError), ({'x': object()}, TypeError)],
)
def test_config_must_be_json(path, tmp_path, config, error):
  with pytest.raises(error):
    log_lib.RoundLog.create(path, make_header(config=config))
  assert os.listdir(tmp_path) == []


@pytest.mark.skipif(log_lib.fcntl is None, reason='no locks here')
def test_a_second_writer_is_refused(path, no_fsync):
  with log_lib.RoundLog.create(path, make_header()) as log:
    with pytest.raises(BlockingIOError, match='another writer'):
      log_lib.RoundLog.open(path, 'a')
    assert log.num_rounds == 0
  with log_lib.RoundLog.open(path, 'a') as log:
    with pytest.raises(BlockingIOError, match='another writer'):
      log_lib.RoundLog.open(path, 'a')
    assert log.num_rounds == 0
  log_lib.RoundLog.open(path, 'a').close()
