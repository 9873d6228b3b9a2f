"""A second reader of the log, and logs to try."""

import binascii
import hashlib
from typing import Any

import hypothesis
import jax
import numpy as np

from jaxfl import log as log_lib
from jaxfl import wire

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


def make_header(like: Any = ONE_BYTE, config=None):
  return log_lib.Header(
    base_digest=hashlib.sha256(b'weights').hexdigest(),
    config=config or {'lr': 0.1, 'layers': [1, 2], 'name': 'test'},
    params=[['w', 'float32', [3, 4]]],
    message=wire.describe(like),
  )


def make_messages(like, size, rng):
  def leaf(x):
    raw = rng.integers(0, 2 if x.dtype == bool else 100, (size, *x.shape))
    return raw.astype(x.dtype)

  return jax.tree.map(leaf, like)


def make_rounds(like, sizes, seed=0):
  """One round for each size; a size that repeats keeps its cohort."""
  rng, rounds, previous = np.random.default_rng(seed), [], None
  for size in sizes:
    if previous is None or len(previous[0]) != size:
      ids = np.sort(rng.choice(100_000, size, replace=False))
      weights = rng.integers(1, 500, size) if size % 2 else np.full(size, 3)
      previous = ids, weights
    rounds.append((*previous, make_messages(like, size, rng)))
  return rounds


def write_log(path, rounds, like: Any = ONE_BYTE, reopen_at=()):
  log = log_lib.RoundLog.create(path, make_header(like))
  for r, (ids, weights, messages) in enumerate(rounds):
    if r in reopen_at:
      log.close()
      log = log_lib.RoundLog.open(path, 'a')
    log.append(r, ids, weights, messages)
  log.close()
  with open(path, 'rb') as f:
    return f.read()


def crc8(data):
  crc = 0
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc << 1) ^ 0x107 if crc & 0x80 else crc << 1
  return crc


def parse_records(data, row_bytes):
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
    assert data[stop] == crc8(data[at:stop]) ^ chain[0]
    records.append((at, round, tag, ids, weights, data[start:stop]))
    chain = hashlib.sha256(chain + data[at : stop + 1]).digest()
    round, at = round + 1, stop + 1
  return records, chain


def assert_rounds(log, rounds, like):
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


def open_data(path, data):
  with open(path, 'wb') as f:
    f.write(data)
  with log_lib.RoundLog.open(path) as log:
    return [log.read(r) for r in range(log.num_rounds)]
