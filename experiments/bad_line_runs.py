"""A federation of processes on clean and bad lines, for `experiments.bad_line`.

Server and coordinator are on one side, every client on the other side of a
proxy of its own. This process watches the records as the server stores them,
kills and starts processes by a plan, and compares what is left at the end.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import random
import signal
import socket
import time
import urllib.request
from typing import Any, NamedTuple

import numpy as np

from experiments import replayer
from experiments.federation import site
from experiments.federation.line import Line
from experiments.federation.process import Process
from jaxfl import digest, log
from jaxfl.federation import connect, records, server_config
from jaxfl.federation.names import Names
from jaxfl.federation.server import LocalServer

NAMES = Names('bad-line')
POINTS = 200  # of a curve
_EXAMPLES = 64  # of a client
_AGAIN_S = 2.0  # until a process that ended by itself is started again
_LIMIT, _START_S = 3, 300.0  # a run of 3 times its minutes hangs, and so much
_LINGER_S = 120.0  # for clients, after the last round
_METHOD = (
  '--method=spsa', '--target=y', '--batch_size=16', '--num_perturbations=2',
  '--mu=1e-2', '--learning_rate=0.01',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is run.

  Attributes:
    minutes: that a condition takes if nothing but steps and round trips do.
    num_clients: all of them; on a bad line up to two come late.
    seed: of lines, plan, data and run.
    step_s: seconds of a local step.
    rate: of a bad line, bits per second each way.
    round_trip: of a bad line, seconds.
    loss: of a bad line, probability that a segment is lost.
    pipeline: rounds that clients may be ahead; None for enough.
    deadline_s: after which a round is closed without those who are silent.
  """

  minutes: float = 10.0
  num_clients: int = 8
  seed: int = 0
  step_s: float = 0.5
  rate: float = 64e3
  round_trip: float = 0.3
  loss: float = 0.05
  pipeline: int | None = None
  deadline_s: float = 2.0

  @property
  def ahead(self) -> int:
    """Steps that take a round trip with a segment that is lost twice."""
    if self.pipeline is not None:
      return self.pipeline
    timeout = max(0.2, self.round_trip)
    return math.ceil((self.round_trip + 3 * timeout) / self.step_s) + 1

  def rounds(self, bad: bool, pipelined: bool) -> int:
    """Rounds that fill `minutes`."""
    wait = self.round_trip if bad and not pipelined else 0.0
    return max(20, round(60 * self.minutes / (self.step_s + wait)))


class Event(NamedTuple):
  """Something that is done to a run.

  Attributes:
    at: seconds after the first round.
    kind: join; kill, of a client; coordinator, which is killed.
    client: None for the coordinator.
    down_s: seconds until what was killed is started again.
  """

  at: float
  kind: str
  client: int | None = None
  down_s: float = 0.0


def plan(settings: Settings) -> list[Event]:
  """What happens on a bad line, in order.

  A client is killed in every minute and the coordinator once, at random times;
  up to two clients join at random times in the first half.
  """
  draw = random.Random(settings.seed)
  seconds, clients = 60 * settings.minutes, range(settings.num_clients)
  late = draw.sample(clients, min(2, settings.num_clients - 1))
  events = [Event(draw.uniform(0.1, 0.5) * seconds, 'join', c) for c in late]
  kills = max(1, round(settings.minutes))
  for k in range(kills):
    at = (k + draw.uniform(0.1, 0.8)) * seconds / kills
    absent = {e.client for e in events if e.kind == 'join' and at < e.at + 30}
    there = [c for c in clients if c not in absent]
    events.append(Event(at, 'kill', draw.choice(there), draw.uniform(2, 5)))
  at = draw.uniform(0.4, 0.6) * seconds
  return sorted([*events, Event(at, 'coordinator', None, 1.0)])


async def run(
  settings: Settings, bad: bool, pipelined: bool, directory: pathlib.Path
) -> dict[str, Any]:
  """Runs a condition to its end, or until it hangs.

  Args:
    settings: of the study.
    bad: whether lines are bad, and processes killed.
    pipelined: whether clients may be ahead.
    directory: of all processes; there must be none.

  Returns:
    What was measured, for the JSON file.
  """
  return await _Run(settings, bad, pipelined, directory).run()


class _Run:
  """A federation at work."""

  def __init__(self, settings, bad, pipelined, directory):
    self._settings, self._directory, self._bad = settings, directory, bad
    self._ahead = settings.ahead if pipelined else 0
    self._rounds = settings.rounds(bad, pipelined)
    self._plan = collections.deque(plan(settings) if bad else [])
    joins = [e.client for e in self._plan if e.kind == 'join']
    self._absent = {client for client in joins if client is not None}
    self._times = {}  # of records, by round
    self._hellos = []  # client, time
    self._events = []  # that happened
    self._failures = []  # processes that ended by themselves
    self._refused = []  # by coordinator, client and reason
    self._due = []  # time, process to be started, event
    self._hung = None

  async def run(self):
    settings, directory = self._settings, self._directory
    directory.mkdir(parents=True)
    async with contextlib.AsyncExitStack() as stack:
      server = stack.enter_context(LocalServer(directory / 'server'))
      lines = [
        await stack.enter_async_context(self._line(server.port, client))
        for client in range(settings.num_clients)
      ]
      nc = await connect.connect(None, server.url)
      stack.push_async_callback(nc.close)
      await nc.subscribe(server_config.live(NAMES), cb=self._record)
      await nc.subscribe(NAMES.sent('hello', '*'), cb=self._hello)
      self._make(server.url, [line.port for line in lines])
      for process in self._all:
        stack.callback(process.end)
        if process not in [self._clients[c] for c in self._absent]:
          process.start()
      polling = asyncio.create_task(self._poll())
      stack.callback(polling.cancel)
      await self._until_done()
      counts = {
        'line_up': [line.up for line in lines],
        'line_down': [line.down for line in lines],
        'lost_segments': sum(line.losses for line in lines),
        'connections': [line.accepted for line in lines],
      }
    return counts | self._found()

  def _line(self, port, client):
    settings = self._settings
    bad = {
      'rate': settings.rate,
      'round_trip': settings.round_trip,
      'loss': settings.loss,
      'seed': 1000 * settings.seed + client,
    }
    return Line(target=('127.0.0.1', port), **(bad if self._bad else {}))

  def _make(self, url, ports):
    """The processes."""
    settings, directory = self._settings, self._directory
    table = directory / 'table.csv'
    _write_table(table, settings)
    with socket.create_server(('127.0.0.1', 0)) as probe:
      page = probe.getsockname()[1]
    self._page = f'http://127.0.0.1:{page}/status.json'
    self._again = [
      '--role=coordinator', '--resume', f'--run={NAMES.run}', f'--server={url}',
      f'--deadline_s={settings.deadline_s}', f'--monitor_port={page}',
      f'--min_clients={settings.num_clients - len(self._absent)}',
    ]  # fmt: skip
    first = [
      *(x for x in self._again if x != '--resume'), *_METHOD,
      f'--dataset={table}', f'--num_clients={settings.num_clients}',
      f'--num_rounds={self._rounds}', f'--pipeline={self._ahead}',
      f'--seed={settings.seed}',
    ]  # fmt: skip
    output = directory / 'coordinator' / 'output.txt'
    self._coordinator = Process(output, 'experiments.federate', first)
    self._refused.append({})
    self._clients = []
    for client, port in enumerate(ports):
      home = directory / f'client-{client}'
      arguments = [
        f'--run={NAMES.run}', f'--server=nats://127.0.0.1:{port}',
        f'--client={client}', f'--workdir={home}',
        f'--step_s={settings.step_s}',
      ]  # fmt: skip
      module, output = 'experiments.federation.paced', home / 'output.txt'
      self._clients.append(Process(output, module, arguments, _cache(home)))
    self._all = [self._coordinator, *self._clients]

  # Watching.

  async def _record(self, message):
    headers = message.headers or {}
    number = headers.get(records.ROUND, '')
    if headers.get('Nats-Subject') == NAMES.log and number.isdecimal():
      self._times.setdefault(int(number), time.monotonic())

  async def _hello(self, message):
    found = NAMES.sender(message.subject)
    if found is not None:
      self._hellos.append((found[1], time.monotonic()))

  async def _poll(self):
    """Keeps what the coordinator says about refused messages."""

    def ask():
      try:
        with urllib.request.urlopen(self._page, timeout=2) as answer:
          return json.load(answer)['refused']
      except (OSError, ValueError):  # it is down
        return None

    while True:
      await asyncio.sleep(0.5)
      which = len(self._refused) - 1
      said = await asyncio.to_thread(ask)
      if said:
        self._refused[which] = said

  async def _until_done(self):
    start = time.monotonic()
    limit = start + _LIMIT * 60 * self._settings.minutes + _START_S
    while True:
      await asyncio.sleep(0.05)
      now = time.monotonic()
      self._act(now)
      if len(self._times) == self._rounds:
        if all(process.code == 0 for process in self._all):
          return
        limit = min(limit, max(self._times.values()) + _LINGER_S)
      if now > limit:
        self._hung = self._describe_hang()
        return

  # Acting.

  def _act(self, now):
    first = self._times.get(0, now)
    while self._plan and now - first >= self._plan[0].at:
      self._happen(self._plan.popleft(), now)
    for item in [item for item in self._due if item[0] <= now]:
      self._due.remove(item)
      _, process, event = item
      process.start()
      event['started'] = now
    waiting = [process for _, process, _ in self._due]
    for process in self._all:
      if process.code not in (None, 0) and process not in waiting:
        said, name = process.last_words(), process.output.parent.name
        if not self._times and process is self._coordinator:
          raise RuntimeError(f'the coordinator does not start: {said}')
        self._failures.append(
          {'process': name, 'code': process.code, 'said': said[-500:]}
        )
        self._due.append((now + _AGAIN_S, process, {}))
        if process is self._coordinator:
          self._restarts_coordinator()

  def _happen(self, event, now):
    coordinator = event.kind == 'coordinator'
    process = self._coordinator if coordinator else self._clients[event.client]
    if event.kind != 'join' and not process.running:
      return  # it has ended, or was killed before
    done = {'kind': event.kind, 'client': event.client, 'at': now}
    process.end()
    if coordinator:
      self._restarts_coordinator()
    self._events.append(done)
    self._due.append((now + event.down_s, process, done))

  def _restarts_coordinator(self):
    self._coordinator.arguments = self._again
    self._refused.append({})

  def _describe_hang(self):
    """Which processes still run, with their stacks."""
    words = [f'{len(self._times)} of {self._rounds} rounds are closed']
    for process in self._all:
      if process.running:
        process.end(signal.SIGABRT)  # has it print its stacks
        words.append(f'{process.output}:\n{process.last_words()}')
    return '\n\n'.join(words)

  # At the end.

  def _found(self):
    times = [self._times[k] for k in sorted(self._times)] or [math.nan]
    homes = [client.output.parent for client in self._clients]
    summaries = [site.read_summary(home) for home in homes]
    ended = self._hung is None and all(s is not None for s in summaries)
    rounds, replayed = _participants(homes[0]), None
    if ended:
      params, _, header = replayer.rebuild(homes[0])
      replayed = digest.digest(params)
      assert header.config['pipeline'] == self._ahead
    steady = min(self._rounds // 20, len(times) - 1)  # without the start
    seconds = times[-1] - times[steady]
    refused = collections.Counter()
    for told in self._refused:
      for counts in told.values():
        refused.update(counts)
    return {
      'line': 'bad' if self._bad else 'clean',
      'pipeline': self._ahead,
      'rounds': self._rounds,
      'closed': len(self._times),
      'seconds': times[-1] - times[0],
      'rate': (len(times) - 1 - steady) / seconds if seconds else None,
      'longest_s': max(np.diff(times), default=0.0),
      'messages': np.mean([len(ids) for ids in rounds]) if rounds else 0.0,
      'messages_of': [
        sum(c in ids for ids in rounds) for c in range(len(homes))
      ],
      'refused': dict(refused),
      'digests': [None if s is None else s['digest'] for s in summaries],
      'log_digests': [
        None if s is None else s['log_digest'] for s in summaries
      ],
      'replayed': replayed,
      'equal': ended
      and {replayed} == {s['digest'] for s in summaries if s}
      and len({s['log_digest'] for s in summaries if s}) == 1,
      'hung': self._hung,
      'failures': self._failures,
      'events': [self._told(event, times, rounds) for event in self._events],
      'curve': _curve(times, rounds),
    }

  def _told(self, event, times, rounds):
    """An event with what followed, in seconds after the first round."""
    client, at = event['client'], event['at']
    started = event.get('started', math.inf)
    before = [t for t in times if t <= at]
    gaps = np.diff([*before[-1:], *(t for t in times if at < t < at + 30)])
    heard = [t for c, t in self._hellos if c == client and t > started]
    took_part = [
      t
      for t, ids in zip(times, rounds, strict=False)
      if heard and t > heard[0] and client in ids  # none from before
    ]
    since = lambda found: round(found[0] - started, 2) if found else None
    return {
      'kind': event['kind'],
      'client': client,
      'at': round(at - times[0], 2),
      'down_s': round(started - at, 2) if 'started' in event else None,
      'hello_s': since(heard),
      'message_s': since(took_part),
      'longest_s': round(max(gaps, default=0.0), 2),
    }


def _cache(home):
  """Makes JAX keep what it has compiled, for a client that starts again."""
  return {
    'JAX_COMPILATION_CACHE_DIR': str(home.absolute() / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


def _participants(home):
  """Clients of every round."""
  path = home / 'rounds.log'
  if not path.exists():
    return []
  with log.RoundLog.open(path) as found:
    return [record.ids.tolist() for record in found]


def _curve(times, rounds):
  """Rounds and mean number of messages against time, thinned out."""
  every = max(1, len(times) // POINTS)
  marks = range(0, len(times), every)
  return {
    'round': list(marks),
    'seconds': [round(times[k] - times[0], 2) for k in marks],
    'messages': [
      float(np.mean([len(ids) for ids in rounds[k : k + every]] or [0]))
      for k in marks
    ],
  }


def _write_table(path, settings):
  """A table whose target is almost linear in four columns."""
  draw = np.random.default_rng(settings.seed)
  x = draw.normal(size=(_EXAMPLES * settings.num_clients, 4))
  y = x @ [1.0, -1.0, 0.5, 0.25] + 0.1 * draw.normal(size=len(x))
  lines = [','.join(f'{v:.4f}' for v in row) for row in np.c_[x, y]]
  path.write_text('\n'.join(['a,b,c,d,y', *lines]) + '\n')
