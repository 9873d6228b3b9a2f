"""Keys, certificates and the server's configuration of a run.

    DIR/server/        goes to the machine of the server: `server.conf`, its
                       certificate and the certificate's key
    DIR/credentials/   one file for everybody who connects, with a secret seed
    DIR/ca-key.pem     secret, stays here: signs server certificates
    DIR/ca.pem         its certificate, also in every credential
    DIR/provision.json what was given out: public keys only

Whoever runs it again with more clients gets files for the new ones; the others'
stay as they are, and need not be here any more.
"""

import dataclasses
import json
import os
import pathlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import nkeys

from jaxfl.federation import certificates, server_config
from jaxfl.federation.names import Names
from jaxfl.federation.server_config import COORDINATOR, KEEPER, Settings, client

_STATE = 'provision.json'
_LOOPBACK = ('localhost', '127.0.0.1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
  """What a process needs to connect; `to_file`'s JSON has these fields.

  Attributes:
    run: name of the run.
    user: coordinator, keeper or client-ID.
    seed: of its key; secret.
    inbox_prefix: the only subjects on which it may receive answers.
    ca: certificate of the authority that signed the server's, PEM.
  """

  run: str
  user: str
  seed: str
  inbox_prefix: str
  ca: str

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> 'Credentials':
    """Raises ValueError if the file is not there or no credential."""
    try:
      fields = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
      raise ValueError(f'--credentials: {path}: {error}') from error
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or fields.keys() != names:
      raise ValueError(
        f'--credentials: {path} must be a file of --role=provision, with the'
        f' fields {", ".join(sorted(names))}'
      )
    if not all(isinstance(value, str) for value in fields.values()):
      raise ValueError(f'--credentials: {path}: all fields must be texts')
    try:
      nkeys.from_seed(bytearray(fields['seed'].encode()))
    except (nkeys.NkeysError, ValueError) as error:
      raise ValueError(f'--credentials: {path}: seed is no key') from error
    return cls(**fields)

  def to_file(self, path: str | os.PathLike) -> None:
    """Writes a file that only its owner can read."""
    _write(path, json.dumps(dataclasses.asdict(self), indent=1), secret=True)


@dataclasses.dataclass(frozen=True)
class Provisioned:
  """What `provision` did.

  Attributes:
    directory: DIR.
    settings: of the server.
    hosts: in the server's certificate.
    users: all that may connect.
    written: the credentials that are new.
    revoked: users that may not connect any more.
    new_certificate: whether the server has another certificate now.
  """

  directory: pathlib.Path
  settings: Settings
  hosts: list[str]
  users: list[str]
  written: list[pathlib.Path]
  revoked: list[str]
  new_certificate: bool

  @property
  def server(self) -> pathlib.Path:
    """The directory for the server's machine."""
    return self.directory / 'server'

  def credentials(self, user: str) -> pathlib.Path:
    """The file of a user."""
    return _credentials(self.directory, user)


def provision(
  directory: str | os.PathLike,
  run: str,
  num_clients: int,
  hosts: Sequence[str] = (),
  *,
  settings: Settings = Settings(),  # noqa: B008
  revoke: Iterable[str] = (),
  renew: Iterable[str] = (),
) -> Provisioned:
  """Writes, or adds to, what the server and everybody who connects to it need.

  A running server cuts off who was revoked with `nats-server --signal
  reload=PID`. For new clients it is to be started anew (2.9.10 lets them in
  after a reload, but does not answer them); nothing is lost, the others connect
  again.

  Args:
    directory: DIR above.
    run: name of the run.
    num_clients: clients 0 to num_clients - 1; those that there were stay.
    hosts: names and addresses under which the server is reached; loopback is
      added. Other ones than before get the server a new certificate.
    settings: of the server.
    revoke: users whose key is not accepted any more.
    renew: users that get a new key and file; the old key is not accepted any
      more.

  Raises:
    ValueError: if something is out of its range, names nobody, or the directory
      is that of another run.
  """
  names = Names(run)
  if not 1 <= num_clients <= 10_000:
    raise ValueError(f'num_clients must be in [1, 10000], got {num_clients}')
  for host in hosts:
    certificates.check_host(host)
  directory = pathlib.Path(directory)
  state = _read(directory, run)
  keys: dict[str, str | None] = state['keys']
  wanted = [COORDINATOR, KEEPER, *map(client, range(num_clients))]
  revoke, renew = set(revoke), set(renew)
  if unknown := sorted((revoke | renew) - set(wanted) - set(keys)):
    raise ValueError(
      f'revoke and renew take {COORDINATOR}, {KEEPER} and {client(0)} and so'
      f' on; got {", ".join(unknown)}'
    )
  if both := sorted(revoke & renew | revoke & {COORDINATOR}):
    raise ValueError(f'{", ".join(both)} can only be renewed')

  for path in (directory, directory / 'server', directory / 'credentials'):
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
  # without new ones, those that there were
  hosts = list(dict.fromkeys([*(hosts or state['hosts'] or ()), *_LOOPBACK]))
  new_certificate = _certify(directory, run, hosts, state['hosts'])
  ca = (directory / 'ca.pem').read_text()
  written = []
  for user in dict.fromkeys([*keys, *wanted]):
    if user in revoke:
      keys[user] = None
      _credentials(directory, user).unlink(missing_ok=True)
    elif user not in keys or user in renew:
      seed, keys[user] = _key()
      made = Credentials(
        run=run,
        user=user,
        seed=seed,
        inbox_prefix=server_config.inbox(user),
        ca=ca,
      )
      made.to_file(_credentials(directory, user))
      written.append(_credentials(directory, user))
  state.update(keys=keys, hosts=hosts)
  _write(directory / _STATE, json.dumps(state, indent=1))
  valid = {user: key for user, key in keys.items() if key is not None}
  config = server_config.render(names, valid, settings)
  _write(directory / 'server' / 'server.conf', config)
  gone = [user for user in keys if user not in valid]
  return Provisioned(
    directory, settings, hosts, list(valid), written, gone, new_certificate
  )


def _credentials(directory, user):
  return directory / 'credentials' / f'{user}.json'


def _read(directory: pathlib.Path, run: str) -> dict[str, Any]:
  path = directory / _STATE
  if not path.exists():
    return {'run': run, 'hosts': [], 'keys': {}}
  state = json.loads(path.read_text())
  if state['run'] != run:
    raise ValueError(f'{directory} is of the run {state["run"]!r}, not {run!r}')
  return state


def _certify(directory, run, hosts, before):
  """A certificate for the hosts, if they are not those of the last one."""
  ca_key, ca = directory / 'ca-key.pem', directory / 'ca.pem'
  if not ca.exists():
    key, certificate = certificates.authority(run)
    _write(ca_key, key.decode(), secret=True)
    _write(ca, certificate.decode())
  elif hosts == before:
    return False
  key, certificate = certificates.server(
    ca_key.read_bytes(), ca.read_bytes(), hosts
  )
  _write(directory / 'server' / 'server-key.pem', key.decode(), secret=True)
  _write(directory / 'server' / 'server-cert.pem', certificate.decode())
  return True


def _key():
  """A new user key: secret seed and public key."""
  seed = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
  public: Any = nkeys.from_seed(bytearray(seed)).public_key
  return seed.decode(), public.decode()


def _write(path, text, *, secret=False):
  """Writes a file in one go; a secret one is never readable by others."""
  temporary = pathlib.Path(f'{path}.new')
  temporary.unlink(missing_ok=True)
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
  descriptor = os.open(temporary, flags, 0o600 if secret else 0o644)
  with os.fdopen(descriptor, 'w') as file:
    file.write(text)
  temporary.replace(path)
