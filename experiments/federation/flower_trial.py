"""A whole Flower federation on this machine, and what it costs.

    python -m experiments.federation.flower_trial --nodes=2 \\
      --run_config='num_rounds=5 method="fedkseed" local_steps=256'

starts a SuperLink and SuperNodes on loopback, without TLS, runs the Flower App
of `experiments/flower`, and prints bytes and seconds per round. The bytes are
those on the sockets of the first SuperNode, counted by `line.py`.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from typing import Any

from absl import app, flags

from experiments.federation.line import BackgroundLine

APP = pathlib.Path(__file__).parents[1] / 'flower'
ROOT = APP.parents[1]
_START_S = 60.0
_STOP_S = 10.0


@dataclasses.dataclass(frozen=True)
class Mark:
  """What had passed on the measured line when the log grew."""

  seconds: float
  up: int
  down: int


def programs() -> pathlib.Path:
  """Where Flower's commands are; FileNotFoundError if they are missing."""
  found = pathlib.Path(sys.executable).parent
  if not (found / 'flower-superlink').exists():
    raise FileNotFoundError(
      "Flower is missing; install it with pip install -e '.[flower]'"
    )
  return found


def free_port() -> int:
  """A port of loopback that nobody uses."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


class Federation:
  """A SuperLink and SuperNodes, as long as it is entered.

  Attributes:
    line: that the first SuperNode uses.
    nodes: processes of the SuperNodes.
  """

  def __init__(self, directory: pathlib.Path, configs: list[dict[str, Any]]):
    """Args:
    directory: of everything that they write.
    configs: node-config of each SuperNode.
    """
    self.directory, self._configs = directory.absolute(), configs
    self._bin = programs()
    self.port = free_port()
    self.nodes: list[subprocess.Popen] = []
    self.line = BackgroundLine(target=('127.0.0.1', self.port))

  def __enter__(self):
    self.directory.mkdir(parents=True, exist_ok=True)
    self._stack = contextlib.ExitStack()
    with contextlib.ExitStack() as stack:
      link = self._start(
        'link', 'flower-superlink', '--host=127.0.0.1', f'--port={self.port}',
        '--disable-runtime-dependency-installation',
      )  # fmt: skip
      stack.callback(stop, link)
      self._wait(link)
      stack.enter_context(self.line)
      for number in range(len(self._configs)):
        self.nodes.append(self.start_node(number))
        stack.callback(lambda n=number: stop(self.nodes[n]))
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *error):
    self._stack.close()

  def start_node(self, number: int) -> subprocess.Popen:
    """Starts a SuperNode."""
    port = self.port if number else self.line.port
    return self._start(
      f'node-{number}', 'flower-supernode',
      f'--superlink=127.0.0.1:{port}', f'--port={free_port()}',
      f'--node-config={toml(self._configs[number])}',
    )  # fmt: skip

  def environment(self, name: str) -> dict[str, str]:
    """Of a process: no telemetry, and a home of its own."""
    own = {
      'FLWR_HOME': str(self.directory / name),
      'FLWR_TELEMETRY_ENABLED': '0',
      'FLWR_DISABLE_UPDATE_CHECK': '1',
      'PYTHONPATH': str(ROOT),
      'PATH': f'{self._bin}{os.pathsep}{os.environ["PATH"]}',
    }
    return os.environ | own

  def _start(self, name, program, *arguments):
    with open(self.directory / f'{name}.txt', 'ab') as out:
      return subprocess.Popen(
        [self._bin / program, '--insecure', *arguments],
        cwd=self.directory, env=self.environment(name), stdout=out, stderr=out,
        stdin=subprocess.DEVNULL, start_new_session=True,
      )  # fmt: skip

  def _wait(self, link):
    until = time.monotonic() + _START_S
    while time.monotonic() < until and link.poll() is None:
      with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', self.port), 1).close()
        return
      time.sleep(0.2)
    raise RuntimeError(f'no SuperLink, see {self.directory / "link.txt"}')

  def run(self, config: dict[str, Any]) -> list[Mark]:
    """Runs the Flower App to its end; a mark for every growth of its log.

    Args:
      config: of the run, by name; its directory is `server` here by default.

    Raises:
      RuntimeError: if it does not end well.
    """
    home = self.directory / 'cli'
    home.mkdir(exist_ok=True)
    (home / 'config.toml').write_text(
      '[superlink]\ndefault = "here"\n[superlink.here]\n'
      f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
    )
    config = {'workdir': str(self.directory / 'server')} | config
    server = pathlib.Path(config['workdir'])
    marks, done = [], threading.Event()
    watching = threading.Thread(
      target=self._watch, args=(server / 'rounds.log', marks, done)
    )
    watching.start()
    output = self.directory / 'run.txt'
    try:
      with open(output, 'ab') as out:
        subprocess.run(
          [
            *(self._bin / 'flwr', 'run', APP, 'here', '--stream'),
            *('--run-config', toml(config)),
          ],
          cwd=self.directory, env=self.environment('cli'), check=True,
          stdout=out, stderr=out, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
      done.set()
      watching.join()
    if not (server / 'summary.json').exists():
      raise RuntimeError(f'the run has failed, see {output}')
    return marks

  def _watch(self, path, marks, done):
    size = 0
    while not done.wait(0.02):
      with contextlib.suppress(FileNotFoundError):
        if (now := os.stat(path).st_size) > size:
          size = now
          marks.append(Mark(time.monotonic(), self.line.up, self.line.down))


def stop(process: subprocess.Popen) -> None:
  """Ends a process and those that it has started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGTERM)
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(_STOP_S)
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def toml(values: dict[str, Any]) -> str:
  """Settings as Flower's command line takes them."""
  return ' '.join(f'{name}={json.dumps(x)}' for name, x in values.items())


def parse(text: str) -> dict[str, Any]:
  """The inverse of `toml`."""
  found = re.findall(r'(\S+?)=("[^"]*"|\S+)', text)
  return tomllib.loads('\n'.join(f'{name} = {x}' for name, x in found))


def per_round(marks: list[Mark], num_rounds: int) -> dict[str, float]:
  """Means over the rounds after the first; the header is a mark, too."""
  first, last = marks[1], marks[num_rounds]
  count = num_rounds - 1
  return {
    'seconds': (last.seconds - first.seconds) / count,
    'up': (last.up - first.up) / count,
    'down': (last.down - first.down) / count,
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  options = flags.FLAGS
  config = {'num_clients': options.nodes, 'num_rounds': 5}
  config |= parse(' '.join(options.run_config))
  stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  directory = pathlib.Path(options.workdir or f'runs/{stamp}')
  node = parse(options.node_config)
  configs = [node | {'client': n} for n in range(options.nodes)]
  try:
    with Federation(directory, configs) as federation:
      if options.idle_s:
        time.sleep(10)  # until all are there
        up, down = federation.line.up, federation.line.down
        time.sleep(options.idle_s)
        print(
          f'idle: {(federation.line.up - up) / options.idle_s:.0f} B/s up,'
          f' {(federation.line.down - down) / options.idle_s:.0f} B/s down'
        )
      marks = federation.run(config)
      total = federation.line.up, federation.line.down
  except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
    sys.exit(f'error: {error}')
  summary = json.loads((directory / 'server' / 'summary.json').read_text())
  rounds, clients = config['num_rounds'], options.nodes
  found = per_round(marks, rounds)
  print(
    f'frame {summary["bytes_up"] / rounds / clients:.0f} B; on the socket'
    f' {found["up"]:.0f} B up, {found["down"]:.0f} B down a round, in'
    f' {found["seconds"]:.1f} s; in all {total[0]} B up, {total[1]} B down\n'
    f'digest {summary["digest"]}, of {directory / "server"}'
  )


if __name__ == '__main__':
  # not above: tests that import this have flags of their own
  flags.DEFINE_integer('nodes', 2, 'SuperNodes, a client each.')
  flags.DEFINE_multi_string(
    'run_config', [], 'Of the run: NAME=VALUE ..., as of flwr run.'
  )
  flags.DEFINE_string('node_config', '', 'Of every node, but for its client.')
  flags.DEFINE_string('workdir', None, 'Default runs/DATE-TIME.')
  flags.DEFINE_float('idle_s', 0.0, 'Counts bytes before the run, too.')
  app.run(main)
