"""A small task, the same for every simulator: needs nothing but JAX."""

import jax
import jax.numpy as jnp
import numpy as np

FEATURES, HIDDEN, CLASSES = 64, 32, 10  # 2,410 parameters
STEPS, BATCH = 4, 16  # of a client in a round
RATE, MU = 0.05, 1e-3


def params() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  shapes = {
    'w1': (FEATURES, HIDDEN), 'b1': (HIDDEN,),
    'w2': (HIDDEN, CLASSES), 'b2': (CLASSES,),
  }  # fmt: skip
  return {
    name: 0.1 * rng.standard_normal(shape, np.float32)
    for name, shape in shapes.items()
  }


def loss_fn(params, batch) -> jax.Array:
  """Mean cross-entropy of a network with one hidden layer."""
  hidden = jnp.tanh(batch['x'] @ params['w1'] + params['b1'][None])
  logits = hidden @ params['w2'] + params['b2'][None]
  picked = jnp.take_along_axis(
    jax.nn.log_softmax(logits), batch['y'][:, None], axis=1
  )
  return -jnp.mean(picked)


def data(client: int) -> dict[str, np.ndarray]:
  """All examples of a client, STEPS batches of them."""
  rng = np.random.default_rng(client)
  count = STEPS * BATCH
  return {
    'x': rng.standard_normal((count, FEATURES), np.float32),
    'y': rng.integers(0, CLASSES, count).astype(np.int32),
  }
