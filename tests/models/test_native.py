"""The project's own model directories."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxfl import keys
from jaxfl.models import native, transformer
from jaxfl.models.config import Config
from jaxfl.models.rotary import Rope

pytestmark = pytest.mark.fast_compile

CONFIG = native.byte_config(num_layers=2, model_dim=8, num_heads=2, mlp_dim=12)
init = jax.jit(
  lambda config: transformer.init(config, jax.random.key(0)),
  static_argnums=0,
)
RICH = dataclasses.replace(
  CONFIG,
  rope=Rope(theta=500.0, scaling='llama3', factor=8.0, truncate=False),
  local_rope=Rope(theta=3.0),
  sliding=(True, False),
  sliding_window=4,
  attention_scale=0.25,
)


@pytest.fixture(scope='module')
def params():
  return init(CONFIG)


@pytest.fixture
def saved(params, tmp_path):
  native.save(tmp_path / 'model', CONFIG, params)
  return tmp_path / 'model'


def assert_equal(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for (name, a), b in zip(
    keys.named_leaves(tree), jax.tree.leaves(other), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b, err_msg=name)


def test_round_trip(params, tmp_path):
  directory = tmp_path / 'a' / 'b'
  native.save(directory, CONFIG, params, metadata={'note': 'a test'})
  assert sorted(os.listdir(directory)) == ['config.json', 'model.safetensors']
  config, again = native.load(directory)
  assert config == CONFIG
  assert_equal(params, again)
  with safe_open(directory / 'model.safetensors', framework='numpy') as file:
    assert file.metadata() == {'note': 'a test'}
    names = [name for name, _ in keys.named_leaves(params)]
    assert sorted(file.keys()) == sorted(names)
    assert 'layers/attention/q/kernel' in names


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_dtypes_are_kept(dtype, params, tmp_path):
  small = jax.tree.map(lambda x: x.astype(dtype), params)
  native.save(tmp_path, CONFIG, small)
  assert_equal(small, native.load(tmp_path)[1])


def through_json(config):
  return native.from_json(json.loads(json.dumps(native.to_json(config))))


def test_configs_round_trip():
  for config in (CONFIG, RICH):
    assert through_json(config) == config
    assert hash(through_json(config)) == hash(config)  # tuples, not lists


@given(
  st.builds(
    dict,
    norm_eps=st.floats(1e-12, 1e-3),
    gated=st.booleans(),
    attention_scale=st.none() | st.floats(0.1, 2),
    sliding=st.just(()) | st.tuples(st.booleans(), st.booleans()),
    rope=st.none()
    | st.builds(Rope, theta=st.floats(1, 1e6), truncate=st.booleans()),
    pool=st.sampled_from(['first', 'mean', 'last']),
  )
)
def test_any_config_round_trips(changes):
  config = dataclasses.replace(CONFIG, sliding_window=4, **changes)
  assert through_json(config) == config


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'llama'}, "model_type is 'llama', expected 'jaxfl'"),
    ({'model_typ': 'jaxfl'}, 'unknown fields model_typ'),
    ({'num_layers': '2'}, "num_layers is '2', expected a value of type int"),
    ({'num_layers': True}, 'num_layers is True, expected a value of type int'),
    ({'num_heads': 0}, 'num_heads must be >= 1, got 0'),
    ({'rope': {'theat': 1.0}}, 'rope: unknown fields'),
    ({'rope': {'theta': 'x'}}, "rope: theta is 'x'"),
    ({'rope': {'scaling': 'none'}}, "rope: rope scaling must .* got 'none'"),
    ({'rope': 3}, 'rope is 3, expected a value of type Rope'),
    ({'sliding': [1]}, 'sliding is 1, expected a value of type bool'),
    ({'sliding': [True]}, 'sliding has 1 entries for 2 layers'),
  ],
)
def test_bad_fields_are_named(changes, message, saved):
  path = saved / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(ValueError, match=message) as caught:
    native.load(saved)
  assert str(path) in str(caught.value)


def test_fields_may_be_missing_if_they_have_a_default(saved, params):
  path = saved / 'config.json'
  fields = json.loads(path.read_text())
  del fields['embed_scale']
  path.write_text(json.dumps(fields))
  assert native.load(saved)[0] == CONFIG
  del fields['num_heads']
  path.write_text(json.dumps(fields))
  with pytest.raises(ValueError, match='num_heads'):
    native.load(saved)


def test_bad_directories_are_refused(saved, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere': no such directory"):
    native.load(tmp_path / 'nowhere')
  with pytest.raises(FileNotFoundError, match=r'no config\.json'):
    native.load(tmp_path)
  weights = saved / 'model.safetensors'
  data = weights.read_bytes()
  for damaged in (data[:-1], data[:100], b'', b'\xff' * 64):
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match=r'model\.safetensors is damaged'):
      native.load(saved)
  weights.unlink()
  with pytest.raises(FileNotFoundError, match=r'no model\.safetensors'):
    native.load(saved)
  for text, message in (('{', 'not valid JSON'), ('[]', 'not a JSON object')):
    (saved / 'config.json').write_text(text)
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=message):
      native.load(saved)


def test_tensors_that_do_not_fit_are_refused(params, saved, tmp_path):
  path = saved / 'model.safetensors'
  named = {name: np.asarray(x) for name, x in keys.named_leaves(params)}
  bias = 'lm_head/bias'
  for tensors, message in (
    ({**named, 'w': named[bias]}, r"missing tensors \[\], unexpected.*\['w'\]"),
    ({bias: named[bias]}, r"missing tensors \['embed/embedding', "),
    ({**named, bias: np.zeros(3, np.float32)}, r'float32\[3\], expected .*256'),
    ({**named, bias: named[bias].astype(np.int32)}, r'is int32\[256\]'),
    ({**named, bias: named[bias].astype(np.float64)}, r'is float64\[256\]'),
  ):
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
      native.load(saved)
  with pytest.raises(ValueError, match=r'the parameters: missing tensors'):
    native.save(tmp_path / 'new', CONFIG, {'w': named[bias]})
  assert not (tmp_path / 'new').exists()


def test_a_crash_leaves_the_old_model_the_new_one_or_none(
  params, saved, monkeypatch
):
  """os.replace fails before every call in turn."""
  (saved / 'MODEL_CARD.md').write_text('stays')
  newer = jax.tree.map(lambda x: x + 1, params)
  replace, calls = os.replace, []

  def crash(source, target):
    if len(calls) == crash_at:
      raise KeyboardInterrupt
    calls.append(target)
    replace(source, target)

  monkeypatch.setattr(os, 'replace', crash)
  for crash_at in (0, 1):  # noqa: B007
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
      native.save(saved, CONFIG, newer)
    assert not native.is_native(saved)
    with pytest.raises(FileNotFoundError):
      native.load(saved)
  monkeypatch.undo()
  native.save(saved, CONFIG, newer)
  assert_equal(newer, native.load(saved)[1])
  assert sorted(os.listdir(saved)) == [
    'MODEL_CARD.md', 'config.json', 'model.safetensors',
  ]  # fmt: skip


def test_is_native(saved, tmp_path):
  assert native.is_native(saved)
  assert not native.is_native(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": "opt"}')
  assert not native.is_native(tmp_path)


def test_the_head_can_be_chosen(params, saved):
  config, bare = native.load(saved, head='none')
  assert config.head == 'none'
  assert 'lm_head' not in bare
  with pytest.raises(ValueError, match='num_labels must be given'):
    native.load(saved, head='classify')
  with pytest.raises(ValueError, match='the head is new and needs a key'):
    native.load(saved, head='classify', num_labels=3)
  key = jax.random.key(1)
  config, made = native.load(saved, head='classify', num_labels=3, key=key)
  assert (config.num_labels, config.pool) == (3, 'last')
  kernel = made['head']['out']['kernel']
  assert kernel.shape == (8, 3)
  assert 0.01 < jnp.std(kernel) < 0.03
  assert_equal(bare, {k: x for k, x in made.items() if k != 'head'})
  logits = transformer.logits(config, made, np.arange(6).reshape(2, 3))
  assert logits.shape == (2, 3)
  with pytest.raises(ValueError, match='causal=True has no mlm head'):
    native.load(saved, head='mlm')
  with pytest.raises(ValueError, match='pool is for the head classify'):
    native.load(saved, pool='mean')


def test_a_trained_classifier_is_kept_and_another_is_new(saved, tmp_path):
  key = jax.random.key(1)
  config, params = native.load(saved, head='classify', num_labels=3, key=key)
  native.save(tmp_path / 'c', config, params)
  for wish in ({}, {'head': 'classify', 'num_labels': 3}, {'pool': 'last'}):
    again, found = native.load(tmp_path / 'c', **wish)
    assert again == config
    assert_equal(params, found)
  again, found = native.load(tmp_path / 'c', num_labels=5, key=key)
  assert again.num_labels == 5
  assert found['head']['out']['kernel'].shape == (8, 5)
  again, found = native.load(tmp_path / 'c', pool='mean', key=jax.random.key(2))
  assert again.pool == 'mean'
  out = lambda tree: tree['head']['out']['kernel']
  assert (out(found) != out(params)).any()
  with pytest.raises(ValueError, match='has no lm head: it lacks lm_head/bias'):
    native.load(tmp_path / 'c', head='lm')


def test_encoders_get_their_classifier(tmp_path):
  encoder = Config(
    vocab_size=9, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2,
    head_dim=4, mlp_dim=8, causal=False, head='mlm',
  )  # fmt: skip
  native.save(tmp_path, encoder, init(encoder))
  config, made = native.load(
    tmp_path, head='classify', num_labels=2, key=jax.random.key(0)
  )
  assert (config.pool, config.head_dense) == ('first', True)
  assert set(made['head']) == {'dense', 'out'}
