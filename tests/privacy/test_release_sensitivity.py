"""Neighbours by brute force: releases in float64, before their noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import method as method_lib
from jaxfl import noise
from jaxfl import plan as plan_lib
from jaxfl.methods import diff2

SIZES = (4, 7, 5)
COHORT = method_lib.Party(
  np.arange(3, dtype=np.int32), np.zeros(3, np.int32), np.ones(3, np.float32)
)


def loss_fn(params, batch):
  """Of curvature and slope that an example can make as large as it likes."""
  out = jnp.tanh(batch['x'] @ params['w']) @ params['v'] + params['b']
  error = out - batch['y']
  return jnp.mean(0.5 * error**2 * batch['slope'])


def params():
  rng = np.random.default_rng(3)
  return {
    'w': rng.normal(size=(3, 4)).astype(np.float32),
    'v': rng.normal(size=4).astype(np.float32),
    'b': np.float32(0.1),
  }


def data(rng):
  """Stacked batches of all clients, padded."""
  shape = (3, 1, max(SIZES))
  weight = np.arange(max(SIZES)) < np.array(SIZES)[:, None]
  return {
    'x': rng.normal(size=(*shape, 3)).astype(np.float32),
    'y': rng.normal(size=shape).astype(np.float32),
    'slope': np.ones(shape, np.float32),
    'example_weight': weight[:, None].astype(np.float32),
  }


def changed(rng, batches, client, rows):
  """Two neighbours: the rows of a client pull one way, or the other."""
  one = {k: v.copy() for k, v in batches.items()}
  slope = 10.0 ** rng.uniform(-1, 7)
  place = (client, 0, rows)
  one['x'][place] = rng.normal(size=3) * 10.0 ** rng.uniform(-2, 1)
  one['slope'][place] = slope
  two = {k: v.copy() for k, v in one.items()}
  two['slope'][place] = -slope if rng.integers(2) else rng.normal()
  if not rng.integers(8):
    two['x'][place] = np.nan
  return one, two


@pytest.mark.parametrize('unit', ['record', 'client'])
@pytest.mark.parametrize('round', [0, 1])
def test_neighbours_move_a_release_by_its_sensitivity(unit, round, monkeypatch):
  """By 2 C / (P n_min) or 2 C / P, in float64, at most."""
  stds = []

  def without_noise(key, mean, std, **query):
    stds.append(std)
    return mean

  monkeypatch.setattr(noise, 'add_gaussian', without_noise)
  method = diff2.diff2(
    loss_fn,
    plan=plan_lib.Plan(8, 4, 0.7, 0.3),
    learning_rate=0.1,
    clip_norm=0.8,
    clip_norm_diff=0.3,
    num_examples=SIZES,
    unit=unit,
    microbatch_size=3,
    allow_unstable=True,
    research_float_noise=True,
  )
  release = method.release
  assert release is not None
  run = jax.jit(jax.vmap(method.client, (None, None, 0, 0)))

  def released(state, batches):
    messages, _, _ = run(state, (), batches, COHORT)
    mean = release.make(state, jax.device_get(messages), COHORT, None)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(mean)])

  rng = np.random.default_rng(0)
  state = method.init(params())
  if round:
    step = jax.tree.map(lambda x: rng.normal(size=(1, *x.shape)), params())
    step = jax.tree.map(lambda x: x.astype(np.float32), step)
    state = method.server(state, step, COHORT)
  divisor = 3 * min(SIZES) if unit == 'record' else 3
  bound = 2 * float(state.clip) / divisor
  worst = 0.0
  for trial in range(60):
    client = trial % 3
    size = SIZES[client]
    rows = np.arange(size) if unit == 'client' else rng.integers(size)
    here, there = changed(rng, data(rng), client, rows)
    moved = released(state, here) - released(state, there)
    worst = max(worst, float(np.linalg.norm(moved)) / bound)
  assert 0.999 < worst <= 1 + 1e-9
  z = 0.3 if round else 0.7
  np.testing.assert_allclose(stds, z * bound, rtol=1e-12)
