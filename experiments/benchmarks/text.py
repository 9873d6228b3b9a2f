"""Encoding text, and making batches of it: what a step waits for."""

import pathlib
import sysconfig
import tempfile

import numpy as np

from experiments.benchmarks import timing
from jaxfl.data import encode, templates
from jaxfl.data import tokenizer as tokenizer_lib

TEXTS, TAKES = 2000, 1000
ROWS, LENGTH = 32, 48  # of a batch


def operations() -> list[timing.Operation]:
  """Text to examples, and examples to batches.

  The vocabulary is trained on the standard library's modules, whose lines are
  the texts.
  """
  import tokenizers

  paths = sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
  lines = '\n'.join(p.read_text(errors='ignore') for p in paths[:80])
  texts = [line for line in lines.split('\n') if len(line.split()) > 5]
  model = tokenizers.BertWordPieceTokenizer()
  model.train_from_iterator(texts, vocab_size=8000, show_progress=False)
  rows = [{'text': text, 'label': 0} for text in texts[:TEXTS]]
  template = templates.bare('lines', rows[0], ('no', 'yes'))
  with tempfile.TemporaryDirectory() as folder:
    model.save_model(folder)
    tokenizer = tokenizer_lib.load(folder)
  tokenise = lambda: encode.encode(
    rows, template, tokenizer, form='head', max_length=LENGTH
  )
  encoded = tokenise()
  rng = np.random.default_rng(0)

  def take():
    for _ in range(TAKES):
      encoded.take(rng.integers(0, len(encoded), ROWS), LENGTH)

  make = lambda name, run, count: timing.Operation(
    name=name, on='text', run=run, work=count * LENGTH, unit='tokens/s'
  )
  return [
    make(f'tokenise {len(rows)} lines', tokenise, len(rows)),
    make(f'take {TAKES} batches', take, TAKES * ROWS),
  ]
