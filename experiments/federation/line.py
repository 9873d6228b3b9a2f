"""A bad line: a proxy that counts bytes, and delays, loses and breaks.

    python -m experiments.federation.line --listen=4223 --target=HOST:4222 \\
      --rate=64k --round_trip=0.3 --loss=0.05

stands between clients that connect to 127.0.0.1:4223 and the server at HOST,
and prints once a second what has passed. Stop it with Ctrl-C. Where `tc netem`
and network namespaces are permitted, they are a better model of the same: whole
packets are delayed and lost below TCP, and headers and ACKs count too.

What is counted is what is read from the sockets: with TLS its records, without
the headers of TCP and IP (40 to 52 bytes per packet, and 18 on Ethernet).

Bytes cross in segments: what one read returns, <= 1448 bytes, which is what a
packet of 1500 bytes carries. For each, in this order,

  * rate: a direction sends one segment after the other, of all connections. A
    connection's next one is not read before, so that a sender that is too fast
    finds the socket full; some 16 kB wait here, the rest at the sender.
  * loss: TCP underneath loses nothing, hence a lost segment is what TCP makes
    of it: the stream stops for a retransmission timeout of max(200 ms, round
    trip), the segment is sent again, at the expense of the rate too, and may be
    lost again, after twice the timeout. Other connections go on. This is what
    happens to short messages; a long transfer would often recover after one
    round trip (fast retransmission), and would slow down (congestion control).
    ACKs and handshakes are not lost.
  * delay: half a round trip, in order. Connecting takes a round trip.
"""

import asyncio
import random
import re
import socket
import struct
import sys
import threading
from typing import Self

from absl import app, flags

SEGMENT = 1448  # bytes
RTO_MIN = 0.2  # seconds; Linux's, RFC 6298 asks for 1
_BUFFER = 8192  # bytes for the sockets; Linux takes twice as many
_FLIGHT = 724  # segments on their way per connection: a window of 1 MiB
_BUCKET = 0.02  # seconds at the rate that may be caught up with


class _Way:
  """One direction of a line."""

  def __init__(self, seed: str):
    self.count = 0  # bytes
    self.losses = 0
    self.free = 0.0  # when the last segment was or will be sent
    self.random = random.Random(seed)


class Line:
  """A line to a server, as long as it is entered: `async with Line(...)`.

  `target`, `rate`, `round_trip` and `loss` may be set at any time; a new target
  is for new connections. Other threads may do so too, and call what is here.

  With an equal seed, the n-th segment of a direction has an equal fate. That is
  reproducible for who sends one message after the other; how a long transfer is
  cut into segments depends on the time.

  Attributes:
    port: to connect to, on 127.0.0.1.
    up: bytes read from clients so far, whether or not they arrived.
    down: bytes read from the server so far.
    losses: segments lost so far, both ways.
    connections: that are open.
    accepted: connections so far, without those that were refused.
  """

  def __init__(
    self,
    *,
    target: tuple[str, int],
    rate: float | None = None,
    round_trip: float = 0.0,
    loss: float = 0.0,
    seed: int = 0,
    listen: int = 0,
  ):
    """A line that nobody can use yet.

    Args:
      target: host and port of the server.
      rate: bits per second in each direction; None is as fast as possible.
      round_trip: seconds.
      loss: probability that a segment is lost, < 1.
      seed: of the losses.
      listen: the port; 0 takes a free one.

    Raises:
      ValueError: names the argument that is out of range.
    """
    if rate is not None and not rate > 0:
      raise ValueError(f'rate must be > 0 bits/s or None, got {rate}')
    if not round_trip >= 0:
      raise ValueError(f'round_trip must be >= 0 seconds, got {round_trip}')
    if not 0 <= loss < 1:
      raise ValueError(f'loss must be in [0, 1), got {loss}')
    self.target = target
    self.rate = rate
    self.round_trip = round_trip
    self.loss = loss
    self.port = listen
    self.accepted = 0
    self._up = _Way(f'{seed} up')
    self._down = _Way(f'{seed} down')
    self._stalled = 0.0  # until when, by the loop's clock
    self._refused = 0.0
    self._serving: set[asyncio.Task] = set()

  @property
  def up(self) -> int:
    return self._up.count

  @property
  def down(self) -> int:
    return self._down.count

  @property
  def losses(self) -> int:
    return self._up.losses + self._down.losses

  @property
  def connections(self) -> int:
    return len(self._serving)

  async def __aenter__(self) -> Self:
    self._loop = asyncio.get_running_loop()
    self._listener = _socket()
    try:
      self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      self._listener.bind(('127.0.0.1', self.port))
      self._listener.listen(128)
    except OSError:
      self._listener.close()
      raise
    self.port = self._listener.getsockname()[1]
    self._accepting = asyncio.create_task(self._accept())
    return self

  async def __aexit__(self, *exc_info) -> None:
    tasks = {self._accepting, *self._serving}
    while left := {task for task in tasks if not task.done()}:
      for task in left:  # once may not be enough, see `stream.end`
        task.cancel()
      await asyncio.wait(left, timeout=1.0)
    await asyncio.gather(*tasks, return_exceptions=True)
    self._listener.close()

  def cut(self) -> None:
    """Resets all connections; what was on its way is lost."""
    self._loop.call_soon_threadsafe(self._cut)

  def stall(self, seconds: float) -> None:
    """From now on nothing passes for a while; connections stay."""
    self._stalled = self._loop.time() + seconds

  def refuse(self, seconds: float) -> None:
    """From now on whoever connects is reset; open connections stay."""
    self._refused = self._loop.time() + seconds

  def _cut(self) -> None:
    for task in self._serving:
      task.cancel()

  async def _accept(self) -> None:
    while True:
      client, _ = await self._loop.sock_accept(self._listener)
      if self._loop.time() < self._refused:
        _reset(client)
        continue
      self.accepted += 1
      task = asyncio.create_task(self._serve(client))
      self._serving.add(task)
      task.add_done_callback(self._serving.discard)
      # not by the task, which may be cancelled before its first step
      task.add_done_callback(lambda _, client=client: _reset(client))

  async def _serve(self, client: socket.socket) -> None:
    """A connection, until both sides have ended theirs or one breaks."""
    server = _socket()
    try:
      await asyncio.sleep(self.round_trip)
      await self._loop.sock_connect(server, self.target)
      async with asyncio.TaskGroup() as group:
        for source, sink, way in (
          (client, server, self._up),
          (server, client, self._down),
        ):
          flight = asyncio.Queue(_FLIGHT)
          group.create_task(self._read(source, way, flight))
          group.create_task(self._write(sink, flight))
      client.close()
      server.close()
    except* OSError:  # one side has reset it, or the server is not there
      pass
    finally:
      _reset(server)

  async def _read(self, source, way: _Way, flight: asyncio.Queue) -> None:
    """Bytes into the line, a segment at a time; b'' is the end."""
    data = b'-'
    while data:
      data = await self._loop.sock_recv(source, SEGMENT)
      way.count += len(data)
      await self._stall()
      await self._send(len(data), way)
      await flight.put((self._loop.time() + self.round_trip / 2, data))

  async def _write(self, sink, flight: asyncio.Queue) -> None:
    """Bytes out of the line, when they are due."""
    while True:
      due, data = await flight.get()
      await self._until(due)
      await self._stall()
      if not data:
        sink.shutdown(socket.SHUT_WR)
        return
      await self._loop.sock_sendall(sink, data)

  async def _send(self, size: int, way: _Way) -> None:
    """Takes the time that a segment takes until it leaves for good."""
    await self._pass(size, way)
    timeout = max(RTO_MIN, self.round_trip)
    while size and way.random.random() < self.loss:
      way.losses += 1
      await asyncio.sleep(timeout)
      await self._pass(size, way)
      timeout *= 2

  async def _pass(self, size: int, way: _Way) -> None:
    """A token bucket; who comes first is served first."""
    if self.rate is not None:
      way.free = max(way.free, self._loop.time() - _BUCKET)
      way.free += 8 * size / self.rate
      await self._until(way.free)

  async def _stall(self) -> None:
    while self._stalled > self._loop.time():  # it may grow meanwhile
      await self._until(self._stalled)

  async def _until(self, time: float) -> None:
    wait = time - self._loop.time()
    if wait > 0:
      await asyncio.sleep(wait)


class BackgroundLine(Line):
  """A `Line` in a thread of its own, entered with a plain `with`."""

  def __enter__(self) -> Self:
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    try:
      self._run(self.__aenter__())
    except BaseException:
      self._end()
      raise
    return self

  def __exit__(self, *exc_info) -> None:
    try:
      self._run(self.__aexit__(*exc_info))
    finally:
      self._end()

  def _run(self, coroutine) -> None:
    asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

  def _end(self) -> None:
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()


def _socket() -> socket.socket:
  """A socket with small buffers, and segments that are small beside them.

  Linux's on loopback are up to 64 KiB otherwise.
  """
  result = socket.socket()
  result.setblocking(False)
  result.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
  result.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
  if sys.platform == 'linux':
    result.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
  result.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  return result


def _reset(connection: socket.socket) -> None:
  """Closes with RST; nothing if it is closed."""
  if connection.fileno() >= 0:
    linger = struct.pack('ii', 1, 0)  # on, for 0 seconds
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def parse_rate(text: str) -> float:
  """Bits per second of '9600', '64k' or '1.5M'; ValueError otherwise."""
  match = re.fullmatch(r'(\d+\.?\d*)([kMG]?)', text)
  if not match:
    raise ValueError(f'rate must be like 9600, 64k or 1.5M, got {text!r}')
  return float(match[1]) * {'': 1.0, 'k': 1e3, 'M': 1e6, 'G': 1e9}[match[2]]


def parse_target(text: str) -> tuple[str, int]:
  """Host and port of 'HOST:PORT'; ValueError otherwise."""
  host, _, port = text.rpartition(':')
  if not host or not port.isdecimal():
    raise ValueError(f'target must be HOST:PORT, got {text!r}')
  return host, int(port)


async def watch(line: Line) -> None:
  """Runs a line for ever, and prints what passes."""
  async with line:
    host, port = line.target
    print(f'127.0.0.1:{line.port} -> {host}:{port}')
    up = down = 0
    while True:
      await asyncio.sleep(1)
      print(
        f'up {line.up:,} B ({8 * (line.up - up):,} bit/s),'
        f' down {line.down:,} B ({8 * (line.down - down):,} bit/s),'
        f' {line.losses} lost, {line.connections} connections',
        flush=True,
      )
      up, down = line.up, line.down


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  options = flags.FLAGS
  if options.target is None:
    raise app.UsageError('--target is needed: HOST:PORT of the server')
  try:
    line = Line(
      target=parse_target(options.target),
      rate=None if options.rate is None else parse_rate(options.rate),
      round_trip=options.round_trip,
      loss=options.loss,
      seed=options.seed,
      listen=options.listen,
    )
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  try:
    asyncio.run(watch(line))
  except OSError as error:
    sys.exit(f'error: port {line.port} cannot be listened on: {error}')
  except KeyboardInterrupt:
    pass


if __name__ == '__main__':
  # not above: launchers that import this have flags of their own
  flags.DEFINE_integer('listen', 0, 'Port; 0 for any free one.')
  flags.DEFINE_string('target', None, 'HOST:PORT of the server.')
  flags.DEFINE_string('rate', None, 'Bits/s each way: 9600, 64k, 1.5M.')
  flags.DEFINE_float('round_trip', 0.0, 'Seconds.')
  flags.DEFINE_float('loss', 0.0, 'Probability per segment.')
  flags.DEFINE_integer('seed', 0, 'Of the losses.')
  app.run(main)
