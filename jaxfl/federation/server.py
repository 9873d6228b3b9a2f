"""A nats-server of one's own on this machine, for tests and trials."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

INSTALL = (
  'on Debian or Ubuntu apt-get install nats-server; elsewhere put the binary of'
  ' https://github.com/nats-io/nats-server/releases on the PATH'
)
_START_S = 20.0
_SBIN = '/usr/sbin:/usr/local/sbin'  # Debian has it there, users may not
_OPEN = 'jetstream { store_dir: "store" }\n'


def find() -> str | None:
  """Path of nats-server; None if it is not installed."""
  path = f'{os.environ.get("PATH", os.defpath)}:{_SBIN}'
  return shutil.which('nats-server', path=path)


class LocalServer:
  """Runs `nats-server` on loopback while it is open; a context manager.

  Attributes:
    url: of the server.
    port: of it, a free one when it is first started.
    log: path of what it said.
  """

  def __init__(self, path: str | os.PathLike, *, port: int | None = None):
    """Args:
    path: DIR or DIR/server of `jaxfl.federation.provision`, or a file
      `server.conf`. Another directory gets a server that is open to everybody
      on this machine.
    port: to listen on; default a free one.

    Raises:
      FileNotFoundError: if nats-server is not installed.
    """
    program = find()
    if program is None:
      raise FileNotFoundError(f'nats-server is missing: {INSTALL}')
    self._program = program
    self._config = _config(pathlib.Path(path))
    self.port = port or _free_port()
    self.url = f'nats://127.0.0.1:{self.port}'
    self.log = self._config.with_name('server.log')
    self._process: subprocess.Popen | None = None

  def __enter__(self) -> 'LocalServer':
    self.start()
    return self

  def __exit__(self, *error) -> None:
    self.stop()

  @property
  def pid(self) -> int | None:
    """Of the server; None if it does not run."""
    return None if self._process is None else self._process.pid

  def start(self) -> None:
    """Starts it, with the store that it had, and waits until it answers.

    Raises:
      RuntimeError: if it does not come up; has what it said.
    """
    assert self._process is None, 'it runs'
    address = ['-a', '127.0.0.1', '-p', str(self.port)]
    with open(self.log, 'ab') as log:
      self._process = subprocess.Popen(
        [self._program, '-c', self._config.name, *address],
        cwd=self._config.parent,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
      )
    until = time.monotonic() + _START_S
    while not _answers(self.port):
      if self._process.poll() is not None or time.monotonic() > until:
        self.kill()
        said = self.log.read_text(errors='replace')[-2000:]
        raise RuntimeError(f'nats-server did not start on {self.url}:\n{said}')
      time.sleep(0.02)

  def kill(self) -> None:
    """Ends it at once, as a power cut would end the process."""
    self._end(signal.SIGKILL)

  def stop(self) -> None:
    """Ends it in order."""
    self._end(signal.SIGTERM)

  def reload(self) -> None:
    """Makes it read its configuration again; enough to cut off users."""
    assert self._process is not None, 'it does not run'
    self._process.send_signal(signal.SIGHUP)

  def _end(self, how):
    process, self._process = self._process, None
    if process is None:
      return
    process.send_signal(how)
    try:
      process.wait(_START_S)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def _config(path):
  for found in (path, path / 'server.conf', path / 'server' / 'server.conf'):
    if found.is_file():
      return found.absolute()
  path.mkdir(parents=True, exist_ok=True)
  config = path / 'open.conf'
  config.write_text(_OPEN)
  return config.absolute()


def _free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _answers(port):
  """Whether a server greets there; it does so before TLS."""
  try:
    with socket.create_connection(('127.0.0.1', port), 1) as connection:
      return connection.recv(5) == b'INFO '
  except OSError:
    return False
