"""Tasks from files in the form of the shared data, labels, held-out rows."""

import collections
import csv
import gzip
import hashlib
import json
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxfl.data import catalog, labels, layouts, sources
from jaxfl.data import rows as rows_lib

# old versions of `datasets` leave csv files to the garbage collector to close
pytestmark = pytest.mark.filterwarnings(
  'ignore::ResourceWarning',
  'ignore::pytest.PytestUnraisableExceptionWarning',
)
DATA_DIR = pathlib.Path(
  os.environ.get('JAXFL_DATA_DIR')
  or pathlib.Path(__file__).parents[2] / '..' / 'shared' / 'data'
)
shared_data = pytest.mark.skipif(
  not (DATA_DIR / 'MANIFEST.md').is_file(),
  reason='no shared data; JAXFL_DATA_DIR says where they are',
)


def _write(path: pathlib.Path, data):
  if not isinstance(data, str | bytes):
    data = json.dumps(data)
  data = data.encode() if isinstance(data, str) else data
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def _sentences(folder, suffix=''):
  train = b'1 caf\xe9 \x85 bar ?\n4 Where is it ?\n'
  base = folder / 'sentence_classification'
  _write(base / f'TREC.train.all{suffix}', train)
  _write(base / f'TREC.test.all{suffix}', '2 What is NASA ?')
  return folder


def test_sentences_are_latin_1_and_lines_end_at_newlines(tmp_path):
  dataset = catalog.load('trec', data_dir=_sentences(tmp_path / 'a'))
  names = ('ABBR', 'ENTY', 'DESC', 'HUM', 'LOC', 'NUM')
  assert dataset == rows_lib.Dataset(
    'trec',
    [
      {'text': 'café \x85 bar ?', 'label': names.index('ENTY')},
      {'text': 'Where is it ?', 'label': names.index('LOC')},
    ],
    [{'text': 'What is NASA ?', 'label': names.index('ABBR')}],
    names,
    dataset.digest,
  )
  assert catalog.load('trec', data_dir=_sentences(tmp_path / 'b', '.gz')) == (
    dataset
  )


@pytest.mark.parametrize('line', ['6 Too large ?', 'x No ?', '1', '', '1  '])
def test_broken_sentence_is_named(tmp_path, line):
  _sentences(tmp_path)
  path = tmp_path / 'sentence_classification' / 'TREC.train.all'
  _write(path, f'0 a ?\n{line}\n1 b ?\n')
  with pytest.raises(ValueError, match=r'TREC\.train\.all, line 2: expected a'):
    catalog.load('trec', data_dir=tmp_path)


def test_half_a_task_is_refused(tmp_path):
  _sentences(tmp_path)
  (tmp_path / 'sentence_classification' / 'TREC.test.all').unlink()
  with pytest.raises(FileNotFoundError, match=r'neither TREC\.test\.all'):
    catalog.load('trec', data_dir=tmp_path)


OLORA = {
  'cb': ('sentence 1: a\nb\nsentence 2: c', 'neutral', 2),
  'rte': ('sentence 1: a\nb\nsentence 2: c', 'contradiction', 1),
  'boolq': ('question: q\npassage: p: x', 'True', 1),
  'wic': ('word: w\nOne at 9: a.\nTwo.', 'False', 0),
  'copa': (
    'Which sentence is the effect of "He said "A"."? Choose one between A and '
    'B.\nA: x\nB: y',
    'B',
    1,
  ),
}
FIELDS = {
  'cb': {'premise': 'a\nb', 'hypothesis': 'c'},
  'rte': {'premise': 'a\nb', 'hypothesis': 'c'},
  'boolq': {'question': 'q', 'passage': 'p: x'},
  'wic': {'word': 'w', 'sentence1': 'One at 9: a.', 'sentence2': 'Two.'},
  'copa': {
    'question': 'effect',
    'premise': 'He said "A".',
    'choice1': 'x',
    'choice2': 'y',
  },
}


@pytest.mark.parametrize('task', OLORA)
def test_parts_of_a_sentence_become_fields(tmp_path, task):
  sentence, label, index = OLORA[task]
  folder = tmp_path / 'olora_classification' / task
  good = {'sentence': sentence, 'label': label}
  _write(folder / 'train.json.gz', [good])
  _write(folder / 'test.json', [good, good])
  dataset = catalog.load(task, data_dir=tmp_path)
  assert dataset.train == [FIELDS[task] | {'label': index}]
  assert dataset.test == dataset.train * 2

  for bad in (
    {'sentence': 'sentence: a', 'label': label},
    {'sentence': sentence},
    {'label': label},
  ):
    path = _write(folder / 'test.json', [good, bad])
    with pytest.raises(ValueError, match=rf'{path}, row 2: expected a label'):
      catalog.load(task, data_dir=tmp_path)
  _write(folder / 'test.json', [good, {'sentence': sentence, 'label': 'no'}])
  with pytest.raises(
    ValueError, match=rf"'{task}', split 'test', row 2: label 'no' is none of"
  ):
    catalog.load(task, data_dir=tmp_path)
  for empty in ([], {}, [1]):
    _write(folder / 'test.json', empty)
    with pytest.raises(ValueError, match=r'test\.json: expected a list'):
      catalog.load(task, data_dir=tmp_path)


def test_fewglue_where_olora_is_not(tmp_path):
  folder = tmp_path / 'fewglue_32dev' / 'WiC'
  row = {'word': 'w', 'sentence1': 'a', 'sentence2': 'b', 'idx': 5}
  lines = {'train': True, 'dev32': False, 'val': True}
  for name, label in lines.items():
    _write(folder / f'{name}.jsonl', json.dumps(row | {'label': label}) + '\n')
  dataset = catalog.load('wic', data_dir=tmp_path)
  del row['idx']
  assert dataset.train == [row | {'label': 1}, row | {'label': 0}]
  assert dataset.test == [row | {'label': 1}]
  _write(folder / 'val.jsonl', '{"word": "w", "label": true}')
  with pytest.raises(
    ValueError, match=r"val\.jsonl, row 1 has no field 'sentence1'"
  ):
    catalog.load('wic', data_dir=tmp_path)


def test_a_folder_of_the_tasks_own_name(tmp_path):
  head = 'premise,hypothesis,label\n'
  _write(tmp_path / 'mnli/train.csv', head + 'a,b,neutral\nc,d,-1\ne,f,2\n')
  _write(tmp_path / 'mnli/test.csv.gz', head + 'a,b,0\nc,d,-\n')
  dataset = catalog.load('mnli', data_dir=tmp_path)
  assert [row['label'] for row in dataset.train] == [1, 2]  # -1 is dropped
  assert [row['label'] for row in dataset.test] == [0]
  _write(tmp_path / 'mnli/train.csv', 'premise,label\na,1\n')
  with pytest.raises(ValueError, match="'mnli'.*no field 'hypothesis'.*colu"):
    catalog.load('mnli', data_dir=tmp_path)


def test_natural_instructions(tmp_path):
  def task(outputs, **more):
    return {
      'Definition': ['Do it.'],
      'Categories': ['Doing'],
      'Instances': [{'input': 'x', 'output': outputs, 'id': 'i'}],
      **more,
    }

  folder = tmp_path / 'natural_instructions'
  _write(folder / 'train_shared/task2_b.json.gz', task(['one', 'two']))
  _write(folder / 'train_shared/task1_a.json', task('one'))
  _write(folder / 'test_shared/task3_c.json', task(['three']))
  dataset = catalog.load('natural_instructions', data_dir=tmp_path)
  assert dataset.train[1] == {
    'instruction': 'Do it.',
    'input': 'x',
    'response': 'one',
    'references': ['one', 'two'],
    'task': 'task2_b',
    'category': 'Doing',
  }
  assert [row['task'] for row in dataset.train] == ['task1_a', 'task2_b']
  assert dataset.test[0]['references'] == ['three']
  assert dataset.label_names == ()
  path = folder / 'test_shared/task3_c.json'
  _write(path, task([]))
  with pytest.raises(ValueError, match="'test', row 1: response and ref"):
    catalog.load('natural_instructions', data_dir=tmp_path)
  _write(path, task(['a'], Instances=[]))
  with pytest.raises(ValueError, match=r"task3_c.json, field 'Instances'"):
    catalog.load('natural_instructions', data_dir=tmp_path)
  _write(path, task(['a'], Definition=[]))
  with pytest.raises(ValueError, match="task3_c.json: no field 'Definition'"):
    catalog.load('natural_instructions', data_dir=tmp_path)


def test_dolly_wants_all_clients(tmp_path):
  folder = tmp_path / 'dolly_clients' / 'dolly' / '10'
  row = {'instruction': 'i', 'context': '', 'response': 'r', 'category': 'c'}
  for i in range(10):
    _write(folder / f'local_training_{i}.json', [row])
  with pytest.raises(FileNotFoundError, match='1 of them are not there'):
    catalog.load('dolly', data_dir=tmp_path)
  _write(folder / 'global_test.json.gz', [row])
  dataset = catalog.load('dolly', data_dir=tmp_path)
  assert [row['client'] for row in dataset.train] == list(range(10))
  assert dataset.test == [
    {
      'instruction': 'i',
      'input': '',
      'response': 'r',
      'references': ['r'],
      'category': 'c',
    }
  ]


def test_own_generation_data(tmp_path):
  path = tmp_path / 'a.jsonl'
  rows = [
    {'q': 'one', 'a': ['1', 'i'], 'speaker': 'x'},
    {'q': 'two', 'a': ['2'], 'speaker': 'y'},
  ]
  _write(path, '\n'.join(map(json.dumps, rows)))
  columns = rows_lib.parse_columns('instruction=q,response=a')
  dataset = catalog.load(str(path), columns=columns)
  both = sorted(dataset.train + dataset.test, key=lambda row: row['speaker'])
  assert both[0] == {
    'instruction': 'one',
    'input': '',
    'response': '1',
    'references': ['1', 'i'],
    'speaker': 'x',
  }
  assert len(both) == 2
  with pytest.raises(ValueError, match="no column 'b' .for field 'response'"):
    catalog.load(str(path), columns={'response': 'b'})
  with pytest.raises(ValueError, match=r"columns .*'a', 'q'.*--columns"):
    catalog.load(str(path))


@pytest.mark.parametrize(
  ('values', 'names', 'indices'),
  [
    (['b', 'a', 'b'], ('a', 'b'), [1, 0, 1]),
    ([10, 9, 10], ('9', '10'), [1, 0, 1]),  # by value, not as text
    (['10', '9', '-1'], ('-1', '9', '10'), [2, 1, 0]),
    ([True, False], ('False', 'True'), [1, 0]),
    ([0, 2, 1], ('0', '1', '2'), [0, 2, 1]),
  ],
)
def test_labels_of_any_spelling(values, names, indices):
  rows = [{'label': value} for value in values]
  assert labels.names_of(rows, 'x') == names
  assert [r['label'] for r in labels.encode(rows, names, 'x')] == indices


@pytest.mark.parametrize('label', [None, 1.0, '', 'bad', 2, -1, '2', ['good']])
def test_labels_outside_the_words(label):
  rows = [{'label': 'good'}, {'label': label}]
  with pytest.raises(ValueError, match='x, row 2: '):
    labels.encode(rows, ('bad ', 'good'), 'x')


def test_label_of_test_that_train_does_not_have(tmp_path):
  _write(tmp_path / 'train.csv', 'text,label\na,x\nb,y\n')
  _write(tmp_path / 'test.csv', 'text,label\na,z\n')
  with pytest.raises(ValueError, match="'test', row 1: label 'z' is none of"):
    catalog.load(str(tmp_path))
  _write(tmp_path / 'test.csv', 'text\na\n')
  with pytest.raises(ValueError, match="'test', row 1 has no field 'label'"):
    catalog.load(str(tmp_path))
  _write(tmp_path / 'train.csv', 'text,label\na,x\n')
  with pytest.raises(ValueError, match="'label' has one value only, 'x'"):
    catalog.load(str(tmp_path))


def test_text_must_be_text(tmp_path):
  path = _write(
    tmp_path / 'a.json', [{'text': 'a', 'label': 0}, {'text': None, 'label': 1}]
  )
  with pytest.raises(ValueError, match="row 2: field 'text' must be text"):
    catalog.load(str(path))


def test_blank_texts_are_left_out(tmp_path):
  path = _write(tmp_path / 'a.txt', 'one\n\n \ntwo\n')
  dataset = catalog.load(str(path))
  texts = sorted(row['text'] for row in dataset.train + dataset.test)
  assert texts == ['one', 'two']
  path = _write(tmp_path / 'a.json', [{'text': ''}, {'text': ' '}])
  with pytest.raises(ValueError, match=r"a\.json.*'text' is blank in all 2"):
    catalog.load(str(path))


@pytest.mark.parametrize('names', [('a',), ('a', 'a'), ('a', '')])
def test_label_names_differ(tmp_path, names):
  path = _write(tmp_path / 'a.csv', 'text,label\nx,0\ny,1\n')
  with pytest.raises(ValueError, match='two or more different names'):
    catalog.load(str(path), label_names=names)
  assert catalog.load(str(path), label_names=('a', 'b')).label_names == (
    'a',
    'b',
  )


def test_options_that_do_not_apply(tmp_path):
  with pytest.raises(ValueError, match="task 'sst2' has its own columns"):
    catalog.load('sst2', columns={'text': 'x'})
  with pytest.raises(FileNotFoundError, match="--data_dir: no folder at 'no/"):
    catalog.load('sst2', data_dir='no/where')
  with pytest.raises(ValueError, match="'trec' from files .* fixed splits"):
    catalog.load('trec', data_dir=_sentences(tmp_path), test_split='dev')


def test_parse_columns():
  assert rows_lib.parse_columns('') == rows_lib.parse_columns(None) == {}
  assert rows_lib.parse_columns(' text=a b, label = c=d') == {
    'text': 'a b',
    'label': 'c=d',
  }
  for text in ('text', 'text=', '=a', 'a=b,', 'a=b,,c=d'):
    with pytest.raises(ValueError, match='--columns: .* field=column'):
      rows_lib.parse_columns(text)
  with pytest.raises(ValueError, match="'a' comes twice"):
    rows_lib.parse_columns('a=b,a=c')


def test_rename_may_swap_and_replace():
  rows = [{'a': 1, 'b': 2, 'c': 3}]
  swap = rows_lib.rename(rows, {'a': 'b', 'b': 'a'}, 'x')
  assert swap == [{'a': 2, 'b': 1, 'c': 3}]
  assert rows_lib.rename(rows, {'a': 'b'}, 'x') == [{'a': 2, 'c': 3}]


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
  st.lists(st.integers(0, 30), min_size=2, max_size=80), st.randoms()
)
def test_rows_held_out(numbers, random):
  hypothesis.assume(len(set(numbers)) > 1)
  rows = [{'text': str(number)} for number in numbers]
  train, test = rows_lib.hold_out(rows, 'x')
  text = lambda part: [row['text'] for row in part]
  assert train
  assert test
  assert sorted(text(train + test)) == sorted(text(rows))
  assert not set(text(train)) & set(text(test))  # equal rows stay together
  assert [r for r in rows if r in train] == train  # in their order
  random.shuffle(rows)  # another order, the same rows
  again = rows_lib.hold_out(rows, 'x')
  assert sorted(text(again[1])) == sorted(text(test))


def test_a_tenth_is_held_out():
  train, test = rows_lib.hold_out([{'i': i} for i in range(1005)], 'x')
  assert (len(train), len(test)) == (905, 100)
  with pytest.raises(ValueError, match='x: 3 rows, 1 of them different'):
    rows_lib.hold_out([{'i': 1}] * 3, 'x')


def test_digest_is_over_canonical_json():
  lines = 'train 1\n{"a":"\\u00e9","b":[1,true]}\ntest 0\n'
  expected = hashlib.sha256(lines.encode()).hexdigest()
  assert rows_lib.digest([{'b': [1, True], 'a': 'é'}], []) == expected
  assert rows_lib.digest([], [{'b': [1, True], 'a': 'é'}]) != expected


COUNTS = {
  'sst2': (6920, 1821),
  'sst5': (8544, 2210),
  'trec': (5452, 500),
  'mr': (9596, 1066),
  'cb': (250, 56),
  'rte': (2000, 277),
  'boolq': (2000, 3270),
  'wic': (2000, 638),
  'copa': (400, 100),
  'gsm8k': (7473, 1319),
  'dolly': (14931, 80),
  'natural_instructions': (13432, 1100),
}


@shared_data
@pytest.mark.parametrize('task', COUNTS)
def test_real_data_have_the_published_sizes(task):
  dataset = catalog.load(task, data_dir=DATA_DIR)
  assert (len(dataset.train), len(dataset.test)) == COUNTS[task]
  for rows in (dataset.train, dataset.test):
    for name in catalog.TASKS[task].fields:
      assert all(row[name] or row[name] == 0 for row in rows)
    if dataset.label_names:
      found = {row['label'] for row in rows}
      assert found == set(range(len(dataset.label_names)))


@shared_data
@pytest.mark.parametrize('task', OLORA)
def test_two_sources_of_a_task_agree(task):
  """O-LoRA's parsed sentences against FewGLUE's fields, row for row."""
  spec = catalog.TASKS[task]
  parsed = layouts.olora(DATA_DIR, task)
  given = layouts.fewglue(DATA_DIR, task, spec.fields)
  assert parsed is not None
  assert given is not None

  def encoded(rows):
    # RTE in FewGLUE has lost quotes at the ends of its fields
    plain = lambda text: ' '.join(str(text).replace('"', '').split())
    rows = labels.encode(rows, spec.label_names, task, aliases=spec.aliases)
    return collections.Counter(
      tuple(plain(row[field]) for field in spec.fields) for row in rows
    )

  assert encoded(parsed[1]) == encoded(given[1])


@shared_data
def test_overlaps_are_as_documented():
  def common(rows, others):
    letters = lambda row: ''.join(filter(str.isalnum, row['text'].lower()))
    known = {letters(row) for row in others}
    return sum(letters(row) in known for row in rows)

  load = lambda name: catalog.load(name, data_dir=DATA_DIR)
  trec, mr, sst2 = load('trec'), load('mr'), load('sst2')
  assert common(trec.test, trec.train) == 11
  assert common(sst2.test, mr.train + mr.test) == 1431


@shared_data
def test_columns_of_real_data_make_clients():
  instructions = catalog.load('natural_instructions', data_dir=DATA_DIR)
  assert len({row['task'] for row in instructions.train}) == 60
  assert not {r['task'] for r in instructions.train} & {
    r['task'] for r in instructions.test
  }
  dolly = catalog.load('dolly', data_dir=DATA_DIR)
  assert {row['client'] for row in dolly.train} == set(range(10))
  assert len({row['category'] for row in dolly.train}) == 8


@shared_data
def test_real_rows_survive_csv(tmp_path):
  """5,452 questions through `datasets` and back, each as it was."""
  dataset = catalog.load('trec', data_dir=DATA_DIR)
  with open(tmp_path / 'a.csv', 'w', encoding='utf-8', newline='') as f:
    writer = csv.DictWriter(f, ['text', 'label'])
    writer.writeheader()
    writer.writerows(dataset.train)
  rows = sources.local(tmp_path / 'a.csv').train
  assert [row['text'] for row in rows] == [r['text'] for r in dataset.train]
