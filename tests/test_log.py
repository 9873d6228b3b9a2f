"""The log: exact, small, and every damage found where it is."""

import binascii
import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxfl import log as log_lib
from jaxfl import log_format, wire

FAST = hypothesis.settings(
  deadline=None,
  max_examples=60,
  derandomize=True,
  database=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
ONE_BYTE = jax.ShapeDtypeStruct((1,), np.uint8)
TREE = {
  'a': jax.ShapeDtypeStruct((), np.float32),
  'b': [
    jax.ShapeDtypeStruct((2,), np.int16),
    jax.ShapeDtypeStruct((3,), np.bool_),
  ],
}


@pytest.fixture
def path(tmp_path):
  return str(tmp_path / 'run.log')


@pytest.fixture
def no_fsync(monkeypatch):
  monkeypatch.setattr(os, 'fsync', lambda fd: None)


def _header(like: Any = ONE_BYTE, config=None):
  return log_lib.Header(
    base_digest=hashlib.sha256(b'weights').hexdigest(),
    config=config or {'lr': 0.1, 'layers': [1, 2], 'name': 'test'},
    params=[['w', 'float32', [3, 4]]],
    message=wire.describe(like),
  )


def _messages(like, size, rng):
  def leaf(x):
    raw = rng.integers(0, 2 if x.dtype == bool else 100, (size, *x.shape))
    return raw.astype(x.dtype)

  return jax.tree.map(leaf, like)


def _rounds(like, sizes, seed=0):
  """One round for each size; a size that repeats keeps its cohort."""
  rng, rounds, previous = np.random.default_rng(seed), [], None
  for size in sizes:
    if previous is None or len(previous[0]) != size:
      ids = np.sort(rng.choice(100_000, size, replace=False))
      weights = rng.integers(1, 500, size) if size % 2 else np.full(size, 3)
      previous = ids, weights
    rounds.append((*previous, _messages(like, size, rng)))
  return rounds


def _write(path, rounds, like: Any = ONE_BYTE, reopen_at=()):
  log = log_lib.RoundLog.create(path, _header(like))
  for r, (ids, weights, messages) in enumerate(rounds):
    if r in reopen_at:
      log.close()
      log = log_lib.RoundLog.open(path, 'a')
    log.append(r, ids, weights, messages)
  log.close()
  with open(path, 'rb') as f:
    return f.read()


def _crc8(data):
  crc = 0
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc << 1) ^ 0x107 if crc & 0x80 else crc << 1
  return crc


def _records(data, row_bytes):
  """A second reader, from the text of the format alone.

  Returns:
    (offset, round, tag, ids, weights, payload) of every record, and the chain.
  """
  assert data[:9] == b'JAXFLLOG\x01'
  at = 13 + int.from_bytes(data[9:13], 'little') + 32
  chain = data[at - 32 : at]
  assert hashlib.sha256(data[: at - 32]).digest() == chain
  round, ids, weights, records = 0, [], [], []
  while at < len(data):
    tag, start = data[at], at + 1
    if tag == 3:
      assert data[start : start + 32] == chain
      records.append((at, round, tag, None, None, None))
      at += 33
      continue
    if tag == 2:
      assert data[start : start + 3] == bytes(255 - c for c in chain[:3])
      length = int.from_bytes(data[at + 4 : at + 7], 'little')
      count = int.from_bytes(data[at + 7 : at + 10], 'little')
      crc = binascii.crc_hqx(data[at : at + 10], 0xFFFF)
      assert data[at + 10 : at + 12] == crc.to_bytes(2, 'little')
      start, place, numbers = at + 12 + length, at + 12, []
      while place < start:
        number, place = wire.read_varint(data, place)
        numbers.append(number)
      ids = [sum(numbers[: i + 1]) + i for i in range(count)]
      weights = numbers[count:]
      weights = weights if len(weights) == count else weights * count
    stop = start + len(ids) * row_bytes
    assert data[stop] == _crc8(data[at:stop]) ^ chain[0]
    records.append((at, round, tag, ids, weights, data[start:stop]))
    chain = hashlib.sha256(chain + data[at : stop + 1]).digest()
    round, at = round + 1, stop + 1
  return records, chain


def _assert_rounds(log, rounds, like):
  assert log.num_rounds == len(rounds)
  for r, (ids, weights, messages) in enumerate(rounds):
    record = log.read(r, like)
    assert record.round == r
    np.testing.assert_array_equal(record.ids, ids)
    np.testing.assert_array_equal(record.weights, weights)
    assert record.ids.dtype == np.int32
    assert record.weights.dtype == np.float32
    assert jax.tree.structure(record.messages) == jax.tree.structure(messages)
    pairs = zip(
      jax.tree.leaves(record.messages), jax.tree.leaves(messages), strict=True
    )
    for x, y in pairs:
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)


def _open(path, data):
  with open(path, 'wb') as f:
    f.write(data)
  with log_lib.RoundLog.open(path) as log:
    return [log.read(r) for r in range(log.num_rounds)]


@pytest.fixture
def warnings_of(monkeypatch):
  seen = []
  monkeypatch.setattr(
    log_lib.logging, 'warning', lambda text, *args: seen.append(text % args)
  )
  return seen


@pytest.fixture(params=['one_byte', 'tree', 'empty'])
def damaged(request, tmp_path, monkeypatch, no_fsync):
  """A log with changes of cohort, empty rounds, both kinds of seal."""
  del no_fsync
  monkeypatch.setattr(log_format, 'SEAL_INTERVAL', 4)
  like = {'one_byte': ONE_BYTE, 'tree': TREE, 'empty': ()}[request.param]
  sizes = [2, 2, 3, 3, 1, 1, 0, 0, 2, 2, 2, 4]
  original = str(tmp_path / 'original.log')
  data = _write(original, _rounds(like, sizes), like, reopen_at=(1, 4, 6, 10))
  records, _ = _records(data, wire.payload_bytes(wire.describe(like)))
  assert [r[2] for r in records].count(3) == 6
  assert {r[2] for r in records} == {1, 2, 3}
  return data, records


# What is written is read.


@pytest.mark.parametrize('like', [ONE_BYTE, TREE, ()], ids=str)
def test_round_trip_and_a_second_reader(path, no_fsync, like):
  rounds = _rounds(like, [0, 0, 3, 3, 1, 200, 200, 0, 4] + [4] * 130)
  data = _write(path, rounds, like, reopen_at=(0, 2, 64, 100))
  with log_lib.RoundLog.open(path) as log:
    _assert_rounds(log, rounds, like)
    assert [record.round for record in log] == list(range(len(rounds)))
    for name in ('base_digest', 'config', 'params', 'message', 'spec'):
      assert getattr(log.header, name) == getattr(_header(like), name)
    digest = log.digest
  spec = wire.describe(like)
  records, chain = _records(data, wire.payload_bytes(spec))
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
  rounds = _rounds(TREE, [2])
  _write(path, rounds, TREE)
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
  rounds = _rounds(ONE_BYTE, [2, 2, 3, 3, 2])
  with log_lib.RoundLog.create(path, _header()) as log:
    for r, (ids, weights, messages) in enumerate(rounds):
      log.append(r, ids, weights, messages)
      _assert_rounds(log, rounds[: r + 1], ONE_BYTE)
      with log_lib.RoundLog.open(path) as reader:
        _assert_rounds(reader, rounds[: r + 1], ONE_BYTE)
        assert reader.digest == log.digest


def test_digest_depends_on_rounds_and_header_only(tmp_path, no_fsync):
  rounds = _rounds(ONE_BYTE, [2] * 70)
  digests = set()
  for name, reopen_at in (('a', ()), ('b', (0, 1, 64, 65)), ('c', (69,))):
    _write(str(tmp_path / name), rounds, reopen_at=reopen_at)
    digests.add(log_lib.verify(tmp_path / name).digest)
  assert len(digests) == 1
  with log_lib.RoundLog.create(
    tmp_path / 'd', _header(config={'lr': 1})
  ) as log:
    for r, round in enumerate(rounds):
      log.append(r, *round)
  assert log_lib.verify(tmp_path / 'd').digest not in digests


def test_golden_chain(path, no_fsync):
  """The chain of two rounds, from a header without compression's whims."""
  data = _write(path, [([5, 7], [1, 2], np.array([[8], [9]], np.uint8))] * 2)
  records, _ = _records(data, 1)
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
  with log_lib.RoundLog.create(path, _header()) as log:
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
  _write(path, [([0], [1], message)] * 100, like)
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
  _write(path, rounds)
  with log_lib.RoundLog.open(path) as log:
    _assert_rounds(log, rounds, ONE_BYTE)


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
  with log_lib.RoundLog.create(path, _header()) as log:
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
  log_lib.RoundLog.create(path, _header()).close()
  with pytest.raises(FileExistsError):
    log_lib.RoundLog.create(path, _header())
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
    log_lib.RoundLog.create(path, _header(config=config))
  assert os.listdir(tmp_path) == []


@pytest.mark.skipif(log_lib.fcntl is None, reason='no locks here')
def test_a_second_writer_is_refused(path, no_fsync):
  with log_lib.RoundLog.create(path, _header()) as log:
    with pytest.raises(BlockingIOError, match='another writer'):
      log_lib.RoundLog.open(path, 'a')
    assert log.num_rounds == 0
  with log_lib.RoundLog.open(path, 'a') as log:
    with pytest.raises(BlockingIOError, match='another writer'):
      log_lib.RoundLog.open(path, 'a')
    assert log.num_rounds == 0
  log_lib.RoundLog.open(path, 'a').close()


# Damage.


def _owner(records, position):
  """Offset and round of the record that a byte belongs to."""
  owners = [(at, round) for at, round, *_ in records if at <= position]
  return owners[-1] if owners else (0, -1)


def test_every_wrong_byte_is_found_in_its_record(path, damaged):
  data, records = damaged
  tags = {record[0] for record in records}
  for i, x in enumerate(data):
    in_header = i < records[0][0]
    values = {x ^ 1} if in_header else {x ^ 1, x ^ 255, 0, 1, 2, 3}
    for value in (set(range(8)) if i in tags else values) - {x}:
      with pytest.raises(log_lib.LogCorruptError, match=path) as e:
        _open(path, data[:i] + bytes([value]) + data[i + 1 :])
      assert (e.value.offset, e.value.round) == _owner(records, i)


def test_every_truncation_yields_the_rounds_before(path, damaged, warnings_of):
  data, records = damaged
  whole = _open(path, data)
  assert not warnings_of
  starts = [record[0] for record in records]
  for size in range(len(data)):
    warnings_of.clear()
    if size < starts[0]:
      with pytest.raises(log_lib.LogCorruptError, match='header'):
        _open(path, data[:size])
      continue
    kept = max(at for at in [*starts, len(data)] if at <= size)
    num_rounds = sum(1 for r in records if r[0] < kept and r[2] != 3)
    found = _open(path, data[:size])
    assert str(found) == str(whole[:num_rounds])
    if size == kept:
      assert not warnings_of
    else:
      (text,) = warnings_of
      assert f'{path}: the record of round {num_rounds} is torn' in text
      assert f'{size - kept} bytes dropped at byte {kept}' in text


def test_a_truncated_log_can_be_continued(path, damaged, warnings_of):
  data, records = damaged
  whole = _open(path, data)
  for size in range(records[0][0], len(data), 3):
    with open(path, 'wb') as f:
      f.write(data[:size])
    with log_lib.RoundLog.open(path, 'a') as log:
      assert os.path.getsize(path) == size - log.torn_bytes
      for record in whole[log.num_rounds :]:
        log.append(*record)
    with log_lib.RoundLog.open(path) as log:
      assert str(list(log)) == str(whole)


def test_a_tail_of_zeros_is_torn(path, damaged, warnings_of):
  data, records = damaged
  whole = _open(path, data)
  for end in [record[0] for record in records] + [len(data)]:
    num_rounds = sum(1 for r in records if r[0] < end and r[2] != 3)
    for size in (1, 2, 3, 4, 10, 33, 34, 100_000):
      warnings_of.clear()
      found = _open(path, data[:end] + bytes(size))
      assert str(found) == str(whole[:num_rounds])
      assert len(warnings_of) == 1


def test_other_tails_are_refused(path, damaged):
  data, _ = damaged
  for tail in (b'\0x', b'\0' * 70_000 + b'\1', b'\4', b'\3', data[-33:], data):
    with pytest.raises(log_lib.LogCorruptError) as e:
      _open(path, data + tail)
    assert (e.value.offset, e.value.round) == (len(data), 12)


def test_records_may_look_like_seals(path, no_fsync, monkeypatch):
  """Clients can't make a log unreadable by imitating its other records."""
  monkeypatch.setattr(log_format, 'SEAL_INTERVAL', 5)
  for size in (1, 2, 4, 40):
    if os.path.exists(path):
      os.unlink(path)
    rounds = []
    with log_lib.RoundLog.create(path, _header()) as log:
      for r in range(12):
        chain = np.frombuffer(bytes.fromhex(log.digest), np.uint8)
        chain = np.resize(chain if r % 2 else ~chain, (size, 1))
        if size == 1:  # the check byte is then the second byte of the chain
          continue
        rounds.append((np.arange(size), np.ones(size), chain))
        log.append(r, *rounds[-1])
    with log_lib.RoundLog.open(path) as log:
      _assert_rounds(log, rounds, ONE_BYTE)
    with open(path, 'rb') as f:
      records, _ = _records(f.read(), 1)
    if size > 2:
      assert {record[2] for record in records} <= {2, 3}


@pytest.mark.parametrize('size', [0, 1])
def test_zero_records_can_be_told_from_a_zero_tail(path, no_fsync, size):
  rounds = [(range(size), [1] * size, np.zeros((size, 1), np.uint8))] * 2000
  data = _write(path, rounds)
  records, _ = _records(data, 1)
  unusual = [at for at, _, tag, *_ in records if tag == 2]
  assert 1 <= len(unusual) <= 30  # one in 256 was expected to be all zeros
  for at, _, tag, *_ in records:
    assert tag == 3 or any(data[at + 1 : at + 2 + size])


@pytest.mark.parametrize('change', [b'\1', b'\2\3', b'\0' * 9])
def test_a_file_that_changes_while_open_is_noticed(path, no_fsync, change):
  _write(path, _rounds(ONE_BYTE, [3, 3, 3]))
  with log_lib.RoundLog.open(path) as log:
    log.read(2)
    with open(path, 'r+b') as f:
      f.seek(log._offsets[2] + 1)
      f.write(change)
    with pytest.raises(log_lib.LogCorruptError, match='round 2'):
      log.read(2)


# Hostile files.


@FAST
@hypothesis.given(st.binary(max_size=80), st.booleans())
def test_random_files_are_refused(tmp_path, data, with_magic):
  path = str(tmp_path / 'random.log')
  with pytest.raises(log_lib.LogCorruptError, match='header'):
    _open(path, b'JAXFLLOG\x01' * with_magic + data)


@hypothesis.settings(FAST, max_examples=200)
@hypothesis.given(st.data())
def test_mutated_files_are_refused_or_shortened(tmp_path, no_fsync, data):
  path = str(tmp_path / 'mutated.log')
  if os.path.exists(path):
    os.unlink(path)
  rounds = _rounds(TREE, [2, 2, 3, 0, 1])
  valid = _write(path, rounds, TREE, reopen_at=(2,))
  start = data.draw(st.integers(0, len(valid)))
  stop = data.draw(st.integers(start, min(start + 12, len(valid))))
  mutated = valid[:start] + data.draw(st.binary(max_size=12)) + valid[stop:]
  with open(path, 'wb') as f:
    f.write(mutated)
  try:
    with log_lib.RoundLog.open(path) as log:
      _assert_rounds(log, rounds[: log.num_rounds], TREE)
  except log_lib.LogCorruptError:
    pass


def _with_header(text, rest=b'', compress=zlib.compress):
  body = compress(
    text if isinstance(text, bytes) else json.dumps(text).encode()
  )
  block = b'JAXFLLOG\x01' + len(body).to_bytes(4, 'little') + body
  return block + hashlib.sha256(block).digest() + rest


FIELDS = {**vars(_header()), 'config': {}}


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    (b'x', 'Expecting value'),
    pytest.param(b'[' * 200_000, 'nested', id='nested'),
    pytest.param(b' ' * (1 << 25), 'too long', id='bomb'),
    (b'\xff', 'decode'),
    ([], 'not an object'),
    ({}, 'not an object'),
    ({**FIELDS, 'more': 1}, 'not an object'),
    ({**FIELDS, 'config': []}, 'config is no dict'),
    ({**FIELDS, 'message': [['a', 'uint8', [-1]]]}, 'bad shape'),
    ({**FIELDS, 'message': [['a', 'uint8', [2**50]]]}, 'bad shape'),
    ({**FIELDS, 'message': [['a', 'object', []]]}, 'unknown dtype'),
    ({**FIELDS, 'message': [[1, 'uint8', []]]}, 'not text'),
    ({**FIELDS, 'message': 3}, 'a spec is a list'),
  ],
)
def test_hostile_headers(path, text, match):
  with pytest.raises(log_lib.LogCorruptError, match=match) as e:
    _open(path, _with_header(text))
  assert e.value.round == -1


def test_headers_that_are_not_zlib(path):
  with pytest.raises(log_lib.LogCorruptError, match='zlib'):
    _open(path, _with_header(FIELDS, compress=lambda x: x))
  more = lambda x: zlib.compress(x) + b'x'
  with pytest.raises(log_lib.LogCorruptError, match='followed by'):
    _open(path, _with_header(FIELDS, compress=more))


def test_huge_sizes_allocate_nothing(path, warnings_of):
  fields = {**FIELDS, 'message': [['', 'float64', [2**39]]]}
  block = _with_header(fields)
  prefix = b'\2' + bytes(255 - c for c in block[-32:-29]) + b'\xff' * 6
  prefix += binascii.crc_hqx(prefix, 0xFFFF).to_bytes(2, 'little')
  tracemalloc.start()
  try:
    assert _open(path, block + prefix) == []
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
  finally:
    tracemalloc.stop()
  assert len(warnings_of) == 1


@pytest.mark.parametrize(
  ('count', 'cohort', 'match'),
  [
    (1, '0580', 'wrong integer'),
    (1, '05808080808001', 'wrong integer'),
    (1, '058000', 'only form'),
    (2, '050101', None),
    (2, '05010101', 'only form'),
    (2, '0501', 'can not be 2 clients'),
    (2, '0501010203', 'can not be 2 clients'),
    (0, '05', 'can not be 0 clients'),
    (1, '05ffffff7f', 'whole numbers'),
    (1, 'ffffffff7f01', 'ids must be'),
    (0, '', 'only form'),
  ],
)
def test_cohorts_have_one_form(path, count, cohort, match):
  block = _with_header(FIELDS)
  code, chain = bytes.fromhex(cohort), block[-32:]
  record = b'\2' + bytes(255 - c for c in chain[:3])
  record += len(code).to_bytes(3, 'little') + count.to_bytes(3, 'little')
  record += binascii.crc_hqx(record, 0xFFFF).to_bytes(2, 'little')
  record += code + bytes(count)
  record += bytes([_crc8(record) ^ chain[0]])
  if match is None:
    assert len(_open(path, block + record)) == 1
  else:
    with pytest.raises(log_lib.LogCorruptError, match=match):
      _open(path, block + record)


# Crashes.


def test_a_failed_write_leaves_the_log_as_it_was(path, monkeypatch):
  rounds = _rounds(ONE_BYTE, [2, 2])
  with log_lib.RoundLog.create(path, _header()) as log:
    log.append(0, *rounds[0])
    size = os.path.getsize(path)

    def full(fd):
      raise OSError(errno.ENOSPC, 'disk full')

    with monkeypatch.context() as patch:
      patch.setattr(os, 'fsync', full)
      with pytest.raises(OSError, match='full'):
        log.append(1, *rounds[1])
    assert os.path.getsize(path) == size
    assert log.num_rounds == 1
    with pytest.raises(ValueError, match='not open for appending'):
      log.append(1, *rounds[1])
  with log_lib.RoundLog.open(path, 'a') as log:
    log.append(1, *rounds[1])
  with log_lib.RoundLog.open(path) as log:
    _assert_rounds(log, rounds, ONE_BYTE)


def test_an_interrupt_after_the_write_does_no_harm(path, monkeypatch, no_fsync):
  rounds = _rounds(ONE_BYTE, [2, 2])

  def interrupt(*args):
    raise KeyboardInterrupt

  with log_lib.RoundLog.create(path, _header()) as log:
    log.append(0, *rounds[0])
    monkeypatch.setattr(log, '_note', interrupt)
    with pytest.raises(KeyboardInterrupt):
      log.append(1, *rounds[1])
  with log_lib.RoundLog.open(path) as log:
    _assert_rounds(log, rounds, ONE_BYTE)


CHILD = """
import os, random, signal, sys, time
import numpy as np
from jaxfl import log as log_lib, wire

folder = sys.argv[1]
header = log_lib.Header(
    base_digest='', config={}, params=[],
    message=wire.describe(np.zeros(1, np.uint8)),
)
rng = random.Random(0)
for trial in range(12):
  read, write = os.pipe()
  pid = os.fork()
  if not pid:
    log = log_lib.RoundLog.create(f'{folder}/{trial}.log', header)
    for r in range(10**6):
      ids = np.arange(1 + r // 5 % 7)
      log.append(r, ids, ids + 1, np.full((len(ids), 1), r % 256, np.uint8))
      os.write(write, b'.')
  time.sleep(rng.uniform(0.0, 0.15))
  os.kill(pid, signal.SIGKILL)
  os.waitpid(pid, 0)
  os.close(write)
  print(trial, len(os.read(read, 1 << 20)))
  os.close(read)
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_every_round_that_was_acknowledged_survives_a_kill(tmp_path):
  """Kills twelve writers; what `append` returned for must be in the log."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  result = subprocess.run(
    [sys.executable, '-c', CHILD, str(tmp_path)],
    capture_output=True,
    check=True,
    env=env,
    timeout=120,
  )
  total = 0
  for line in result.stdout.split(b'\n')[:-1]:
    trial, acknowledged = map(int, line.split())
    path = tmp_path / f'{trial}.log'
    if not path.exists():
      assert acknowledged == 0
      continue
    with log_lib.RoundLog.open(path, 'a') as log:
      assert acknowledged <= log.num_rounds <= acknowledged + 1
      for r in range(log.num_rounds):
        record = log.read(r)
        assert len(record.ids) == 1 + r // 5 % 7
        assert (record.messages == r % 256).all()
      total += log.num_rounds
  assert total > 0
