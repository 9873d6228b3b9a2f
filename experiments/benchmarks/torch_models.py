"""The same shapes in PyTorch, as transformers has them, and MeZO's step."""

import importlib.util
from typing import Any

import numpy as np

from experiments.benchmarks import timing, torch_loops


def operations(
  name: str, batch: dict[str, np.ndarray], on: str
) -> list[timing.Operation]:
  """A forward pass and a step of MeZO, if there is such a model.

  Args:
    name: of the model; the embedded one is in no other library.
    batch: see `models.Model.batch`.
    on: the row's.
  """
  builders = {'minilm': _encoder, 'opt-1.3b': _decoder}
  here = torch_loops.device() and importlib.util.find_spec('transformers')
  if name not in builders or not here:
    return []
  import torch  # pyright: ignore[reportMissingImports]

  values = {
    k: torch.tensor(v, device=torch_loops.device()).long()
    for k, v in batch.items()
  }
  weights, loss = builders[name](values)
  for w in weights:
    w.requires_grad_(False)

  def inference(run):
    with torch.inference_mode():
      run()
      torch_loops.wait()

  work = batch['tokens'].size
  make = lambda name, run: timing.Operation(
    name=name,
    on=on,
    run=lambda: inference(run),
    work=work,
    unit='tokens/s',
    shown=False,
  )
  return [
    make('forward, torch', loss),
    make('MeZO step, torch', lambda: torch_loops.mezo_step(weights, loss)),
  ]


def _encoder(values: dict[str, Any]):
  """MiniLM-L6's shape with a mean-pooled linear head: weights, and the loss."""
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  config = transformers.BertConfig(
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
  )
  model = transformers.BertModel(config, add_pooling_layer=False).eval()
  head = torch.nn.Linear(384, 2)
  model, head = (x.to(torch_loops.device()) for x in (model, head))
  mask = values['mask'][:, :, None].float()

  def loss():
    states = model(values['tokens'], attention_mask=values['mask'])[0]
    pooled = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.cross_entropy(head(pooled), values['label'])

  return [*model.parameters(), *head.parameters()], loss


def _decoder(values: dict[str, Any]):
  """OPT-1.3B's shape, in bfloat16: weights, and the loss."""
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  config = transformers.OPTConfig(
    hidden_size=2048,
    word_embed_proj_dim=2048,
    num_hidden_layers=24,
    num_attention_heads=32,
    ffn_dim=8192,
  )
  with torch.device(torch_loops.device()):
    model = transformers.OPTForCausalLM(config).to(torch.bfloat16).eval()
  tokens = values['tokens']
  return list(model.parameters()), lambda: model(tokens, labels=tokens).loss
