"""Reading without consumers: in order, over gaps and a crash; snapshots."""

import asyncio
import os

import pytest

from jaxfl.federation import direct, snapshots
from tests.federation.trial import NAMES, Trial, needs_server, until

pytestmark = needs_server


@pytest.fixture(scope='module')
def trial(tmp_path_factory):
  with Trial(tmp_path_factory.mktemp('trial')) as made:
    yield made


async def take(reader, count):
  messages = [await reader.next(5) for _ in range(count)]
  return [(m.subject, m.data, m.sequence) for m in messages]


def record(number):
  return (NAMES.log, b'record %d' % (number - 1), number)


def test_old_and_new_messages_once_and_in_order(tmp_path):
  async def run(trial):
    async with (
      trial.open('client-0') as nc,
      trial.open('coordinator') as writer,
    ):
      js = writer.jetstream()
      for number in range(4, 50):
        await js.publish(NAMES.log, b'record %d' % (number - 1))
      async with direct.Reader(nc, NAMES) as reader:
        assert await take(reader, 49) == [record(n) for n in range(1, 50)]
        assert reader.start == 50
        assert await reader.next(0) is None
        headers = {'r': '7'}
        await js.publish(NAMES.note, b'note', headers=headers)
        note = await reader.next(5)
        assert (note.subject, note.sequence) == (NAMES.note, 50)
        assert note.headers['r'] == '7'
        # what the line loses is asked for
        await js.publish(NAMES.log, b'record 50')
        await nc.flush()
        await until(lambda: reader._sub.pending_msgs == 1)
        await reader._sub.next_msg(1)
        await js.publish(NAMES.log, b'record 51')
        assert await take(reader, 2) == [record(51), record(52)]
      async with direct.Reader(nc, NAMES, 30) as reader:
        assert await take(reader, 1) == [record(30)]

  with Trial(tmp_path) as trial:
    asyncio.run(run(trial))


def test_a_crash_of_the_server_leaves_no_gap(tmp_path):
  async def run(trial):
    async with (
      trial.open('client-0') as nc,
      trial.open('coordinator') as writer,
      direct.Reader(nc, NAMES) as reader,
    ):
      assert await take(reader, 3) == [record(n) for n in (1, 2, 3)]
      trial.server.kill()
      await until(lambda: not (writer.is_connected or nc.is_connected))
      waiting = asyncio.ensure_future(take(reader, 1))
      trial.server.start()
      await until(lambda: writer.is_connected)
      await writer.jetstream().publish(NAMES.log, b'record 3')
      assert await waiting == [record(4)]

  with Trial(tmp_path) as trial:
    asyncio.run(run(trial))


def test_silence_is_not_trusted_for_ever(trial, monkeypatch):
  """A lost message, and no other after it."""
  monkeypatch.setattr(direct, 'POLL_S', 0.1)

  async def run():
    async with (
      trial.open('client-0') as nc,
      trial.open('coordinator') as writer,
    ):
      js = writer.jetstream()
      last = (await js.stream_info(NAMES.log_stream)).state.last_seq
      async with direct.Reader(nc, NAMES, last + 1) as reader:
        assert await reader.next(0) is None
        await reader._sub.unsubscribe()
        reader._sub = await nc.subscribe('_INBOX_0.silence')
        await js.publish(NAMES.log, b'unheard')
        assert (await reader.next(5)).data == b'unheard'

  asyncio.run(run())


def test_snapshots_are_those_of_the_librarys_object_store(trial):
  data = os.urandom(300_007)

  async def run():
    async with (
      trial.open('client-0') as nc,
      trial.open('keeper') as keeper,
      trial.open('coordinator') as coordinator,
    ):
      store = await coordinator.jetstream().object_store(NAMES.snapshots)
      reads = snapshots.Snapshots(nc, NAMES)
      writes = snapshots.Snapshots(keeper, NAMES)
      await writes.put('10-abc', data)
      await store.put('11-def', data[:7])
      assert await reads.list() == ['10-abc', '11-def']
      assert await reads.get('10-abc', len(data)) == data
      assert await reads.get('11-def', 7) == data[:7]
      assert (await store.get('10-abc')).data == data
      with pytest.raises(ValueError, match='has 300007 bytes'):
        await reads.get('10-abc', len(data) - 1)
      await writes.delete('10-abc')
      assert await reads.list() == ['11-def']
      with pytest.raises(ValueError, match='there is no snapshot 10-abc'):
        await reads.get('10-abc', len(data))
      info = await coordinator.jetstream().stream_info(f'OBJ_{NAMES.snapshots}')
      assert info.state.bytes < 2000  # its chunks are gone
      await store.delete('11-def')
      assert await reads.list() == []

  asyncio.run(run())


def test_a_damaged_snapshot_is_refused(trial):
  async def run():
    async with (
      trial.open('keeper') as keeper,
      trial.open('coordinator') as coordinator,
    ):
      kept = snapshots.Snapshots(keeper, NAMES)
      await kept.put('12-abc', b'12345')
      js = coordinator.jetstream()
      stream = f'OBJ_{NAMES.snapshots}'
      chunks = f'$O.{NAMES.snapshots}.C.*'
      chunk = None
      start = 1
      while (
        found := await direct.get(keeper, stream, start, chunks)
      ) is not None:
        chunk, start = found, found.sequence + 1
      assert chunk is not None
      await js.publish(chunk.subject, b'54321', headers={'Nats-Rollup': 'sub'})
      with pytest.raises(ValueError, match='12-abc is damaged'):
        await kept.get('12-abc', 100)
      await js.publish(f'$O.{NAMES.snapshots}.M.abc', b'{}')  # no description
      assert await kept.list() == ['12-abc']

  asyncio.run(run())
