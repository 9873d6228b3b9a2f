"""Rotary positions, and the ways in which models stretch them.

References:
  Su et al., "RoFormer: Enhanced transformer with rotary position embedding",
    2021, https://arxiv.org/abs/2104.09864, eq. 15.
  Peng et al., "YaRN: Efficient context window extension of large language
    models", ICLR 2024, https://arxiv.org/abs/2309.00071, eqs. 17, 21 and 22.
  The Llama 3.1 model card for `llama3`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = ('default', 'linear', 'llama3', 'yarn')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Which rotary positions a model has.

  Attributes:
    theta: base of the frequencies.
    scaling: one of `SCALINGS`.
    factor: by how much the context is stretched.
    low_freq_factor: of `llama3`; longer waves than context / this are stretched
      in full.
    high_freq_factor: of `llama3`; shorter waves than context / this stay.
    beta_fast: of `yarn`; dimensions that turn more often than this stay.
    beta_slow: of `yarn`; those that turn less often are stretched in full.
    truncate: of `yarn`; round the two borders to whole dimensions.
    original_max_positions: context of `llama3` and `yarn` before stretching.
    attention_factor: multiplies sine and cosine.
  """

  theta: float = 10_000.0
  scaling: str = 'default'
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  original_max_positions: int = 0
  attention_factor: float = 1.0

  def __post_init__(self):
    if self.scaling not in SCALINGS:
      raise ValueError(
        f'rope scaling must be one of {", ".join(SCALINGS)}; got '
        f'{self.scaling!r}'
      )


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Radians per position of every pair of dimensions, float32[head_dim / 2]."""
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
  if rope.scaling == 'linear':
    return plain / np.float32(rope.factor)
  if rope.scaling == 'llama3':
    return _llama3(plain, rope).astype(np.float32)
  if rope.scaling == 'yarn':
    keep = 1.0 - _yarn_ramp(rope, head_dim)
    return (plain * keep + plain / rope.factor * (1.0 - keep)).astype(
      np.float32
    )
  return plain


def _llama3(plain, rope):
  turns = rope.original_max_positions * plain / (2 * np.pi)
  span = rope.high_freq_factor - rope.low_freq_factor
  smooth = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
  return (1.0 - smooth) * plain / rope.factor + smooth * plain


def _yarn_ramp(rope, head_dim):
  """0 for the dimensions that stay, 1 for those that are stretched."""

  def dimension(turns):
    waves = rope.original_max_positions / (turns * 2 * math.pi)
    return head_dim * math.log(waves) / (2 * math.log(rope.theta))

  low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  ramp = np.arange(head_dim // 2, dtype=np.float32) - low
  return np.clip(ramp / max(high - low, 1e-3), 0.0, 1.0)


def table(
  rope: Rope, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine float32[B, T, head_dim / 2] at positions integer[B, T]."""
  rates = jnp.asarray(frequencies(rope, head_dim))[None, None, :]
  angles = positions.astype(jnp.float32)[..., None] * rates
  return (
    jnp.cos(angles) * rope.attention_factor,
    jnp.sin(angles) * rope.attention_factor,
  )


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns the halves of [B, T, H, K] by the angles of `table`."""
  dtype = x.dtype
  left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None, :], sin[:, :, None, :]
  return jnp.concatenate(
    [left * cos - right * sin, left * sin + right * cos], axis=-1
  ).astype(dtype)
