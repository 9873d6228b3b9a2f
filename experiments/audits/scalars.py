"""The audit of the private byte, as `jaxfl.private_scalars` makes it.

    units = clipped_units(scalars of the examples)      # exact sums
    noise = prepare(...)                                # discrete Gaussian
    sent = encode(units, noise)                         # one byte a scalar

The canary is one of 24 examples. All of its scalars are far above the clip, in
directions that both signs turn around. The adversary knows the other examples,
the shared rounding and what is wrong, and scores the bytes of all rounds by the
logarithm of their likelihood ratio. What a byte decodes to tells no more.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import discrete, events, keys, noise, private_scalars
from jaxfl import plan as plan_lib

NUM_ROUNDS, NUM_SCALARS = 4, 8
NUM_EXAMPLES = 24
CLIP_NORM = 1.0
SENSITIVITY = 1  # of the code, in its steps
LARGEST = private_scalars.LARGEST['linear8']
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
    units: float32[n, K] -> int32[K], what is encoded.
    noise: 32 secret bytes, sigma -> int32[R, K], of all rounds of a run.
    score: transcript -> float64[N], above 0 if it looks like sign +1.
  """

  event: events.IntegerNoise
  units: Callable[[jax.Array], jax.Array]
  noise: Callable[[bytes, float], np.ndarray]
  score: Callable[[Transcript], np.ndarray]


@functools.cache
def mechanism(sigma: float) -> private_scalars.Mechanism:
  """What is shipped, for one client and this noise."""
  plan = plan_lib.ScalarPlan(NUM_ROUNDS, NUM_SCALARS, sigma)
  settings = private_scalars.Settings(plan, CLIP_NORM, [NUM_EXAMPLES])
  return private_scalars.mechanism(settings, 'linear8')


def shipped(event: events.IntegerNoise) -> Pieces:
  """The byte as it is."""
  units = functools.partial(discrete.clipped_units, clip_norm=CLIP_NORM)
  return Pieces(event, units, _noise, likelihood_ratio)


def _noise(secret, sigma):
  key = noise.NoiseKey(secret, run='audit')
  return np.stack([_draw(key, sigma, r) for r in range(NUM_ROUNDS)])


def _draw(key, sigma, round):
  return mechanism(sigma).prepare({}, {}, round, 0, key)['noise'][0]


def half_sensitivity(event: events.IntegerNoise) -> Pieces:
  """noise for an example that is dropped, not replaced"""
  return shipped(dataclasses.replace(event, scale=event.scale / 2))


def clip_of_the_mean(event: events.IntegerNoise) -> Pieces:
  """the mean over the examples is clipped, not the examples"""

  def units(scalars):
    mean = scalars.mean(0, keepdims=True)
    one = discrete.clipped_units(mean, clip_norm=CLIP_NORM)
    return NUM_EXAMPLES * one

  return shipped(event)._replace(units=units)


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
  reach = LARGEST + NUM_EXAMPLES
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
    sigma = pieces.event.scale
    places = np.arange(NUM_ROUNDS * NUM_SCALARS).reshape(NUM_ROUNDS, -1)
    dither = keys.fold(keys.root(seed), places)  # of every scalar
    units = jax.vmap(jax.vmap(pieces.units))(jnp.asarray(data(seed)))
    scalar = lambda u, n, key: mechanism(sigma).encode(u, 0, n, key)
    run = jax.vmap(jax.vmap(scalar))  # over rounds and scalars
    encode = jax.jit(jax.vmap(run, (0, 0, None)))
    codes = encode(units, np.zeros(units.shape, np.int32), dither)
    drawn = [
      pieces.noise(hashlib.sha256(f'audit {seed} {i}'.encode()).digest(), sigma)
      for i in range(len(signs))
    ]
    of_sign = units[np.where(np.asarray(signs) > 0, 0, 1)]
    sent = encode(of_sign, np.stack(drawn), dither)
    wide = lambda x: np.asarray(x, np.int64)
    return pieces.score(Transcript(wide(sent), wide(codes), sigma))

  return play
