"""A federation of a toy method in one process, over a real server."""

import asyncio
import contextlib
import dataclasses
import functools
import shutil
import time

import jax
import numpy as np
import pytest
from nats.aio.client import Client

from jaxfl import digest, log, wire
from jaxfl.federation import (
  book,
  client,
  connect,
  coordinator,
  names,
  replica,
  server,
)
from jaxfl.runtime import simulate
from tests import methods_table as table

NAMES = names.Names('toy')
needs_server = pytest.mark.skipif(
  shutil.which('nats-server') is None, reason=server.INSTALL
)
TIMEOUT_S = 90.0


@functools.cache
def programs(case: str):
  method = table.CASES[case].build()
  return method, simulate.compile_method(method)


def header_of(case: str, pipeline: int = 0) -> log.Header:
  method, _ = programs(case)
  params = table.params()
  return log.Header(
    base_digest=digest.digest(params),
    config={'case': case, 'pipeline': pipeline},
    params=wire.describe(params),
    message=wire.describe(method.message(params)),
  )


@dataclasses.dataclass
class Toy:
  """A run of the toy method."""

  url: str
  directory: object
  case: str = 'spsa'
  num_clients: int = 3
  num_rounds: int = 12
  pipeline: int = 0
  deadline_s: float = 20.0
  min_clients: int | None = None
  quorum: int | None = None
  digest_every: int = 4
  pause_s: float = 0.0  # before every message
  probes: bool = False  # whether the coordinator listens to verdicts
  credentials: object = None  # user -> path
  urls: dict = dataclasses.field(default_factory=dict)  # by client
  statuses: list = dataclasses.field(default_factory=list)
  replicas: dict = dataclasses.field(default_factory=dict)

  @property
  def header(self):
    return header_of(self.case, self.pipeline)

  @contextlib.asynccontextmanager
  async def connection(self, user: str, url: str | None = None):
    path = None if self.credentials is None else self.credentials(user)
    nc: Client = await connect.connect(path, url or self.url)
    try:
      yield nc
    finally:
      await nc.close()

  def plan(self, header=None) -> coordinator.Plan:
    method, _ = programs(self.case)
    return coordinator.Plan(
      names=NAMES,
      rules=book.Rules(
        num_clients=self.num_clients,
        min_clients=self.min_clients or self.num_clients,
        quorum=self.quorum,
        pipeline=self.pipeline,
        deadline_s=self.deadline_s,
      ),
      header=header,
      shared=lambda header: {'case': header.config['case']},
      usable=lambda header: book.usable(method),
      num_rounds=lambda header: self.num_rounds,
      lease_s=1.5,
      size=(lambda header: book.size(method)) if self.probes else None,
    )

  async def coordinate(self, header=None, watch=lambda status: None):
    def seen(status):
      self.statuses.append(dataclasses.replace(status))
      watch(status)

    async with self.connection('coordinator') as nc:
      plan = self.plan(header or self.header)
      return await coordinator.coordinate(nc, plan, seen)

  async def until(self, round: int):
    """Waits for so many closed rounds."""
    while not self.statuses or self.statuses[-1].round < round:
      await asyncio.sleep(0.01)

  def site(self, number: int | None, **changes) -> client.Site:
    method, compiled = programs(self.case)
    one = lambda tree: jax.tree.map(lambda x: np.asarray(x)[None], tree)
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)

    def batches(round):
      time.sleep(self.pause_s)
      return table.batch_fn(method.num_batches)(round, number)

    fields = {
      'names': NAMES,
      'client': number,
      'header': self.header,
      'shared': frozenset({'case'}),
      'method': method,
      'run_client': lambda state, *rest: first(
        compiled.client(state, *map(one, rest))
      ),
      'batch_fn': batches,
      'num_rounds': self.num_rounds,
      'pipeline': self.pipeline,
      'digest_every': self.digest_every,
    }
    return client.Site(**fields | changes)

  async def follow(self, number: int | None, watch=lambda p: None, **changes):
    """Takes part; the digest of the params, and the progress."""
    user = 'keeper' if number is None else f'client-{number}'
    async with self.connection(user, self.urls.get(number)) as nc:
      block = await client.find(nc, NAMES)
      method, compiled = programs(self.case)
      live = replica.Replica(
        method,
        table.params,
        compiled.server,
        self.num_clients,
        self.directory / user,
        block,
      )
      self.replicas[number] = live
      try:
        done = await client.follow(
          nc, self.site(number, **changes), live, watch
        )
        return digest.digest(live.state.params), done
      finally:
        live.close()

  async def run(self, numbers=None, **changes):
    """All clients and a coordinator; the digests, and the last status."""
    numbers = range(self.num_clients) if numbers is None else numbers
    status, *ends = await asyncio.gather(
      self.coordinate(), *(self.follow(n, **changes) for n in numbers)
    )
    return [digest for digest, _ in ends], status

  @functools.cached_property
  def simulated(self):
    """The last round of the same run in the simulator."""
    method, compiled = programs(self.case)
    *_, last = simulate.simulate(
      method,
      method.init(table.params()),
      table.batch_fn(method.num_batches),
      simulate.Population(num_clients=self.num_clients),
      num_rounds=self.num_rounds,
      programs=compiled,
    )
    return last


def run(coroutine):
  """Runs a test's coroutine with a limit."""
  return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))
