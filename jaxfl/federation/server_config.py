"""The configuration of a run's nats-server: who may do what.

In NATS whoever sends a request chooses the subject of the answer, and the
server does not ask whether he may write there. In one account with the streams,
a client could thus have an answer stored as a record of the log, or sent to
`$JS.API.STREAM.DELETE.RUN_log`, which deletes it (test_reply.py does both). So
every client has an account of its own, with subjects of its own, and imports
from the run's account just what it needs; answers stay in its account. Whoever
makes a consumer chooses a subject of the run's account that it delivers to,
with the same danger: nobody but the coordinator may make one. The others read
by `jaxfl.federation.direct`.

The file has public keys only.
"""

import dataclasses
import json
from collections.abc import Mapping

from jaxfl.federation import names as names_lib

COORDINATOR, KEEPER = 'coordinator', 'keeper'
_CLIENT = 'client-'
_CONNECTIONS = 4  # of a user, as when it comes again before the old one ended
_STRANGERS = 64  # connections that did not say yet who they are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Of a server.

  Attributes:
    port: that it listens on.
    max_payload: bytes of the longest message: a record has those of all clients
      of a round.
    max_store: bytes of the streams on disk.
    monitor_port: of the server's status pages, on loopback only; None for none.
  """

  port: int = 4222
  max_payload: int = 8 * 2**20
  max_store: int = 10 * 2**30
  monitor_port: int | None = None

  def __post_init__(self):
    for name, high in (
      ('port', 65535),
      ('max_payload', 64 * 2**20),  # nats-server takes no more
      ('max_store', 2**62),
      ('monitor_port', 65535),
    ):
      value = getattr(self, name)
      if value is not None and not 1 <= value <= high:
        raise ValueError(f'{name} must be in [1, {high}], got {value}')


def client(number: int) -> str:
  """The user of a client."""
  return f'{_CLIENT}{number}'


def inbox(user: str) -> str:
  """The prefix of a user's inboxes."""
  return f'_INBOX_{user.removeprefix(_CLIENT)}'


def live(names: names_lib.Names) -> str:
  """Where records and notes are published again, once they are stored."""
  return f'{names.run}.live.>'


def services(names: names_lib.Names, user: str) -> list[str]:
  """Subjects that a client or keeper may publish to; the run answers there."""
  streams = (names.log_stream, f'OBJ_{names.snapshots}')
  get = '$JS.API.DIRECT.GET'
  reads = [f'{get}.{s}{rest}' for s in streams for rest in ('', '.>')]
  if user == KEEPER:
    objects = f'$O.{names.snapshots}'
    return [names.trust, f'{objects}.C.*', f'{objects}.M.*', *reads]
  number = user.removeprefix(_CLIENT)
  return [*(names.sent(k, number) for k in names_lib.KINDS), *reads]


def render(
  names: names_lib.Names, keys: Mapping[str, str], settings: Settings
) -> str:
  """The file, for a server that runs in the directory of the file.

  Args:
    names: of the run.
    keys: public keys by user.
    settings: of the server.
  """
  others = [user for user in keys if user != COORDINATOR]
  exports = [_item(stream=live(names))]
  shared: set[str] = set()
  for user in others:
    for subject in services(names, user):
      if subject.startswith('$JS.'):
        shared.add(subject)
      else:
        exports.append(_item(service=subject, accounts=[user]))
  exports += [_item(service=subject) for subject in sorted(shared)]
  lines = [
    '# Written by jaxfl.federation.provision; changes are lost when it is run',
    '# again. Start nats-server in this directory: nats-server -c server.conf',
    f'server_name: {json.dumps(names.run)}',
    f'listen: "0.0.0.0:{settings.port}"',
    f'max_payload: {settings.max_payload}',
    f'max_connections: {_STRANGERS + _CONNECTIONS * len(keys)}',
    'max_subscriptions: 1000',
    'ping_interval: "20s"',
    'ping_max: 3',
    'tls {',
    '  cert_file: "server-cert.pem"',
    '  key_file: "server-key.pem"',
    '  timeout: 5',
    '}',
    'jetstream {',
    '  store_dir: "store"',
    f'  max_mem: {64 * 2**20}',
    f'  max_file: {settings.max_store}',
    '}',
    'accounts {',
    '  run {',
    '    jetstream: enabled',
    f'    users: [{_coordinator(names, keys[COORDINATOR])}]',
    '    exports: [',
    *(f'      {item}' for item in exports),
    '    ]',
    '  }',
    *(line for user in others for line in _account(names, user, keys[user])),
    '}',
  ]
  if settings.monitor_port is not None:
    lines.append(f'http: "127.0.0.1:{settings.monitor_port}"')
  return '\n'.join(lines) + '\n'


def _item(**fields):
  """One line; JSON is a part of the language of the file."""
  return json.dumps(fields)


def _coordinator(names, key):
  own = [f'{names.run}.>']
  api = ['$JS.API.>', '$JS.ACK.>', '$JS.FC.>']
  buckets = [f'$KV.{names.lease}.>', f'$O.{names.snapshots}.>']
  inboxes = [f'{inbox(COORDINATOR)}.>']
  return _user(key, own + api + buckets, own + inboxes)


def _user(key, publish, subscribe):
  allow = {'publish': {'allow': publish}, 'subscribe': {'allow': subscribe}}
  return _item(nkey=key, permissions=allow)


def _account(names, user, key):
  allowed = services(names, user)
  feed = live(names)
  place = lambda subject: {'account': 'run', 'subject': subject}
  return [
    f'  {json.dumps(user)} {{',
    f'    users: [{_user(key, allowed, [f"{inbox(user)}.>", feed])}]',
    '    imports: [',
    f'      {_item(stream=place(feed))}',
    *(f'      {_item(service=place(subject))}' for subject in allowed),
    '    ]',
    '  }',
  ]
