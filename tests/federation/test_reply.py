"""Whoever asks chooses where the answer goes: what a client can do with that.

In one account with the streams it can do anything that an answer can: the first
test shows it on a server with the same permissions and without the accounts. In
an account of its own it reaches its own subjects, and nothing else.
"""

import asyncio
import json

import nats
import pytest
from nats.js import api

from jaxfl.federation import direct, server, server_config, stream
from tests.federation.trial import NAMES, Trial, needs_server

pytestmark = needs_server
_UP, _LOG = NAMES.sent('up', 0), NAMES.log
_GET = f'$JS.API.DIRECT.GET.{NAMES.log_stream}'
_REQUESTS = (
  (_UP, b'a frame'),  # answered by the stream that stores it, in JSON
  (_GET, b'{"seq": 1}'),  # answered with a record
  (_GET, b'{"seq": 1000000}'),  # answered with nothing but headers
)
_ONE_ACCOUNT = """
jetstream {{ store_dir: "store" }}
authorization {{ users: [
  {{ user: "coordinator", password: "c" }}
  {{ user: "client", password: "c", permissions: {{
    publish: {{ allow: {allowed} }}, subscribe: {{ allow: ["_INBOX.>"] }}
  }} }}
] }}
"""


@pytest.fixture(scope='module')
def trial(tmp_path_factory):
  with Trial(tmp_path_factory.mktemp('trial')) as made:
    yield made


async def ask(nc, subject, data, reply, headers=None):
  await nc.publish(subject, data, reply=reply, headers=headers)
  await nc.flush()
  await asyncio.sleep(0.03)  # the server answers when it has stored


def test_in_one_account_a_client_could_do_anything(tmp_path):
  allowed = json.dumps(server_config.services(NAMES, 'client-0'))
  config = tmp_path / 'one.conf'
  config.write_text(_ONE_ACCOUNT.format(allowed=allowed))

  async def run(url):
    observer = await nats.connect(url, user='coordinator', password='c')
    nc = await nats.connect(url, user='client', password='c')
    js = observer.jetstream()
    for name, subjects in (
      (NAMES.up_stream, [f'{NAMES.run}.up.*']),
      (NAMES.log_stream, [_LOG]),
    ):
      await js.add_stream(name=name, subjects=subjects, allow_direct=True)
    await js.publish(_LOG, b'record 0')

    async def last(subject, name):
      return (await js.get_last_msg(name, subject)).data

    # not by the front door
    await ask(nc, _LOG, b'forged', None)
    assert await last(_LOG, NAMES.log_stream) == b'record 0'
    await ask(nc, _UP, b'a frame', _LOG)
    assert b'"stream"' in await last(_LOG, NAMES.log_stream)
    await ask(nc, _GET, b'{"seq": 1}', _LOG)
    assert await last(_LOG, NAMES.log_stream) == b'record 0'
    other = NAMES.sent('up', 1)
    await ask(nc, _GET, b'{"seq": 1}', other)
    assert await last(other, NAMES.up_stream) == b'record 0'
    await ask(
      nc, _GET, b'{"seq": 99}', f'$JS.API.STREAM.PURGE.{NAMES.up_stream}'
    )
    assert (await js.stream_info(NAMES.up_stream)).state.messages == 0
    await ask(
      nc, _GET, b'{"seq": 99}', f'$JS.API.STREAM.DELETE.{NAMES.log_stream}'
    )
    left = [info.config.name for info in await js.streams_info()]
    assert left == [NAMES.up_stream]
    await nc.close()
    await observer.close()

  with server.LocalServer(config) as running:
    asyncio.run(run(running.url))


@pytest.mark.parametrize(
  'reply',
  [
    _LOG,
    NAMES.note,
    NAMES.sent('up', 1),
    NAMES.sent('hello', 1),
    f'{NAMES.run}.trust',
    f'{NAMES.run}.live.{_LOG}',
    f'$KV.{NAMES.lease}.coordinator',
    f'$O.{NAMES.snapshots}.M.abc',
    f'$JS.API.STREAM.PURGE.{NAMES.up_stream}',
    f'$JS.API.STREAM.DELETE.{NAMES.log_stream}',
    f'$JS.API.CONSUMER.CREATE.{NAMES.log_stream}',
    '$JS.API.ACCOUNT.PURGE.run',  # for all in 2.9.10: CVE-2025-30215
    '_INBOX_1.x',
    '_INBOX_coordinator.x',
  ],
)
def test_an_answer_stays_in_the_clients_account(trial, reply):
  async def run():
    async with (
      trial.open('client-0') as nc,
      trial.open('client-1') as other,
      trial.open('coordinator') as observer,
    ):
      heard = []

      async def hear(message):
        heard.append(message)

      await other.subscribe('_INBOX_1.>', cb=hear)
      await other.subscribe(server_config.live(NAMES), cb=hear)
      await observer.subscribe('_INBOX_coordinator.x', cb=hear)
      await other.flush()
      await observer.flush()
      before = await trial.stored(observer)
      for subject, data in _REQUESTS:
        await ask(nc, subject, data, reply)
      after = await trial.stored(observer)
      # its own frame, and nothing else
      sequence, count = before.pop(NAMES.up_stream)
      assert after.pop(NAMES.up_stream) == (sequence + 1, count + 1)
      assert after == before
      last = await observer.jetstream().get_msg(NAMES.up_stream, sequence + 1)
      assert (last.subject, last.data) == (_UP, b'a frame')
      assert heard == []

  asyncio.run(run())


def test_answers_may_come_as_its_own_messages(trial):
  """What a reader of RUN_up has to take: anything at all, from its sender."""
  reply = NAMES.sent('hello', 0)

  async def run():
    async with (
      trial.open('client-0') as nc,
      trial.open('coordinator') as observer,
    ):
      js = observer.jetstream()
      start = (await js.stream_info(NAMES.up_stream)).state.last_seq
      for subject, data in _REQUESTS:
        await ask(nc, subject, data, reply)
      found = []
      for number in range(start + 1, start + 5):
        message = await js.get_msg(NAMES.up_stream, number)
        found.append((message.subject, message.data, message.headers))
      assert found[0] == (_UP, b'a frame', None)
      assert [subject for subject, _, _ in found[1:]] == [reply] * 3
      assert json.loads(found[1][1])['stream'] == NAMES.up_stream
      assert found[2][1] == b'record 0'
      assert found[2][2]['Nats-Subject'] == _LOG
      assert not found[3][1]  # headers, of which the status is one

  asyncio.run(run())


def test_no_headers_make_the_coordinator_stumble(trial):
  """A message that looks like the server's own word is a message."""
  headers = {'Status': '100', 'Nats-Last-Consumer': '7'}

  async def run():
    async with (
      trial.open('client-0') as nc,
      trial.open('coordinator') as coordinator,
    ):
      info = await coordinator.jetstream().stream_info(NAMES.up_stream)
      start = info.state.last_seq + 1
      async with stream.Reader(coordinator, NAMES.up_stream, start) as reader:
        for data in (b'before', b'', b'after'):
          sent = None if data else headers
          await nc.jetstream().publish(_UP, data, headers=sent)
        found = [await reader.next(5) for _ in range(3)]
        assert [m.data for m in found] == [b'before', b'', b'after']

  asyncio.run(run())


def test_a_client_can_take_the_message_ids_of_others(trial):
  """So nobody may count on `Nats-Msg-Id` in a stream of several writers."""
  headers = {api.Header.MSG_ID: '1:17'}

  async def run():
    async with trial.open('client-0') as nc, trial.open('client-1') as other:
      first = await nc.jetstream().publish(_UP, b'mine', headers=headers)
      assert not first.duplicate
      second = await other.jetstream().publish(
        NAMES.sent('up', 1), b'lost', headers=headers
      )
      assert second.duplicate

  asyncio.run(run())


def test_a_flood_pushes_out_nothing_but_its_own(trial):
  async def run():
    async with trial.open('client-0') as nc, trial.open('client-1') as other:
      await other.jetstream().publish(NAMES.sent('up', 1), b'kept')
      for _ in range(2 * stream.KEPT):
        await nc.publish(_UP, b'flood')
      await nc.jetstream().publish(_UP, b'the last')
      async with trial.open('coordinator') as observer:
        js = observer.jetstream()
        info = await js.stream_info(NAMES.up_stream, subjects_filter='>')
        counts = info.state.subjects or {}
        assert counts[_UP] == stream.KEPT
        kept = await js.get_last_msg(NAMES.up_stream, NAMES.sent('up', 1))
        assert kept.data == b'kept'

  asyncio.run(run())


def test_what_was_refused_is_not_heard(trial):
  """Readers listen to what was stored; of two coordinators one is too late."""

  async def run():
    async with (
      trial.open('client-0') as nc,
      trial.open('coordinator') as writer,
    ):
      js = writer.jetstream()
      last = (await js.get_last_msg(NAMES.log_stream, _LOG)).seq or 0
      async with direct.Reader(nc, NAMES, last) as reader:
        assert (await reader.next(5)).sequence == last
        expected = {'Nats-Expected-Last-Subject-Sequence': str(last - 1)}
        with pytest.raises(nats.js.errors.APIError):
          await js.publish(_LOG, b'too late', headers=expected)
        expected = {'Nats-Expected-Last-Subject-Sequence': str(last)}
        await js.publish(_LOG, b'in time', headers=expected)
        message = await reader.next(5)
        assert (message.data, message.sequence) == (b'in time', last + 1)

  asyncio.run(run())
