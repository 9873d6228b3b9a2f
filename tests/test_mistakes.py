"""Settings, models and files that do not fit: named before a run starts."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  build,
  defaults,
  models,
  problem,
  replay,
  session,
  workdir,
)
from experiments.config import UsageError, from_mapping
from jaxfl import keys
from jaxfl.data import features
from jaxfl.models import native, transformer
from jaxfl.models.config import Config

SHAPE = Config(
  vocab_size=256, num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1,
  head_dim=8, mlp_dim=8, max_positions=48, learned_positions=True,
)  # fmt: skip
PARAMS = transformer.init(SHAPE, jax.random.key(0))


def make(**settings):
  return defaults.resolve(from_mapping({'num_clients': 2} | settings))


def write_rows(folder, rows):
  folder.mkdir()
  for split in ('train', 'test'):
    lines = [json.dumps(row) + '\n' for row in rows]
    (folder / f'{split}.jsonl').write_text(''.join(lines))
  return str(folder)


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """A byte model of 48 positions, labelled rows, and responses."""
  root = tmp_path_factory.mktemp('places')
  native.save(root / 'model', SHAPE, PARAMS)
  labelled = [{'text': f'it is {i}', 'label': i % 2} for i in range(4)]
  responses = [{'instruction': 'say', 'response': f'i {i}'} for i in range(4)]
  return types.SimpleNamespace(
    model=str(root / 'model'),
    labelled=write_rows(root / 'labelled', labelled),
    responses=write_rows(root / 'responses', responses),
  )


LABELS = {'template': '{text}: {answer}', 'words': 'a,b', 'sequence_length': 16}


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'adapter': 'full', 'lora_rank': 2}, 'lora_rank does not apply to adapte'),
    ({'dirichlet_alpha': 0.1}, 'dirichlet_alpha does not apply to partition'),
    ({'partition_column': 'who'}, 'partition_column does not apply to'),
    ({'dataset': ''}, 'dataset must not be empty'),
    ({'pool': 'mean'}, 'pool does not apply to form cand'),
    ({'generate_examples': 2}, 'generate_examples does not apply to form'),
    ({'partition': 'column'}, 'needs partition_column'),
    ({'dtype': 'int8'}, 'adapter full leaves none; use adapter lora, head or'),
  ],
)
def test_settings_that_nothing_reads(settings, message, places):
  fixed = LABELS | {'model': places.model, 'dataset': places.labelled}
  with pytest.raises(UsageError, match=message):
    problem.build(make(**fixed | settings))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'length_normalised': False}, 'does not apply to form lm'),
    ({'adapter': 'head'}, 'no head of its own'),
    ({'objective': 'f1'}, r'max_new_tokens is 32, the prompts are of up to'),
    ({'generate_examples': 1}, r'max_new_tokens is 32, the prompts are of'),
  ],
)
def test_instructions_that_do_not_fit(settings, message, places):
  fixed = {
    'model': places.model, 'dataset': places.responses, 'sequence_length': 48
  }  # fmt: skip
  with pytest.raises(UsageError, match=message):
    problem.build(make(**fixed | settings))


def test_layers_of_a_model_without_them():
  config = make(dataset='rows.npz', in_layers='split')
  with pytest.raises(UsageError, match='in_layers split is for transformers'):
    build.build_method(config, build.no_loss)


def test_text_longer_than_the_model(places, tmp_path):
  for name in ('a', 'b'):
    (tmp_path / f'{name}.txt').write_text('to be or not to be. ' * 500)
  config = make(model=places.model, dataset=str(tmp_path), sequence_length=49)
  with pytest.raises(UsageError, match='sequence_length is 49.*48 positions'):
    problem.build(config)


def test_a_folder_with_the_name_of_a_task(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'sst2').mkdir()
  assert problem.kind_of(from_mapping({'dataset': 'sst2'})) == 'rows'


def labelled_config(places, **settings):
  return make(
    **LABELS | {'model': places.model, 'dataset': places.labelled} | settings
  )


def test_seeds_of_64_bits_make_heads_of_their_own(places):
  heads = []
  for seed in (1, 2**32 + 1, 2**64 - 1):
    config = labelled_config(places, seed=seed)
    model = models.load_model(config, 'classify', num_labels=2)
    heads.append(np.asarray(model.params['head']['out']['kernel']))
  assert not np.array_equal(heads[0], heads[1])
  assert not np.array_equal(heads[0], heads[2])


def products(config):
  """The dtypes of the matrix products of a problem's loss."""
  found = problem.build(config)
  batch = jax.tree.map(lambda x: x[0], found.task.batches(0, 0, 0, 1, 2))
  params = found.params
  if config.forward_dtype:  # as the method gives them
    params = jax.tree.map(lambda x: x.astype(config.forward_dtype), params)
  text = str(jax.make_jaxpr(found.loss_fn)(found.frozen, params, batch))
  lines = [line for line in text.split('\n') if '= dot_general' in line]
  assert lines
  return {line.split(':')[1].split('[')[0] for line in lines}


@pytest.mark.parametrize(
  'setting', [{'dtype': 'bfloat16'}, {'forward_dtype': 'bfloat16'}]
)
def test_the_forward_pass_has_the_dtype_that_is_asked_for(setting, places):
  assert products(labelled_config(places)) == {'f32'}
  assert 'bf16' in products(labelled_config(places, **setting))


def test_weights_that_are_not_finite(places, tmp_path):
  broken = PARAMS | {'embed': {'embedding': jnp.full((256, 8), jnp.nan)}}
  native.save(tmp_path / 'model', SHAPE, broken)
  config = labelled_config(places, model=str(tmp_path / 'model'))
  with pytest.raises(UsageError, match="'embed/embedding' has entries that"):
    problem.build(config)


def test_tokens_that_the_model_lacks(places, monkeypatch):
  loaded = models.load_tokenizer(models.Model(SHAPE, {}, None))
  encode = lambda texts: [[300] * len(text) for text in texts]
  monkeypatch.setattr(
    models, 'load_tokenizer', lambda model: loaded._replace(encode=encode)
  )
  with pytest.raises(UsageError, match='the token 300, and the model has 256'):
    problem.build(labelled_config(places, form='candidates'))


def test_a_pad_token_that_the_model_lacks(monkeypatch, tmp_path):
  loaded = models.load_tokenizer(models.Model(SHAPE, {}, None))
  monkeypatch.setattr(
    models.tokenizer_lib, 'load', lambda path: loaded._replace(pad_id=256)
  )
  found = models.load_tokenizer(models.Model(SHAPE, {}, tmp_path))
  assert found.pad_id == 0


def test_frozen_weights_are_on_the_device_once(places):
  config = labelled_config(places, adapter='lora', lora_rank=2)
  found = problem.build(config)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found.frozen))
  assert found.shape is not None
  merge = models.make_adapter(config, found.shape).merge
  merged = dict(keys.named_leaves(merge(found.frozen, found.params)))
  changed = {
    name for name, x in keys.named_leaves(found.frozen) if merged[name] is not x
  }
  assert changed == {f'layers/attention/{name}/kernel' for name in 'qv'}


def test_models_of_equal_weights_and_another_shape(places, tmp_path):
  there = workdir.Workdir(tmp_path)
  config = labelled_config(places)
  method = build.build_method(config, build.no_loss)
  found = problem.build(config)
  with session.open_session(config, there, method, found):
    pass
  other = found._replace(shape=dataclasses.replace(SHAPE, norm_eps=1e-3))
  with (
    pytest.raises(UsageError, match='differs in norm_eps'),
    session.open_session(config, there, method, other),
  ):
    pass


def test_export_with_a_model_that_has_moved(places, tmp_path):
  config = labelled_config(places, model=str(tmp_path / 'gone'))
  there = workdir.Workdir(tmp_path)
  there.model.write_text(json.dumps(native.to_json(SHAPE)))
  digests = {'data_digest': '', 'frozen_digest': ''}
  found = problem.build(labelled_config(places))
  digests['frozen_digest'] = models.digest_lib.digest(found.frozen)
  header = types.SimpleNamespace(config=dataclasses.asdict(config) | digests)
  with pytest.raises(FileNotFoundError, match='gone'):
    replay.write(found.params, header, there, str(tmp_path / 'out'))
  replay.write(found.params, header, there, str(tmp_path / 'out'), places.model)
  _, again = native.load(tmp_path / 'out')
  for (name, x), (_, y) in zip(
    keys.named_leaves(again), keys.named_leaves(PARAMS), strict=True
  ):
    np.testing.assert_array_equal(x, y, name)
  with pytest.raises(UsageError, match='cannot be written'):
    replay.write(
      found.params, header, there, str(tmp_path / 'no/x.safetensors')
    )


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='workdir: .* cannot be written'):
    workdir.claim(workdir.Workdir(tmp_path / 'file' / 'run'), make())


def test_damaged_features(tmp_path):
  x, y = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)
  path = tmp_path / 'f.npz'
  np.savez(path, f_train=x, y_train=y, f_test=x, y_test=y)
  whole = path.read_bytes()
  features.load(path)
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match='damaged'):
    features.load(path)
  path.write_bytes(whole[:80] + b'!' + whole[81:])
  with pytest.raises(ValueError, match=r'damaged'):
    features.load(path)
  with open(path, 'wb') as file:
    np.save(file, x)
  with pytest.raises(ValueError, match='no npz file'):
    features.load(path)
  np.savez(path, f_train=np.float32(1), y_train=y, f_test=x, y_test=y)
  with pytest.raises(ValueError, match='f_train must be'):
    features.load(path)


def test_a_study_keeps_no_run_of_other_settings(tmp_path):
  there = workdir.Workdir(tmp_path)
  workdir.claim(there, make(mu=1, num_rounds=3))
  same = ['--mu=1', '--num_rounds=3', '--data_dir=elsewhere', '--config=x.py']
  workdir.check_same(there, same)
  with pytest.raises(RuntimeError, match=r'with mu 1\.0, not 2'):
    workdir.check_same(there, ['--mu=2', *same[1:]])
