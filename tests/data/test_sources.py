"""Local files, the hub, and what is wrong with them."""

import gzip
import json
import logging
import pathlib
import pickle
import types

import datasets
import pytest

from jaxfl.data import catalog, files, hub, sources
from jaxfl.data import rows as rows_lib

# old versions of `datasets` leave csv files to the garbage collector to close
pytestmark = pytest.mark.filterwarnings(
  'ignore::ResourceWarning',
  'ignore::pytest.PytestUnraisableExceptionWarning',
)
ROWS = [
  {'text': 'NA', 'label': '007'},
  {'text': 'né, "so"\nund', 'label': '1'},
]
CSV = 'text,label\nNA,007\n"né, ""so""\nund",1\n'


def _write(path: pathlib.Path, data: str | bytes):
  data = data.encode() if isinstance(data, str) else data
  data = gzip.compress(data) if path.suffix == '.gz' else data
  path.write_bytes(data)
  return path


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('a.csv', CSV),
    ('a.csv.gz', CSV),
    ('bom.csv', '\ufeff' + CSV),
    ('a.tsv', 'text\tlabel\nNA\t007\n"né, ""so""\nund"\t1\n'),
    ('a.json', json.dumps(ROWS)),
    ('a.json.gz', json.dumps(ROWS)),
    ('a.jsonl', '\n'.join(map(json.dumps, ROWS))),
    ('a.jsonl.gz', '\n'.join(map(json.dumps, ROWS)) + '\n'),
  ],
)
def test_formats_give_the_cells_as_they_are(tmp_path, name, text):
  splits = sources.local(_write(tmp_path / name, text))
  assert splits == sources.Splits(ROWS, None, {})


def test_a_path_is_not_a_pattern(tmp_path):
  folder = tmp_path / 'a[b]*'
  folder.mkdir()
  assert sources.local(_write(folder / 'a.csv', CSV)).train == ROWS


def test_text_is_a_row_a_line(tmp_path):
  for name in ('a.txt', 'b.txt.gz'):
    splits = sources.local(_write(tmp_path / name, 'one\u2028two\nthree\n'))
    assert splits.train == [{'text': 'one\u2028two'}, {'text': 'three'}]


def test_parquet_has_class_labels(tmp_path):
  features = datasets.Features(
    {
      'text': datasets.Value('string'),
      'label': datasets.ClassLabel(names=['z', 'a']),
    }
  )
  rows = [{'text': f't{i}', 'label': i % 2} for i in range(20)]
  path = tmp_path / 'a.parquet'
  datasets.Dataset.from_list(rows, features=features).to_parquet(path)
  dataset = catalog.load(str(path))
  assert dataset.label_names == ('z', 'a')  # not sorted: the file's own
  assert len(dataset.train) + len(dataset.test) == 20
  assert all(row in rows for row in dataset.train + dataset.test)


def test_folder_of_splits(tmp_path):
  _write(tmp_path / 'train-0.csv', 'text,label\na,x\nb,y\n')
  _write(tmp_path / 'train-1.csv', 'text,label\nc,x\n')
  _write(tmp_path / 'dev.csv.gz', 'text,label\nd,y\n')
  _write(tmp_path / 'README.md', 'not data')
  dataset = catalog.load(str(tmp_path))
  assert [row['text'] for row in dataset.train] == ['a', 'b', 'c']
  assert dataset.test == [{'text': 'd', 'label': 1}]
  assert dataset.label_names == ('x', 'y')
  other = catalog.load(
    str(tmp_path),
    train_split='dev',
    test_split='train',
    label_names=('y', 'x'),
  )
  assert other.train == [{'text': 'd', 'label': 0}]
  assert [row['label'] for row in other.test] == [1, 0, 1]


@pytest.mark.parametrize(
  ('name', 'data', 'message'),
  [
    ('a.csv', '', 'a.csv: the file is empty'),
    ('a.csv', '\n \n', 'a.csv: the file is empty'),
    ('a.csv.gz', '', 'a.csv.gz: the file is empty'),
    ('a.csv', 'text,label\n', 'a.csv: a header, but no rows'),
    ('a.csv', 'text,label\nx\n', r'a.csv, line 2: 1 cells.*\bhas 2'),
    ('a.csv', 'text,label\nx,1\n\nx,1,2\n', 'a.csv, line 4: 3 cells'),
    ('a.csv', 'text,text\nx,1\n', "each once; got .'text', 'text'"),
    ('a.csv', 'text,label\né,1\n'.encode('latin-1'), 'a.csv: not utf-8'),
    ('a.json', '', 'a.json: the file is empty'),
    ('a.json', '[]', 'a.json: no rows'),
    ('a.json', '[{"text": ', 'a.json: cannot be read as json'),
    ('a.jsonl', '{"text": "a"}\n{"text"', 'a.jsonl: cannot be read as json'),
    ('a.jsonl', '{"text": "\xe9"}'.encode('latin-1'), 'a.jsonl: not utf-8'),
    ('a.txt', '', 'a.txt: the file is empty'),
    ('a.parquet', 'PAR1 this is not one', 'a.parquet: cannot be read'),
    ('a.pkl', pickle.dumps(ROWS), 'a.pkl: unknown format; .*csv.*parquet'),
    ('a', 'text,label\nx,1\n', 'a: unknown format'),
  ],
)
def test_bad_files_are_named(tmp_path, name, data, message):
  path = _write(tmp_path / name, data)
  with pytest.raises(ValueError, match=message):
    catalog.load(str(path))


def test_broken_gzip_is_named(tmp_path):
  data = gzip.compress(CSV.encode())
  for name, broken in (('a.csv.gz', data[:-9]), ('b.csv.gz', CSV.encode())):
    path = tmp_path / name
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=f'{name}: not a whole gzip'):
      sources.local(path)


def test_folders_that_lack_a_split(tmp_path):
  _write(tmp_path / 'data.csv', CSV)
  with pytest.raises(FileNotFoundError, match=r'no train\.csv.*data\.csv'):
    catalog.load(str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r'no fold2\.csv'):
    catalog.load(str(tmp_path), test_split='fold2')
  _write(tmp_path / 'train.csv', CSV)
  _write(tmp_path / 'train.json', json.dumps(ROWS))
  with pytest.raises(ValueError, match="'train' in several formats"):
    catalog.load(str(tmp_path))


def test_a_file_has_no_splits(tmp_path):
  path = _write(tmp_path / 'a.csv', CSV)
  for options in ({'train': 'b'}, {'test': 'test'}):
    with pytest.raises(ValueError, match=r'a\.csv is one file.*test_split'):
      sources.local(path, **options)


def test_json_errors_name_the_place(tmp_path):
  path = _write(tmp_path / 'a.jsonl', '{"a": 1}\n\n[1]\n')
  with pytest.raises(ValueError, match=r'a\.jsonl, line 3: not an object'):
    files.read_json_lines(path)
  path = _write(tmp_path / 'a.jsonl', '{"a": 1}\n{"a"\n')
  with pytest.raises(ValueError, match=r'a\.jsonl, line 2: not JSON'):
    files.read_json_lines(path)


def test_a_home_that_cannot_be_written_to(tmp_path, monkeypatch):
  """Local files need no cache; for the hub a temporary one steps in."""
  blocked = _write(tmp_path / 'file', 'x') / 'below'
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(blocked))
  monkeypatch.setattr(
    datasets.config, 'DOWNLOADED_DATASETS_PATH', str(blocked / 'downloads')
  )
  path = _write(tmp_path / 'a.csv.gz', CSV)
  assert sources.local(path).train == ROWS
  seen = _fake_hub(monkeypatch, {'train': ROWS})
  assert hub.read('owner/name').train == ROWS
  assert not pathlib.Path(seen['cache_dir']).exists()  # it was temporary


def _fake_hub(monkeypatch, splits, features=None, name='parquet'):
  """Puts a data set on the hub; returns what it will be asked for."""
  asked = {}
  tables = {
    split: datasets.Dataset.from_list(rows, features=features)
    for split, rows in splits.items()
  }

  def load_dataset_builder(path, config=None, *, cache_dir=None):
    asked.update(path=path, config=config, cache_dir=cache_dir)
    return types.SimpleNamespace(
      name=name,
      download_and_prepare=lambda: asked.update(downloaded=True),
      info=types.SimpleNamespace(splits=dict.fromkeys(tables)),
      as_dataset=lambda split: tables[split],
    )

  monkeypatch.setattr(datasets, 'load_dataset_builder', load_dataset_builder)
  return asked


def test_hub_id_with_config_and_columns(monkeypatch):
  features = datasets.Features(
    {
      'sentence': datasets.Value('string'),
      'label': datasets.ClassLabel(names=['neg', 'pos']),
      'topic': datasets.Value('string'),
    }
  )
  row = {'sentence': 'fine', 'label': 1, 'topic': 'a'}
  asked = _fake_hub(monkeypatch, {'train': [row], 'dev': [row]}, features)
  dataset = catalog.load('owner/name:cfg', columns={'text': 'sentence'})
  assert (asked['path'], asked['config']) == ('owner/name', 'cfg')
  assert dataset.train == [{'text': 'fine', 'label': 1, 'topic': 'a'}]
  assert dataset.test == dataset.train
  assert dataset.label_names == ('neg', 'pos')


HUB = {
  # id, config, columns on the hub, our row
  'sst2': (
    ('nyu-mll/glue', 'sst2'),
    {'sentence': 'a', 'label': 1, 'idx': 0},
    {'text': 'a', 'label': 1},
  ),
  'sst5': (
    ('SetFit/sst5', None),
    {'text': 'a', 'label': 4, 'label_text': 'very positive'},
    {'text': 'a', 'label': 4},
  ),
  'trec': (
    ('SetFit/TREC-QC', None),
    {'text': 'a', 'label': 7, 'label_coarse_original': 'DESC'},
    {'text': 'a', 'label': 2},
  ),
  'mr': (
    ('cornell-movie-review-data/rotten_tomatoes', None),
    {'text': 'a', 'label': 'neg'},
    {'text': 'a', 'label': 0},
  ),
  'cb': (
    ('aps/super_glue', 'cb'),
    {'premise': 'a', 'hypothesis': 'b', 'label': 'neutral', 'idx': 0},
    {'premise': 'a', 'hypothesis': 'b', 'label': 2},
  ),
  'gsm8k': (
    ('openai/gsm8k', 'main'),
    {'question': 'a', 'answer': 'b'},
    {'instruction': 'a', 'input': '', 'response': 'b', 'references': ['b']},
  ),
  'dolly': (
    ('databricks/databricks-dolly-15k', None),
    {'instruction': 'a', 'context': 'c', 'response': 'b', 'category': 'd'},
    {
      'instruction': 'a',
      'input': 'c',
      'response': 'b',
      'references': ['b'],
      'category': 'd',
    },
  ),
  'natural_instructions': (
    ('Muennighoff/natural-instructions', None),
    {'task_name': 't', 'definition': 'a', 'inputs': 'c', 'targets': 'b'},
    {
      'instruction': 'a',
      'input': 'c',
      'response': 'b',
      'references': ['b'],
      'task': 't',
    },
  ),
}


@pytest.mark.parametrize('task', HUB)
def test_tasks_on_the_hub(monkeypatch, task):
  (path, config), theirs, ours = HUB[task]
  split = catalog.TASKS[task].test_split or 'test'
  asked = _fake_hub(monkeypatch, {'train': [theirs], split: [theirs]})
  dataset = catalog.load(task)
  assert (asked['path'], asked['config']) == (path, config)
  assert dataset.train == dataset.test == [ours]


def test_snli_rows_without_a_label_are_dropped(monkeypatch):
  features = datasets.Features(
    {
      'premise': datasets.Value('string'),
      'hypothesis': datasets.Value('string'),
      # another order than ours: labels go by name
      'label': datasets.ClassLabel(
        names=['contradiction', 'entailment', 'neutral']
      ),
    }
  )
  rows = [
    {'premise': 'a', 'hypothesis': 'b', 'label': label}
    for label in (-1, 0, 1, 2)
  ]
  _fake_hub(monkeypatch, {'train': rows, 'test': rows}, features)
  dataset = catalog.load('snli')
  assert [row['label'] for row in dataset.train] == [2, 0, 1]


def test_hub_split_without_labels(monkeypatch):
  features = datasets.Features(
    {
      'text': datasets.Value('string'),
      'label': datasets.ClassLabel(names=['neg', 'pos']),
    }
  )
  rows = {
    'train': [{'text': 'a', 'label': 1}],
    'test': [{'text': 'b', 'label': -1}],
  }
  _fake_hub(monkeypatch, rows, features)
  with pytest.raises(ValueError, match="'test', row 1: label -1 .* split"):
    catalog.load('owner/name')


def test_hub_reader_must_be_one_that_we_know(monkeypatch):
  asked = _fake_hub(monkeypatch, {'train': ROWS}, name='pandas')
  with pytest.raises(ValueError, match="'owner/name'.*read by 'pandas'"):
    hub.read('owner/name')
  assert 'downloaded' not in asked


def test_hub_data_set_with_a_script(monkeypatch):
  def load_dataset_builder(*args, **kwargs):
    raise RuntimeError('Dataset scripts are no longer supported')

  monkeypatch.setattr(datasets, 'load_dataset_builder', load_dataset_builder)
  with pytest.raises(ValueError, match="'owner/name'.*scripts are no longer"):
    hub.read('owner/name')


def test_real_reader_of_a_folder_passes_the_check(tmp_path):
  """What `datasets` calls its readers is what we look for."""
  _write(tmp_path / 'train.jsonl', json.dumps(ROWS[0]))
  builder = datasets.load_dataset_builder(
    str(tmp_path), cache_dir=str(tmp_path / 'cache')
  )
  assert builder.name in hub.FORMATS


def test_offline_says_what_to_do(monkeypatch, tmp_path):
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'c')
  with pytest.raises(FileNotFoundError) as error:
    catalog.load('sst2', data_dir=tmp_path)
  for part in (
    "data set 'sst2'",
    f'--data_dir={tmp_path}',
    'nyu-mll/glue:sst2',
    'sentence_classification/{stsa.binary.train,stsa.binary.test}',
    'sst2/{train,test}.jsonl',
    'path of your own file',
    'go online',
  ):
    assert part in str(error.value)
  with pytest.raises(FileNotFoundError, match="'owner/name'.*go online"):
    catalog.load('owner/name')
  with pytest.raises(FileNotFoundError) as error:
    catalog.load('boolq', data_dir=tmp_path)
  for part in ('olora_classification/boolq/{train,test}.json or ',
               'fewglue_32dev/BoolQ/{train,val}.jsonl or '):  # fmt: skip
    assert part in str(error.value)


def test_retries_of_the_hub_are_not_shown(monkeypatch, caplog):
  logger = logging.getLogger('huggingface_hub.utils._http')

  def fail(*args, **options):
    logger.warning('Retrying in 1s [Retry 1/5].')
    raise OSError('no network')

  monkeypatch.setattr(datasets, 'load_dataset_builder', fail)
  with pytest.raises(FileNotFoundError, match='no network'):
    catalog.load('owner/name')
  assert 'Retrying' not in caplog.text
  logger.warning('as before')
  assert 'as before' in caplog.text


@pytest.mark.parametrize('name', ['sst3', './x', 'a/b/c', 'a/b.csv', 'x.csv'])
def test_neither_task_nor_path_nor_hub_id(name, monkeypatch):
  monkeypatch.delattr(datasets, 'load_dataset_builder')
  with pytest.raises(FileNotFoundError, match='no such file or folder.*sst2'):
    catalog.load(name)


def test_values_that_are_no_data():
  with pytest.raises(ValueError, match="'image'.* a value of type object"):
    rows_lib.canonical({'image': object()})
