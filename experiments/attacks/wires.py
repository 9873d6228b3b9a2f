"""What messages carry, and what an attacker makes of them.

A `Wire` makes a victim's message with the functions that methods use, and says
how badly inputs explain it. The attacker knows the weights, the shared key and
so every direction, the labels, and the laws of rounding and of noise. Of finite
differences it takes the limit of a small radius: with V the directions, one a
row, and g the gradient,

    scalars of SPSA, a sketch     V g
    coordinates of Ferret         V_l g_l / |g_l| of blocks l, and |g_l|
    private scalars               mean_i clip(V g_i) + noise
    gradient, DP-GD               g;   mean_i clip(g_i) + noise

All numbers are of one batch at the weights as they were drawn.

Shapes: B examples, D pixels, d parameters, K directions, M measured numbers.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.attacks import inversion
from experiments.attacks.victim import (
  DIRECTIONS,
  Victim,
  flat,
  gradient,
  gradients,
  loss_fn,
  message,
)
from jaxfl import (
  allocation,
  blocks,
  calibration,
  codecs,
  discrete,
  keys,
  method,
  noise,
  perturb,
  privacy,
  wire,
)
from jaxfl import typing as jt
from jaxfl.methods import fed_avg, ferret

DELTA = 1e-5
CLIP, SCALAR_CLIP = 3.0, 6.0  # about once and twice the norm of a gradient
LEVELS = 8  # of the code of private scalars
LOCAL_STEPS, LOCAL_LR = 4, 0.1
_BLOCK = 1 << 14  # entries of a block of Ferret; no tensor has more
_PADDED = (256, DIRECTIONS)  # so that few programs are compiled
# standard deviations of what is lost besides noise, relative to the numbers
_EXACT, _LOG8, _BFLOAT16 = 1e-3, 0.04, 2.0**-9
_SIGN_WIDTH = 0.05  # tolerance of a sign, in units of a coordinate's deviation


class Sent(NamedTuple):
  """A message, as seen by who knows all that is shared.

  Attributes:
    num_bytes: of its frame.
    evidence: arrays for `Wire.mismatch`: `values`, their `std`, the mean
      square `power` of the values, and more.
  """

  num_bytes: int
  evidence: dict[str, Any]


class Wire(NamedTuple):
  """A wire format.

  Attributes:
    label: of the row.
    family: of the line in the picture.
    send: victim -> Sent.
    mismatch: see `inversion.reconstruct`.
    epsilon: of the message for a replaced example, or None.
  """

  label: str
  family: str
  send: Callable[[Victim], Sent]
  mismatch: inversion.Mismatch
  epsilon: float | None = None


def _sent(frame: jt.Message, values: jax.Array, std: Any, **more) -> Sent:
  """Evidence; with directions, padded with measurements of nothing."""
  values = jnp.asarray(values)
  std = jnp.broadcast_to(jnp.asarray(std, jnp.float32), values.shape)
  power = jnp.mean(jnp.square(values))
  if 'rows' in more:
    num = len(values)
    add = next(size for size in _PADDED if size >= num) - num
    values, std = jnp.pad(values, (0, add)), jnp.pad(std, (0, add), mode='edge')
    more['rows'] = jnp.pad(more['rows'], ((0, add), (0, 0)))
  evidence = {'values': values, 'std': std, 'power': power, **more}
  return Sent(len(wire.to_bytes(frame)), evidence)


def _rms(values: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.mean(jnp.square(values)))


def _normal(evidence, predicted, temper) -> jax.Array:
  """Half the squared distance in standard deviations."""
  variance = jnp.square(evidence['std'])
  variance += jnp.square(temper) * evidence['power']
  distance = jnp.square(predicted - evidence['values'])
  return 0.5 * jnp.sum(distance / variance)


def _gradient_mismatch(evidence, params, x, labels, temper):
  return _normal(evidence, gradient(params, x, labels), temper)


def _projected_mismatch(evidence, params, x, labels, temper):
  predicted = evidence['rows'] @ gradient(params, x, labels)
  return _normal(evidence, predicted, temper)


def _clipped_mismatch(evidence, params, x, labels, temper):
  clipped = jax.vmap(lambda g: privacy.clip(g, CLIP)[0])
  predicted = clipped(gradients(params, x, labels)).mean(0)
  return _normal(evidence, predicted, temper)


def _clipped_scalars_mismatch(evidence, params, x, labels, temper):
  each = gradients(params, x, labels) @ evidence['rows'].T
  predicted = jnp.clip(each, -SCALAR_CLIP, SCALAR_CLIP).mean(0)
  return _normal(evidence, predicted, temper)


def _one_step(root):
  del root  # Unused.
  return fed_avg.fed_avg(loss_fn, client_optimizer=optax.sgd(1.0))


def dense() -> Wire:
  """FedSGD: the gradient."""

  def send(victim):
    frame = message(_one_step, victim)
    values = flat(frame)
    return _sent(frame, values, _EXACT * _rms(values))

  return Wire('dense gradient', 'dense', send, _gradient_mismatch)


def _local_steps(root):
  del root  # Unused.
  return fed_avg.fed_avg(
    loss_fn, client_optimizer=optax.sgd(LOCAL_LR), local_steps=LOCAL_STEPS
  )


def _local_steps_mismatch(evidence, params, x, labels, temper):
  predicted = message(_local_steps, Victim(params, x, labels))
  return _normal(evidence, flat(predicted), temper)


def local_steps() -> Wire:
  """FedAvg: the difference after steps on the same batch."""

  def send(victim):
    frame = message(_local_steps, victim)
    values = flat(frame)
    return _sent(frame, values, _EXACT * _rms(values))

  label = f'dense difference, {LOCAL_STEPS} local steps'
  return Wire(label, 'dense, local steps', send, _local_steps_mismatch)


def _noise_key(victim: Victim, what: str) -> noise.NoiseKey:
  """Noise that can be drawn again, so that the table can be made again.

  A real run has `NoiseKey.fresh`. The attack does not know it, either way.
  """
  entropy = hashlib.sha256(f'{what} {victim.trial}'.encode()).digest()
  return noise.NoiseKey(entropy, run='attack')


def dp_gd(epsilon: float) -> Wire:
  """The mean of clipped gradients with float noise: one round of DP-GD."""
  plan = calibration.diff2(epsilon, DELTA, num_rounds=1)

  def send(victim):
    size = len(victim.x)
    total = privacy.clipped_sum(
      loss_fn,
      victim.params,
      {'features': victim.x, 'label': victim.labels},
      clip_norm=CLIP,
      microbatch_size=size,
    ).total
    mean = jax.tree.map(lambda s: s / size, total)
    std = plan.noise_multiplier * 2 * CLIP / size
    key = _noise_key(victim, f'dp_gd {epsilon} {size}')
    frame = noise.add_gaussian(key, mean, std, round=0, name='gradient')
    return _sent(frame, flat(frame), std)

  label = f'dense gradient, epsilon {epsilon:g}'
  return Wire(label, 'dense, private', send, _clipped_mismatch, epsilon)


@functools.cache
def _ferret(num: int) -> Callable[[jax.Array], method.Method]:
  return lambda root: ferret.ferret(
    loss_fn,
    root,
    client_optimizer=optax.sgd(1.0),
    coordinates=num,
    codec='float32',
    max_block_size=_BLOCK,
  )


def _coordinates_mismatch(codec, evidence, params, x, labels, temper):
  tree = jax.grad(loss_fn)(params, {'features': x, 'label': labels})
  squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
  norms = jnp.sqrt(jnp.stack(squares) + 1e-12)
  fit = _normal(evidence['norms'], norms, temper)
  predicted = evidence['rows'] @ flat(tree)
  if codec == 'float32':
    return fit + _normal(evidence, predicted, temper)
  margin = jnp.sign(evidence['values']) * predicted
  return fit + jnp.sum(jax.nn.softplus(-margin / (_SIGN_WIDTH + temper)))


_MISMATCHES = {
  codec: functools.partial(_coordinates_mismatch, codec)
  for codec in ('float32', 'sign1')
}


def coordinates(num: int, codec: str) -> Wire:
  """Ferret after one local step: coordinates of blocks, and their norms."""
  code = codecs.codec(codec)

  def send(victim):
    frame = message(_ferret(num), victim)
    frame['coordinates'] = code.encode(frame['coordinates'], None)
    parts = blocks.partition(victim.params, max_size=_BLOCK)
    sizes = [part.size for part in parts]
    norms = frame['norms'].astype(jnp.float32)
    factors = allocation.factors('bytes', sizes, 'rademacher')
    counts = allocation.counts(norms, factors, num)
    block, k = blocks.slots(counts, num)
    owner = np.repeat(np.arange(len(parts)), sizes)  # a block is a tensor
    rows = jnp.where(block[:, None] == owner[None], victim.rows[k], 0)
    return _sent(
      frame,
      code.decode(frame['coordinates'], num),
      _EXACT,
      rows=rows / norms[block][:, None],
      norms={
        'values': norms,
        'std': _BFLOAT16 * norms,
        'power': jnp.mean(jnp.square(norms)),
      },
    )

  kind = {'float32': 'float32', 'sign1': 'one bit'}[codec]
  label = f'{num:,} Ferret coordinates, {kind}'
  return Wire(label, f'Ferret, {kind}', send, _MISMATCHES[codec])


def sketch(num: int) -> Wire:
  """Inner products of the gradient with directions that all clients share."""

  def send(victim):
    batch = {'features': victim.x, 'label': victim.labels}
    tree = jax.grad(loss_fn)(victim.params, batch)
    frame = perturb.project(tree, victim.directions[:num])
    rows = victim.rows[:num]
    return _sent(frame, frame, _EXACT * _rms(frame), rows=rows)

  return Wire(f'sketch of {num:,}', 'sketch', send, _projected_mismatch)


def scalars(num: int, codec: str) -> Wire:
  """Projected gradients of SPSA, all on one batch at fixed weights."""
  code = codecs.codec(codec)

  def send(victim):
    frame = code.encode(victim.scalars[:num], None)
    values = code.decode(frame, num)
    if codec == 'log8':
      std = _LOG8 * jnp.abs(values) + _EXACT
    else:
      std = _EXACT * _rms(values)
    return _sent(frame, values, std, rows=victim.rows[:num])

  kind = {'float32': 'float32', 'log8': 'one byte'}[codec]
  label = f'{num:,} scalar{"s" * (num > 1)}, {kind}'
  return Wire(label, f'scalars, {kind}', send, _projected_mismatch)


@functools.cache
def _event(epsilon: float, num: int, size: int):
  return calibration.integer_noise(
    epsilon,
    DELTA,
    law='discrete_gaussian',
    sensitivity=discrete.sensitivity(LEVELS, size),
    count=num,
  )


def private_scalars(num: int, epsilon: float) -> Wire:
  """Means of clipped scalars of examples, as integers with integer noise."""

  def send(victim):
    size = len(victim.x)
    each = victim.scalars_of_examples[:, :num]
    units = discrete.clipped_units(each, clip_norm=SCALAR_CLIP)
    uniform = keys.uniform(keys.stream(victim.directions[:num], 'rounding'))
    code = discrete.encode(units, uniform, levels=LEVELS, divisor=size)
    sigma = _event(epsilon, num, size).scale
    key = _noise_key(victim, f'scalars {num} {epsilon} {size}')
    drawn = key.discrete_gaussian((num,), sigma, round=0, name='scalars')
    bits = discrete.bits_needed(LEVELS, discrete.gaussian_pmf(sigma))
    frame = discrete.wrap(np.asarray(code, np.int64) + drawn, bits)
    frame = frame.astype(np.uint8 if bits <= 8 else np.uint16)
    decode = functools.partial(
      discrete.decode, clip_norm=SCALAR_CLIP, levels=LEVELS, divisor=size
    )
    values = decode(discrete.unwrap(frame.astype(np.int32), bits))
    # the noise, and at most a quarter for rounding to one of two neighbours
    std = decode(np.float32(np.sqrt(sigma**2 + 0.25)))
    return _sent(frame, values, std, rows=victim.rows[:num])

  label = f'{num:,} private scalars, epsilon {epsilon:g}'
  family = f'private scalars, epsilon {epsilon:g}'
  return Wire(label, family, send, _clipped_scalars_mismatch, epsilon)
