"""Problems as the launchers build them, on small files and small models."""

import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import build, defaults, problem, replay, runner
from experiments.config import UsageError, from_mapping
from experiments.workdir import Workdir
from jaxfl import adapters, keys
from jaxfl.models import hf, native, transformer
from jaxfl.models.config import Config
from tests.data import tiny

pytestmark = pytest.mark.fast_compile

WORDS = (
  'great',
  'bad',
  'it was great',
  'a bad film',
  'a great play',
  'was bad',
)
SMALL = {
  'num_clients': 2,
  'num_rounds': 2,
  'num_perturbations': 2,
  'sequence_length': 24,
  'eval_every': 1,
  'eval_batch_size': 4,
  'learning_rate': 1e-4,
}


@pytest.fixture(scope='module')
def small_model(tmp_path_factory):
  """A byte model that compiles quickly, in the project's own layout."""
  config = Config(
    vocab_size=256,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    norm='rms',
  )
  folder = tmp_path_factory.mktemp('model') / 'bytes'
  native.save(folder, config, transformer.init(config, jax.random.key(0)))
  return str(folder)


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
  """A small BERT with a vocabulary of its own, in the hub's layout."""
  folder = tiny.bert(tmp_path_factory.mktemp('bert'))
  config = Config(
    vocab_size=len(tiny.BERT_WORDS),
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    norm_eps=1e-12,
    causal=False,
    norm_place='post',
    embed_norm=True,
    final_norm=False,
    max_positions=32,
    learned_positions=True,
    type_vocab=2,
    head='mlm',
    output_bias=True,
  )
  params = transformer.init(config, jax.random.key(1))
  hf.save(folder, config, params)
  return str(folder)


def write_rows(folder, name, rows):
  path = folder / name
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
  """Files `train.jsonl` and `test.jsonl` with text and label."""
  folder = tmp_path_factory.mktemp('rows')
  rows = [
    {'text': text, 'label': 'good' if 'great' in text else 'poor', 'who': i % 3}
    for i, text in enumerate(WORDS * 3)
  ]
  write_rows(folder, 'train.jsonl', rows)
  write_rows(folder, 'test.jsonl', rows[:5])
  return str(folder)


@pytest.fixture(scope='module')
def responses(tmp_path_factory):
  folder = tmp_path_factory.mktemp('responses')
  rows = [
    {'instruction': f'say {i}', 'response': f'it is {i}'} for i in range(12)
  ]
  write_rows(folder, 'train.jsonl', rows)
  write_rows(folder, 'test.jsonl', rows[:3])
  return str(folder)


def make(**settings):
  return defaults.resolve(from_mapping(SMALL | settings))


def test_a_run_replays_and_exports_what_it_evaluated(
  labelled, small_model, tmp_path, capsys
):
  config = make(
    model=small_model,
    dataset=labelled,
    template='{text}: {answer}',
    words='fine,poor',
  )
  found = problem.build(config)
  assert found.task.eval_batches['tokens'].shape[1:3] == (4, 2)  # candidates
  summary = runner.run(config, tmp_path / 'run')
  assert '2 clients, 18 examples' in capsys.readouterr().out
  assert set(summary['after']) == {'accuracy', 'macro_f1', 'loss'}
  assert summary['best']['loss']['value'] <= summary['before']['loss']
  params, rounds, header = replay.rebuild(tmp_path / 'run')
  assert rounds == 2
  workdir = Workdir(tmp_path / 'run')
  replay.write(params, header, workdir, str(tmp_path / 'out'))
  again = make(**(SMALL | {'model': str(tmp_path / 'out'), 'dataset': labelled,
                           'template': '{text}: {answer}',
                           'words': 'fine,poor'}))  # fmt: skip
  other = problem.build(again)
  assert other.evaluate(other.params)['loss'] == summary['after']['loss']
  with pytest.raises(UsageError, match='exists; choose another'):
    replay.write(params, header, workdir, str(tmp_path / 'out'))


@pytest.mark.parametrize(
  ('adapter', 'dtype'),
  [
    ('lora', 'float32'),
    ('lora', 'int8'),
    pytest.param('bias', 'float32', marks=pytest.mark.slow),
    pytest.param('head', 'float32', marks=pytest.mark.slow),
  ],
)
def test_adapters_train_their_part_of_a_hub_model(
  adapter, dtype, labelled, bert, tmp_path
):
  config = make(
    model=bert, dataset=labelled, form='head', adapter=adapter, dtype=dtype,
    **({'lora_rank': 2} if adapter == 'lora' else {}),
  )  # fmt: skip
  found = problem.build(config)
  paths = [path for path, _ in keys.named_leaves(found.params)]
  assert 'head/out/kernel' in paths
  if adapter == 'lora':
    assert 'layers/attention/q/kernel/a' in paths
  if adapter == 'bias':
    assert 'layers/mlp/up/bias' in paths
    assert 'layers/mlp/up/kernel' not in paths
  if adapter == 'head':
    assert all(path.startswith('head/') for path in paths)
  summary = runner.run(config, tmp_path / 'run')
  assert summary['num_params'] == adapters.count(found.params)
  assert summary['num_frozen'] > 0
  params, _, header = replay.rebuild(tmp_path / 'run')
  workdir = Workdir(tmp_path / 'run')
  replay.write(params, header, workdir, str(tmp_path / 'out'))
  again = problem.build(
    make(model=str(tmp_path / 'out'), dataset=labelled, form='head')
  )
  np.testing.assert_allclose(
    again.evaluate(again.params)['loss'], summary['after']['loss'], rtol=1e-6
  )
  assert (tmp_path / 'out' / 'vocab.txt').exists()


def test_masked_models_score_label_words(labelled, bert):
  config = make(
    model=bert, dataset=labelled, template='{text} it was {mask} .',
    words='great,bad',
  )  # fmt: skip
  found = problem.build(config)
  assert set(found.task.eval_batches) >= {'tokens', 'position', 'label'}
  assert found.shape is not None
  assert found.shape.head == 'mlm'
  batch = found.task.batches(0, 0, 0, 1, 2)
  loss = found.loss_fn(
    found.frozen, found.params, jax.tree.map(lambda x: x[0], batch)
  )
  assert np.isfinite(loss)


def test_responses_are_generated_and_compared(responses, small_model, tmp_path):
  settings = {
    'model': small_model,
    'dataset': responses,
    'sequence_length': 160,
    'generate_examples': 2,
    'max_new_tokens': 4,
    'num_rounds': 1,
  }
  summary = runner.run(make(**settings), tmp_path / 'loss')
  assert set(summary['after']) == {
    'loss', 'perplexity', 'accuracy', 'rouge_l', 'exact_match', 'f1',
  }  # fmt: skip
  # the same path with an objective that has no gradient
  config = make(**(settings | {'objective': 'f1'}))
  found = problem.build(config)
  batch = jax.tree.map(lambda x: x[0], found.task.batches(0, 0, 0, 1, 2))
  loss = found.loss_fn(found.frozen, found.params, batch)
  assert 0 <= loss <= 1


def test_accuracy_as_the_objective(labelled, bert, tmp_path):
  config = make(
    model=bert, dataset=labelled, form='head', objective='accuracy',
    adapter='head',
  )  # fmt: skip
  summary = runner.run(config, tmp_path / 'run')
  assert summary['rounds'] == 2


def test_features(tmp_path):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 5)).astype(np.float32)
  path = tmp_path / 'f.npz'
  y = (x[:, 0] > 0).astype(np.int8)
  np.savez(path, f_train=x[:40], y_train=y[:40], f_test=x[40:], y_test=y[40:])
  settings = SMALL | {'num_rounds': 40, 'learning_rate': 0.3, 'eval_every': 40}
  del settings['sequence_length'], settings['eval_batch_size']
  config = defaults.resolve(
    from_mapping(settings | {'dataset': str(path), 'batch_size': 8})
  )
  summary = runner.run(config, tmp_path / 'run')
  assert summary['after']['accuracy'] > 0.8 > summary['before']['accuracy']
  params, _, header = replay.rebuild(tmp_path / 'run')
  workdir = Workdir(tmp_path / 'run')
  with pytest.raises(UsageError, match=r'must end in \.safetensors'):
    replay.write(params, header, workdir, str(tmp_path / 'out'))


def test_partitions_show_their_split(labelled, bert):
  config = make(
    model=bert, dataset=labelled, form='head', partition='column',
    partition_column='who', num_clients=3,
  )  # fmt: skip
  found = problem.build(config)
  assert 'client 2: 2 6' in found.notes
  assert list(found.task.num_examples) == [6, 6, 6]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'dataset': 'nowhere.jsonl'}, 'no such file'),
    ({'model': 'nowhere/at/all'}, 'no directory'),
    ({'words': 'a,b'}, 'words need a template'),
    ({'template': '{text} {answer}', 'words': 'a,b,c'}, 'one for each of the'),
    ({'form': 'lm'}, 'form lm is for responses'),
    ({'form': 'head', 'adapter': 'lora', 'lora_targets': '*/w'}, 'matches no'),
    ({'form': 'head', 'sequence_length': 64}, '32 positions'),
    ({'form': 'head', 'num_clients': 19}, '18'),
    ({'form': 'candidates', 'template': '{text} {answer}'}, 'causal'),
    ({'form': 'words', 'template': '{text} {mask}', 'words': 'great,films'},
     'films'),
    ({'columns': 'text=nothing'}, 'nothing'),
    ({'objective': 'f1'}, 'loss or accuracy'),
    ({'partition': 'column'}, 'column'),
  ],
)  # fmt: skip
def test_mistakes_are_named(settings, message, labelled, bert):
  config = make(**({'model': bert, 'dataset': labelled} | settings))
  with pytest.raises(UsageError, match=message):
    problem.build(config)


def test_settings_that_nothing_reads_are_refused(labelled):
  with pytest.raises(UsageError, match='template does not apply to dataset py'):
    make(template='{text} {answer}')
  with pytest.raises(UsageError, match='adapter does not apply to dataset a'):
    make(
      dataset='a.npz', adapter='lora', sequence_length=128, eval_batch_size=32
    )
  config = make(
    dataset=labelled, objective='accuracy', method='fed_avg',
    num_perturbations=None,
  )  # fmt: skip
  with pytest.raises(UsageError, match='has no gradient'):
    build.build_method(config, build.no_loss)


def test_a_tokenizer_must_be_there(labelled, tmp_path, bert):
  folder = tmp_path / 'bert'
  folder.mkdir()
  for name in ('config.json', 'model.safetensors'):
    (folder / name).write_bytes((pathlib.Path(bert) / name).read_bytes())
  config = make(model=str(folder), dataset=labelled, form='head')
  with pytest.raises(UsageError, match='tokenizer'):
    problem.build(config)
