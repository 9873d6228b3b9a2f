"""Private scalars: projected gradients that hide single examples.

    g_i = (l_i(w + mu z) - l_i(w - mu z)) / (2 mu)      of one example i
    s = mean_i clip(g_i, C)                             over all n of a client
    code = round(s / (2 C / n)) + noise                 integers
    message = code, cut to the range of a byte

A projected gradient is one number: its noise has one dimension, whatever the
model's size. One step of the code, 2 C / n, is what one example can move s by
if it is another one; the code's sensitivity is therefore 1, and the
discrete Gaussian noise of the message has an exactly known law (see
`jaxfl.discrete`). The code is linear; a logarithmic one has no bounded
sensitivity. Cutting to the range comes after the noise and is free.

**Nobody is trusted.** Every client adds noise to what it sends, and goes on
from the noisy value like everybody else: messages are what is accounted for, so
that the log holds them as it does without privacy. The price is that noise is
relative to the examples of one client. Other methods release means over all
clients (`jaxfl.methods.diff2`, `jaxfl.methods.private_sketch`).

Every release is one of R rounds with K scalars, all with noise z times the
sensitivity, fixed before the run. How many it can be is limited by the byte: it
holds +-127 steps, and noise grows with sqrt(R K). `linear16` has more room.

References:
  Zhang et al., "DPZero: private fine-tuning of language models without
    backpropagation", ICML 2024, https://arxiv.org/abs/2310.09639, algorithm 2.
  Tang et al., "Private fine-tuning of large language models with zeroth-order
    optimization", 2024, https://arxiv.org/abs/2401.04343.
  Both clip and noise as above, in floats and for one client.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfl import checks, codecs, discrete, events, keys
from jaxfl import noise as noise_lib
from jaxfl import typing as jt

LARGEST = {'linear8': 127, 'linear16': 32767}  # code of a codec
CODECS = (*LARGEST, 'float32')


class Plan(NamedTuple):
  """What a client sends in a run, and under which noise.

  Attributes:
    num_rounds: R.
    num_scalars: K, of a client in a round.
    noise_multiplier: z, the noise over the sensitivity of a scalar.
    law: of the noise: `discrete_gaussian`, or `gaussian` for floats.
  """

  num_rounds: int
  num_scalars: int
  noise_multiplier: float
  law: str = 'discrete_gaussian'

  @property
  def adjacency(self) -> str:
    """What the multiplier is relative to: a key of `plan.ADJACENCIES`."""
    return 'replace'

  def rounds(self) -> list[events.Round]:
    """The events of every round, for an example of a client in all of them."""
    z, count = self.noise_multiplier, self.num_scalars
    event = events.Gaussian(z, count)
    if self.law != 'gaussian':
      event = events.IntegerNoise(self.law, z, 1, count)
    return [(event,)] * self.num_rounds


class Settings(NamedTuple):
  """How the clients of a method hide their examples.

  Attributes:
    plan: of the run, from `calibration.scalars`.
    clip_norm: C, of the projected gradient of an example.
    num_examples: of every client, which is public; None for a replica that has
      none of them and follows messages.
    microbatch_size: examples whose losses a client computes at once.
    research_float_noise: needed by the codec `float32`; floats only resemble
      the mechanism that is accounted for.
  """

  plan: Plan
  clip_norm: float
  num_examples: Sequence[int] | np.ndarray | None
  microbatch_size: int = 64
  research_float_noise: bool = False


class Mechanism(NamedTuple):
  """The steps of a client, for one method.

  Attributes:
    code: turns messages back; float32 values in the range of C.
    measure: loss_fn, perturbed, examples, mu -> int32[], float32[]: the sum of
      clipped projected gradients in units of `discrete.clipped_units`, and the
      mean loss, which is private. `perturbed` is scale -> params; examples are
      arrays [N, ...] with `example_weight`.
    encode: units int32[], party id, noise, key uint32[2] -> one entry of a
      message. The key may be shared, the noise must not be.
    prepare: see `Method.prepare`; makes `{'examples', 'noise'}`.
  """

  code: codecs.Codec
  measure: Callable[..., tuple[jax.Array, jax.Array]]
  encode: Callable[..., jax.Array]
  prepare: Callable[..., jt.Batch]


def check_count(settings: Settings, num_scalars: int) -> None:
  """Raises ValueError if a method sends other than the plan's scalars."""
  if num_scalars != settings.plan.num_scalars:
    raise ValueError(
      f'the plan is for {settings.plan.num_scalars} scalars of a client and'
      f' round, the method sends {num_scalars}'
    )


def mechanism(settings: Settings, codec: str) -> Mechanism:
  """Builds the steps of a client.

  Args:
    settings: of the method.
    codec: of a scalar, one of `CODECS`.

  Raises:
    ValueError: naming the setting that is out of range.
  """
  plan, clip_norm = settings.plan, settings.clip_norm
  checks.one_of('codec of private scalars', codec, CODECS)
  if not 2.0**-50 <= clip_norm <= 2.0**50:
    raise ValueError(
      f'clip_norm must be positive and finite (in [2**-50, 2**50]) for a finite'
      f' epsilon_dp, got {clip_norm}'
    )
  if not plan.noise_multiplier > 0:
    raise ValueError(
      f'noise_multiplier must be > 0, got {plan.noise_multiplier}'
    )
  if settings.microbatch_size < 1:
    raise ValueError(
      f'microbatch_size must be >= 1, got {settings.microbatch_size}'
    )
  floats = codec == 'float32'
  if floats != (plan.law == 'gaussian'):
    raise ValueError(f'codec {codec} does not go with {plan.law} noise')
  if floats and not settings.research_float_noise:
    raise ValueError(
      'research_float_noise must be set for codec float32: the gaps of floats'
      ' can tell neighbouring values apart; linear8 and linear16 have integer'
      ' noise'
    )
  known = settings.num_examples is not None
  # without clients, two that nobody asks for
  sizes = np.array(settings.num_examples if known else [2], np.int64)
  if not sizes.size or sizes.min() < 2:
    raise ValueError(
      'num_examples: every client needs two examples at least, to hide one'
    )
  # One step of the code is 2 C / n of the smallest client, or a little more.
  levels = int(sizes.min()) // 2
  step = clip_norm / levels
  largest = LARGEST.get(codec, 0)
  code = codecs.codec(codec, step * largest if largest else 1.0)
  factors = np.array(
    [discrete.code_factor(levels, int(n)) for n in sizes], np.float32
  )
  per_unit = (clip_norm / (sizes * 2.0**discrete.UNIT_BITS)).astype(np.float32)

  def measure(loss_fn, perturbed, examples, mu):
    examples = dict(examples)
    mask = examples.pop('example_weight') > 0
    plus, minus = perturbed(mu), perturbed(-mu)

    def losses(example):
      batch = jax.tree.map(lambda x: x[None], example)
      return loss_fn(plus, batch), loss_fn(minus, batch)

    high, low = jax.lax.map(
      losses, examples, batch_size=min(settings.microbatch_size, len(mask))
    )
    g = (high - low).astype(jnp.float32) / (2.0 * mu)
    units = discrete.clipped_units(g, mask, clip_norm=clip_norm)
    mean = 0.5 * jnp.sum(jnp.where(mask, high + low, 0.0)) / jnp.sum(mask)
    return units, mean

  def encode(units, party_id, noise, key):
    if floats:
      s = units.astype(jnp.float32) * jnp.asarray(per_unit)[party_id]
      return s + noise
    exact = discrete.encode_by(
      units, keys.uniform(key), jnp.asarray(factors)[party_id], levels=levels
    )
    noisy = jnp.clip(exact + noise, -largest, largest)
    return noisy.astype(code.struct(1).dtype)

  def prepare(params, examples, round, client, key):
    del params  # Unused: scalars have no shape.
    noise_lib.check_key(key)
    if round >= plan.num_rounds:
      raise ValueError(
        f'the budget is spent: the plan has {plan.num_rounds} rounds'
      )
    query = {'round': round, 'name': f'scalars of client {client}'}
    shape, z = (plan.num_scalars,), plan.noise_multiplier
    if floats:
      std = z * 2.0 * clip_norm / sizes[client]
      noise = key.gaussian(shape, std, **query).astype(np.float32)
    else:
      noise = key.discrete_gaussian(shape, z, **query).astype(np.int32)
    given = {'examples': dict(examples), 'noise': noise}
    return jax.tree.map(lambda x: np.asarray(x)[None], given)

  return Mechanism(code, measure, encode, prepare)
