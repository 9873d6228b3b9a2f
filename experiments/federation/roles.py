"""What the processes of a federation do: coordinate, take part, provision."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client
from nats.js.errors import NotFoundError
from rich.console import Console
from rich.table import Table

from experiments import progress, report
from experiments import workdir as workdir_lib
from experiments.config import Config, UsageError
from experiments.federation import monitor, site
from jaxfl import digest, probe
from jaxfl.federation import book, connect, coordinator, records
from jaxfl.federation import client as client_lib
from jaxfl.federation.names import Names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """Where a process is.

  Attributes:
    run: name of the run.
    server: nats://HOST:PORT.
    credentials: file of --role=provision; None for a server on this machine.
    directory: of the process.
  """

  run: str
  server: str
  credentials: str | None
  directory: pathlib.Path

  @property
  def names(self) -> Names:
    """Raises UsageError if the run can't be called so."""
    try:
      return Names(self.run)
    except ValueError as error:
      raise UsageError(f'--run: {error}') from error

  async def connect(self) -> Client:
    """Raises UsageError if there is no connection."""
    try:
      return await connect.connect(self.credentials, self.server)
    except (ValueError, ConnectionError) as error:
      raise UsageError(str(error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coordination:
  """How a coordinator works.

  Attributes:
    rules: of `book.Rules`, but for the number of clients.
    pipeline: rounds that clients may be ahead of the log.
    digest_every: rounds between two comparisons of digests.
    monitor_port: of a page that shows the run; None for none.
    probe: whether to weigh clients by the probes of a keeper.
  """

  rules: dict[str, Any]
  pipeline: int
  digest_every: int
  monitor_port: int | None = None
  probe: bool = False

  def of(self, num_clients: int, pipeline: int) -> book.Rules:
    """Raises UsageError naming the flag that is wrong."""
    if self.digest_every < 1:
      raise UsageError(f'--digest_every must be >= 1, got {self.digest_every}')
    fields = dict(self.rules)
    if fields['min_clients'] is None:
      fields['min_clients'] = num_clients
    try:
      return book.Rules(num_clients=num_clients, pipeline=pipeline, **fields)
    except ValueError as error:
      raise UsageError(f'--{error}') from error


async def coordinate(
  place: Place, config: Config | None, how: Coordination, watch=None
) -> coordinator.Status:
  """Coordinates a run to its end.

  Args:
    place: of this process.
    config: to start the run with; None for the run that is there.
    how: to work.
    watch: called with a `coordinator.Status` in place of a progress bar.

  Raises:
    UsageError: naming what is wrong.
  """
  names, header = place.names, None
  if config is not None:
    how.of(config.num_clients, how.pipeline)  # before any work
    if how.probe:
      site.check_probe(config)
    header = site.header_of(config, how.pipeline, how.digest_every)
  nc = await place.connect()
  there = header or records.read_header(await client_lib.find(nc, names))
  run = site.config_of(there)
  if how.probe:
    site.check_probe(run)
  rules = how.of(run.num_clients, there.config['pipeline'])
  plan = coordinator.Plan(
    names=names,
    rules=rules,
    header=header,
    shared=site.shared_of,
    usable=site.usable,
    num_rounds=lambda header: site.config_of(header).num_rounds,
    size=site.size if how.probe else None,
  )
  try:
    async with monitor.serve(how.monitor_port, names.run) as page:
      with contextlib.ExitStack() as stack:
        if watch is None:
          bar = stack.enter_context(progress.bar(run.num_rounds, 0))
          watch = lambda status: bar(status.round, describe(status))

        def seen(status):
          page(status)
          watch(status)

        return await coordinator.coordinate(nc, plan, seen)
  except coordinator.RunDiffers as error:
    raise UsageError(
      f'{error}; --resume goes on with the run that is there, --run gives'
      ' another one a name'
    ) from error
  except NotFoundError as error:
    raise UsageError(str(error)) from error
  finally:
    await nc.close()


def describe(status: coordinator.Status) -> str:
  """A status in a line."""
  loss = [f'loss {x:.3f}' for x in list(status.losses.values())[-1:]]
  refused = sum(
    n
    for counts in status.refused.values()
    for reason, n in counts.items()
    if reason not in (book.LATE, book.REPEATED)
  )
  words = [
    *loss,
    f'{len(status.members)} clients',
    f'up {report.amount(status.bytes_up)}',
    f'down {report.amount(status.bytes_down)} each',
  ]
  if refused:
    words.append(f'{refused} refused')
  return '  '.join(words)


def show(status: coordinator.Status) -> None:
  """Prints how a run ended."""
  table = Table(title='the run')
  table.add_column('')
  table.add_column('value', justify='right')
  table.add_row('rounds', f'{status.round} of {status.num_rounds}')
  table.add_row('bytes up, all clients', report.amount(status.bytes_up))
  table.add_row('bytes down, each replica', report.amount(status.bytes_down))
  for client, counts in sorted(status.refused.items()):
    text = ', '.join(f'{n} {reason}' for reason, n in counts.items())
    table.add_row(f'refused of client {client}', text)
  if status.levels:
    levels = ', '.join(f'{i}: {x}' for i, x in enumerate(status.levels))
    table.add_row(f'trust of clients, 0 to {probe.LEVELS}', levels)
  if status.attested:
    last = max(status.attested)
    table.add_row(
      f'digest after round {last}', status.attested[last] or 'differs'
    )
  Console(width=78).print(table)


async def follow(
  place: Place,
  client: int | None,
  given: dict[str, Any],
  *,
  own_data: bool,
  evaluate: bool,
  probes: bool = False,
  make: Callable[..., site.Bench] = site.Bench,
) -> dict[str, Any]:
  """Takes part in a run to its end, as a client or a keeper.

  Args:
    place: of this process.
    client: its id; None for a keeper.
    given: settings of this site.
    own_data: whether all of the data is this client's.
    evaluate: whether to evaluate base and result.
    probes: whether to probe what clients claim; of a keeper.
    make: makes what this site runs.

  Returns:
    The summary, also in the directory.

  Raises:
    UsageError: naming what is wrong.
    RuntimeError: if this device does not compute what the others do.
  """
  started = time.monotonic()
  names = place.names
  nc = await place.connect()
  try:
    block = await client_lib.find(nc, names)
    header = records.read_header(block)
    bench = make(names, client, header, given, own_data)
    bench.claim(place.directory)
    here = bench.site
    if probes:
      judge = bench.judge(place.directory / 'probes.json')
      here = dataclasses.replace(here, judge=judge)
    replica = bench.replica(place.directory, block)
    before = bench.problem.evaluate(bench.problem.params) if evaluate else {}
    with progress.bar(bench.config.num_rounds, replica.round) as advance:

      def watch(done):
        loss = '' if done.loss is None else f'loss {done.loss:.3f}  '
        advance(done.round, f'{loss}up {report.amount(done.bytes_up)}')

      try:
        done = await client_lib.follow(nc, here, replica, watch)
      except client_lib.Refused as error:
        raise UsageError(f'this site does not fit the run: {error}') from error
      finally:
        replica.close()
    params = replica.state.params
    summary = {
      'run': names.run,
      'client': client,
      'rounds': replica.round,
      'digest': digest.digest(params),
      'log_digest': replica.log.digest,
      'before': before,
      'after': bench.problem.evaluate(params) if evaluate else {},
      'messages': done.sent,
      'bytes_up': done.bytes_up,
      'bytes_down': done.bytes_down,
      'wall_s': time.monotonic() - started,
    }
    workdir = workdir_lib.Workdir(place.directory)
    workdir_lib.write_json(workdir.summary, summary)
    return summary
  finally:
    await nc.close()
