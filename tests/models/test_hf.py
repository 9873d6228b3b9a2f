"""Every family against logits of transformers, and there and back again.

The fixtures are made by `make_hf_fixtures`.
"""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from jaxfl import keys
from jaxfl.models import hf, hf_compose, hf_config, hf_heads, transformer
from jaxfl.models.config import Config
from tests.models.hf_tools import (
  FIXTURES,
  NAMES,
  at_real,
  changed,
  checkpoint,
  logits,
  random_params,
  reference,
)

pytestmark = pytest.mark.fast_compile


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_transformers(name):
  data = reference(name)
  assert not data['mask'][1, -1]
  assert not data['mask'][2, 0]
  want = at_real(data['logits'], data)
  got = at_real(logits(checkpoint(name), data), data)
  assert 0.1 < np.abs(want).max() < 3
  # sums are grouped by the number of threads: a few last bits of either side
  np.testing.assert_allclose(got, want, rtol=0, atol=4e-6)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), y in zip(
    keys.named_leaves(a), jax.tree.leaves(b), strict=True
  ):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize('name', NAMES)
def test_there_and_back(name, tmp_path):
  found = checkpoint(name)
  hf.save(tmp_path, found.config, found.params, source=FIXTURES / name)
  again = hf.load(tmp_path)
  assert again.config == found.config
  assert_same(again.params, found.params)
  before, after = (
    json.loads((x / 'config.json').read_text())
    for x in (FIXTURES / name, tmp_path)
  )
  different = {
    x for x in before.keys() | after.keys() if before.get(x) != after.get(x)
  }
  assert different <= {'id2label', 'label2id'}  # spelled out for two classes


@pytest.mark.parametrize('name', NAMES)
def test_a_family_is_found_for_every_config(name):
  """Without a source, a config.json is composed that means the same."""
  config = checkpoint(name).config
  fields = hf_compose.compose(config)
  assert hf_config.read(fields) == hf_heads.without_head(config)


def test_export_of_a_model_from_nowhere(tmp_path):
  config = Config(
    vocab_size=8, num_layers=2, model_dim=4, num_heads=2, num_kv_heads=2,
    head_dim=2, mlp_dim=6, max_positions=8, learned_positions=True,
  )  # fmt: skip
  params = random_params(config)
  hf.save(tmp_path, config, params)
  found = hf.load(tmp_path)
  assert found.config == config
  assert_same(found.params, params)
  odd = Config(**{**vars(config), 'activation': 'relu2', 'embed_norm': True})
  with pytest.raises(ValueError, match='no Hugging Face family'):
    hf.save(tmp_path / 'b', odd, random_params(odd))
  assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('name', ['gpt2', 'llama_linear', 'bert_classify'])
def test_bfloat16_and_back(name, tmp_path):
  """Both conversions round to nearest, tensor by tensor."""
  full, half = checkpoint(name), hf.load(FIXTURES / name, dtype='bfloat16')
  want = jax.tree.map(lambda x: x.astype(hf.DTYPES['bfloat16']), full.params)
  assert_same(half.params, want)
  hf.save(tmp_path, half.config, half.params, source=FIXTURES / name)
  fields = json.loads((tmp_path / 'config.json').read_text())
  old = 'torch_dtype' in json.loads(
    (FIXTURES / name / 'config.json').read_text()
  )
  assert fields['torch_dtype' if old else 'dtype'] == 'bfloat16'
  assert_same(hf.load(tmp_path, dtype='bfloat16').params, want)
  floats = jax.tree.map(lambda x: x.astype(np.float32), want)
  assert_same(hf.load(tmp_path).params, floats)


def test_half_precision_is_read(tmp_path):
  halve = lambda found: {x: y.astype(np.float16) for x, y in found.items()}
  half = changed('gpt2', tmp_path / 'a', tensors=halve, dtype='float16')
  want = jax.tree.map(
    lambda x: x.astype(np.float16).astype(np.float32),
    checkpoint('gpt2').params,
  )
  assert_same(hf.load(half).params, want)


def test_large_tensors_come_in_pieces(monkeypatch):
  monkeypatch.setattr('jaxfl.models.hf_files._PIECE', 100)
  for name in ('gpt2', 'llama_linear'):
    assert_same(hf.load(FIXTURES / name).params, checkpoint(name).params)


def test_parameters_are_plain_arrays_of_the_model():
  found = checkpoint('llama_31')
  assert found.source_dir == str(FIXTURES / 'llama_31')
  assert found.fresh == ()
  leaves = jax.tree.leaves(found.params)
  assert {type(x) for x in leaves} == {np.ndarray}
  assert all(x.flags.writeable and x.flags.c_contiguous for x in leaves)
  shapes = jax.eval_shape(
    functools.partial(transformer.init, found.config), jax.random.key(0)
  )
  assert jax.tree.map(np.shape, found.params) == jax.tree.map(
    lambda x: x.shape, shapes
  )


def test_tokenizer_files_go_along(tmp_path):
  source = tmp_path / 'source'
  shutil.copytree(FIXTURES / 'bert', source)
  (source / '1_Pooling').mkdir()
  for name in ('tokenizer.json', 'vocab.txt', '1_Pooling/config.json'):
    (source / name).write_text(name)
  (source / 'notes.md').write_text('stays')
  found = hf.load(source)
  hf.save(tmp_path / 'new', found.config, found.params, source=source)
  files = sorted(
    str(x.relative_to(tmp_path / 'new'))
    for x in (tmp_path / 'new').rglob('*')
    if x.is_file()
  )
  assert files == [
    '1_Pooling/config.json',
    'config.json',
    'model.safetensors',
    'tokenizer.json',
    'vocab.txt',
  ]
  hf.save(source, found.config, found.params, source=source)  # in place
  assert_same(hf.load(source).params, found.params)
