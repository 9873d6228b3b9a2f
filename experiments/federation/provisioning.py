"""Writes what the sites of a federation need to reach each other."""

from collections.abc import Iterable, Sequence

from experiments.config import UsageError
from jaxfl.federation import provision as provision_lib
from jaxfl.federation import server, server_config


def provision_main(
  directory: str,
  run: str,
  num_clients: int,
  hosts: Sequence[str] = (),
  *,
  settings: server_config.Settings = server_config.Settings(),  # noqa: B008
  revoke: Iterable[str] = (),
  renew: Iterable[str] = (),
) -> provision_lib.Provisioned:
  """Runs `provision`; prints what was written and what to do next.

  Args: those of `jaxfl.federation.provision.provision`.

  Raises:
    UsageError: if they don't fit.
  """
  try:
    made = provision_lib.provision(
      directory,
      run,
      num_clients,
      hosts,
      settings=settings,
      revoke=revoke,
      renew=renew,
    )
  except ValueError as error:
    raise UsageError(str(error)) from error
  print(report(made))
  return made


def report(made: provision_lib.Provisioned) -> str:
  """What was written and what to do next, in words."""
  lines = [f'{len(made.users)} users may connect: {_some(made.users)}.']
  if made.revoked:
    lines.append(f'Not accepted any more: {_some(made.revoked)}.')
  for path in made.written:
    lines.append(f'  new: {path}')
  if made.written:
    lines.append(
      'Give each file to its site over a safe way, then delete it here: who has'
      ' it, is that user.'
    )
  host = next((h for h in made.hosts if h != 'localhost'), 'localhost')
  lines += [
    f'Copy {made.server} to the machine of the server and start it there:',
    f'  cd {made.server.name} && nats-server -c server.conf',
    '  If it runs already, start it anew: nothing is lost and all come back.'
    ' To cut off who was revoked, nats-server --signal reload=PID is enough.',
    f'  (to install it: {server.INSTALL})',
    f'Sites connect with --server=tls://{host}:{made.settings.port}'
    ' --credentials=FILE; the certificate is good for'
    f' {", ".join(made.hosts)}.',
    f'Keep {made.directory / "ca-key.pem"} here: it is needed to add hosts.',
  ]
  return '\n'.join(lines)


def _some(users):
  shown = ', '.join(users[:6])
  return shown if len(users) <= 6 else f'{shown} ... {users[-1]}'
