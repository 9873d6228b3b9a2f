"""Private noise: its law, one draw a query, keys that can not be mixed up."""

import copy
import hashlib
import math
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfl import keys, noise

SECRET = bytes(range(32))


def make(run='run'):
  return noise.NoiseKey(SECRET, run=run)


def accepted(sample, law):
  """Kolmogorov-Smirnov at a level of 1e-4, which fixed keys pass or fail."""
  return stats.kstest(sample, law).pvalue > 1e-4


def test_gaussian_noise_has_the_scale_it_is_told_and_no_other():
  sample = make().gaussian((100_001,), 3.0, round=0, name='x')
  assert sample.dtype == np.float64
  assert accepted(sample, stats.norm(scale=3.0).cdf)
  assert not accepted(sample, stats.norm(scale=3.0 * 1.05).cdf)
  assert not accepted(sample, stats.norm(scale=3.0 / 1.05).cdf)
  assert not accepted(sample, stats.norm(0.1, 3.0).cdf)
  # entries of one draw: neighbours, and the two halves of a pair
  half = len(sample) // 2
  for lag in (1, half, half + 1):
    correlation = np.corrcoef(sample[:-lag], sample[lag:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(sample) - lag)
  assert not make().gaussian((2, 3), 0.0, round=0, name='x').any()


def test_a_draw_is_a_function_of_entropy_run_round_and_name():
  draw = lambda key, round, name: tuple(
    key.gaussian((2,), 1.0, round=round, name=name)
  )
  assert draw(make(), 3, 'a') == draw(make(), 3, 'a')
  others = [
    draw(make(), 4, 'a'),
    draw(make(), 3, 'b'),
    draw(make('other'), 3, 'a'),
    draw(make('run' + '\x00' * 8), 3, 'a'),
    draw(noise.NoiseKey(SECRET[::-1], run='run'), 3, 'a'),
    draw(noise.NoiseKey.fresh(run='run'), 3, 'a'),
    draw(noise.NoiseKey.fresh(run='run'), 3, 'a'),
  ]
  assert len({draw(make(), 3, 'a'), *others}) == 8
  # any language can make them: the fields with their lengths, 8 bytes each
  fields = b''.join(
    len(x).to_bytes(8) + x for x in (b'run', (3).to_bytes(8), b'a')
  )
  stream = hashlib.shake_256(b'jaxfl private noise 1\n' + SECRET + fields)
  words = np.frombuffer(stream.digest(16), '<u8') >> np.uint64(11)
  radius = math.sqrt(-2 * math.log((float(words[0]) + 0.5) * 2.0**-53))
  angle = 2 * math.pi * (float(words[1]) + 0.5) * 2.0**-53
  expected = [radius * math.cos(angle), radius * math.sin(angle)]
  np.testing.assert_allclose(draw(make(), 3, 'a'), expected, rtol=1e-14)


def test_the_same_noise_is_never_drawn_twice():
  key = make()
  key.gaussian((2,), 1.0, round=0, name='a')
  key.gaussian((2,), 1.0, round=1, name='a')
  key.gaussian((2,), 1.0, round=0, name='b')
  for draw in (
    lambda: key.gaussian((2,), 1.0, round=0, name='a'),
    lambda: key.gaussian((9,), 2.0, round=np.int32(1), name='a'),  # pyright: ignore[reportArgumentType]
    lambda: key.discrete_gaussian((2,), 1.0, round=0, name='b'),
    lambda: key.bernoulli((2,), 0.5, round=0, name='b'),
  ):
    with pytest.raises(RuntimeError, match='has been drawn before'):
      draw()
  with pytest.raises(ValueError, match='std must be finite'):
    key.gaussian((2,), -1.0, round=7, name='a')
  key.gaussian((2,), 1.0, round=7, name='a')  # a refused draw costs nothing


def test_a_forked_process_draws_nothing(monkeypatch):
  key = make()
  monkeypatch.setattr(os, 'getpid', lambda: -1)
  with pytest.raises(RuntimeError, match='belongs to another process'):
    key.gaussian((2,), 1.0, round=0, name='a')


@pytest.mark.parametrize(
  ('value', 'kind'),
  [
    (7, 'an int'),
    ('0' * 32, 'a str'),
    (None, 'a NoneType'),
    (keys.root(7), 'an array (uint32); keys of jaxfl.keys are shared'),
    (np.zeros(32, np.uint8), 'an array (uint8)'),
    (bytearray(32), 'a bytearray'),
  ],
)
def test_seeds_and_shared_keys_make_no_noise_key(value, kind):
  with pytest.raises(TypeError) as error:
    noise.NoiseKey(value, run='run')
  assert kind in str(error.value)
  assert 'NoiseKey.fresh' in str(error.value)
  with pytest.raises(TypeError, match='noise needs a NoiseKey'):
    noise.add_gaussian(value, {}, 1.0, round=0, name='x')


def test_a_typed_key_makes_no_noise_key():
  with pytest.raises(TypeError, match='not an array'):
    noise.NoiseKey(jax.random.key(0), run='run')  # pyright: ignore[reportArgumentType]


def test_other_arguments_are_checked():
  with pytest.raises(ValueError, match='entropy must be 32 bytes, got 16'):
    noise.NoiseKey(bytes(16), run='run')
  with pytest.raises(TypeError, match='run must be a name, got an int'):
    noise.NoiseKey(SECRET, run=3)  # pyright: ignore[reportArgumentType]
  for round in (True, 0.0, jnp.int32(0)):
    with pytest.raises(TypeError, match='round must be an integer'):
      make().gaussian((), 1.0, round=round, name='x')  # pyright: ignore
  for rate in (0.0, 1.0, -1.0):
    with pytest.raises(ValueError, match='rate must be in'):
      make().bernoulli((), rate, round=0, name='x')


def test_a_noise_key_is_no_shared_key():
  key = make()
  for use in (
    lambda: keys.fold(key, 1),  # pyright: ignore[reportArgumentType]
    lambda: keys.stream(key, 'x'),  # pyright: ignore[reportArgumentType]
    lambda: keys.uniform(key),  # pyright: ignore[reportArgumentType]
    lambda: jnp.asarray(key),
    lambda: np.asarray(key),
    lambda: jax.jit(lambda x: x)(key),
    lambda: jax.random.normal(key),  # pyright: ignore[reportArgumentType]
  ):
    with pytest.raises(TypeError):
      use()


def test_a_noise_key_stays_where_it_is():
  key = make()
  for use in (pickle.dumps, copy.copy, copy.deepcopy):
    with pytest.raises(TypeError, match='private to its process'):
      use(key)
  assert not hasattr(key, '__dict__')
  for text in (repr(key), str(key), f'{key}', f'{[key]}'):
    assert 'NoiseKey' in text
    assert SECRET.hex() not in text
    assert repr(SECRET) not in text
  assert jax.tree.leaves({'key': key}) == [key]  # no pytree


def test_nothing_is_drawn_while_a_function_is_traced():
  key = make()
  with pytest.raises(TypeError, match='drawn on the host'):
    jax.jit(lambda r: key.gaussian((2,), 1.0, round=r, name='x'))(0)
  with pytest.raises(jax.errors.TracerArrayConversionError):
    jax.jit(lambda x: noise.add_gaussian(key, x, 1.0, round=1, name='x'))(
      jnp.zeros(2)
    )


def test_noise_on_a_pytree():
  tree = {'w': np.full((30, 50), 7, np.float32), 'b': jnp.zeros(2000)}
  found = noise.add_gaussian(make(), tree, 0.5, round=2, name='v')
  assert {k: v.dtype for k, v in found.items()} == {
    'w': np.float32, 'b': np.float32,
  }  # fmt: skip
  assert accepted(found['b'], stats.norm(scale=0.5).cdf)
  assert accepted(found['w'].ravel(), stats.norm(7.0, 0.5).cdf)
  again = make().gaussian((2000,), 0.5, round=2, name='v/b')
  np.testing.assert_array_equal(found['b'], again.astype(np.float32))
  for narrow in (jnp.bfloat16, jnp.float16, jnp.int32):
    with pytest.raises(TypeError, match="added in float32, 'b' is"):
      noise.add_gaussian(
        make(), {'b': jnp.zeros(2, narrow)}, 0.5, round=0, name='v'
      )


def test_poisson_sampling():
  found = make().bernoulli((40_000,), 0.3, round=0, name='sample')
  error = np.sqrt(0.3 * 0.7 / 40_000)
  assert abs(found.mean() - 0.3) < 4 * error
  assert abs(found.mean() - 0.32) > 4 * error
