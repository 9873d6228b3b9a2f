"""The audit of the private byte: clipped scalars, a linear code, integer noise.

    units = clipped_units(scalars of the examples)      # exact sums
    code = encode(units)                                # in [-24, 24]
    sent = clamp(code + discrete Gaussian, -127, 127)   # one byte a scalar

The canary is one of 24 examples. All of its scalars are far above the clip, in
directions that both signs turn around. The adversary knows the other examples,
the shared rounding and what is wrong, and scores the bytes of all rounds by the
logarithm of their likelihood ratio. What a byte decodes to tells no more.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxfl import discrete, events, keys, noise

NUM_ROUNDS, NUM_SCALARS = 4, 8
NUM_EXAMPLES = LEVELS = 24
CLIP_NORM = 1.0
LARGEST = 127  # of a signed byte; -128 is left out
_SHARED = b'the seed that everybody knows...'  # 32 bytes


class Transcript(NamedTuple):
  """What the adversary sees, and what it can compute.

  Attributes:
    sent: int64[N, R, K].
    codes: int64[2, R, K], without noise, for signs +1 and -1.
    sigma: of the noise that is really added.
  """

  sent: np.ndarray
  codes: np.ndarray
  sigma: float


class Pieces(NamedTuple):
  """What the byte is made of; a planted bug changes one of them.

  Attributes:
    event: whose noise is added; the claim may be another one's.
    code: float32[n, K], float32[K] in [0, 1) -> int32[K].
    noise: 32 secret bytes, sigma -> int64[R, K], of all rounds of a run.
    score: transcript -> float64[N], above 0 if it looks like sign +1.
  """

  event: events.IntegerNoise
  code: Callable[..., jax.Array]
  noise: Callable[[bytes, float], np.ndarray]
  score: Callable[[Transcript], np.ndarray]


def sensitivity() -> int:
  """How far an example that is replaced moves a code."""
  return discrete.sensitivity(LEVELS, NUM_EXAMPLES)


def shipped(event: events.IntegerNoise) -> Pieces:
  """The byte as it is."""
  return Pieces(event, _code, _noise, likelihood_ratio)


def _code(scalars, uniform):
  units = discrete.clipped_units(scalars, clip_norm=CLIP_NORM)
  return discrete.encode(units, uniform, levels=LEVELS, divisor=NUM_EXAMPLES)


def _noise(secret, sigma):
  key = noise.NoiseKey(secret, run='audit')
  return np.stack([_draw(key, sigma, r) for r in range(NUM_ROUNDS)])


def _draw(key, sigma, round):
  return key.discrete_gaussian(
    (NUM_SCALARS,), sigma, round=round, name='scalars'
  )


def half_sensitivity(event: events.IntegerNoise) -> Pieces:
  """noise for an example that is dropped, not replaced"""
  return shipped(dataclasses.replace(event, scale=event.scale / 2))


def clip_of_the_mean(event: events.IntegerNoise) -> Pieces:
  """the mean over the examples is clipped, not the examples"""

  def code(scalars, uniform):
    mean = scalars.mean(0, keepdims=True)
    units = discrete.clipped_units(mean, clip_norm=CLIP_NORM)
    return discrete.encode(units, uniform, levels=LEVELS, divisor=1)

  return shipped(event)._replace(code=code)


def noise_from_the_shared_key(event: events.IntegerNoise) -> Pieces:
  """the noise key is made of a seed that everybody knows"""

  def score(seen):
    rest = seen.sent[:, None] - _noise(_SHARED, seen.sigma) - seen.codes
    plus, minus = np.square(rest).sum((2, 3)).T
    return (minus - plus).astype(np.float64)

  return shipped(event)._replace(
    noise=lambda secret, sigma: _noise(_SHARED, sigma), score=score
  )


def reused_noise(event: events.IntegerNoise) -> Pieces:
  """every round makes the key anew and draws the noise of the first"""

  def same(secret, sigma):
    make = lambda: noise.NoiseKey(secret, run='audit')
    return np.stack([_draw(make(), sigma, 0) for _ in range(NUM_ROUNDS)])

  def score(seen):
    units = seen.sent[:, None] - seen.codes
    spread = np.square(units - units.mean(2, keepdims=True)).sum((2, 3))
    plus, minus = spread.T
    return minus - plus

  return shipped(event)._replace(noise=same, score=score)


BUGS = (
  half_sensitivity,
  clip_of_the_mean,
  noise_from_the_shared_key,
  reused_noise,
)


def likelihood_ratio(seen: Transcript) -> np.ndarray:
  """For noise that nobody knows, by its exact law."""
  pmf = discrete.gaussian_pmf(seen.sigma)
  reach = LARGEST + LEVELS
  law = np.zeros(2 * max(reach, max(pmf)) + 1)
  law[np.array(list(pmf)) + len(law) // 2] = list(pmf.values())
  byte = np.arange(-LARGEST, LARGEST + 1)
  offset = byte - seen.codes[..., None] + len(law) // 2
  chances = law[offset]
  below = np.cumsum(law)  # the ends of the range stand for all beyond
  chances[..., 0] = below[offset[..., 0]]
  chances[..., -1] = 1.0 - below[offset[..., -1] - 1]
  logs = np.log(np.maximum(chances, 1e-300))
  ratio = logs[0] - logs[1]  # float64[R, K, 255]
  place = np.moveaxis(seen.sent + LARGEST, 0, -1)
  return np.take_along_axis(ratio, place, -1).sum((0, 1))


def data(seed: int) -> np.ndarray:
  """Scalars of the examples for both signs: float32[2, R, n, K]."""
  rng = np.random.default_rng(seed)
  shape = (NUM_ROUNDS, NUM_EXAMPLES, NUM_SCALARS)
  plus = rng.normal(size=shape)
  plus[:, 0] = 1e6 * np.sign(plus[:, 0])
  minus = plus.copy()
  minus[:, 0] *= -1
  return np.stack([plus, minus]).astype(np.float32)


def player(pieces: Pieces) -> Callable[[np.ndarray, int], np.ndarray]:
  """A mechanism, ready to be run.

  Returns:
    signs int[N], seed -> scores float64[N].
  """

  def play(signs, seed):
    places = np.arange(NUM_ROUNDS * NUM_SCALARS)
    uniform = keys.uniform(keys.fold(keys.root(seed), places))
    uniform = uniform.reshape(NUM_ROUNDS, NUM_SCALARS)
    code = jax.jit(jax.vmap(jax.vmap(pieces.code), (0, None)))
    codes = np.asarray(code(data(seed), uniform), np.int64)
    sigma, sent = pieces.event.scale, []
    for i, sign in enumerate(signs):
      secret = hashlib.sha256(f'audit {seed} {i}'.encode()).digest()
      code = codes[0 if sign > 0 else 1]
      sent.append(code + pieces.noise(secret, sigma))
    clamped = np.clip(np.stack(sent), -LARGEST, LARGEST)
    return pieces.score(Transcript(clamped, codes, sigma))

  return play
