"""The log as messages: the file's bytes, and nothing else is taken."""

import numpy as np
import pytest

from jaxfl import log, log_format, wire
from jaxfl.federation import handshake, records

LIKE = np.zeros(3, np.uint8)
HEADER = log.Header(
  base_digest='0' * 64,
  config={'method': 'x', 'mu': 1e-3},
  params=[['w', 'float32', [2, 3]]],
  message=wire.describe(LIKE),
)
BLOCK = log_format.encode_header(HEADER)


def rounds(count, seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(count):
    ids = np.flatnonzero(rng.random(5) < 0.6).astype(np.int32)
    rows = rng.integers(0, 256, (len(ids), 3)).astype(np.uint8)
    yield ids, np.ones(len(ids), np.float32), rows


def written(count):
  """Records with their headers, of one tail."""
  tail, found = records.Tail(BLOCK), []
  for ids, weights, rows in rounds(count):
    made = tail.write(ids, weights, rows.tobytes())
    assert tail.take(*made) is not None
    found.append(made)
  return found, tail


def test_records_are_those_of_the_file(tmp_path):
  """Also past the seals, which only the file has."""
  made, tail = written(150)
  with log.RoundLog.create(tmp_path / 'rounds.log', HEADER) as live:
    for number, (ids, weights, rows) in enumerate(rounds(150)):
      live.append(number, ids, weights, rows)
    assert live.digest == tail.chain
  data = (tmp_path / 'rounds.log').read_bytes()
  assert data.startswith(BLOCK)
  assert all(record in data for record, _ in made)


def test_messages_come_back():
  made, _ = written(20)
  tail = records.Tail(BLOCK)
  for (record, headers), (ids, _, rows) in zip(made, rounds(20), strict=True):
    found = tail.take(record, headers)
    np.testing.assert_array_equal(found.ids, ids)
    messages = found.messages(HEADER.message, LIKE)
    np.testing.assert_array_equal(messages, rows)


def test_nothing_but_the_next_record_is_taken():
  made, _ = written(10)
  tail = records.Tail(BLOCK)
  for record, headers in made[:5]:
    tail.take(record, headers)
  record, headers = made[5]
  old, old_headers = made[4]
  wrong = [
    (old, old_headers),  # repeated
    (old, headers),  # repeated under a new number
    made[6],  # too early
    (record, None),
    (record, {'r': '5'}),
    (record, headers | {'c': '0' * 16}),
    (record + b'\0', headers),
    (record[:-1], headers),
    (b'', headers),
    (b'{"type":"answer of the server"}', headers),
    (BLOCK, headers),
    (bytes([log_format.SEAL]) + bytes.fromhex(tail.chain), headers),
  ]
  wrong += [
    (record[:i] + bytes([record[i] ^ 1]) + record[i + 1 :], headers)
    for i in range(len(record))
  ]
  for data, said in wrong:
    assert tail.take(data, said) is None
  assert tail.round == 5
  assert tail.take(record, headers) is not None
  assert tail.round == 6


def test_headers():
  assert records.read_header(BLOCK) == HEADER
  for data in (b'', BLOCK[:-1], BLOCK + b'x', b'{"type": "answer"}'):
    with pytest.raises(ValueError):
      records.read_header(data)
  with pytest.raises(ValueError, match='are not 2 messages'):
    records.Tail(BLOCK).write([0, 1], [1, 1], b'123')


def test_what_differs_is_named():
  shared = frozenset({'mu', 'method'})
  assert handshake.difference(HEADER, HEADER, shared) is None
  change = lambda **fields: log.Header(**vars(HEADER) | fields)
  for other, text in (
    (change(config={'method': 'x', 'mu': 2e-3}), 'mu is 0.001 in the run and'),
    (change(params=[['w', 'float32', [2, 4]]]), r"parameter 'w' is float32\[2"),
    (change(params=[]), "parameter 'w' is .* and missing here"),
    (change(base_digest='1' * 64), 'base weights have the digest 1111'),
    (change(spec='other/2'), 'seed contract'),
    (change(message=[['', 'int8', [3]]]), "message '' is uint8"),
  ):
    found = handshake.difference(HEADER, other, shared)
    assert found is not None
    with pytest.raises(AssertionError, match=text):
      raise AssertionError(found)
  passports = [
    handshake.passport(h, {'distribution': 'rademacher'})
    for h in (HEADER, HEADER, change(params=[]))
  ]
  assert passports[0] == passports[1]
  assert handshake.compare(handshake.encode(passports[2]), passports[0]) == (
    f'params differs: the run has {passports[0]["params"]}, the client'
    f' {passports[2]["params"]!r}'
  )
  assert handshake.draws('rademacher') != handshake.draws('gaussian')
