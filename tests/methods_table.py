"""One row per method for the contract tests, and a problem to run them on."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from jaxfl import keys
from jaxfl import method as method_lib
from jaxfl.methods import decomfl, fed_avg, fedkseed, ferret, spsa

NUM_CLIENTS = 6
ROOT = keys.root(2**40 + 17)


class Case(NamedTuple):
  """How a method is built for a loss, and what it promises."""

  build: Callable[..., method_lib.Method]
  exact: bool  # order-free and equal on every device
  converges_to: float  # share of the initial loss, after 60 rounds


def params():
  rng = np.random.default_rng(0)
  return {
    'layer': {'w': rng.normal(0, 0.5, (3, 5)).astype(np.float32)},
    'other': rng.normal(0, 0.5, (3, 5)).astype(np.float32),
    'bias': np.zeros(3, np.float32),
  }


def loss_fn(params, batch):
  """A quadratic whose minimum is at 0.25 everywhere, with noise per example."""
  pull = jnp.mean(batch['noise'])
  terms = [
    jnp.sum(jnp.square(x - 0.25)) + pull * jnp.sum(x)
    for x in (params['layer']['w'], params['other'], params['bias'])
  ]
  return 0.5 * (terms[0] + terms[1] + terms[2])


def batch_fn(num_batches, noise=0.01):
  def batches(round, client):
    rng = np.random.default_rng([round, client])
    shape = (num_batches, 4)
    return {'noise': rng.normal(0, noise, shape).astype(np.float32)}

  return batches


def _spsa(**changes):
  def build(loss_fn=loss_fn, **more):
    settings = {'learning_rate': 0.05, 'mu': 1e-2, 'num_perturbations': 2}
    return spsa.spsa(loss_fn, ROOT, **(settings | changes | more))

  return build


def _fedkseed(**changes):
  def build(loss_fn=loss_fn, **more):
    settings = {
      'learning_rate': 0.03, 'mu': 1e-2, 'num_seeds': 256, 'local_steps': 4
    }  # fmt: skip
    return fedkseed.fedkseed(loss_fn, ROOT, **(settings | changes | more))

  return build


def _decomfl(**changes):
  def build(loss_fn=loss_fn, **more):
    settings = {
      'learning_rate': 0.06, 'mu': 1e-2, 'local_steps': 2,
      'num_perturbations': 4,
    }  # fmt: skip
    return decomfl.decomfl(loss_fn, ROOT, **(settings | changes | more))

  return build


def _ferret(**changes):
  def build(loss_fn=loss_fn, **more):
    settings = {
      'client_optimizer': optax.sgd(0.1), 'local_steps': 2, 'coordinates': 48
    }  # fmt: skip
    return ferret.ferret(loss_fn, ROOT, **(settings | changes | more))

  return build


def _fed_avg(**changes):
  def build(loss_fn=loss_fn, **more):
    settings = {'client_optimizer': optax.sgd(0.1)}
    return fed_avg.fed_avg(loss_fn, **(settings | changes | more))

  return build


_LINEAR = lambda r: 0.06 * (1 - r / 100)

CASES = {
  'spsa': Case(_spsa(), True, 0.02),
  'spsa-sign1': Case(
    _spsa(codec='sign1', codec_scale=1.0, learning_rate=0.08), True, 0.1
  ),
  'spsa-one-sided': Case(
    _spsa(sides='one_sided', mu=1e-3, codec='log8_stochastic'), True, 0.02
  ),
  'spsa-sum-popcount16': Case(
    _spsa(
      scaling='sum', learning_rate=0.05 / 12, distribution='popcount16',
      codec='linear8_stochastic', codec_scale=32.0,
    ),
    True, 0.02,
  ),
  'spsa-256': Case(_spsa(num_perturbations=256), True, 0.02),
  'spsa-rank4': Case(_spsa(distribution='rank4'), True, 0.02),
  'spsa-gaussian': Case(_spsa(distribution='gaussian'), False, 0.02),
  'spsa-schedule-decay': Case(
    _spsa(learning_rate=_LINEAR, weight_decay=1e-3, num_rounds=100), True, 0.05
  ),
  'spsa-float32-weights': Case(
    _spsa(weights='float32', weight_decay=1e-3, codec='float32'), True, 0.05
  ),
  'fedkseed': Case(_fedkseed(), True, 0.02),
  'fedkseed-sent': Case(
    _fedkseed(send_indices=True, codec='bfloat16', distribution='popcount16'),
    True, 0.02,
  ),
  'fedkseed-schedule-decay': Case(
    _fedkseed(learning_rate=_LINEAR, weight_decay=1e-3, num_rounds=100),
    True, 0.05,
  ),
  'fedkseed-pro-weighted': Case(
    _fedkseed(pro=True, importance_weight=True, codec='float32'), True, 0.02
  ),
  'decomfl-one-sided': Case(
    _decomfl(sides='one_sided', mu=1e-3, codec='log8', weights='float32'),
    True, 0.02,
  ),
  'decomfl': Case(
    _decomfl(learning_rate=_LINEAR, num_rounds=100), True, 0.02
  ),
  'ferret': Case(_ferret(server_lr=0.5), True, 0.02),
  'ferret-schedule': Case(
    _ferret(
      server_lr=lambda r: 0.7 * (1 - r / 100), num_rounds=100,
      client_optimizer=optax.adam(0.02), codec='linear8_stochastic',
      distribution='popcount16', allocation='compute',
    ),
    True, 0.02,
  ),
  'ferret-adam-server': Case(
    _ferret(server_optimizer=optax.adam(0.05), codec='bfloat16'), False, 0.02
  ),
  'fed_avg': Case(
    _fed_avg(client_optimizer=optax.adam(0.02), local_steps=2), False, 0.02
  ),
  'fed_opt': Case(
    _fed_avg(server_optimizer=optax.sgd(0.5, momentum=0.5)), False, 0.02
  ),
  'fed_sgd': Case(_fed_avg(client_optimizer=optax.sgd(1.0),
                           server_optimizer=optax.sgd(0.2)), False, 0.02),
}  # fmt: skip
