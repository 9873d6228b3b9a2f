"""A network with one hidden layer of softplus units, for tables and features.

    y = W2 softplus(W1 x + b1) + b2

With 10 hidden units it is the network that DIFF2 was measured with. Softplus is
smooth, as the theory of gradient differences wants. Weights start as PyTorch's
linear layers do, see `initializers.uniform`.

Shapes: B examples, D features, H hidden units, O outputs.

References:
  Murata and Suzuki, "DIFF2: differential private optimization via gradient
    differences for nonconvex distributed learning", ICML 2023,
    https://arxiv.org/abs/2302.03884.
"""

import functools

import jax
import jax.numpy as jnp

from jaxfl import typing as jt
from jaxfl.models import initializers


def init(
  key: jax.Array, num_features: int, hidden_units: int, num_outputs: int
) -> jt.Params:
  """Parameters by layer, `hidden` and `out`, float32.

  Args:
    key: typed.
    num_features: D.
    hidden_units: H.
    num_outputs: O.

  Raises:
    ValueError: if a size is not positive.
  """
  sizes = (num_features, hidden_units, num_outputs)
  if min(sizes) < 1:
    raise ValueError(
      'num_features, hidden_units and num_outputs must be positive, got'
      f' {sizes}'
    )
  return _init(key, num_features, hidden_units, num_outputs)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _init(key, num_features, hidden_units, num_outputs):
  def layer(key, fan_in, fan_out):
    drawn = initializers.uniform(fan_in)(key, (fan_in + 1, fan_out))
    return {'kernel': drawn[:-1], 'bias': drawn[-1]}

  first, second = jax.random.split(key)
  return {
    'hidden': layer(first, num_features, hidden_units),
    'out': layer(second, hidden_units, num_outputs),
  }


def outputs(params: jt.Params, features: jt.Array) -> jax.Array:
  """What the network makes of features.

  Args:
    params: as from `init`; the computation is in their dtype.
    features: float[B, D].

  Returns:
    float32[B, O].
  """
  hidden, out = params['hidden'], params['out']
  x = jnp.asarray(features).astype(hidden['kernel'].dtype)
  x = jax.nn.softplus(x @ hidden['kernel'] + hidden['bias'][None, :])
  y = x @ out['kernel'] + out['bias'][None, :]
  return y.astype(jnp.float32)
