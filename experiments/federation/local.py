"""A whole federation on this machine: server, coordinator, clients."""

import asyncio
import contextlib
import os
import pathlib
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from experiments import report
from experiments import workdir as workdir_lib
from experiments.config import Config, UsageError
from experiments.federation import roles, site
from jaxfl.federation.coordinator import Status
from jaxfl.federation.server import LocalServer

_RUN = 'local'
_EVERY_S = 10.0  # between lines, where there is no terminal


class Child:
  """A client or keeper in a process; what it says goes to a file."""

  def __init__(
    self, client: int | None, directory: pathlib.Path, arguments: list
  ):
    self.client = client
    self.name = 'keeper' if client is None else f'client-{client}'
    self.directory = directory / self.name
    self.directory.mkdir(parents=True, exist_ok=True)
    self.output = self.directory / 'output.txt'
    with open(self.output, 'ab') as out:
      self.process = subprocess.Popen(
        [
          *(sys.executable, '-m', 'experiments.federate', *arguments),
          f'--workdir={self.directory}',
        ],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        env=os.environ | {'PYTHONUNBUFFERED': '1'},
      )

  def stop(self) -> None:
    """Ends it, if it runs."""
    if self.process.poll() is None:
      self.process.terminate()
      try:
        self.process.wait(10)
      except subprocess.TimeoutExpired:
        self.process.kill()
        self.process.wait()


async def run(
  directory: pathlib.Path,
  config: Config,
  how: roles.Coordination,
) -> dict[str, Any]:
  """Runs a federation to its end.

  Args:
    directory: of all processes: `server/`, `client-0/` and so on.
    config: of the run; the clients find it in the log.
    how: its coordinator works.

  Returns:
    The summary, also in the directory.

  Raises:
    UsageError: naming what is wrong.
  """
  workdir = workdir_lib.Workdir(directory)
  if workdir.config.exists():
    raise UsageError(
      f'{directory} already holds a run; choose another --workdir'
    )
  how.of(config.num_clients, how.pipeline)  # before any work
  if how.probe:
    site.check_probe(config)
  workdir_lib.claim(workdir, config)
  try:
    (directory / 'server').mkdir(exist_ok=True)
    server = LocalServer(directory / 'server')
  except FileNotFoundError as error:
    raise UsageError(str(error)) from error
  with server, contextlib.ExitStack() as stack:
    children = []
    for client in (*range(config.num_clients), *([None] if how.probe else [])):
      part = ['--role=client', f'--client={client}']
      part = part if client is not None else ['--role=keeper', '--probe']
      part += [] if client == 0 else ['--noevaluate']
      arguments = [*part, f'--run={_RUN}', f'--server={server.url}']
      child = Child(client, directory, arguments)
      stack.callback(child.stop)
      children.append(child)
    place = roles.Place(
      run=_RUN,
      server=server.url,
      credentials=None,
      directory=directory / 'coordinator',
    )
    status = Status(num_rounds=config.num_rounds)
    with _shown(children, lambda: status) as refresh:

      def watch(new):
        nonlocal status
        status = new
        refresh()

      work = asyncio.create_task(roles.coordinate(place, config, how, watch))
      await _until_done(work, children)
    summary = _summary(children, status, config)
  workdir_lib.write_json(workdir.summary, summary)
  Console(width=78).print(_table(children, status, summary))
  print(f'{directory} has the log and the output of every process.')
  if not summary['equal']:
    raise RuntimeError('the clients did not end with equal weights')
  return summary


async def _until_done(work, children):
  """Waits for the coordinator, then for the clients."""
  while not work.done():
    await asyncio.wait([work], timeout=0.5)
    clients = [child for child in children if child.client is not None]
    codes = [child.process.poll() for child in clients]
    if all(code is not None for code in codes) and not work.done():
      await asyncio.wait([work], timeout=20.0)
      if not work.done():
        work.cancel()
        raise UsageError(f'all clients have ended: {_last_words(children[0])}')
  await work
  for child in children:
    with contextlib.suppress(subprocess.TimeoutExpired):
      await asyncio.to_thread(child.process.wait, 120)


def _last_words(child):
  text = child.output.read_text(errors='replace').strip()
  return f'{child.output} ends with: {text[-500:]}'


def _summary(children, status, config):
  found = [site.read_summary(child.directory) for child in children]
  ended = [s for s in found if s is not None]
  digests = {s['digest'] for s in ended}
  first = found[0] or {}
  return {
    'method': config.method,
    'num_clients': config.num_clients,
    'rounds': status.round,
    'bytes_up': status.bytes_up,
    'bytes_down': status.bytes_down,
    'refused': status.refused,
    'attested': status.attested,
    'digest': min(digests, default=None),
    'equal': len(digests) == 1 and len(ended) == len(children),
    'before': first.get('before', {}),
    'after': first.get('after', {}),
  }


def _level(child, status):
  return '' if child.client is None else str(status.levels[child.client])


def _table(children, status, summary=None) -> Table:
  """Everything on one page."""
  table = Table(
    title=f'round {status.round} of {status.num_rounds}   '
    f'up {report.amount(status.bytes_up)}, down'
    f' {report.amount(status.bytes_down)} each'
  )
  names = ['', 'process', 'member', 'refused', 'digest at the end']
  for name in names + (['trust'] if status.levels else []):
    table.add_column(name, justify='right')
  for child in children:
    code = child.process.poll()
    process = (
      'runs' if code is None else 'ended' if not code else f'exit {code}'
    )
    found = None if summary is None else site.read_summary(child.directory)
    table.add_row(
      child.name,
      process,
      'yes' if child.client in status.members else '',
      str(sum(status.refused.get(child.client, {}).values()) or ''),
      '' if found is None else found['digest'][:16],
      *([_level(child, status)] if status.levels else []),
    )
  lines = [f'{k} {v:.4f}' for k, v in list(status.losses.items())[-1:]]
  if lines:
    table.caption = f'mean training loss at round {lines[0]}'
  if summary is not None and summary['after']:
    table.caption = ', '.join(
      f'held-out {k.replace("_", " ")} {summary["before"][k]:.4f} -> {v:.4f}'
      for k, v in summary['after'].items()
    )
  return table


@contextlib.contextmanager
def _shown(children, status):
  """A live table on terminals, a line now and then elsewhere."""
  console = Console(stderr=True)
  if console.is_terminal:
    with Live(console=console, refresh_per_second=2) as live:
      yield lambda: live.update(_table(children, status()))
    return
  loop, last = asyncio.get_running_loop(), -_EVERY_S

  def refresh():
    nonlocal last
    if loop.time() - last > _EVERY_S or status().done:
      last = loop.time()
      now = status()
      print(
        f'round {now.round}/{now.num_rounds}  {roles.describe(now)}',
        file=sys.stderr,
      )

  yield refresh
