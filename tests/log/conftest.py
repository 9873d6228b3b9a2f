"""Fixtures of the log tests."""

import os

import pytest

from jaxfl import log as log_lib
from jaxfl import log_format, wire
from tests.log.tools import (
  ONE_BYTE,
  TREE,
  make_rounds,
  parse_records,
  write_log,
)


@pytest.fixture
def path(tmp_path):
  return str(tmp_path / 'run.log')


@pytest.fixture
def no_fsync(monkeypatch):
  monkeypatch.setattr(os, 'fsync', lambda fd: None)


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
  data = write_log(
    original, make_rounds(like, sizes), like, reopen_at=(1, 4, 6, 10)
  )
  records, _ = parse_records(data, wire.payload_bytes(wire.describe(like)))
  assert [r[2] for r in records].count(3) == 6
  assert {r[2] for r in records} == {1, 2, 3}
  return data, records
