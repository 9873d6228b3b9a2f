"""What messages give away: the measurements of `experiments.attack`.

Every row is a wire format; every trial has another victim, with its own batch,
weights and directions. All rows of a trial attack the same victim.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import progress
from experiments.attacks import images, inversion, wires
from experiments.attacks import victim as victim_lib
from experiments.config import UsageError
from experiments.papers import common

EPSILONS = (1.0, 3.0, 8.0)
CONTROL = 1000.0  # no protection: does the attack survive noise at all?
NOTHING, LABELS = 'nothing: the mean', 'labels: the mean of the class'


def _setting(default: Any, text: str) -> Any:
  """A field with the text of its flag."""
  return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the flags of the same names say."""

  data_dir: str | None = _setting(
    None, 'Folder with MNIST; drawn strokes without it.'
  )
  seeds: int = _setting(3, 'Victims, each with its own weights and directions.')
  small_batch: int = _setting(1, 'Examples of a batch, first table.')
  large_batch: int = _setting(8, 'Examples of a batch, second table.')
  restarts: int = _setting(4, 'Starts of the search.')
  steps: int = _setting(1000, 'Steps of Adam, from every start.')


class Baseline(NamedTuple):
  """A row without a message."""

  label: str
  guess: Callable[[images.Pictures, np.ndarray], np.ndarray]
  family: str = 'no message'
  epsilon: None = None


def _mean(pictures, labels):
  mean = pictures.public.mean(0)
  return np.broadcast_to(mean, (len(labels), len(mean)))


def _class_mean(pictures, labels):
  known = [pictures.public[pictures.public_labels == c] for c in labels]
  return np.stack([x.mean(0) for x in known])


BASELINES = (Baseline(NOTHING, _mean), Baseline(LABELS, _class_mean))


def all_wires() -> list[wires.Wire]:
  """The rows of the table, private ones last."""
  most = victim_lib.DIRECTIONS
  some = (16, 256, most)
  return [
    wires.dense(),
    wires.local_steps(),
    *(wires.sketch(k) for k in some),
    *(wires.scalars(k, 'float32') for k in (1, 16, 64, 256, most)),
    *(wires.scalars(k, 'log8') for k in (1, 16, 64, 256, most)),
    *(wires.coordinates(k, 'float32') for k in some),
    *(wires.coordinates(k, 'sign1') for k in some),
    *(wires.dp_gd(e) for e in (CONTROL, *EPSILONS)),
    *(wires.private_scalars(k, e) for e in EPSILONS for k in (16, 256)),
  ]


def _check(settings: Settings, pictures: images.Pictures) -> None:
  least = {'small_batch': 1, 'large_batch': 2, 'restarts': 1, 'steps': 8}
  for name, low in {'seeds': 1, **least}.items():
    if (value := getattr(settings, name)) < low:
      raise UsageError(f'{name} must be >= {low}, got {value}')
  most = len(pictures.private)
  if settings.large_batch > most:
    raise UsageError(
      f'large_batch must be at most {most}, the pictures of victims, got'
      f' {settings.large_batch}'
    )
  if settings.small_batch >= settings.large_batch:
    raise UsageError(
      f'small_batch must be below large_batch, {settings.large_batch}, got'
      f' {settings.small_batch}'
    )


def make(
  settings: Settings, chosen: Sequence[wires.Wire] | None = None
) -> common.Result:
  """Attacks every victim through every wire.

  Args:
    settings: of the flags.
    chosen: the rows; those of `all_wires` by default.

  Returns:
    What is printed, drawn and written.

  Raises:
    UsageError: for a setting that is out of range; names the flag.
    OSError, ValueError: for images that are missing or damaged.
    ImportError: without dp-accounting, which private rows need.
  """
  if settings.data_dir is None:
    pictures = images.strokes()
  else:
    pictures = images.mnist(settings.data_dir)
  _check(settings, pictures)
  chosen = all_wires() if chosen is None else chosen
  started = time.perf_counter()
  jobs = [
    (wire, size)
    for size in (settings.small_batch, settings.large_batch)
    for wire in (*BASELINES, *chosen)
  ]
  attacked = _Attacked(settings, pictures)
  rows = []
  with progress.bar(len(jobs), 0, 'row') as advance:
    for done, (wire, size) in enumerate(jobs, 1):
      rows.append(attacked.row(wire, size))
      advance(done, f'{wire.label}, batch of {size}')
  victim = attacked.victims(settings.small_batch)[0]
  return {
    'settings': dataclasses.asdict(settings),
    'pictures': pictures.name,
    'pixels': pictures.side**2,
    'parameters': len(victim_lib.flat(victim.params)),
    'delta_dp': wires.DELTA,
    'clip_norm': {'gradient': wires.CLIP, 'scalar': wires.SCALAR_CLIP},
    'rows': rows,
    'truth': _pixels(victim.x[0]),
    'seconds': round(time.perf_counter() - started, 1),
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


def _pixels(x: Any) -> list[float]:
  return [round(float(value), 3) for value in np.asarray(x)]


class _Attacked:
  """Victims, made once for every size of a batch, and attacks on them."""

  def __init__(self, settings: Settings, pictures: images.Pictures):
    self._settings = settings
    self._pictures = pictures
    self._prior = inversion.prior_of(pictures.public)
    self._victims: dict[int, list[victim_lib.Victim]] = {}
    self._effort = inversion.Effort(settings.restarts, settings.steps)

  def victims(self, size: int) -> list[victim_lib.Victim]:
    """One for every seed."""
    if size not in self._victims:
      self._victims[size] = self._make(size)
    return self._victims[size]

  def _make(self, size: int) -> list[victim_lib.Victim]:
    found = []
    for seed in range(self._settings.seeds):
      rng = np.random.default_rng([seed, size])
      chosen = rng.choice(len(self._pictures.private), size, replace=False)
      x = self._pictures.private[chosen]
      labels = self._pictures.private_labels[chosen]
      found.append(victim_lib.make(x, labels, seed))
    return found

  def row(self, wire: wires.Wire | Baseline, size: int) -> dict[str, Any]:
    """The errors for all victims, as JSON can hold them."""
    errors, num_bytes, first = [], [], None
    for victim in self.victims(size):
      if isinstance(wire, Baseline):
        count, found = 0, wire.guess(self._pictures, victim.labels)
      else:
        sent = wire.send(victim)
        starts = inversion.draw_starts(
          self._effort, size, victim.x.shape[1], [victim.trial, size]
        )
        count = sent.num_bytes
        found, _ = inversion.reconstruct(
          wire.mismatch,
          sent.evidence,
          victim.params,
          victim.labels,
          self._prior,
          starts,
          self._effort,
        )
      error = inversion.error(np.asarray(found), victim.x, self._prior.mean)
      errors.append(error)
      num_bytes.append(count)
      first = found[0] if first is None else first
    relative = [round(e.relative, 6) for e in errors]
    return {
      'batch': size,
      'label': wire.label,
      'family': wire.family,
      'epsilon_dp': wire.epsilon,
      'bytes': max(num_bytes),
      'error': statistics.fmean(relative),
      'spread': statistics.stdev(relative) if len(relative) > 1 else None,
      'errors': relative,
      'psnr': round(statistics.fmean(e.psnr for e in errors), 2),
      'first': _pixels(first),
    }
