"""Measures a step of a 22M-parameter encoder on one CPU core, beside PyTorch.

    python -m experiments.benchmark_model --out=model.json

Takes about two minutes on an idle core. The encoder has the shape of MiniLM-L6
(6 layers of 384) with random weights and a mean-pooled head; a batch is 32 rows
of 48 tokens. The operations take turns, so that all see the same machine:

  * `forward`: our loss, jitted.
  * `spsa step`: a client's two-sided one-byte step, one projected gradient.
  * `spsa server`: applying eight clients' bytes to all weights.
  * `sgd step`: gradient and update, the first-order step.
  * `torch forward`: the same encoder of transformers, inference mode, one
    thread; only if torch and transformers are installed.
  * `torch mezo step`: the usual loop: perturb in place by a seeded normal
    tensor per parameter, forward, perturb back, forward, restore, update.
  * `tokenise`, `take`: encoding 2,000 lines of text, and 1,000 batches from
    encoded examples.
"""

import json
import os
import pathlib
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable

if hasattr(os, 'sched_setaffinity'):  # before JAX counts the cores
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
import optax
from absl import app, flags, logging

from jaxfl import keys, objectives
from jaxfl import method as method_lib
from jaxfl.data import encode, templates
from jaxfl.data import tokenizer as tokenizer_lib
from jaxfl.methods import fed_avg, spsa
from jaxfl.models import transformer
from jaxfl.models.config import Config

_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')
_REPEATS = flags.DEFINE_integer('repeats', 15, 'Repeats of every measurement.')

ROWS, LENGTH, CLIENTS = 32, 48, 8
TEXTS, TAKES = 2000, 1000
SHAPE = Config(
  vocab_size=30522,
  num_layers=6,
  model_dim=384,
  num_heads=12,
  num_kv_heads=12,
  head_dim=32,
  mlp_dim=1536,
  causal=False,
  norm_eps=1e-12,
  norm_place='post',
  embed_norm=True,
  final_norm=False,
  max_positions=512,
  learned_positions=True,
  type_vocab=2,
  head='classify',
  num_labels=2,
  pool='mean',
)


def batch() -> dict[str, np.ndarray]:
  """A batch with the row lengths of real sentences: 8 to 48 tokens."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(8, LENGTH + 1, ROWS)
  lengths[0] = LENGTH
  mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int8)
  return {
    'tokens': rng.integers(1000, 30000, (ROWS, LENGTH)).astype(np.int32),
    'mask': mask,
    'label': rng.integers(0, 2, ROWS).astype(np.int32),
  }


def jax_operations() -> dict[str, Callable]:
  """Our operations; each waits for its result."""
  params = transformer.init(SHAPE, jax.random.key(0))
  scores = objectives.class_scores(SHAPE, 'head')
  loss_fn = objectives.classification_loss(scores)
  zeroth = spsa.spsa(loss_fn, keys.root(0), learning_rate=1e-4, mu=1e-3)
  first = fed_avg.fed_avg(loss_fn, client_optimizer=optax.sgd(1e-3))
  one = batch()
  stacked = jax.tree.map(lambda x: x[None], one)
  party = method_lib.Party(np.int32(0), np.int32(0), np.float32(1))
  state, other = zeroth.init(params), first.init(params)
  forward, server = jax.jit(loss_fn), jax.jit(zeroth.server)
  client, sgd = jax.jit(zeroth.client), jax.jit(first.client)
  message = client(state, (), stacked, party)[0]
  messages = np.stack([message] * CLIENTS)
  cohort = method_lib.Party(
    np.arange(CLIENTS, dtype=np.int32),
    np.zeros(CLIENTS, np.int32),
    np.ones(CLIENTS, np.float32),
  )
  wait = jax.block_until_ready
  return {
    'forward': lambda: wait(forward(state.params, one)),
    'spsa step': lambda: wait(client(state, (), stacked, party)),
    'spsa server': lambda: wait(server(state, messages, cohort)),
    'sgd step': lambda: wait(sgd(other, (), stacked, party)),
  }


def torch_operations() -> dict[str, Callable]:
  """The competitor's; empty without torch and transformers."""
  try:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
  except ImportError:
    return {}
  torch.set_num_threads(1)
  config = transformers.BertConfig(
    vocab_size=SHAPE.vocab_size,
    hidden_size=SHAPE.model_dim,
    num_hidden_layers=SHAPE.num_layers,
    num_attention_heads=SHAPE.num_heads,
    intermediate_size=SHAPE.mlp_dim,
  )
  model = transformers.BertModel(config, add_pooling_layer=False).eval()
  head = torch.nn.Linear(SHAPE.model_dim, 2)
  values = {k: torch.tensor(v).long() for k, v in batch().items()}
  weights = [*model.parameters(), *head.parameters()]
  mask = values['mask'][:, :, None].float()

  def forward():
    states = model(values['tokens'], attention_mask=values['mask'])[0]
    pooled = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.cross_entropy(head(pooled), values['label'])

  def shift(scale):
    torch.manual_seed(0)
    for w in weights:
      w.add_(torch.normal(mean=0.0, std=1.0, size=w.size()) * scale)

  def mezo():
    shift(1e-3)
    plus = forward()
    shift(-2e-3)
    minus = forward()
    shift(1e-3)
    shift(-1e-6 * float(plus - minus) / 2e-3)

  def inference(run):
    def wrapped():
      with torch.inference_mode():
        run()

    return wrapped

  for w in weights:
    w.requires_grad_(False)
  return {
    'torch forward': inference(forward),
    'torch mezo step': inference(mezo),
  }


def data_operations() -> dict[str, Callable]:
  """Text to examples, and examples to a batch; see the module's docstring.

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

  return {f'tokenise {TEXTS}': tokenise, f'take {TAKES}': take}


def measure(operations: dict[str, Callable], repeats: int) -> dict[str, dict]:
  """Seconds of every operation: best and median of `repeats`, in turns."""
  seconds = {name: [] for name in operations}
  for repeat in range(repeats + 1):
    for name, run in operations.items():
      start = time.perf_counter()
      run()
      if repeat:  # the first compiles
        seconds[name].append(time.perf_counter() - start)
  return {
    name: {'best': min(times), 'median': statistics.median(times)}
    for name, times in seconds.items()
  }


def ratios(results: dict[str, dict]) -> dict[str, float]:
  """Quotients of medians that say how close we are to what is possible."""
  s = {name: result['median'] for name, result in results.items()}
  step = s['spsa step'] / ROWS  # seconds per example
  found = {
    'spsa step / two forwards': s['spsa step'] / (2 * s['forward']),
    'tokenise / spsa step': s[f'tokenise {TEXTS}'] / TEXTS / step,
    'take / spsa step': s[f'take {TAKES}'] / (TAKES * ROWS) / step,
  }
  if 'torch forward' in s:
    found['forward / torch forward'] = s['forward'] / s['torch forward']
    found['spsa step / torch mezo step'] = s['spsa step'] / s['torch mezo step']
  return found


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  repeats = _REPEATS.value
  results = measure(jax_operations() | torch_operations(), repeats)
  results |= measure(data_operations(), repeats)
  found = ratios(results)
  print(f'{"operation":18}{"best s":>10}{"median s":>10}')
  for name, row in results.items():
    print(f'{name:18}{row["best"]:10.4f}{row["median"]:10.4f}')
  print()
  for name, value in found.items():
    print(f'{name:30}{value:10.4f}')
  if 'torch forward' not in results:
    print('torch and transformers are not installed: no competitor')
  if _OUT.value:
    result = {
      'batch': [ROWS, LENGTH],
      'jax': jax.__version__,
      'seconds': results,
      'ratios': found,
    }
    with open(_OUT.value, 'w', encoding='utf-8') as file:
      json.dump(result, file, indent=2)
      file.write('\n')


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
