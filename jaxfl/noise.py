"""Private noise: keys that nobody shares, and draws that are made only once.

Noise hides data only from those who can't compute it. The keys of `jaxfl.keys`
are shared, so that everybody can rebuild every direction; noise under such a
key is noise that everybody can subtract. A `NoiseKey` is therefore another
type: it holds 32 bytes of the operating system's entropy, is no array and no
pytree, and takes no seed. It can't be printed, pickled, copied or inherited by
a fork, so that it reaches no log, no checkpoint and no other party.

Two queries under the same noise reveal their difference. Every draw has a round
and a name, and a key gives each pair once. A process makes a key of its own
when it starts (`NoiseKey.fresh`): a resumed run draws other noise than the run
that it continues, also for rounds that were computed but never logged. What is
needed for a replay is the noised release, which is in the log.

    stream(round, name) = SHAKE-256(label, entropy, run, round, name)

Draws are made on the host, in NumPy. Integer noise (`discrete_gaussian`,
`skellam`) has the law that the accountant is told. `gaussian` is float64 noise
for research: floating-point numbers have gaps, and their pattern can tell
neighbouring values apart, so that epsilon is that of an ideal mechanism which
the floats only resemble.

References:
  Mironov, "On significance of the least significant bits for differential
    privacy", CCS 2012.
"""

import hashlib
import math
import os
from typing import Any, NoReturn

import jax
import numpy as np

from jaxfl import discrete, keys
from jaxfl import typing as jt

_ENTROPY_BYTES = 32
_LABEL = b'jaxfl private noise 1\n'


class NoiseKey:
  """One party's private noise for one run, in one process.

  Example:
    key = NoiseKey.fresh(run='sst2-7')
    release = total + key.gaussian(total.shape, std, round=0, name='gradient')
  """

  __slots__ = ('_entropy', '_process', '_run', '_spent')

  def __init__(self, entropy: bytes, *, run: str):
    """For tests; see `fresh`.

    Args:
      entropy: 32 bytes that nobody else knows.
      run: a name of the run, so that equal entropy gives other noise in others.

    Raises:
      TypeError: for anything but bytes, above all seeds and shared keys.
      ValueError: for another number of bytes.
    """
    if type(entropy) is not bytes:
      raise TypeError(
        'a NoiseKey takes 32 bytes from the operating system'
        f' (NoiseKey.fresh), not {_kind(entropy)}: whoever knows the key can'
        ' subtract the noise'
      )
    if len(entropy) != _ENTROPY_BYTES:
      raise ValueError(
        f'entropy must be {_ENTROPY_BYTES} bytes, got {len(entropy)}'
      )
    if not isinstance(run, str):
      raise TypeError(f'run must be a name, got {_kind(run)}')
    self._entropy = entropy
    self._run = run
    self._process = os.getpid()
    self._spent: set[tuple[int, str]] = set()

  @classmethod
  def fresh(cls, *, run: str) -> 'NoiseKey':
    """A key of new entropy; call it once in every process of every party."""
    return cls(os.urandom(_ENTROPY_BYTES), run=run)

  def gaussian(
    self, shape: tuple[int, ...], std: float, *, round: int, name: str
  ) -> np.ndarray:
    """Normal noise in float64; for research, see the module's docstring.

    Args:
      shape: of the result.
      std: standard deviation; 0 gives zeros, for a query that is constant.
      round: >= 0.
      name: of the query; once for every round.

    Raises:
      ValueError: if `std` is negative or not finite.
      RuntimeError: if the pair of round and name has been drawn before, or the
        process was forked.
    """
    if not 0 <= std < math.inf:
      raise ValueError(f'std must be finite and not negative, got {std}')
    count = math.prod(shape)
    words = self._words(count + count % 2, round, name).reshape(2, -1)
    # Box-Muller; uniform numbers in (0, 1] of 53 bits
    uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[0]))
    angle = 2.0 * np.pi * uniform[1]
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return (std * pairs[:count]).reshape(shape)

  def discrete_gaussian(
    self, shape: tuple[int, ...], sigma: float, *, round: int, name: str
  ) -> np.ndarray:
    """Integers of `discrete.gaussian_table(sigma)`, int64; for one noiser."""
    table = discrete.gaussian_table(sigma)
    words = self._words(math.prod(shape), round, name)
    return discrete.invert(table, words).reshape(shape)

  def skellam(
    self, shape: tuple[int, ...], variance: float, *, round: int, name: str
  ) -> np.ndarray:
    """Integers, int64, whose sums over parties are of the same family.

    The difference of two Poisson variables. Shares of variance v / P by P
    parties add up to variance v. Who knows some of the shares, such as its own,
    sees the noise of the others only, and so does everybody if some are absent:
    account for the variance that is left.
    """
    table = discrete.poisson_table(variance / 2.0)
    count = math.prod(shape)
    words = self._words(2 * count, round, name)
    draws = discrete.invert(table, words).reshape(2, *shape)
    return draws[0] - draws[1]

  def bernoulli(
    self, shape: tuple[int, ...], rate: float, *, round: int, name: str
  ) -> np.ndarray:
    """bool: True with probability `rate`, to 2**-64; Poisson sampling.

    Sampling amplifies privacy only if nobody knows who was drawn. Samples from
    a shared key amplify nothing.

    Raises:
      ValueError: if `rate` is not in (0, 1).
    """
    if not 0 < rate < 1:
      raise ValueError(f'rate must be in (0, 1), got {rate}')
    words = self._words(math.prod(shape), round, name)
    return (words < np.uint64(int(rate * 2.0**64))).reshape(shape)

  def _words(self, count: int, round: int, name: str) -> np.ndarray:
    """uint64[count]: the stream of a query; raises if it was drawn before."""
    if isinstance(round, bool) or not isinstance(round, int | np.integer):
      raise TypeError(
        f'round must be an integer, got {_kind(round)}; noise is drawn on the'
        ' host, not while a function is traced'
      )
    if not 0 <= round < 2**64:
      raise ValueError(f'round must be in [0, 2**64), got {round}')
    if os.getpid() != self._process:
      raise RuntimeError(
        'this NoiseKey belongs to another process, which may draw the same'
        ' noise: make one with NoiseKey.fresh'
      )
    query = (int(round), name)
    if query in self._spent:
      raise RuntimeError(
        f'noise {name!r} of round {round} has been drawn before: two queries'
        ' under the same noise reveal their difference'
      )
    self._spent.add(query)
    stream = hashlib.shake_256(_LABEL + self._entropy)
    for part in (self._run.encode(), query[0].to_bytes(8), name.encode()):
      stream.update(len(part).to_bytes(8) + part)
    return np.frombuffer(stream.digest(8 * count), '<u8').astype(np.uint64)

  def __repr__(self) -> str:
    return f'NoiseKey(run={self._run!r}, {len(self._spent)} draws, secret)'

  def _refuse(self, *args, **kwargs) -> NoReturn:
    del args, kwargs  # Unused.
    raise TypeError(
      'a NoiseKey is private to its process: it can not be copied, pickled or'
      ' turned into an array; make another one with NoiseKey.fresh'
    )

  __array__ = __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = _refuse


def check_key(key: Any) -> None:
  """Raises TypeError for anything but a `NoiseKey`."""
  if not isinstance(key, NoiseKey):
    raise TypeError(
      f'noise needs a NoiseKey, got {_kind(key)}: shared randomness can be'
      ' subtracted by everybody'
    )


def add_gaussian(
  key: NoiseKey, tree: jt.Params, std: float, *, round: int, name: str
) -> jt.Params:
  """Adds float noise to a pytree; see `NoiseKey.gaussian`.

  Args:
    key: private.
    tree: pytree of float32 or float64 arrays on the host or a device.
    std: standard deviation of every entry.
    round: see `NoiseKey.gaussian`.
    name: likewise; a tensor's noise is called `name/path`.

  Returns:
    Pytree of NumPy arrays, float32: sums in float64, rounded once.

  Raises:
    TypeError: if the key is not a NoiseKey, or a tensor is narrower than
      float32: coarse numbers give away more of what they hide.
  """
  check_key(key)
  leaves = keys.named_leaves(tree)
  for path, x in leaves:
    if x.dtype not in (np.float32, np.float64):
      raise TypeError(f'noise is added in float32, {path!r} is {x.dtype}')
  noised = []
  for path, x in leaves:
    noise = key.gaussian(x.shape, std, round=round, name=f'{name}/{path}')
    noised.append((np.asarray(x, np.float64) + noise).astype(np.float32))
  return jax.tree.structure(tree).unflatten(noised)


def _kind(value: Any) -> str:
  """What a wrong argument is, without showing it."""
  kind = type(value).__name__
  if isinstance(value, jax.Array | np.ndarray):
    return f'an array ({value.dtype}); keys of jaxfl.keys are shared'
  return f'{"an" if kind[0] in "aeiou" else "a"} {kind}'
