"""Fine-tunes a model over real clients, on NATS JetStream.

python -m experiments.federate --role=local --num_clients=4
python -m experiments.federate --role=provision --run=NAME --clients=8 \\
    --hosts=fl.example.org --workdir=keys
python -m experiments.federate --role=coordinator --run=NAME --num_clients=8 \\
    --server=tls://fl.example.org:4222 --credentials=coordinator.json
python -m experiments.federate --role=client --run=NAME --client=3 \\
    --server=tls://fl.example.org:4222 --credentials=client-3.json \\
    --dataset=mine.csv --own_data

A client takes the settings of the run from its log and needs only those of its
own data and model. See docs/federation.md.
"""

import asyncio
import datetime
import logging as std_logging
import pathlib
import sys

from absl import app, flags, logging

from experiments import setting_flags
from experiments.config import UsageError

try:
  from experiments.federation import local, provisioning, roles
except ModuleNotFoundError as missing:
  sys.exit(f"error: {missing}; install it with pip install -e '.[federation]'")

flags.adopt_module_key_flags(setting_flags)
_ROLE = flags.DEFINE_enum(
  'role',
  None,
  ['local', 'provision', 'coordinator', 'client', 'keeper'],
  'local: a server, a coordinator and clients on this machine. provision: keys'
  ' and the configuration of a server. coordinator: closes the rounds. client:'
  ' takes part. keeper: follows, stores snapshots for those who come late, and'
  ' probes.',
)
_RUN = flags.DEFINE_string('run', 'run', 'Name of the run.')
_SERVER = flags.DEFINE_string(
  'server', 'nats://127.0.0.1:4222', 'tls://HOST:PORT of the nats-server.'
)
_CREDENTIALS = flags.DEFINE_string(
  'credentials', None, 'File of --role=provision for this process.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of this process; default runs/RUN-ROLE.'
)
_CLIENT = flags.DEFINE_integer('client', None, 'Id of this client, from 0.')
_OWN_DATA = flags.DEFINE_bool(
  'own_data', False, "All of the dataset is this client's, none of others'."
)
_EVALUATE = flags.DEFINE_bool(
  'evaluate', True, 'Evaluate the base and the result on held-out data.'
)
_RESUME = flags.DEFINE_bool(
  'resume', False, 'Coordinate the run that is there, with its settings.'
)
_RULES = {
  'min_clients': flags.DEFINE_integer(
    'min_clients', None, 'Clients before the first round; default all.'
  ),
  'quorum': flags.DEFINE_integer(
    'quorum',
    None,
    'Messages with which a round is closed at once; default those of all'
    ' clients that answered the round before.',
  ),
  'deadline_s': flags.DEFINE_float(
    'deadline_s', 60.0, 'Seconds after which a round is closed all the same.'
  ),
}
_PIPELINE = flags.DEFINE_integer(
  'pipeline', 0, 'Rounds that clients may be ahead of the log.'
)
_DIGEST_EVERY = flags.DEFINE_integer(
  'digest_every', 20, 'Rounds between two comparisons of all replicas.'
)
_MONITOR_PORT = flags.DEFINE_integer(
  'monitor_port', None, 'Shows the run on http://127.0.0.1:PORT, read-only.'
)
_PROBE = flags.DEFINE_bool(
  'probe',
  False,
  'keeper: check on own data what clients claim. coordinator: weigh clients by'
  ' what the keeper found; without a keeper nobody counts. local: both,'
  ' on the data of client 0.',
)
_CLIENTS = flags.DEFINE_integer('clients', None, 'Of --role=provision.')
_HOSTS = flags.DEFINE_list(
  'hosts', [], 'Names and addresses of the server, for its certificate.'
)
_REVOKE = flags.DEFINE_list(
  'revoke', [], 'Users whose key is not accepted any more: client-3.'
)
_RENEW = flags.DEFINE_list(
  'renew', [], 'Users that get a new key and file; the old key is refused.'
)


def _where(role: str) -> roles.Place:
  name = role if _CLIENT.value is None else f'{role}-{_CLIENT.value}'
  return roles.Place(
    run=_RUN.value,
    server=_SERVER.value.replace('tls://', 'nats://', 1),
    credentials=_CREDENTIALS.value,
    directory=pathlib.Path(_WORKDIR.value or f'runs/{_RUN.value}-{name}'),
  )


def _coordination() -> roles.Coordination:
  return roles.Coordination(
    rules={name: flag.value for name, flag in _RULES.items()},
    pipeline=_PIPELINE.value,
    digest_every=_DIGEST_EVERY.value,
    monitor_port=_MONITOR_PORT.value,
    probe=_PROBE.value,
  )


def run(role: str) -> None:
  """Plays a role; raises UsageError."""
  if role == 'provision':
    if _CLIENTS.value is None:
      raise UsageError('--role=provision needs --clients')
    directory = pathlib.Path(_WORKDIR.value or f'runs/{_RUN.value}-keys')
    provisioning.provision_main(
      str(directory),
      _RUN.value,
      _CLIENTS.value,
      _HOSTS.value,
      revoke=_REVOKE.value,
      renew=_RENEW.value,
    )
    return
  config, given = setting_flags.asked_for(None)
  if role in ('client', 'keeper'):
    if (role == 'client') != (_CLIENT.value is not None):
      raise UsageError('--client is needed by --role=client, and for it alone')
    if role == 'client' and _PROBE.value:
      raise UsageError('--probe is for the coordinator and the keeper')
    own = {name: getattr(config, name) for name in given}
    asyncio.run(
      roles.follow(
        _where(role),
        _CLIENT.value,
        own,
        own_data=_OWN_DATA.value,
        evaluate=_EVALUATE.value,
        probes=_PROBE.value,
      )
    )
  elif role == 'coordinator':
    how = _coordination()
    config = None if _RESUME.value else config
    roles.show(asyncio.run(roles.coordinate(_where(role), config, how)))
  else:
    stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
    directory = pathlib.Path(_WORKDIR.value or f'runs/{stamp}')
    asyncio.run(local.run(directory, config, _coordination()))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  std_logging.getLogger('nats').setLevel(std_logging.CRITICAL)
  try:
    if _ROLE.value is None:
      raise UsageError('--role is needed; see --help')
    run(_ROLE.value)
  except (UsageError, FloatingPointError, RuntimeError, OSError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    print(
      '\nStopped. What was stored is in the stream and in the directory of the'
      ' process; the same command goes on.',
      file=sys.stderr,
    )
    sys.exit(130)


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=setting_flags.parse)
