"""Rows of one's own through the settings: splits, labels, plain text, words."""

import json

import jax
import numpy as np
import pytest

from experiments import defaults, problem
from experiments.config import UsageError, from_mapping
from jaxfl.models import native, transformer
from jaxfl.models.config import Config

SMALL = {
  'num_clients': 2,
  'num_rounds': 1,
  'num_perturbations': 1,
  'sequence_length': 16,
  'eval_batch_size': 4,
}
LABELLED = [{'text': f'text {i}', 'label': i % 2} for i in range(12)]
PLAIN = [{'text': 'word ' * (1 + 4 * i), 'who': i % 2} for i in range(6)]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  config = Config(
    vocab_size=256,
    num_layers=1,
    model_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=8,
    norm='rms',
  )
  folder = tmp_path_factory.mktemp('model') / 'bytes'
  native.save(folder, config, transformer.init(config, jax.random.key(0)))
  return str(folder)


def write(path, rows):
  path.parent.mkdir(exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def make(**settings):
  return defaults.resolve(from_mapping(SMALL | settings))


def test_plain_text(model, tmp_path):
  path = write(tmp_path / 'a.jsonl', [*PLAIN, {'text': ' \n', 'who': 0}])
  config = make(
    model=model, dataset=path, partition='column', partition_column='who'
  )
  found = problem.build(config)
  assert set(found.evaluate(found.params)) == {'loss', 'perplexity', 'accuracy'}
  assert '2 clients, 5 examples' in found.notes
  total = int(found.task.num_examples.sum())
  assert total > 5  # long texts are several windows
  assert f'5 texts are {total} windows of at most 16 tokens' in found.notes
  batch = found.task.batches(0, 1, 0, 2, 3)
  assert batch['tokens'].shape == (2, 3, 16)
  one = jax.tree.map(lambda x: x[0], batch)
  assert np.isfinite(found.loss_fn(found.frozen, found.params, one))


def test_lines_of_a_text_file(model, tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one\n\ntwo\n   \nthree\nfour\n')
  found = problem.build(make(model=model, dataset=str(path)))
  assert found.task.num_examples.sum() == 3  # one of four is held out
  assert len(found.task.eval_batches['tokens']) == 1


def test_folders_of_any_split(model, tmp_path):
  write(tmp_path / 'd' / 'mine.jsonl', LABELLED)
  write(tmp_path / 'd' / 'other.jsonl', LABELLED[:3])
  folder = str(tmp_path / 'd')
  config = make(
    model=model,
    dataset=folder,
    train_split='mine',
    test_split='other',
    label_names='bad,good',
    template='{text}{answer}',
  )
  found = problem.build(config)
  assert found.task.num_examples.tolist() == [6, 6]
  assert 'good' in found.notes
  assert found.task.eval_batches['example_weight'].sum() == 3
  for settings, message in (
    ({}, r"no train\.csv.*'mine\.jsonl'.*train_split"),
    ({'train_split': 'mine', 'test_split': 'no'}, r'no no\.csv'),
  ):
    with pytest.raises(UsageError, match=message):
      problem.build(make(model=model, dataset=folder, **settings))


def test_a_task_is_not_a_folder_of_its_name(tmp_path, monkeypatch):
  (tmp_path / 'sst2').mkdir()
  monkeypatch.chdir(tmp_path)
  assert problem.kind_of(from_mapping({'dataset': 'sst2'})) == 'rows'


def test_what_a_folder_holds(tmp_path):
  def kind(*names, **settings):
    folder = tmp_path / '-'.join(names)
    folder.mkdir(exist_ok=True)
    for name in names:
      (folder / name).write_text('a')
    config = from_mapping({'dataset': str(folder), **settings})
    return problem.kind_of(config)

  assert kind('train-00000.parquet', 'readme.md') == 'rows'
  assert kind('train.txt') == kind('data.csv', 'more.csv.gz') == 'rows'
  assert kind('a.txt', 'b.py') == kind('data.csv', 'b.py') == 'text'
  assert kind('a.txt', train_split='a') == 'rows'


@pytest.mark.parametrize(
  ('rows', 'settings', 'message'),
  [
    (LABELLED, {'test_split': 'test'}, 'is one file'),
    (LABELLED, {'label_names': 'a,a'}, 'two or more different names'),
    (LABELLED, {'label_names': 'a'}, 'two or more different names'),
    (PLAIN, {'label_names': 'a,b'}, 'has no labels'),
    (PLAIN, {'objective': 'f1'}, 'need instructions and responses'),
    (PLAIN, {'generate_examples': 1}, 'need instructions and responses'),
    (PLAIN, {'template': '{text} {answer}'}, 'for rows with labels'),
    (PLAIN, {'sequence_length': 1}, 'split train.*leaves no room'),
    (PLAIN, {'partition': 'label'}, '--partition_column'),
    ([{'text': ' '}] * 3, {}, "'text' is blank in all 3 rows"),
    ([*LABELLED[:4], {'text': '', 'label': 0}], {'form': 'head'},
     'split (train|test).*the text is empty'),
  ],
)  # fmt: skip
def test_mistakes_are_named(rows, settings, message, model, tmp_path):
  path = write(tmp_path / 'a.jsonl', rows)
  with pytest.raises(UsageError, match=message):
    problem.build(make(**({'model': model, 'dataset': path} | settings)))


def test_words_of_a_task(model, tmp_path):
  write(tmp_path / 'sst2' / 'train.jsonl', LABELLED)
  options = {'model': model, 'dataset': 'sst2', 'data_dir': str(tmp_path)}
  options['sequence_length'] = 32
  with pytest.raises(UsageError, match='two or more different answers'):
    problem.build(make(words='bad,bad', **options))
  one, two = (
    problem.build(make(words=words, **options)).task.eval_batches['tokens']
    for words in ('bad,good', 'awful,fine')
  )
  assert one.shape != two.shape or not np.array_equal(one, two)
