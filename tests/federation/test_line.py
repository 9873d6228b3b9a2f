"""A bad line against its parameters: bytes, rate, delay, losses, faults."""

import asyncio
import contextlib
import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from experiments.federation import line as line_lib

Line = line_lib.Line
ROOT = pathlib.Path(__file__).parents[2]


def run(scenario, **kwargs):
  """Runs a scenario on a line to an echo server; nothing may be left."""

  async def main():
    before = len(os.listdir('/proc/self/fd'))
    async with echo_server() as target, Line(target=target, **kwargs) as line:
      await asyncio.wait_for(scenario(line), 10)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert len(os.listdir('/proc/self/fd')) == before
    assert line.connections == 0

  asyncio.run(main())
  gc.collect()  # sockets that nobody closed warn


@contextlib.asynccontextmanager
async def echo_server(prefix=b''):
  """Sends everything back, after a prefix, and ends when the client ends."""
  tasks = set()

  async def serve(reader, writer):
    tasks.add(asyncio.current_task())
    with contextlib.suppress(ConnectionError):
      writer.write(prefix)
      while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
      writer.write_eof()
    writer.close()
    with contextlib.suppress(ConnectionError):
      await writer.wait_closed()

  server = await asyncio.start_server(serve, '127.0.0.1', 0)
  async with server:
    yield server.sockets[0].getsockname()
  await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def connected(line):
  reader, writer = await asyncio.open_connection('127.0.0.1', line.port)
  try:
    yield reader, writer
  finally:
    writer.close()
    with contextlib.suppress(ConnectionError):
      await writer.wait_closed()


async def echo(reader, writer, data):
  """Seconds until all of `data` is back."""
  start = time.perf_counter()
  writer.write(data)
  assert await reader.readexactly(len(data)) == data
  return time.perf_counter() - start


async def assert_reset(reader):
  with pytest.raises(ConnectionResetError):
    await reader.read()


def test_bytes_are_counted_and_in_order():
  data = os.urandom(300_000)

  async def scenario(line):
    for size in (1, 1447, 1448, 1449, len(data)):
      up, down = line.up, line.down
      async with connected(line) as (reader, writer):
        await echo(reader, writer, data[:size])
        assert (line.up - up, line.down - down) == (size, size)
        assert line.connections == 1
        writer.write_eof()
        assert await reader.read() == b''  # the server has ended it
    assert line.accepted == 5
    assert line.losses == 0

  run(scenario)


def test_order_on_a_bad_line(monkeypatch):
  monkeypatch.setattr(line_lib, 'RTO_MIN', 0.001)
  data = os.urandom(100_000)

  async def scenario(line):
    async with connected(line) as (reader, writer):
      await echo(reader, writer, data)
    assert line.losses > 10

  run(scenario, rate=10e6, round_trip=0.002, loss=0.2)


def test_an_end_does_not_overtake():
  async def scenario(line):
    async with connected(line) as (reader, writer):
      writer.write(b'x' * 3000)
      writer.write_eof()
      assert await reader.read() == b'x' * 3000

  run(scenario, rate=200e3, round_trip=0.1)


def test_rate():
  size = 12_000  # 1.5 s each way, both ways at the same time

  async def scenario(line):
    async with connected(line) as (reader, writer):
      writer.write(b'x' * size)
      arrived = []
      while sum(n for n, _ in arrived) < size:
        arrived.append((len(await reader.read(size)), time.perf_counter()))
    # the first may leave early; from then on it is the rate
    (first, start), (_, end) = arrived[0], arrived[-1]
    assert 8 * (size - first) / (end - start) == pytest.approx(64e3, rel=0.1)
    assert end - start > 1

  run(scenario, rate=64e3)


def test_rate_is_shared_by_connections():
  async def scenario(line):
    async with connected(line) as one, connected(line) as two:
      start = time.perf_counter()
      await asyncio.gather(echo(*one, b'x' * 5000), echo(*two, b'y' * 5000))
      seconds = time.perf_counter() - start
    assert seconds > 0.75  # 10 kB; with a rate for each it takes 0.5

  run(scenario, rate=100e3)


def test_a_fast_sender_has_to_wait():
  async def scenario(line):
    with socket.socket() as client:
      client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
      client.connect(('127.0.0.1', line.port))
      client.setblocking(False)
      accepted = 0
      end = time.monotonic() + 0.5
      while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
          accepted += client.send(bytes(100_000))
        await asyncio.sleep(0.01)
      assert line.up < 64e3 / 8 * 0.6 + 2 * line_lib.SEGMENT
      assert accepted < 60_000

  run(scenario, rate=64e3)


def test_what_is_on_its_way_is_bounded():
  async def scenario(line):
    async with connected(line) as (reader, writer):
      await echo(reader, writer, b'x')
      line.round_trip = 100.0
      writer.write(bytes(3_000_000))
      before = -1
      while before < line.up:
        before = line.up
        await asyncio.sleep(0.2)
      assert 500_000 < line.up < 1_100_000
      line.cut()

  run(scenario)


def test_delay():
  async def scenario(line):
    async with connected(line) as (reader, writer):
      first = await echo(reader, writer, b'x')  # waits for the handshake
      assert 0.4 < first < 0.55
      times = [await echo(reader, writer, b'x') for _ in range(3)]
      assert min(times) == pytest.approx(0.2, abs=0.03)
      # segments follow each other: not one round trip for each
      assert await echo(reader, writer, bytes(14_480)) < 0.8

  run(scenario, round_trip=0.2)


def echoes(count, **kwargs):
  """Seconds and losses of so many messages, one after the other."""
  found = []

  async def scenario(line):
    async with connected(line) as (reader, writer):
      for _ in range(count):
        before = line.losses
        seconds = await echo(reader, writer, b'x' * 100)
        found.append((seconds, line.losses - before))

  run(scenario, **kwargs)
  return found


def test_losses_stop_the_stream(monkeypatch):
  rto = 0.02
  monkeypatch.setattr(line_lib, 'RTO_MIN', rto)
  found = echoes(200, loss=0.1, seed=3)
  # each of 400 segments is lost 0.1 / (1 - 0.1) times on average
  losses = sum(lost for _, lost in found)
  assert abs(losses - 400 / 9) < 3 * (400 * 0.1) ** 0.5 / 0.9
  assert all(seconds > 0.99 * lost * rto for seconds, lost in found)
  # twice the timeout when a segment is lost again
  assert max(seconds / rto - lost for seconds, lost in found) > 0.99
  unharmed = sorted(seconds for seconds, lost in found if not lost)
  assert unharmed[len(unharmed) // 2] < rto


def test_losses_depend_on_the_seed(monkeypatch):
  monkeypatch.setattr(line_lib, 'RTO_MIN', 0.001)
  losses = lambda seed: [lost for _, lost in echoes(60, loss=0.2, seed=seed)]
  first = losses(1)
  assert first == losses(1)
  assert first != losses(2)


def test_timeout_is_at_least_the_round_trip():
  async def scenario(line):
    async with connected(line) as (reader, writer):
      await echo(reader, writer, b'x')
      line.loss = 1 - 1e-9
      echoed = asyncio.create_task(echo(reader, writer, b'x'))
      await asyncio.sleep(0.1)  # the first is lost, then stop losing
      line.loss = 0.0
      assert 0.6 < await echoed < 1

  run(scenario, round_trip=0.3)


def test_cut():
  async def scenario(line):
    async with connected(line) as one, connected(line) as two:
      await echo(*one, b'x')
      await echo(*two, b'x')
      line.cut()
      await assert_reset(one[0])
      await assert_reset(two[0])
      assert line.connections == 0
    async with connected(line) as again:
      await echo(*again, b'x')
    assert line.accepted == 3

  run(scenario)


def test_cut_reaches_the_server_and_loses_what_is_on_its_way():
  async def main():
    broken = asyncio.get_running_loop().create_future()

    async def serve(reader, writer):
      try:
        await reader.read()
      except ConnectionResetError as error:
        broken.set_result(error)
      writer.close()

    server = await asyncio.start_server(serve, '127.0.0.1', 0)
    target = server.sockets[0].getsockname()
    line = Line(target=target, round_trip=0.2)
    async with server, line, connected(line) as (reader, writer):
      writer.write(b'x')
      while line.up == 0:
        await asyncio.sleep(0.01)
      line.cut()
      await assert_reset(reader)
      await asyncio.wait_for(broken, 5)

  asyncio.run(main())


def test_stall():
  async def scenario(line):
    async with connected(line) as (reader, writer):
      await echo(reader, writer, b'x')
      line.stall(0.3)
      assert 0.29 < await echo(reader, writer, b'x') < 0.6
      assert await echo(reader, writer, b'x') < 0.29
      # what is on its way is held too
      line.round_trip = 0.1
      writer.write(b'x')
      while line.up < 4:
        await asyncio.sleep(0.001)
      line.stall(0.3)
      await asyncio.sleep(0.2)
      assert (line.up, line.down) == (4, 3)
      assert await reader.read(1) == b'x'

  run(scenario)


def test_refuse():
  async def scenario(line):
    async with connected(line) as old:
      await echo(*old, b'x')
      line.refuse(0.2)
      async with connected(line) as (reader, _):
        await assert_reset(reader)
      await echo(*old, b'x')  # stays
      await asyncio.sleep(0.25)
      async with connected(line) as new:
        await echo(*new, b'x')
    assert line.accepted == 2

  run(scenario)


def test_target_changes_and_may_be_missing():
  async def scenario(line):
    async with connected(line) as old, echo_server(b'other ') as other:
      await echo(*old, b'x')
      line.target = other
      async with connected(line) as (reader, _):
        assert await reader.readexactly(6) == b'other '
      await echo(*old, b'x')  # where it was
    async with connected(line) as (reader, _):  # nobody listens there now
      await assert_reset(reader)

  run(scenario)


def test_background():
  threads = threading.active_count()
  with (
    socket.create_server(('127.0.0.1', 0)) as server,
    line_lib.BackgroundLine(target=server.getsockname()) as line,
    socket.create_connection(('127.0.0.1', line.port), 5) as client,
  ):
    client.sendall(b'hello')
    accepted, _ = server.accept()
    with accepted:
      assert accepted.recv(100) == b'hello'
      accepted.sendall(b'welcome')
      assert client.recv(100) == b'welcome'
      assert (line.up, line.down, line.connections) == (5, 7, 1)
      line.cut()
      with pytest.raises(ConnectionResetError):
        client.recv(100)
  assert threading.active_count() == threads
  gc.collect()


def test_background_on_a_port_that_is_taken():
  with socket.create_server(('127.0.0.1', 0)) as server:
    target = server.getsockname()
    line = line_lib.BackgroundLine(target=target, listen=target[1])
    with pytest.raises(OSError, match='in use'):
      line.__enter__()
  gc.collect()


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    ({'rate': 0}, 'rate must be > 0'),
    ({'round_trip': -1}, 'round_trip must be >= 0'),
    ({'loss': 1}, r'loss must be in \[0, 1\)'),
  ],
)
def test_bad_arguments(bad, message):
  with pytest.raises(ValueError, match=message):
    Line(target=('127.0.0.1', 1), **bad)


def test_parsing():
  assert line_lib.parse_rate('9600') == 9600
  assert line_lib.parse_rate('64k') == 64e3
  assert line_lib.parse_rate('1.5M') == 1.5e6
  assert line_lib.parse_target('example.org:4222') == ('example.org', 4222)
  for bad in ('', '64 kbit', '-1k', 'k'):
    with pytest.raises(ValueError, match='rate must be like'):
      line_lib.parse_rate(bad)
  for bad in ('', 'host', ':1', 'host:', 'host:x'):
    with pytest.raises(ValueError, match='target must be HOST:PORT'):
      line_lib.parse_target(bad)


def test_command():
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    with subprocess.Popen(
      [
        *(sys.executable, '-u', '-m', 'experiments.federation.line'),
        *(f'--target=127.0.0.1:{port}', '--rate=64k', '--round_trip=0.01'),
      ],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    ) as command:
      assert command.stdout
      listening, target = command.stdout.readline().split(' -> ')
      assert target == f'127.0.0.1:{port}\n'
      address = ('127.0.0.1', int(listening.partition(':')[2]))
      with socket.create_connection(address, 5) as client:
        client.sendall(b'hello')
        accepted, _ = server.accept()
        with accepted:
          assert accepted.recv(100) == b'hello'
          assert command.stdout.readline() == (
            'up 5 B (40 bit/s), down 0 B (0 bit/s), 0 lost, 1 connections\n'
          )
      command.send_signal(signal.SIGINT)
      _, errors = command.communicate(timeout=60)
      assert (errors, command.returncode) == ('', 0)


def test_command_names_a_bad_flag():
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.federation.line'),
      *('--target=127.0.0.1:1', '--rate=fast'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode != 0
  assert "rate must be like 9600, 64k or 1.5M, got 'fast'" in done.stderr
