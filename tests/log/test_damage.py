"""The log: damage, torn ends, hostile files, crashes."""

import binascii
import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxfl import log as log_lib
from jaxfl import log_format
from tests.log.tools import (
  FAST,
  ONE_BYTE,
  TREE,
  assert_rounds,
  crc8,
  make_header,
  make_rounds,
  open_data,
  parse_records,
  write_log,
)

pytestmark = pytest.mark.fast_compile

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
        open_data(path, data[:i] + bytes([value]) + data[i + 1 :])
      assert (e.value.offset, e.value.round) == _owner(records, i)


def test_every_truncation_yields_the_rounds_before(path, damaged, warnings_of):
  data, records = damaged
  whole = open_data(path, data)
  assert not warnings_of
  starts = [record[0] for record in records]
  for size in range(len(data)):
    warnings_of.clear()
    if size < starts[0]:
      with pytest.raises(log_lib.LogCorruptError, match='header'):
        open_data(path, data[:size])
      continue
    kept = max(at for at in [*starts, len(data)] if at <= size)
    num_rounds = sum(1 for r in records if r[0] < kept and r[2] != 3)
    found = open_data(path, data[:size])
    assert str(found) == str(whole[:num_rounds])
    if size == kept:
      assert not warnings_of
    else:
      (text,) = warnings_of
      assert f'{path}: the record of round {num_rounds} is torn' in text
      assert f'{size - kept} bytes dropped at byte {kept}' in text


def test_a_truncated_log_can_be_continued(path, damaged, warnings_of):
  data, records = damaged
  whole = open_data(path, data)
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
  whole = open_data(path, data)
  for end in [record[0] for record in records] + [len(data)]:
    num_rounds = sum(1 for r in records if r[0] < end and r[2] != 3)
    for size in (1, 2, 3, 4, 10, 33, 34, 100_000):
      warnings_of.clear()
      found = open_data(path, data[:end] + bytes(size))
      assert str(found) == str(whole[:num_rounds])
      assert len(warnings_of) == 1


def test_other_tails_are_refused(path, damaged):
  data, _ = damaged
  for tail in (b'\0x', b'\0' * 70_000 + b'\1', b'\4', b'\3', data[-33:], data):
    with pytest.raises(log_lib.LogCorruptError) as e:
      open_data(path, data + tail)
    assert (e.value.offset, e.value.round) == (len(data), 12)


def test_records_may_look_like_seals(path, no_fsync, monkeypatch):
  """Clients can't make a log unreadable by imitating its other records."""
  monkeypatch.setattr(log_format, 'SEAL_INTERVAL', 5)
  for size in (1, 2, 4, 40):
    if os.path.exists(path):
      os.unlink(path)
    rounds = []
    with log_lib.RoundLog.create(path, make_header()) as log:
      for r in range(12):
        chain = np.frombuffer(bytes.fromhex(log.digest), np.uint8)
        chain = np.resize(chain if r % 2 else ~chain, (size, 1))
        if size == 1:  # the check byte is then the second byte of the chain
          continue
        rounds.append((np.arange(size), np.ones(size), chain))
        log.append(r, *rounds[-1])
    with log_lib.RoundLog.open(path) as log:
      assert_rounds(log, rounds, ONE_BYTE)
    with open(path, 'rb') as f:
      records, _ = parse_records(f.read(), 1)
    if size > 2:
      assert {record[2] for record in records} <= {2, 3}


@pytest.mark.parametrize('size', [0, 1])
def test_zero_records_can_be_told_from_a_zero_tail(path, no_fsync, size):
  rounds = [(range(size), [1] * size, np.zeros((size, 1), np.uint8))] * 2000
  data = write_log(path, rounds)
  records, _ = parse_records(data, 1)
  unusual = [at for at, _, tag, *_ in records if tag == 2]
  assert 1 <= len(unusual) <= 30  # one in 256 was expected to be all zeros
  for at, _, tag, *_ in records:
    assert tag == 3 or any(data[at + 1 : at + 2 + size])


@pytest.mark.parametrize('change', [b'\1', b'\2\3', b'\0' * 9])
def test_a_file_that_changes_while_open_is_noticed(path, no_fsync, change):
  write_log(path, make_rounds(ONE_BYTE, [3, 3, 3]))
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
    open_data(path, b'JAXFLLOG\x01' * with_magic + data)


@hypothesis.settings(FAST, max_examples=200)
@hypothesis.given(st.data())
def test_mutated_files_are_refused_or_shortened(tmp_path, no_fsync, data):
  path = str(tmp_path / 'mutated.log')
  if os.path.exists(path):
    os.unlink(path)
  rounds = make_rounds(TREE, [2, 2, 3, 0, 1])
  valid = write_log(path, rounds, TREE, reopen_at=(2,))
  start = data.draw(st.integers(0, len(valid)))
  stop = data.draw(st.integers(start, min(start + 12, len(valid))))
  mutated = valid[:start] + data.draw(st.binary(max_size=12)) + valid[stop:]
  with open(path, 'wb') as f:
    f.write(mutated)
  try:
    with log_lib.RoundLog.open(path) as log:
      assert_rounds(log, rounds[: log.num_rounds], TREE)
  except log_lib.LogCorruptError:
    pass


def _with_header(text, rest=b'', compress=zlib.compress):
  body = compress(
    text if isinstance(text, bytes) else json.dumps(text).encode()
  )
  block = b'JAXFLLOG\x01' + len(body).to_bytes(4, 'little') + body
  return block + hashlib.sha256(block).digest() + rest


FIELDS = {**vars(make_header()), 'config': {}}


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
    open_data(path, _with_header(text))
  assert e.value.round == -1


def test_headers_that_are_not_zlib(path):
  with pytest.raises(log_lib.LogCorruptError, match='zlib'):
    open_data(path, _with_header(FIELDS, compress=lambda x: x))
  more = lambda x: zlib.compress(x) + b'x'
  with pytest.raises(log_lib.LogCorruptError, match='followed by'):
    open_data(path, _with_header(FIELDS, compress=more))


def test_huge_sizes_allocate_nothing(path, warnings_of):
  fields = {**FIELDS, 'message': [['', 'float64', [2**39]]]}
  block = _with_header(fields)
  prefix = b'\2' + bytes(255 - c for c in block[-32:-29]) + b'\xff' * 6
  prefix += binascii.crc_hqx(prefix, 0xFFFF).to_bytes(2, 'little')
  tracemalloc.start()
  try:
    assert open_data(path, block + prefix) == []
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
  record += bytes([crc8(record) ^ chain[0]])
  if match is None:
    assert len(open_data(path, block + record)) == 1
  else:
    with pytest.raises(log_lib.LogCorruptError, match=match):
      open_data(path, block + record)


# Crashes.


def test_a_failed_write_leaves_the_log_as_it_was(path, monkeypatch):
  rounds = make_rounds(ONE_BYTE, [2, 2])
  with log_lib.RoundLog.create(path, make_header()) as log:
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
    assert_rounds(log, rounds, ONE_BYTE)


def test_an_interrupt_after_the_write_does_no_harm(path, monkeypatch, no_fsync):
  rounds = make_rounds(ONE_BYTE, [2, 2])

  def interrupt(*args):
    raise KeyboardInterrupt

  with log_lib.RoundLog.create(path, make_header()) as log:
    log.append(0, *rounds[0])
    monkeypatch.setattr(log, '_note', interrupt)
    with pytest.raises(KeyboardInterrupt):
      log.append(1, *rounds[1])
  with log_lib.RoundLog.open(path) as log:
    assert_rounds(log, rounds, ONE_BYTE)


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
