"""What each user may do, on a real server; what is denied stores nothing."""

import asyncio
import base64
import json

import nats.errors
import nats.js.errors
import pytest

from jaxfl.federation import connect
from jaxfl.federation.provision import Credentials
from tests.federation.trial import (
  MAX_MESSAGE,
  NAMES,
  Trial,
  needs_server,
  until,
)

pytestmark = needs_server
_MAX = 4096
_GET = '$JS.API.DIRECT.GET'
_OBJECTS = f'OBJ_{NAMES.snapshots}'


@pytest.fixture(scope='module')
def trial(tmp_path_factory):
  directory = tmp_path_factory.mktemp('trial')
  with Trial(directory, max_payload=_MAX) as made:
    yield made


def sent(kind, client):
  return NAMES.sent(kind, client)


# publishing: user, subject, and the stream that has it then
MAY = [
  ('client-0', sent('up', 0), NAMES.up_stream),
  ('client-0', sent('hello', 0), NAMES.up_stream),
  ('client-0', sent('digest', 0), NAMES.up_stream),
  ('client-1', sent('up', 1), NAMES.up_stream),
  ('keeper', 'trial.trust', 'trial_up'),
  ('keeper', f'$O.{NAMES.snapshots}.C.abc', _OBJECTS),
  ('keeper', f'$O.{NAMES.snapshots}.M.abc', _OBJECTS),
  ('coordinator', NAMES.log, NAMES.log_stream),
  ('coordinator', NAMES.note, NAMES.log_stream),
  ('coordinator', f'$KV.{NAMES.lease}.coordinator', f'KV_{NAMES.lease}'),
]
API = [
  f'STREAM.{what}.{stream}'
  for stream in (NAMES.up_stream, NAMES.log_stream, _OBJECTS)
  for what in ('CREATE', 'UPDATE', 'DELETE', 'PURGE', 'MSG.DELETE', 'MSG.GET')
] + [
  'STREAM.CREATE.more',
  f'CONSUMER.CREATE.{NAMES.log_stream}',
  f'CONSUMER.CREATE.{NAMES.log_stream}.one',
  f'CONSUMER.DURABLE.CREATE.{NAMES.log_stream}.one',
  f'CONSUMER.CREATE.{_OBJECTS}',
  f'CONSUMER.CREATE.{NAMES.up_stream}',
  f'DIRECT.GET.{NAMES.up_stream}',
  f'DIRECT.GET.KV_{NAMES.lease}',
  'INFO',
  'ACCOUNT.PURGE.run',
]  # fmt: skip
MAY_NOT = [
  *(f'$JS.API.{request}' for request in API),
  NAMES.log,
  NAMES.note,
  f'{NAMES.run}.live.{NAMES.log}',
  f'$KV.{NAMES.lease}.coordinator',
  '$SYS.REQ.SERVER.PING',
  '_INBOX_1.x',
  '_INBOX_coordinator.x',
]
CLIENT_MAY_NOT = [
  *(sent(kind, 1) for kind in ('up', 'hello', 'digest')),
  f'{NAMES.run}.trust',
  f'$O.{NAMES.snapshots}.C.abc',
  f'$O.{NAMES.snapshots}.M.abc',
]


@pytest.mark.parametrize(('user', 'subject', 'stream'), MAY)
def test_allowed(trial, user, subject, stream):
  async def run():
    async with trial.open(user) as nc:
      assert (await nc.jetstream().publish(subject, b'data')).stream == stream

  asyncio.run(run())


@pytest.mark.parametrize('user', ['client-0', 'keeper'])
def test_a_denied_publish_stores_nothing(trial, user):
  subjects = [*MAY_NOT, *(CLIENT_MAY_NOT if user == 'client-0' else [])]
  subjects += [sent('up', 0)] if user == 'keeper' else []

  async def run():
    async with trial.open(user) as nc, trial.open('coordinator') as observer:
      before = await trial.stored(observer)
      assert len(before) == 4
      for subject in subjects:
        nc._err = None
        await nc.publish(subject, b'{}')
        await nc.flush()
        await until(lambda: nc.last_error)
        said = str(nc.last_error)
        assert 'permissions violation for publish' in said, subject
        assert subject.lower() in said
      assert await trial.stored(observer) == before
      consumers = await observer.jetstream().consumers_info(NAMES.log_stream)
      assert consumers == []

  asyncio.run(run())


@pytest.mark.parametrize(
  'subject',
  ['>', '*', NAMES.log, sent('up', '*'), '_INBOX_1.>', '_INBOX.>', '$JS.>'],
)
def test_a_client_hears_its_answers_and_the_log_only(trial, subject):
  async def run():
    async with trial.open('client-0') as nc:
      await nc.subscribe('_INBOX_0.>')
      await nc.subscribe(f'{NAMES.run}.live.>')
      await nc.flush()
      assert nc.last_error is None
      await nc.subscribe(subject)
      await nc.flush()
      await until(lambda: nc.last_error)
      said = str(nc.last_error)
      assert 'permissions violation for subscription' in said

  asyncio.run(run())


def test_reading_is_by_number_or_subject(trial):
  async def run():
    async with trial.open('client-0') as nc:
      ask = lambda subject, **fields: nc.request(
        subject, json.dumps(fields).encode() if fields else b'', timeout=5
      )
      first = await ask(f'{_GET}.{NAMES.log_stream}', seq=1)
      assert first.data == b'record 0'
      last = await ask(f'{_GET}.{NAMES.log_stream}.{NAMES.log}')
      assert int(last.headers['Nats-Sequence']) >= 3
      name = base64.urlsafe_b64encode(b'none').decode()
      none = await ask(f'{_GET}.{_OBJECTS}.$O.{NAMES.snapshots}.M.{name}')
      assert none.headers['Status'] == '404'

  asyncio.run(run())


def test_what_is_too_long_is_refused(trial):
  subject = sent('up', 0)

  async def polite():
    async with trial.open('client-0') as nc:
      assert nc.max_payload == _MAX
      await nc.jetstream().publish(subject, bytes(MAX_MESSAGE - 100))
      with pytest.raises(nats.js.errors.APIError):
        await nc.jetstream().publish(subject, bytes(MAX_MESSAGE + 1))
      with pytest.raises(nats.errors.MaxPayloadError):
        await nc.publish(subject, bytes(_MAX + 1))

  async def rude():
    async with trial.open('coordinator') as observer:
      before = await trial.stored(observer)
      async with trial.open('client-0') as nc:
        nc._max_payload = 2 * _MAX
        await nc.publish(subject, bytes(_MAX + 1))
        await until(lambda: 'payload' in str(nc.last_error).lower())
      assert await trial.stored(observer) == before

  asyncio.run(polite())
  asyncio.run(rude())


def test_users_are_who_they_are(trial):
  """The inbox prefix in the file is no permission: the key is."""
  own = Credentials.from_file(trial.made.credentials('client-0'))

  async def run():
    nc = connect._Client()
    await nc.connect(
      trial.server.url,
      tls=connect._context(own, ''),
      nkeys_seed_str=own.seed,
      inbox_prefix='_INBOX_1',
    )
    with pytest.raises(nats.errors.TimeoutError):
      await nc.request(f'{_GET}.{NAMES.log_stream}', b'{"seq":1}', timeout=0.3)
    assert 'permissions violation' in str(nc.last_error)
    await nc.close()

  asyncio.run(run())
