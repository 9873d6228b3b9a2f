"""What TensorBoard shows of a run; needs the extra `tensorboard`."""

import contextlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Mapping

from experiments.config import UsageError


def check() -> None:
  """Raises UsageError if the writer is not installed."""
  if importlib.util.find_spec('tensorboardX') is None:
    raise UsageError(
      "--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'"
    )


@contextlib.contextmanager
def opened(
  directory: pathlib.Path, rounds: int
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """Opens the events of a run, to add to them.

  Args:
    directory: of the events.
    rounds: that the run has behind it; TensorBoard forgets those after them,
      which a run that was killed may have left.

  Yields:
    A function of the rounds done and values by name.
  """
  from tensorboardX import SummaryWriter

  purge = rounds + 1 if rounds else 0
  with SummaryWriter(str(directory), purge_step=purge) as writer:

    def show(round: int, values: Mapping[str, float]) -> None:
      for name, value in values.items():
        writer.add_scalar(name, value, round)

    yield show
