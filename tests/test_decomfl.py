"""DeComFL: shared directions, a mean that is all one needs, local steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import digest, keys, perturb
from jaxfl import method as method_lib
from jaxfl.methods import decomfl
from jaxfl.runtime import simulate
from tests import methods_table as table

pytestmark = pytest.mark.fast_compile

ROOT = keys.root(6)
compiled = functools.cache(simulate.compile_method)


def build(loss_fn=table.loss_fn, **changes):
  settings = {
    'learning_rate': lambda r: 0.05 / (1 + r), 'mu': 1e-2, 'local_steps': 3,
    'num_perturbations': 4, 'num_rounds': 6,
  }  # fmt: skip
  return decomfl.decomfl(loss_fn, ROOT, **(settings | changes))


def cohort_of(ids, round=0, weights=None):
  n = len(ids)
  return method_lib.Party(
    np.array(ids, np.int32),
    np.full(n, round, np.int32),
    np.array(weights or [1] * n, np.float32),
  )


def messages_of(method, state, ids, round=0):
  batches = [table.batch_fn(method.num_batches)(round, i) for i in ids]
  batches = jax.tree.map(lambda *x: np.stack(x), *batches)
  return compiled(method).client(state, (), batches, cohort_of(ids, round))[0]


def directions_of(round, num_scalars=12):
  """The chain that the module documents."""
  return [
    keys.fold(keys.stream(ROOT, 'cohort'), round, k) for k in range(num_scalars)
  ]


def test_one_client_ends_where_its_local_steps_end():
  """By hand: K steps along P directions each, evaluated where they led."""
  method = build(codec='float32')
  state = method.init(table.params())._replace(round=jnp.int32(1))
  g = np.asarray(messages_of(method, state, [2], 1)[0]).reshape(3, 4)
  after = compiled(method).server(state, g.reshape(1, 12), cohort_of([2], 1))
  w, z = state.params, np.array(directions_of(1)).reshape(3, 4, 2)
  batches = table.batch_fn(3)(1, 2)
  moved = jax.jit(perturb.perturb)
  for k in range(3):
    batch = jax.tree.map(lambda x, k=k: x[k], batches)
    for p in range(4):
      plus, minus = (
        table.loss_fn(moved(w, z[k, p], sign * 1e-2), batch) for sign in (1, -1)
      )
      assert float(plus - minus) / 2e-2 == pytest.approx(g[k, p], abs=2e-3)
    for p in range(4):
      w = moved(w, z[k, p], -0.025 / 4 * g[k, p])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), after.params, w
  )


def test_a_client_that_was_away_catches_up_under_a_schedule():
  """Each missed mean with its own round's rate, not with today's."""
  method = build()
  state = away = method.init(table.params())
  missed = []
  for round in range(5):
    messages = messages_of(method, state, [0, 1, 3], round)
    cohort = cohort_of([0, 1, 3], round, [1, 2, 4])
    missed.append(np.asarray(method.downlink(state, messages, cohort)))
    state = compiled(method).server(state, messages, cohort)
  assert all(x.nbytes == 48 for x in missed)  # whatever the number of clients
  follow = jax.jit(method.follow)
  for down in missed:
    away = follow(away, down)
  assert digest.digest(away) == digest.digest(state)
  late = method.init(table.params())
  for down in missed:  # what the reference code does
    late = follow(late._replace(round=jnp.int32(4)), down)
  assert digest.digest(late.params) != digest.digest(state.params)


def test_mean_is_by_weight_and_leaves_out_what_is_not_finite():
  method = build(codec='float32', local_steps=1, num_perturbations=2)
  messages = jnp.array([[1.0, 2.0], [3.0, jnp.nan], [5.0, 7.0]])
  cohort = cohort_of([4, 0, 2], weights=[1, 2, 1])
  down = method.downlink(None, messages, cohort)
  np.testing.assert_allclose(down, [12 / 4, 9 / 2], rtol=1e-6)
  none = method.downlink(None, messages * jnp.nan, cohort)
  np.testing.assert_array_equal(none, [0, 0])


def test_all_parties_of_a_round_share_their_directions():
  seen = []

  def loss_fn(params, batch):
    jax.debug.callback(lambda w: seen.append(np.array(w)), params['other'])
    return table.loss_fn(params, batch)

  method = build(loss_fn, local_steps=1, num_perturbations=1)
  state = method.init(table.params())
  for ids, round in (([0, 5], 0), ([0], 1)):
    messages_of(method, state, ids, round)
  jax.effects_barrier()
  first, other = ({x.tobytes() for x in part} for part in (seen[:4], seen[4:]))
  assert len(first) == len(other) == 2  # plus and minus, whoever asked
  assert not first & other


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'local_steps': 0}, 'local_steps must be >= 1'),
    ({'num_perturbations': 0}, 'num_perturbations must be >= 1'),
    ({'sides': 'both'}, 'sides must be one of two_sided, one_sided'),
    ({'weights': 'int8'}, 'weights must be one of'),
    ({'mu': 0.0}, 'mu must be > 0'),
    ({'num_rounds': None}, 'num_rounds'),
  ],
)
def test_bad_settings_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    build(**changes)
