"""The byte model and its losses against plain NumPy; the embedded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import objectives
from jaxfl.models import native, transformer

CONFIG = native.byte_config(num_layers=3, model_dim=16, num_heads=2, mlp_dim=24)
logits_of = jax.jit(transformer.logits, static_argnums=0)


@pytest.fixture(scope='module')
def params():
  """Random parameters, scales and biases included."""
  tree = jax.jit(lambda key: transformer.init(CONFIG, key))(jax.random.key(0))
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
  head = config.head_dim

  def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

  def turn(x, position):
    pairs = x[: head // 2] + 1j * x[head // 2 :]
    rates = config.rope.theta ** (-np.arange(head // 2) / (head // 2))
    pairs = pairs * np.exp(1j * position * rates)
    return np.concatenate([pairs.real, pairs.imag])

  def sequence(row):
    embedding = p['embed']['embedding']
    x = embedding[row]
    for i in range(config.num_layers):
      layer = jax.tree.map(lambda value: value[i], p['layers'])
      attention, mlp = (
        {name: part['kernel'] for name, part in layer[kind].items()}
        for kind in ('attention', 'mlp')
      )
      y = norm(x, layer['attention_norm']['scale'])
      q, k, v = (y @ attention[name] for name in 'qkv')
      y = np.zeros_like(x)
      for h in range(config.num_heads):
        part = slice(h * head, (h + 1) * head)
        for t in range(len(row)):
          scores = np.array(
            [turn(q[t, part], t) @ turn(k[s, part], s) for s in range(t + 1)]
          )
          weights = np.exp(scores / np.sqrt(head))
          y[t, part] = weights / weights.sum() @ v[: t + 1, part]
      x = x + y @ attention['o']
      hidden = norm(x, layer['mlp_norm']['scale']) @ mlp['up']
      x = x + np.maximum(hidden, 0) ** 2 @ mlp['down']
    x = norm(x, p['final_norm']['scale'])
    return x @ embedding.T + p['lm_head']['bias']

  return np.stack([sequence(row) for row in tokens])


def test_logits_equal_numpy(params, tokens):
  logits = logits_of(CONFIG, params, tokens)
  assert (logits.shape, logits.dtype) == ((2, 8, 256), jnp.float32)
  want = _numpy_logits(CONFIG, params, tokens)
  np.testing.assert_allclose(logits, want, atol=1e-5, rtol=1e-5)


def test_losses_equal_numpy(params, tokens):
  weights = np.ones((2, 7), np.float32)
  weights[1, 3:] = 0
  logits = _numpy_logits(CONFIG, params, tokens[:, :-1])
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  bytes_ = -np.take_along_axis(logs, tokens[:, 1:, None].astype(int), 2)[..., 0]
  batch = {'tokens': tokens, 'weights': weights}
  loss = jax.jit(objectives.lm_loss(CONFIG))(params, batch)
  np.testing.assert_allclose(loss, (bytes_ * weights).sum() / 10, rtol=1e-5)


def test_later_bytes_do_not_matter(params, tokens):
  changed = tokens.copy()
  changed[:, 5] += 1
  before, after = (logits_of(CONFIG, params, x) for x in (tokens, changed))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


def test_layers_are_stacked_and_differ(params):
  q = lambda tree: tree['layers']['attention']['q']['kernel']
  assert q(params).shape == (3, 16, 16)
  key = jax.random.key(0)
  fresh = q(jax.jit(lambda key: transformer.init(CONFIG, key))(key))
  assert (fresh[0] != fresh[1]).any()
  text = jax.jit(objectives.lm_loss(CONFIG)).lower(
    params, {'tokens': np.zeros((1, 5), np.uint8)}
  )
  assert text.as_text().count('while') == 1


@pytest.mark.parametrize(
  ('field', 'value'),
  [('num_layers', 0), ('model_dim', 6), ('num_heads', -1), ('mlp_dim', 0)],
)
def test_bad_sizes_are_refused(field, value):
  with pytest.raises(ValueError, match=field):
    native.byte_config(**{field: value})


SNIPPET = (
  'It was a bright morning, and the old man went down to the river with his '
  'dog. "I have not seen so fair a day since I was a boy," he said, and he '
  'laughed. The water was cold and clear, and the sun stood high above it.'
)
# of the code with which the weights were trained, (position, byte): logit
GOLDEN = {
  (0, 't'): 2.937805,
  (0, 'n'): 2.101403,
  (40, ' '): -3.759542,
  (40, 'e'): 0.750274,
  (100, 'a'): -1.059752,
  (100, 's'): 0.165818,
  (191, 'l'): -0.176163,
  (191, 'r'): 0.717725,
}


def test_embedded_logits_are_those_of_the_training_code():
  config, params = native.load_embedded()
  assert config == native.byte_config()
  assert transformer.num_params(params) == 820_608
  tokens = np.frombuffer(SNIPPET.encode(), np.uint8)[None, :193]
  logits = logits_of(config, params, tokens[:, :-1])[0]
  for (position, byte), want in GOLDEN.items():
    np.testing.assert_allclose(logits[position, ord(byte)], want, atol=5e-5)
  loss = jax.jit(objectives.lm_loss(config))(params, {'tokens': tokens})
  np.testing.assert_allclose(loss, 1.503577, rtol=1e-5)
