"""The audit of DIFF2 and DP-GD: many tiny runs of the method that is shipped.

The canary is the last example of the smaller client. Its loss is `sign * 10**4
cos(20 c'w)` with a unit vector c: a gradient that is far above any clip, in the
direction +c or -c, whichever way the weights happen to have moved. All other
examples are known to the adversary, and so is what is wrong with a mechanism.
Given what was released before, each release is Gaussian around one of two means
that it can compute, and its score is the logarithm of their likelihood ratio.

All trials of an audit advance together: `client` and `server` of the method
over a batch of states, `Release.make` one by one on the host, as it is there.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import method as method_lib
from jaxfl import noise
from jaxfl import plan as plan_lib
from jaxfl.methods import diff2

SIZES = (8, 12)  # examples of the two clients; the smallest has the canary
DIM = 10
NUM_ROUNDS = 8
CLIP_NORM = 1.0
_RUN = 'audit'
_COHORT = method_lib.Party(
  np.arange(2, dtype=np.int32), np.zeros(2, np.int32), np.ones(2, np.float32)
)


class Transcript(NamedTuple):
  """What the adversary sees, and what it can compute from that.

  Attributes:
    releases: float64[R, N, D].
    means: float64[R, 2, N, D], without noise, for signs +1 and -1.
    std: float64[R, N], of the noise that is really added.
    interval: rounds from one restart to the next.
  """

  releases: np.ndarray
  means: np.ndarray
  std: np.ndarray
  interval: int


class Pieces(NamedTuple):
  """What a private run is made of; a planted bug changes one of them.

  Attributes:
    plan: whose noise is added; the claim may be another one's.
    init: params -> state.
    client: as in `Method`.
    make: as in `Release`.
    server: as in `Method`.
    key: 32 secret bytes, the key of the round before or None -> noise key.
    score: transcript -> float64[N], above 0 if it looks like sign +1.
  """

  plan: plan_lib.Plan
  init: Callable[..., Any]
  client: Callable[..., Any]
  make: Callable[..., Any]
  server: Callable[..., Any]
  key: Callable[[bytes, noise.NoiseKey | None], noise.NoiseKey]
  score: Callable[[Transcript], np.ndarray]


def loss_fn(params, batch):
  """Squared errors, and the loss of the canary where there is one."""
  out = batch['x'] @ params['w']
  known = 0.5 * (out - batch['y']) ** 2
  canary = 1e4 * batch['canary'] * jnp.cos(20.0 * out)
  return jnp.mean(jnp.where(batch['canary'] != 0, canary, known))


def shipped(plan: plan_lib.Plan) -> Pieces:
  """DIFF2, or DP-GD if the plan restarts in every round, as it is."""
  method = diff2.diff2(
    loss_fn,
    plan=plan,
    learning_rate=0.2,
    clip_norm=CLIP_NORM,
    clip_norm_diff=0.4,
    num_examples=SIZES,
    microbatch_size=4,
    research_float_noise=True,
  )
  assert method.release is not None
  one_key = lambda secret, held: held or noise.NoiseKey(secret, run=_RUN)
  return Pieces(
    plan, method.init, method.client, method.release.make, method.server,
    one_key, likelihood_ratio,
  )  # fmt: skip


def likelihood_ratio(seen: Transcript) -> np.ndarray:
  """For noise that nobody knows."""
  return _ratio(seen, seen.releases)


def subtract(
  make: Callable[[], noise.NoiseKey],
) -> Callable[[Transcript], np.ndarray]:
  """For noise from a key that the adversary can make, too; the score to use."""

  def score(seen):
    key, zeros = make(), {'w': np.zeros(DIM)}
    unit = np.stack(
      [
        noise.add_gaussian(key, zeros, 1.0, round=r, name='release')['w']
        for r in range(len(seen.releases))
      ]
    )
    return _ratio(seen, seen.releases - seen.std[..., None] * unit[:, None])

  return score


def compare_intervals(seen: Transcript) -> np.ndarray:
  """For noise that comes again in every interval.

  Under the true sign the noise of rounds r, r + T, r + 2 T ... is the same.
  """
  std = seen.std[:, None, :, None]
  units = (seen.releases[:, None] - seen.means) / std
  spread = 0.0
  for first in range(seen.interval):
    same = units[first :: seen.interval]
    spread = spread + np.square(same - same.mean(0)).sum((0, 3))
  plus, minus = np.asarray(spread)
  return minus - plus


def _ratio(seen: Transcript, releases: np.ndarray) -> np.ndarray:
  plus, minus = np.square(releases[:, None] - seen.means).sum(3).swapaxes(0, 1)
  return ((minus - plus) / (2.0 * seen.std**2)).sum(0)


def data(seed: int) -> dict[str, np.ndarray]:
  """The batches of both clients for both signs: [2, P, 1, n, ...]."""
  rng = np.random.default_rng(seed)
  most = max(SIZES)
  x = rng.normal(size=(2, most, DIM))
  row = SIZES[0] - 1
  x[0, row] /= np.linalg.norm(x[0, row])
  canary = np.zeros((2, 2, most))
  canary[:, 0, row] = 1.0, -1.0
  arrays = {
    'x': x,
    'y': rng.normal(size=(2, most)),
    'example_weight': np.arange(most) < np.array(SIZES)[:, None],
  }
  twice = {k: np.stack([a, a]) for k, a in arrays.items()} | {'canary': canary}
  return {k: a.astype(np.float32)[:, :, None] for k, a in twice.items()}


def player(pieces: Pieces) -> Callable[[np.ndarray, int], np.ndarray]:
  """Many runs of a mechanism at once.

  Returns:
    signs int[N], seed -> scores float64[N]. Data, secrets and the point where
    runs start are functions of the seed.
  """
  over_clients = jax.vmap(pieces.client, (None, None, 0, 0))
  over_trials = jax.vmap(over_clients, (0, None, None, None))
  client = jax.jit(jax.vmap(over_trials, (None, None, 0, None)))  # both signs
  server = jax.jit(jax.vmap(pieces.server, (0, 0, None)))

  def play(signs, seed):
    count, batches = len(signs), data(seed)
    secrets = [
      hashlib.sha256(f'audit {seed} {i}'.encode()).digest()
      for i in range(count)
    ]
    start = np.random.default_rng([seed, 1]).normal(size=DIM)
    state = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))),
      pieces.init({'w': start.astype(np.float32)}),
    )
    held: list[noise.NoiseKey | None] = [None] * count
    releases, means, stds = [], [], []
    for r in range(NUM_ROUNDS):
      both = np.asarray(client(state, (), batches, _COHORT)[0]['w'])
      sent = np.where((signs > 0)[:, None, None], *both)
      held = [pieces.key(*pair) for pair in zip(secrets, held, strict=True)]
      host = jax.device_get(state)
      released = np.stack(
        [
          pieces.make(
            jax.tree.map(lambda x, i=i: x[i], host),
            {'w': sent[i]},
            _COHORT,
            held[i],
          )['w']
          for i in range(count)
        ]
      )
      bound = np.asarray(host.clip, np.float64)
      releases.append(released.astype(np.float64))
      means.append(noiseless(both, bound))
      stds.append(_std(pieces.plan, r) * bound)
      state = server(state, {'w': released[:, None]}, _COHORT)
    return pieces.score(
      Transcript(
        np.stack(releases),
        np.stack(means),
        np.stack(stds),
        pieces.plan.restart_interval,
      )
    )

  return play


def _std(plan: plan_lib.Plan, round: int) -> float:
  """Of the noise of a round, over its clip."""
  z = plan.noise_multiplier
  if round % plan.restart_interval:
    z = plan.noise_multiplier_diff
  return z * 2.0 / (len(SIZES) * min(SIZES))


def noiseless(messages: np.ndarray, bound: np.ndarray) -> np.ndarray:
  """The adversary's model of the aggregator.

  Args:
    messages: float32[2, N, P, D].
    bound: float64[N], the clip of a client's mean.

  Returns:
    float64[2, N, D], the mean that gets the noise.
  """
  wide = messages.astype(np.float64)
  norms = np.linalg.norm(wide, axis=3, keepdims=True)
  scale = np.minimum(1.0, bound[:, None, None] / np.maximum(norms, 1e-300))
  return (wide * scale).mean(2)
