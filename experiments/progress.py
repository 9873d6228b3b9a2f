"""A progress bar on terminals, a line now and then elsewhere."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator

from rich import progress as rich_progress
from rich.console import Console


class Stop:
  """Whether the user asked to stop.

  Attributes:
    asked: set by the first SIGINT (Ctrl-C) or SIGTERM.
  """

  def __init__(self):
    self.asked = False

  def handle(self, signum, frame):
    """The second signal interrupts at once."""
    del frame  # Unused.
    if self.asked:
      raise KeyboardInterrupt
    self.asked = True
    print(
      f'\n{signal.Signals(signum).name}: stopping after this round; once more'
      ' stops now',
      file=sys.stderr,
    )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
  """Turns the first SIGINT or SIGTERM into a request.

  An interrupt at a bad instant (in a callback or a destructor) may get lost;
  a request does not.
  """
  stop = Stop()
  signals = (signal.SIGINT, signal.SIGTERM)
  before = [signal.signal(s, stop.handle) for s in signals]
  try:
    yield stop
  finally:
    for s, handler in zip(signals, before, strict=True):
      signal.signal(s, handler)


@contextlib.contextmanager
def bar(
  total: int, done: int, unit: str = 'round'
) -> Iterator[Callable[[int, str], None]]:
  """Shows rounds and the time left.

  Args:
    total: rounds of the run.
    done: rounds that it has behind it.
    unit: what is counted, if not rounds.

  Yields:
    A function to call after every round, with the rounds done and a text to
    show beside them.
  """
  columns = (
    rich_progress.TextColumn(unit),
    rich_progress.MofNCompleteColumn(),
    rich_progress.BarColumn(bar_width=None),
    rich_progress.TextColumn('{task.fields[text]}'),
    rich_progress.TimeElapsedColumn(),
    rich_progress.TextColumn('left'),
    rich_progress.TimeRemainingColumn(),
  )
  terminal = sys.stderr.isatty()
  last = time.monotonic()
  with rich_progress.Progress(
    *columns, console=Console(stderr=True), disable=not terminal
  ) as shown:
    task = shown.add_task('', total=total, completed=done, text='')

    def advance(round: int, text: str = ''):
      nonlocal last
      shown.update(task, completed=round, text=text)
      now = time.monotonic()
      if not terminal and (now - last > 10 or round == total):
        last = now
        print(f'{unit} {round}/{total}  {text}'.rstrip(), file=sys.stderr)

    yield advance
