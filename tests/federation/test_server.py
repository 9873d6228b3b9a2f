"""A real server: TLS, keys, errors that say what is wrong, and a crash."""

import asyncio
import dataclasses
import socket

import nats
import nats.errors
import pytest

from jaxfl.federation import connect, direct, provision, server
from jaxfl.federation.provision import Credentials
from tests.federation.trial import NAMES, Trial, needs_server, until


@pytest.fixture(scope='module')
def trial(tmp_path_factory):
  with Trial(tmp_path_factory.mktemp('trial')) as made:
    yield made


def refused(credentials, url):
  with pytest.raises(connect.ConnectError) as caught:
    asyncio.run(connect.connect(credentials, url))
  return str(caught.value)


def test_a_missing_server_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.setattr(server, '_SBIN', '')
  with pytest.raises(FileNotFoundError, match='apt-get install nats-server'):
    server.LocalServer(tmp_path)


@needs_server
def test_a_server_that_does_not_start_says_why(tmp_path):
  (tmp_path / 'server.conf').write_text('include "nowhere.conf"')
  with pytest.raises(RuntimeError, match='(?s)did not start.*nowhere'):
    server.LocalServer(tmp_path).start()


@needs_server
def test_an_open_server_takes_everybody_on_this_machine(tmp_path):
  async def talk(url):
    nc = await connect.connect(None, url)
    js = nc.jetstream()
    await js.add_stream(name='s', subjects=['s'])
    assert (await js.publish('s', b'1')).seq == 1
    await nc.close()

  with server.LocalServer(tmp_path) as running:
    asyncio.run(talk(running.url))
    port, pid = running.port, running.pid
    assert pid is not None
  assert running.pid is None
  with pytest.raises(ConnectionRefusedError):
    socket.create_connection(('127.0.0.1', port), 1)


@needs_server
def test_plain_text_is_refused(trial):
  """Of one that speaks the protocol, and leaves out TLS."""
  with socket.create_connection(('127.0.0.1', trial.server.port), 5) as line:
    greeting = line.makefile('rb').readline()
    assert b'"tls_required":true' in greeting
    assert b'"auth_required":true' in greeting
    line.sendall(b'CONNECT {"verbose":true}\r\nPING\r\n')
    try:
      answer = line.recv(1000)
    except ConnectionResetError:
      answer = b''
    assert b'OK' not in answer
    assert b'PONG' not in answer


@needs_server
@pytest.mark.parametrize('scheme', ['tls', 'nats'])
def test_a_credential_and_an_encrypted_line_are_enough(trial, scheme):
  async def run():
    path = trial.made.credentials('client-0')
    url = f'{scheme}://localhost:{trial.server.port}'
    nc = await connect.connect(path, url)
    line = nc._transport._io_writer.get_extra_info('ssl_object')
    assert line.version() in ('TLSv1.2', 'TLSv1.3')
    await nc.close()

  asyncio.run(run())


@needs_server
def test_nobody_is_let_in_without_a_key(trial):
  said = refused(None, trial.server.url)
  assert 'takes nobody without --credentials' in said

  async def anonymous():
    own = Credentials.from_file(trial.made.credentials('client-0'))
    context = connect.ssl.create_default_context(cadata=own.ca)
    await nats.connect(trial.server.url, tls=context, allow_reconnect=False)

  with pytest.raises(nats.errors.Error, match='Authorization Violation'):
    asyncio.run(anonymous())


@needs_server
def test_a_wrong_key_is_refused(trial, tmp_path):
  other = provision.provision(tmp_path, NAMES.run, 1)
  good = Credentials.from_file(trial.made.credentials('client-0'))
  wrong = Credentials.from_file(other.credentials('client-0'))
  path = tmp_path / 'wrong.json'
  dataclasses.replace(good, seed=wrong.seed).to_file(path)
  said = refused(path, trial.server.url)
  assert 'does not take the key in --credentials' in said
  assert str(path) in said


@needs_server
def test_another_authority_is_refused(trial, tmp_path):
  other = provision.provision(tmp_path, NAMES.run, 1)
  said = refused(other.credentials('client-0'), trial.server.url)
  assert 'no certificate of the authority in --credentials' in said


@needs_server
def test_a_server_without_tls_never_hears_who_asks(trial, tmp_path):
  """As if somebody on the way had said that there is none."""
  with server.LocalServer(tmp_path) as plain:
    said = refused(trial.made.credentials('client-0'), plain.url)
  assert 'offers no TLS' in said


@needs_server
def test_a_name_that_is_not_in_the_certificate_is_refused(trial, monkeypatch):
  url = trial.server.url.replace('127.0.0.1', 'elsewhere.example.org')
  lookup = socket.getaddrinfo

  def local(host, *args, **kwargs):
    host = '127.0.0.1' if host == 'elsewhere.example.org' else host
    return lookup(host, *args, **kwargs)

  monkeypatch.setattr(socket, 'getaddrinfo', local)
  said = refused(trial.made.credentials('client-0'), url)
  assert 'its certificate is for other hosts; give --server one of' in said


@needs_server
def test_no_server_and_no_host(trial):
  path = trial.made.credentials('client-0')
  closed = server._free_port()
  said = refused(path, f'nats://127.0.0.1:{closed}')
  assert said.startswith(f'--server: 127.0.0.1:{closed}')
  assert 'is nats-server running there?' in said
  assert 'no such host' in refused(path, 'nats://nowhere.invalid:4222')


@pytest.mark.parametrize(
  'url',
  ['127.0.0.1:4222', 'http://h:1', 'nats://h', 'nats://u@h:1', 'nats://h:x'],
)
def test_a_wrong_address_is_named(url):
  with pytest.raises(ValueError, match='--server must be tls://HOST:PORT'):
    asyncio.run(connect.connect(None, url))


def test_another_machine_needs_credentials():
  with pytest.raises(ValueError, match='--credentials'):
    asyncio.run(connect.connect(None, 'nats://fed.example.org:4222'))


@needs_server
def test_a_crash_loses_nothing_and_clients_come_back(tmp_path):
  async def run(trial):
    events = []

    async def lost():
      events.append('lost')

    async def back():
      events.append('back')

    subject = NAMES.sent('up', 0)
    async with (
      trial.open('client-0', disconnected=lost, reconnected=back) as client,
      trial.open('coordinator') as coordinator,
    ):
      js = client.jetstream()
      for number in range(20):
        await js.publish(subject, b'%d' % number)
      trial.server.kill()
      await until(lambda: events == ['lost'])
      trial.server.start()
      await until(lambda: client.is_connected and coordinator.is_connected)
      assert events == ['lost', 'back']
      reader = coordinator.jetstream()
      for number in range(20):
        message = await reader.get_msg(NAMES.up_stream, number + 1)
        assert message.data == b'%d' % number
      assert (await js.publish(subject, b'more')).seq == 21

  with Trial(tmp_path) as trial:
    asyncio.run(run(trial))


@needs_server
def test_a_revoked_client_is_cut_off_and_a_new_one_let_in(tmp_path):
  async def run(trial):
    async with trial.open('client-0') as revoked, trial.open('client-1') as old:
      provision.provision(
        tmp_path, NAMES.run, 3, settings=trial.settings, revoke=['client-0']
      )
      trial.server.reload()
      await until(lambda: not revoked.is_connected)
      await until(lambda: 'Authorization' in str(revoked.last_error))
      assert not revoked.is_connected
      await old.jetstream().publish(NAMES.sent('up', 1), b'still here')
      trial.server.stop()
      trial.server.start()
      async with trial.open('client-2') as new:
        await new.jetstream().publish(NAMES.sent('up', 2), b'here too')
        first = await direct.get(new, NAMES.log_stream, 1)
        assert first is not None
        assert first.data == b'record 0'
      await until(lambda: old.is_connected)

  with Trial(tmp_path) as trial:
    asyncio.run(run(trial))


def test_a_server_outside_of_the_path_is_found(tmp_path, monkeypatch):
  program = tmp_path / 'nats-server'
  program.touch(mode=0o755)
  monkeypatch.setenv('PATH', '/nowhere')
  monkeypatch.setattr(server, '_SBIN', str(tmp_path))
  assert server.find() == str(program)
