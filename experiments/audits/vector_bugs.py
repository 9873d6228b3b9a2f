"""Planted bugs of DIFF2: each changes one of the pieces that are shipped.

A bug is a function of the plan that is claimed; its docstring says what is
wrong. Where the pieces refuse a mistake, a bug goes around the refusal.
"""

import jax
import jax.numpy as jnp

from experiments.audits import vectors
from jaxfl import noise, privacy
from jaxfl.plan import Plan

_SHARED = b'the seed that everybody knows...'  # 32 bytes
_BATCH = 6  # of the average of averages: 8 examples are 6 and 2


def half_sensitivity(plan: Plan) -> vectors.Pieces:
  """noise for C in place of 2 C, as if a record were dropped"""
  return vectors.shipped(
    plan._replace(
      noise_multiplier=plan.noise_multiplier / 2,
      noise_multiplier_diff=plan.noise_multiplier_diff / 2,
    )
  )


def average_of_averages(plan: Plan) -> vectors.Pieces:
  """a client averages its batches' means, the short last one like the others"""
  pieces = vectors.shipped(plan)

  def client(state, local, batches, party):
    weight = batches['example_weight']
    first = (jnp.arange(weight.shape[1]) < _BATCH)[None]
    means = []
    for part in (weight * first, weight * ~first):
      message, _, metrics = pieces.client(
        state, local, batches | {'example_weight': part}, party
      )
      scale = weight.sum() / part.sum()  # of a sum over n_p: of a batch's
      means.append(jax.tree.map(lambda x, s=scale: x * s, message))
    return jax.tree.map(lambda a, b: (a + b) / 2, *means), local, metrics

  return pieces._replace(client=client)


def clip_of_the_mean(plan: Plan) -> vectors.Pieces:
  """a client clips the mean over its examples, not the examples"""
  pieces = vectors.shipped(plan)

  def client(state, local, batches, party):
    message, local, metrics = pieces.client(
      state._replace(clip=jnp.float32(jnp.inf)), local, batches, party
    )
    return privacy.clip(message, state.clip)[0], local, metrics

  return pieces._replace(client=client)


def no_clip_on_the_difference(plan: Plan) -> vectors.Pieces:
  """examples are clipped in rounds that restart only"""
  pieces = vectors.shipped(plan)

  def client(state, local, batches, party):
    restart = state.round % plan.restart_interval == 0
    clip = jnp.where(restart, state.clip, jnp.inf)
    return pieces.client(state._replace(clip=clip), local, batches, party)

  return pieces._replace(client=client)


def no_noise_on_the_difference(plan: Plan) -> vectors.Pieces:
  """a difference gets a thousandth of its noise"""
  return vectors.shipped(
    plan._replace(noise_multiplier_diff=plan.noise_multiplier_diff / 1000)
  )


def noise_from_the_shared_key(plan: Plan) -> vectors.Pieces:
  """the noise key is made of a seed that everybody knows"""
  make = lambda: noise.NoiseKey(_SHARED, run='shared')
  return vectors.shipped(plan)._replace(
    key=lambda secret, held: held or make(), score=vectors.subtract(make)
  )


def reused_noise(plan: Plan) -> vectors.Pieces:
  """rounds are counted from the last restart, and the key is made anew"""
  pieces = vectors.shipped(plan)

  def make(state, messages, cohort, key):
    within = state.round % plan.restart_interval
    return pieces.make(state._replace(round=within), messages, cohort, key)

  return pieces._replace(
    make=make,
    key=lambda secret, held: noise.NoiseKey(secret, run='audit'),
    score=vectors.compare_intervals,
  )


BUGS = (
  half_sensitivity,
  average_of_averages,
  clip_of_the_mean,
  no_clip_on_the_difference,
  no_noise_on_the_difference,
  noise_from_the_shared_key,
  reused_noise,
)
