"""The table of tasks: their fields, labels, files and hub ids.

Fields of the tasks' rows (`label` is an index into `label_names`):

| task | fields |
|---|---|
| sst2, sst5, mr, trec | text, label |
| cb, rte, mnli, snli | premise, hypothesis, label |
| boolq | passage, question, label |
| wic | sentence1, sentence2, word, label |
| copa | premise, choice1, choice2, question ('cause' or 'effect'), label |
| gsm8k, dolly, natural_instructions | instruction, input ('' if there is
  none), response, references; dolly also category and (from files) client,
  natural_instructions also task and (from files) category |

Known overlaps: MR contains 1,431 of the 1,821 test sentences of SST-2, so a
model that saw MR must not be scored on SST; 11 of TREC's test questions are,
but for case, among those to train on, and are left there, as elsewhere.
From files, SST-2 is tested on the 1,821 test sentences; on the hub, whose test
split has no labels, on the 872 of validation. `natural_instructions` on the hub
has all tasks and instances and is large: `train_split='train[:1%]'` takes a
part. TREC's labels are in the order of the hub, not that of the files.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxfl.data import layouts

_GENERATION = ('instruction', 'response')


class Task(NamedTuple):
  """How to come by a task's rows.

  Attributes:
    fields: that every row has.
    label_names: () for generation.
    hub: owner/name or owner/name:config on the hub.
    layout: where its files are below `--data_dir`, for messages.
    read: reads them: folder -> (train, test), or None if they are not there.
    test_split: on the hub; None: hold rows out.
    columns: from field to the hub's column, where they differ.
    aliases: other spellings of the labels.
    extra: further fields that are kept.
  """

  fields: tuple[str, ...]
  label_names: tuple[str, ...]
  hub: str
  layout: str
  read: Callable[[pathlib.Path], layouts.Parts | None]
  test_split: str | None = 'validation'
  columns: Mapping[str, str] = {}
  aliases: Mapping[str, str] = {}
  extra: tuple[str, ...] = ()


def _sentence_task(hub_id, label_names, train, test, **more) -> Task:
  """A task of one sentence; `numbers` are the labels as the files count."""
  numbers = more.pop('numbers', label_names)
  encoding = more.pop('encoding', 'utf-8')
  return Task(
    ('text', 'label'),
    label_names,
    hub_id,
    'sentence_classification/' + (f'{{{train},{test}}}' if test else train),
    lambda folder: layouts.sentences(folder, train, test, numbers, encoding),
    **more,
  )


def _glue_task(name, fields, label_names, aliases=()) -> Task:
  """A task of SuperGLUE (Wang et al. 2019, arXiv:1905.00537)."""
  fields = (*fields, 'label')

  def read(folder):
    found = layouts.olora(folder, name)
    return found or layouts.fewglue(folder, name, fields)

  return Task(
    fields,
    label_names,
    f'aps/super_glue:{name}',
    f'olora_classification/{name}/{{train,test}}.json or '
    f'{layouts.fewglue_folder(name)}/{{train,val}}.jsonl',
    read,
    aliases=dict(aliases),
  )


def _pair_task(hub_id, test_split) -> Task:
  return Task(
    ('premise', 'hypothesis', 'label'),
    ('entailment', 'neutral', 'contradiction'),
    hub_id,
    '',
    lambda folder: None,
    test_split,
  )


_POLARITY = ('negative', 'positive')
_PAIR = ('premise', 'hypothesis')
_TRUTH = ('False', 'True')
TASKS: Mapping[str, Task] = {
  'sst2': _sentence_task(
    'nyu-mll/glue:sst2',
    _POLARITY,
    'stsa.binary.train',
    'stsa.binary.test',
    columns={'text': 'sentence'},
  ),
  'sst5': _sentence_task(
    'SetFit/sst5',
    ('very negative', 'negative', 'neutral', 'positive', 'very positive'),
    'stsa.fine.train',
    'stsa.fine.test',
    test_split='test',
  ),
  'trec': _sentence_task(
    'SetFit/TREC-QC',
    ('ABBR', 'ENTY', 'DESC', 'HUM', 'LOC', 'NUM'),
    'TREC.train.all',
    'TREC.test.all',
    numbers=('DESC', 'ENTY', 'ABBR', 'HUM', 'LOC', 'NUM'),
    encoding='latin-1',
    test_split='test',
    columns={'label': 'label_coarse_original'},
  ),
  'mr': _sentence_task(
    'cornell-movie-review-data/rotten_tomatoes',
    _POLARITY,
    'rt-polarity.all',
    None,
    encoding='latin-1',
    test_split='test',
    aliases={'neg': 'negative', 'pos': 'positive'},
  ),
  'cb': _glue_task('cb', _PAIR, ('entailment', 'contradiction', 'neutral')),
  'rte': _glue_task(
    'rte',
    _PAIR,
    ('entailment', 'not_entailment'),
    {'contradiction': 'not_entailment'},
  ),
  'boolq': _glue_task('boolq', ('passage', 'question'), _TRUTH),
  'wic': _glue_task('wic', ('sentence1', 'sentence2', 'word'), _TRUTH),
  'copa': _glue_task(
    'copa',
    ('premise', 'choice1', 'choice2', 'question'),
    ('choice1', 'choice2'),
    {'A': 'choice1', 'B': 'choice2'},
  ),
  'mnli': _pair_task('nyu-mll/glue:mnli', 'validation_matched'),
  'snli': _pair_task('stanfordnlp/snli', 'test'),
  'gsm8k': Task(
    _GENERATION,
    (),
    'openai/gsm8k:main',
    'gsm8k/{train,test}.jsonl',
    layouts.gsm8k,
    'test',
    {'instruction': 'question', 'response': 'answer'},
  ),
  'dolly': Task(
    _GENERATION,
    (),
    'databricks/databricks-dolly-15k',
    'dolly_clients/dolly/10/{local_training_0..9,global_test}.json',
    layouts.dolly,
    None,
    {'input': 'context'},
    extra=('category', 'client'),
  ),
  'natural_instructions': Task(
    _GENERATION,
    (),
    'Muennighoff/natural-instructions',
    'natural_instructions/{train_shared,test_shared}/*.json',
    layouts.natural_instructions,
    'test',
    {
      'instruction': 'definition',
      'input': 'inputs',
      'response': 'targets',
      'task': 'task_name',
    },
    extra=('task', 'category'),
  ),
}
