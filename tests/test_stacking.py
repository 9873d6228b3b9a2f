"""Batches of clients that differ in length run in one block."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfl import digest, keys
from jaxfl.methods import spsa
from jaxfl.runtime import simulate, stacking

pytestmark = pytest.mark.fast_compile


def batch(*shape, start=1):
  size = int(np.prod(shape))
  tokens = np.arange(start, start + size, dtype=np.uint16).reshape(shape)
  return {'tokens': tokens, 'text': {'mask': np.ones(shape, np.int8)}}


def test_equal_shapes_are_only_stacked():
  a, b = {'x': np.ones((1, 2))}, {'x': np.full((1, 2), 3.0)}
  np.testing.assert_array_equal(
    stacking.stack([a, b], [0, 1])['x'], [[[1.0, 1.0]], [[3.0, 3.0]]]
  )


@settings(deadline=None)
@given(
  st.lists(
    st.tuples(*(st.integers(1, 4),) * 3), min_size=1, max_size=4
  )
)  # fmt: skip
def test_every_array_is_in_its_corner_and_the_rest_is_zero(shapes):
  batches = [batch(*shape, start=7 * i + 1) for i, shape in enumerate(shapes)]
  stacked = stacking.stack(batches, range(len(batches)))
  assert stacked['tokens'].shape == (len(shapes), *np.max(shapes, axis=0))
  assert stacked['tokens'].dtype == np.uint16
  assert stacked['text']['mask'].dtype == np.int8
  for i, shape in enumerate(shapes):
    corner = tuple(slice(n) for n in shape)
    for path in ('tokens', 'mask'):
      get = lambda tree, p=path: (tree | tree['text'])[p]
      got, own = get(stacked)[i], get(batches[i])
      np.testing.assert_array_equal(got[corner], own)
      assert got.sum() == own.sum()  # all own entries are positive


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    ({'tokens': np.ones((1, 2)), 'mask': np.ones((1, 2, 3))},
     r"client 9: 'tokens' has shape \(1, 2\), that of client 4 .* \(1, 2, 3\);"
     ' such shapes can not be stacked'),
    ({'tokens': np.ones((1, 2, 3))},
     'client 9 have the arrays tokens; those of client 4 .* mask, tokens'),
  ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_refused(other, message):
  first = {'tokens': np.ones((1, 2, 3)), 'mask': np.ones((1, 2, 3))}
  with pytest.raises(ValueError, match=message):
    stacking.stack([first, other], [4, 9])


def test_zeros_without_a_mask_are_refused():
  with pytest.raises(
    ValueError, match="client 1: 'x' .* only with an array `ma"
  ):
    stacking.stack([{'x': np.ones((1, 2))}, {'x': np.ones((1, 3))}], [0, 1])


def loss_fn(params, batch):
  """Squared error of the mean embedding of the tokens that count."""
  mask = batch['mask'].astype(jnp.float32)
  count = jnp.maximum(mask.sum(-1), 1.0)
  rows = params['w'][batch['tokens'].astype(jnp.int32)] * mask[..., None]
  return jnp.mean(jnp.square(rows.sum(1) / count[:, None] - 1.0))


def test_clients_of_different_lengths_run_together():
  """As they run alone: sums of whole numbers are exact, padded or not."""
  method = spsa.spsa(loss_fn, keys.root(1), learning_rate=0.25, mu=0.5)
  params = {'w': np.arange(8, dtype=np.float32).reshape(4, 2)}

  def batches(round, client):
    rng = np.random.default_rng([round, client])
    shape = (1, 2, [2, 8, 4, 8][client])
    return {
      'tokens': rng.integers(0, 4, shape, np.uint8),
      'mask': np.ones(shape, np.int8),
    }

  ends = [
    list(
      simulate.simulate(
        method, method.init(params), batches,
        simulate.Population(num_clients=4), num_rounds=1, block_size=size,
      )
    )[-1]
    for size in (1, 3)
  ]  # fmt: skip
  assert len({digest.digest(done.state) for done in ends}) == 1
  assert len({done.loss for done in ends}) == 1
