"""Files of `jaxfl.federation.provision`; no server."""

import json
import stat

import pytest
from cryptography import x509

from experiments.config import UsageError
from experiments.federation import provisioning
from jaxfl.federation import provision, server_config
from jaxfl.federation.provision import Credentials


def read_all(directory):
  return {
    path.relative_to(directory): path.read_bytes()
    for path in directory.rglob('*')
    if path.is_file()
  }


def keys(directory):
  return json.loads((directory / 'provision.json').read_text())['keys']


def config(directory):
  return (directory / 'server' / 'server.conf').read_text()


def test_what_is_secret_is_for_the_owner_alone(tmp_path):
  made = provision.provision(tmp_path, 'run', 2, ['fed.example.org'])
  assert made.users == ['coordinator', 'keeper', 'client-0', 'client-1']
  secret = [
    *made.written,
    tmp_path / 'ca-key.pem',
    made.server / 'server-key.pem',
  ]
  assert made.written == [made.credentials(user) for user in made.users]
  for path in secret:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
  credentials = [Credentials.from_file(path) for path in made.written]
  assert [c.user for c in credentials] == made.users
  assert credentials[3].inbox_prefix == '_INBOX_1'
  assert credentials[0].inbox_prefix == '_INBOX_coordinator'
  seeds = {c.seed for c in credentials}
  assert len(seeds) == 4
  public = b''.join(
    data for path, data in read_all(tmp_path).items()
    if tmp_path / path not in secret
  )  # fmt: skip
  assert not any(seed.encode() in public for seed in seeds)
  assert b'PRIVATE' not in public
  # a key that is given out is the key that the server knows
  for user, key in keys(tmp_path).items():
    assert key[0] == 'U', user
    assert key in config(tmp_path), user


def test_more_clients_leave_the_others_alone(tmp_path):
  provision.provision(tmp_path, 'run', 1)
  (tmp_path / 'credentials' / 'client-0.json').unlink()  # it is at its site
  before, known = read_all(tmp_path), keys(tmp_path)
  made = provision.provision(tmp_path, 'run', 3)
  assert made.written == [made.credentials(f'client-{i}') for i in (1, 2)]
  assert not made.new_certificate
  after = read_all(tmp_path)
  changed = {str(p) for p in before if before[p] != after[p]}
  assert changed == {'provision.json', 'server/server.conf'}
  assert known.items() <= keys(tmp_path).items()
  # fewer clients take nothing away, and the same again changes nothing
  provision.provision(tmp_path, 'run', 1)
  assert read_all(tmp_path) == after


def test_a_lost_credential_is_revoked_or_renewed(tmp_path):
  provision.provision(tmp_path, 'run', 3)
  before = keys(tmp_path)
  made = provision.provision(
    tmp_path, 'run', 3, revoke=['client-0'], renew=['client-1']
  )
  assert made.revoked == ['client-0']
  assert made.written == [made.credentials('client-1')]
  assert not made.credentials('client-0').exists()
  text = config(tmp_path)
  assert before['client-0'] not in text
  assert before['client-1'] not in text
  assert before['client-2'] in text
  # it stays so
  assert provision.provision(tmp_path, 'run', 4).revoked == ['client-0']
  assert not made.credentials('client-0').exists()
  made = provision.provision(tmp_path, 'run', 4, renew=['client-0'])
  assert made.revoked == []
  assert keys(tmp_path)['client-0'] not in (None, before['client-0'])


def test_other_hosts_get_another_certificate_of_the_same_authority(tmp_path):
  def names():
    pem = (tmp_path / 'server' / 'server-cert.pem').read_bytes()
    certificate = x509.load_pem_x509_certificate(pem)
    authority = x509.load_pem_x509_certificate(ca)
    certificate.verify_directly_issued_by(authority)
    found = certificate.extensions.get_extension_for_class(
      x509.SubjectAlternativeName
    ).value
    return [str(name.value) for name in found]

  provision.provision(tmp_path, 'run', 1, ['a.example.org', '192.0.2.7'])
  ca = (tmp_path / 'ca.pem').read_bytes()
  assert names() == ['a.example.org', '192.0.2.7', 'localhost', '127.0.0.1']
  made = provision.provision(tmp_path, 'run', 1, ['b.example.org'])
  assert made.new_certificate
  assert (tmp_path / 'ca.pem').read_bytes() == ca
  assert names() == ['b.example.org', 'localhost', '127.0.0.1']
  made = provision.provision(tmp_path, 'run', 2)  # who says none, keeps them
  assert not made.new_certificate
  assert names() == ['b.example.org', 'localhost', '127.0.0.1']


def test_settings_are_in_the_configuration(tmp_path):
  settings = provision.Settings(port=4333, max_payload=12345, max_store=678901)
  provision.provision(tmp_path, 'run', 1, settings=settings)
  text = config(tmp_path)
  for line in (
    'listen: "0.0.0.0:4333"',
    'max_payload: 12345',
    'max_file: 678901',
    'store_dir: "store"',
    'tls {',
  ):
    assert line in text
  assert 'http' not in text
  settings = provision.Settings(monitor_port=8222)
  provision.provision(tmp_path, 'run', 1, settings=settings)
  assert 'http: "127.0.0.1:8222"' in config(tmp_path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'run': 'a.b'}, 'run must be'),
    ({'run': 'other'}, "is of the run 'run', not 'other'"),
    ({'num_clients': 0}, 'num_clients must be in'),
    ({'revoke': ['client-9']}, 'got client-9'),
    ({'renew': ['nobody']}, 'got nobody'),
    ({'revoke': ['coordinator']}, 'coordinator can only be renewed'),
    ({'hosts': ['no host']}, 'hosts'),
  ],
)
def test_bad_arguments_are_named(tmp_path, change, message):
  provision.provision(tmp_path, 'run', 1)
  before = read_all(tmp_path)
  arguments = {'run': 'run', 'num_clients': 1, **change}
  with pytest.raises(ValueError, match=message):
    provision.provision(tmp_path, **arguments)
  assert read_all(tmp_path) == before


@pytest.mark.parametrize('name', ['port', 'max_payload', 'max_store'])
def test_bad_settings_are_named(name):
  with pytest.raises(ValueError, match=name):
    server_config.Settings(**{name: 0})


@pytest.mark.parametrize('text', ['', '[]', '{"run": "r"}', None])
def test_a_file_that_is_no_credential_is_refused(tmp_path, text):
  path = tmp_path / 'x.json'
  if text is not None:
    path.write_text(text)
  with pytest.raises(ValueError, match='--credentials: .*x.json'):
    Credentials.from_file(path)


@pytest.mark.parametrize('seed', ['', 'SU', 'SUAB', 'x' * 58, 'ü'])
def test_a_damaged_seed_is_refused(tmp_path, seed):
  made = provision.provision(tmp_path, 'run', 1)
  path = made.credentials('client-0')
  fields = json.loads(path.read_text())
  path.write_text(json.dumps({**fields, 'seed': seed}))
  with pytest.raises(ValueError, match='client-0.json: seed is no key'):
    Credentials.from_file(path)


def test_the_command_says_what_to_do_next(tmp_path, capsys):
  made = provisioning.provision_main(tmp_path, 'run', 2, ['fed.example.org'])
  said = capsys.readouterr().out
  for part in (
    str(made.credentials('client-1')),
    'nats-server -c server.conf',
    '--server=tls://fed.example.org:4222',
  ):
    assert part in said
  with pytest.raises(UsageError, match='num_clients'):
    provisioning.provision_main(tmp_path, 'run', -1)
