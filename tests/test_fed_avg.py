"""FedAvg: equal to the centralised optimizer with one client."""

import chex
import jax
import numpy as np
import optax
import pytest

from jaxfl.methods import fed_avg
from jaxfl.runtime import simulate
from tests import methods_table as table

OPTIMIZERS = {
  'sgd': lambda: optax.sgd(0.05),
  'momentum': lambda: optax.sgd(0.05, momentum=0.9),
  'adam': lambda: optax.adam(0.01),
}


def run(method, num_clients, num_rounds, num_batches):
  (*_, last) = simulate.simulate(
    method,
    method.init(table.params()),
    table.batch_fn(num_batches),
    simulate.Population(num_clients=num_clients),
    num_rounds=num_rounds,
  )
  return last.state.params


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_one_client_in_one_round_is_the_client_optimizer(name):
  steps = 12
  method = fed_avg.fed_avg(
    table.loss_fn, client_optimizer=OPTIMIZERS[name](), local_steps=steps
  )
  found = run(method, 1, 1, steps)
  optimizer, params = OPTIMIZERS[name](), table.params()
  opt_state = optimizer.init(params)
  batches = table.batch_fn(steps)(0, 0)
  for i in range(steps):
    batch = jax.tree.map(lambda x, i=i: x[i], batches)
    grads = jax.grad(table.loss_fn)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  chex.assert_trees_all_close(found, params, atol=1e-5)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_fed_sgd_is_the_server_optimizer_on_the_mean_gradient(name):
  method = fed_avg.fed_avg(
    table.loss_fn,
    client_optimizer=optax.sgd(1.0),
    server_optimizer=OPTIMIZERS[name](),
  )
  found = run(method, 5, 8, 1)
  optimizer, params = OPTIMIZERS[name](), table.params()
  opt_state = optimizer.init(params)
  for round in range(8):
    batches = [table.batch_fn(1)(round, client) for client in range(5)]
    grads = [
      jax.grad(table.loss_fn)(params, jax.tree.map(lambda x: x[0], batch))
      for batch in batches
    ]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *grads)
    updates, opt_state = optimizer.update(mean, opt_state, params)
    params = optax.apply_updates(params, updates)
  chex.assert_trees_all_close(found, params, atol=1e-5)


def test_local_steps_must_be_positive():
  with pytest.raises(ValueError, match='local_steps must be >= 1, got 0'):
    fed_avg.fed_avg(
      table.loss_fn, client_optimizer=optax.sgd(1.0), local_steps=0
    )
