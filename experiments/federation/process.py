"""A process that is started again and again, for `experiments.bad_line`."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence


class Process:
  """A module that runs beside this one; what it says goes to a file.

  Attributes:
    arguments: of its next start.
    output: the file.
  """

  def __init__(
    self,
    output: pathlib.Path,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
  ):
    self.output, self.arguments = output, arguments
    self._module, self._environment = module, environment or {}
    self._process: subprocess.Popen | None = None
    output.parent.mkdir(parents=True, exist_ok=True)

  @property
  def running(self) -> bool:
    return self._process is not None and self._process.poll() is None

  @property
  def code(self) -> int | None:
    """Its exit status; None while it runs, and before it is started."""
    return None if self._process is None else self._process.poll()

  def start(self) -> None:
    """Starts it; its stacks are in the output if it ends by SIGABRT."""
    extra = {'PYTHONUNBUFFERED': '1', 'PYTHONFAULTHANDLER': '1'}
    with open(self.output, 'ab') as out:
      self._process = subprocess.Popen(
        [sys.executable, '-m', self._module, *self.arguments],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        env={**os.environ, **extra, **self._environment},
      )

  def end(self, how: signal.Signals = signal.SIGKILL) -> None:
    """Ends it, if it runs."""
    if self._process is None or not self.running:
      return
    self._process.send_signal(how)
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(10)
    self._process.kill()
    self._process.wait()

  def last_words(self) -> str:
    """The end of what it said."""
    return self.output.read_text(errors='replace').strip()[-4000:]
