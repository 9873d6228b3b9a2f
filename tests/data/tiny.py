"""Small tokenizers for tests, in the files that checkpoints have."""

import json
import os
import pathlib

import pytest

# fmt: off
BERT_WORDS = [
  '[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'it', 'was', 'great', 'bad',
  'a', 'film', 'play', '##ing', '##s', '.', '?', ',', 'yes', 'no',
]
# fmt: on


def shared_data(name: str) -> pathlib.Path:
  """A folder of the real data; the test is skipped where there is none."""
  default = pathlib.Path(__file__).parents[3] / 'shared' / 'data'
  path = pathlib.Path(os.environ.get('JAXFL_DATA_DIR', default)) / name
  if not path.exists():
    pytest.skip(f'no {name} in JAXFL_DATA_DIR or ../shared/data')
  return path


def write_json(path: pathlib.Path, value) -> None:
  path.write_text(json.dumps(value), encoding='utf-8')


def bert(folder: pathlib.Path) -> pathlib.Path:
  """`vocab.txt` alone."""
  folder.mkdir(exist_ok=True)
  (folder / 'vocab.txt').write_text('\n'.join(BERT_WORDS), encoding='utf-8')
  return folder


def byte_level(folder: pathlib.Path, special=(), **configs) -> pathlib.Path:
  """`vocab.json` and `merges.txt`: bytes, and the words great and Ġgreat.

  Args:
    folder: to write to.
    special: tokens at the beginning of the vocabulary.
    **configs: name -> contents of name.json.
  """
  from tokenizers import pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [('g', 'r'), ('e', 'a'), ('gr', 'ea'), ('grea', 't')]
  merges += [('\u0120', 'great')]
  tokens = [*special, *alphabet, *(a + b for a, b in merges)]
  folder.mkdir(exist_ok=True)
  write_json(
    folder / 'vocab.json', {token: i for i, token in enumerate(tokens)}
  )
  lines = ['#version: 0.2', *(' '.join(pair) for pair in merges)]
  (folder / 'merges.txt').write_text('\n'.join(lines), encoding='utf-8')
  for name, value in configs.items():
    write_json(folder / f'{name}.json', value)
  return folder


def llama(folder: pathlib.Path) -> pathlib.Path:
  """A `tokenizer.json` that puts a space before every text, and <s>."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, processors

  words = ['<unk>', '<s>', '</s>', '\u2581', *'abcdefgrt', '\n']
  merges = [('g', 'r'), ('e', 'a'), ('gr', 'ea'), ('grea', 't')]
  merges += [('\u2581', 'great'), ('\u2581', 'a')]
  words += [a + b for a, b in merges]
  vocab = {word: i for i, word in enumerate(words)}
  model = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token='<unk>'))
  model.normalizer = normalizers.Sequence(
    [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  model.post_processor = processors.TemplateProcessing(
    single='<s> $A', pair='<s> $A <s> $B:1', special_tokens=[('<s>', 1)]
  )
  model.decoder = decoders.Replace('\u2581', ' ')
  model.add_special_tokens(['<unk>', '<s>', '</s>'])
  folder.mkdir(exist_ok=True)
  model.save(str(folder / 'tokenizer.json'))
  return folder
