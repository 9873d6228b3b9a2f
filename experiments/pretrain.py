"""Trains the byte model that `jaxfl` carries, and writes its model card.

    python -m experiments.pretrain --data_dir=../shared/data

The text: CC0 books of Standard Ebooks and, for a small share of the windows,
the help topics of the running Python (`pydoc_data/topics.py`): English about
Python with short examples. So the model has met the characters of code, but
has read no module: those are what the clients of `jaxfl.data.python_text` have.
A run is a function of its flags, the books and the Python version.
"""

import gzip
import hashlib
import pathlib
import platform
import sys
import sysconfig
import time

import jax
import numpy as np
import optax
from absl import app, flags, logging

from jaxfl import keys, objectives
from jaxfl.data import python_text
from jaxfl.models import native, transformer
from jaxfl.models.config import Config

_DATA = flags.DEFINE_string(
  'data_dir', None, 'Folder that has standard_ebooks/*.txt.gz.', required=True
)
_OUT = flags.DEFINE_string(
  'out_dir', 'jaxfl/models/embedded', 'Folder for the weights and the card.'
)
_STEPS = flags.DEFINE_integer('steps', 16_000, 'Optimiser steps.')
_BATCH = flags.DEFINE_integer('batch_size', 4, 'Windows in a step.')
_LENGTH = flags.DEFINE_integer('length', 128, 'Target bytes of a window.')
_LR = flags.DEFINE_float('lr', 2e-3, 'Peak learning rate.')
_DECAY = flags.DEFINE_float('weight_decay', 0.1, 'Decoupled weight decay.')
_TOPICS = flags.DEFINE_float(
  'topics_fraction', 0.02, 'Share of the windows that are help topics.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the weights and the windows.')
_LAYERS = flags.DEFINE_integer('num_layers', 4, 'Transformer blocks.')
_DIM = flags.DEFINE_integer('model_dim', 128, 'Width; the MLP has four times.')
_HEADS = flags.DEFINE_integer('num_heads', 2, 'Attention heads.')

VALID_SHARE = 0.02  # the end of every file


def settings() -> list[str]:
  """The flags that were given, but where the results go."""
  return [a for a in sys.argv[1:] if not a.startswith('--out_dir')]


def read_books(data_dir: str) -> list[bytes]:
  """The books of Standard Ebooks, one bytes object each.

  Raises:
    FileNotFoundError: if the folder has no books; names the flag.
  """
  folder = pathlib.Path(data_dir) / 'standard_ebooks'
  paths = sorted(folder.glob('*.txt.gz'))
  if not paths:
    raise FileNotFoundError(f'--data_dir: no *.txt.gz in {folder}')
  return [gzip.decompress(path.read_bytes()) for path in paths]


def read_topics() -> list[bytes]:
  """The help topics of the running Python, one bytes object.

  Raises:
    FileNotFoundError: if this Python has no source of them.
  """
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  return [(root / 'pydoc_data' / 'topics.py').read_bytes()]


def split(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
  """Joins files to one training and one validation text, uint8[N]."""
  train, valid = [], []
  for data in files:
    cut = len(data) - int(VALID_SHARE * len(data))
    train.append(data[:cut])
    valid.append(data[cut:])
  return _join(train), _join(valid)


def _join(parts: list[bytes]) -> np.ndarray:
  return np.frombuffer(b'\n\n'.join(parts), np.uint8)


def windows(
  text: np.ndarray, count: int, length: int, rng: np.random.Generator
) -> np.ndarray:
  """Random windows uint8[count, length + 1] of uint8[N]."""
  starts = rng.integers(0, len(text) - length, size=count)
  return text[starts[:, None] + np.arange(length + 1)[None, :]]


def batch_at(step, texts, *, seed, batch_size, length, topics_fraction):
  """The windows of one step, a function of the seed and the step."""
  rng = np.random.Generator(np.random.Philox(key=[seed, step]))
  count = int(rng.binomial(batch_size, topics_fraction))
  books, topics = texts
  return np.concatenate(
    [
      windows(books, batch_size - count, length, rng),
      windows(topics, count, length, rng),
    ]
  )


def make_step(config: Config, optimizer):
  """One compiled step: params, state, tokens -> params, state, loss."""
  loss_fn = objectives.lm_loss(config)

  @jax.jit
  def step(params, state, tokens):
    loss, grads = jax.value_and_grad(loss_fn)(params, {'tokens': tokens})
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  return step


def evaluate(config, params, texts, length) -> dict[str, dict[str, float]]:
  """Metrics on the validation text of both sources and on the default task."""
  run = objectives.evaluate_lm(config)
  rng = np.random.Generator(np.random.Philox(key=[0, 0]))
  results = {
    name: run(
      params,
      {'tokens': windows(text, 512, length, rng).reshape(16, 32, -1)},
    )
    for name, text in zip(('books', 'help topics'), texts, strict=True)
  }
  task = python_text.load(length=length, eval_examples=512)
  results['default task'] = run(params, task.eval_batches)
  return results


CARD = """# The embedded byte model

A decoder of bytes for demonstrations of fine-tuning: too small to write
useful text.

| | |
|---|---|
| weights | `model.safetensors`, sha256 `{digest}` |
| parameters | {num_params:,}, float32 |
| shape | {num_layers} layers, width {model_dim}, {num_heads} heads, \
{mlp_dim} hidden units; `config.json` |
| training | {steps:,} AdamW steps of {batch_size} windows of {length} bytes \
({tokens:,} bytes), cosine from {lr}, weight decay {weight_decay}, seed {seed} |
| mixture | {topics_percent:g} % of the windows are help topics |
| seconds | {seconds:.0f}, on a CPU with 2 shared cores |
| command | `{command}` |
| versions | Python {python}, JAX {jax} |

## Validation

Books and topics: random bytes of the last 2 % of every file. Default task: the
held-out text of `jaxfl.data.python_text`, Python code. 65,536 bytes each.

| source | bits per byte | next-byte accuracy |
|---|---|---|
{rows}

## Data and licences

- {num_books} books of Standard Ebooks, {book_bytes:,} bytes, sha256
  `{book_digest}`.
  Standard Ebooks dedicates its editions to the public domain (CC0 1.0); the
  texts are in the public domain in the United States.
- The help topics of Python {python}, `pydoc_data/topics.py`, {topics_bytes:,}
  bytes, under the PSF License Version 2; sha256
  `{topics_digest}`.
- Not seen in training: Python modules, the clients' text of the default task.

## Limits

Trained on a few megabytes for minutes. Contexts beyond {length} bytes were not
trained. The books are of the 19th and early 20th century and carry the views of
their time. The digest of a new run differs with the Python version, the JAX
version and the processor.
"""


def write_card(path, params, losses, sources, seconds, config):
  """Fills in the model card beside the weights."""
  weights = (path / 'model.safetensors').read_bytes()
  books, topics = sources
  rows = '\n'.join(
    f'| {name} | {m["bits_per_token"]:.3f} | {m["accuracy"]:.3f} |'
    for name, m in losses.items()
  )
  text = CARD.format(
    digest=hashlib.sha256(weights).hexdigest(),
    num_params=sum(x.size for x in jax.tree.leaves(params)),
    num_layers=config.num_layers,
    model_dim=config.model_dim,
    num_heads=config.num_heads,
    mlp_dim=config.mlp_dim,
    steps=_STEPS.value,
    batch_size=_BATCH.value,
    length=_LENGTH.value,
    tokens=_STEPS.value * _BATCH.value * _LENGTH.value,
    lr=_LR.value,
    weight_decay=_DECAY.value,
    seed=_SEED.value,
    topics_percent=100 * _TOPICS.value,
    seconds=seconds,
    command=' '.join(['python -m experiments.pretrain', *settings()]),
    python=platform.python_version(),
    jax=jax.__version__,
    rows=rows,
    num_books=len(books),
    book_bytes=sum(map(len, books)),
    book_digest=hashlib.sha256(b''.join(books)).hexdigest(),
    topics_bytes=sum(map(len, topics)),
    topics_digest=hashlib.sha256(b''.join(topics)).hexdigest(),
  )
  (path / 'MODEL_CARD.md').write_text(text)


def train(config: Config, texts) -> jax.Array:
  """Trains from random weights; returns the parameters."""
  params = transformer.init(config, jax.random.key(_SEED.value))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, _LR.value, min(200, _STEPS.value // 10), _STEPS.value
  )
  matrices = {
    name for name, x in keys.named_leaves(params) if min(x.shape[-2:]) > 16
  }
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      schedule,
      b2=0.98,
      weight_decay=_DECAY.value,
      mask=lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: keys.path_str(path) in matrices, tree
      ),
    ),
  )
  state = optimizer.init(params)
  step = make_step(config, optimizer)
  start, losses = time.perf_counter(), []
  for i in range(_STEPS.value):
    tokens = batch_at(
      i,
      texts,
      seed=_SEED.value,
      batch_size=_BATCH.value,
      length=_LENGTH.value,
      topics_fraction=_TOPICS.value,
    )
    params, state, loss = step(params, state, tokens)
    losses.append(loss)
    if (i + 1) % 200 == 0 or i + 1 == _STEPS.value:
      logging.info(
        'step %d of %d, loss %.3f nats per byte, %.0f s',
        i + 1,
        _STEPS.value,
        np.mean([float(x) for x in losses]),
        time.perf_counter() - start,
      )
      losses = []
  return params


def main(_):
  """Reads, trains, evaluates, writes."""
  books, topics = read_books(_DATA.value), read_topics()
  parts = split(books), split(topics)
  trains, valids = ([part[i] for part in parts] for i in range(2))
  config = native.byte_config(
    num_layers=_LAYERS.value,
    model_dim=_DIM.value,
    num_heads=_HEADS.value,
    mlp_dim=4 * _DIM.value,
  )
  start = time.perf_counter()
  params = train(config, trains)
  seconds = time.perf_counter() - start
  losses = evaluate(config, params, valids, _LENGTH.value)
  path = pathlib.Path(_OUT.value)
  native.save(path, config, params)
  write_card(path, params, losses, (books, topics), seconds, config)
  logging.info('wrote %s: %s', path, losses)


if __name__ == '__main__':
  app.run(main)
