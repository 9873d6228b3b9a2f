"""The decoder against plain NumPy, its files, and the embedded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import keys
from jaxfl.models import decoder

CONFIG = decoder.Config(num_layers=3, model_dim=16, num_heads=2, mlp_dim=24)


@pytest.fixture(scope='module')
def params():
  """Random parameters, gains and biases included."""
  tree = decoder.init(CONFIG, jax.random.key(0))
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), tree
  )


@pytest.fixture(scope='module')
def tokens():
  return np.random.default_rng(2).integers(0, 256, (2, 8), np.uint8)


def _numpy_logits(config, params, tokens):
  """The same model by loops, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  head = config.model_dim // config.num_heads

  def norm(x, gain):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain

  def turn(x, position):
    pairs = x[: head // 2] + 1j * x[head // 2 :]
    rates = config.rope_base ** (-np.arange(head // 2) / (head // 2))
    pairs = pairs * np.exp(1j * position * rates)
    return np.concatenate([pairs.real, pairs.imag])

  def sequence(row):
    x = p['embedding'][row]
    for i in range(config.num_layers):
      layer = {name: value[i] for name, value in p['layers'].items()}
      q, k, v = np.split(norm(x, layer['gain_attention']) @ layer['qkv'], 3, 1)
      y = np.zeros_like(x)
      for h in range(config.num_heads):
        part = slice(h * head, (h + 1) * head)
        for t in range(len(row)):
          scores = np.array(
            [turn(q[t, part], t) @ turn(k[s, part], s) for s in range(t + 1)]
          )
          weights = np.exp(scores / np.sqrt(head))
          y[t, part] = weights / weights.sum() @ v[: t + 1, part]
      x = x + y @ layer['out']
      hidden = np.maximum(norm(x, layer['gain_mlp']) @ layer['up'], 0) ** 2
      x = x + hidden @ layer['down']
    return norm(x, p['gain']) @ p['embedding'].T + p['bias']

  return np.stack([sequence(row) for row in tokens])


def test_logits_equal_numpy(params, tokens):
  logits = decoder.apply(CONFIG, params, tokens)
  assert (logits.shape, logits.dtype) == ((2, 8, 256), jnp.float32)
  want = _numpy_logits(CONFIG, params, tokens)
  np.testing.assert_allclose(logits, want, atol=1e-5, rtol=1e-5)


def test_losses_equal_numpy(params, tokens):
  mask = np.ones((2, 7), np.uint8)
  mask[1, 3:] = 0
  logits = _numpy_logits(CONFIG, params, tokens[:, :-1])
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  bytes_ = -np.take_along_axis(logs, tokens[:, 1:, None].astype(int), 2)[..., 0]
  hits = logits.argmax(-1) == tokens[:, 1:]
  want = [bytes_[0].mean(), bytes_[1, :3].mean()]
  batch = {'tokens': tokens, 'mask': mask}
  got = decoder.make_example_loss(CONFIG)(params, batch)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  loss = decoder.make_loss(CONFIG)(params, batch)
  np.testing.assert_allclose(loss, np.mean(want), rtol=1e-5)
  metrics = decoder.make_evaluate(CONFIG)(
    params, {name: x[None] for name, x in batch.items()}
  )
  nats = (bytes_ * mask).sum() / 10
  np.testing.assert_allclose(metrics['loss'], nats, rtol=1e-5)
  np.testing.assert_allclose(metrics['bits_per_byte'], nats / np.log(2), 1e-5)
  np.testing.assert_allclose(metrics['accuracy'], (hits * mask).sum() / 10)


def test_an_example_without_targets_has_no_loss(params, tokens):
  batch = {'tokens': tokens, 'mask': np.array([[0] * 7, [1] * 7])}
  losses = decoder.make_example_loss(CONFIG)(params, batch)
  assert losses[0] == 0 < losses[1]


def test_later_bytes_do_not_matter(params, tokens):
  changed = tokens.copy()
  changed[:, 5] += 1
  before, after = (decoder.apply(CONFIG, params, x) for x in (tokens, changed))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


def test_layers_are_stacked_and_differ(params):
  assert params['layers']['qkv'].shape == (3, 16, 48)
  fresh = decoder.init(CONFIG, jax.random.key(0))['layers']['qkv']
  assert (fresh[0] != fresh[1]).any()
  text = jax.jit(decoder.make_loss(CONFIG)).lower(
    params, {'tokens': np.zeros((1, 5), np.uint8)}
  )
  assert text.as_text().count('while') == 1


def test_safetensors_round_trip(params, tmp_path):
  path = tmp_path / 'model.safetensors'
  decoder.save(path, CONFIG, params, metadata={'note': 'a test'})
  config, again = decoder.load(path)
  assert config == CONFIG
  assert jax.tree.structure(again) == jax.tree.structure(params)
  for (name, a), b in zip(
    keys.named_leaves(params), jax.tree.leaves(again), strict=True
  ):
    np.testing.assert_array_equal(a, b, err_msg=name)


def test_bad_files_are_refused(params, tmp_path):
  path = tmp_path / 'model.safetensors'
  with pytest.raises(FileNotFoundError, match='no model file'):
    decoder.load(path)
  deeper = decoder.Config(num_layers=4, model_dim=16, num_heads=2, mlp_dim=24)
  decoder.save(path, deeper, params)
  with pytest.raises(
    ValueError, match=r'layers/down.* is float32\[3, 24, 16\]'
  ):
    decoder.load(path)
  decoder.save(path, CONFIG, {'w': params['bias']})
  with pytest.raises(ValueError, match=r"missing tensors \['bias'.*\['w'\]"):
    decoder.load(path)
  decoder.save_file({'w': np.zeros(1)}, path)
  with pytest.raises(ValueError, match='has the format None'):
    decoder.load(path)


@pytest.mark.parametrize(
  ('field', 'value'), [('num_layers', 0), ('model_dim', 6), ('num_heads', -1)]
)
def test_bad_configs_are_refused(field, value):
  with pytest.raises(ValueError, match=field):
    decoder.Config(**{field: value})


SNIPPET = (
  'It was a bright morning, and the old man went down to the river with his '
  'dog. "I have not seen so fair a day since I was a boy," he said, and he '
  'laughed. The water was cold and clear, and the sun stood high above it.'
)


def test_embedded_weights_predict_english():
  config, params = decoder.load_embedded()
  tokens = np.frombuffer(SNIPPET.encode(), np.uint8)[None, :193]
  loss = decoder.make_loss(config)(params, {'tokens': tokens})
  assert 0.8 < loss / np.log(2) < 2.4
