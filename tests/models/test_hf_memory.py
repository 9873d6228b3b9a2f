"""Loading and saving need little more memory than the parameters."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxfl.models import hf_config, hf_files, hf_names

CHILD = """
import sys
from jaxfl.models import hf

def status(name):
  with open('/proc/self/status') as file:
    lines = [x for x in file if x.startswith(name + ':')]
  return int(lines[0].split()[1]) * 1024

tiny, source, target, dtype = sys.argv[1:]
found = hf.load(tiny)
hf.save(target, found.config, found.params, source=tiny)
del found
before = status('VmRSS')
found = hf.load(source, dtype=dtype)
print(status('VmHWM') - before)
hf.save(target, found.config, found.params, source=source)
print(status('VmHWM') - before)
"""


def make(directory, dtype, layers, dim, vocab):
  """A Llama of ones; its bytes in float32."""
  directory.mkdir()
  fields = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': vocab,
    'hidden_size': dim,
    'num_hidden_layers': layers,
    'num_attention_heads': 8,
    'intermediate_size': 3 * dim,
    'max_position_embeddings': 64,
  }
  (directory / 'config.json').write_text(json.dumps(fields))
  layout = hf_names.LAYOUTS['llama']
  config = dataclasses.replace(hf_config.read(fields), head='lm')
  tensors = {}
  for path, shape in hf_names.shapes(config).items():
    slot = layout.slot(path, config)
    shape = shape[1:] if '{}' in slot.name else shape
    shape = shape[::-1] if slot.transposed else shape
    for name in slot.names(layers):
      name = layout.prefix + name if slot.base else name
      tensors[name] = (shape, lambda shape=shape: np.ones(shape, np.float32))
  hf_files.write(str(directory / 'model.safetensors'), tensors, dtype)
  return 4 * sum(int(np.prod(shape)) for shape, _ in tensors.values())


def growth(tmp_path, source, dtype):
  """Bytes by which the peak grew after loading, and after saving too."""
  make(tmp_path / 'tiny', 'F32', 1, 16, 8)
  names = ('tiny', source, 'target')
  run = subprocess.run(
    [sys.executable, '-c', CHILD, *(str(tmp_path / x) for x in names), dtype],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  return [int(x) for x in run.stdout.split()]


@pytest.mark.skipif(
  not os.path.exists('/proc/self/status'), reason='needs Linux'
)
@pytest.mark.parametrize(
  ('stored', 'dtype', 'layers', 'dim', 'vocab'),
  [
    ('F32', 'float32', 6, 512, 8192),
    pytest.param('BF16', 'float32', 6, 512, 8192, marks=pytest.mark.slow),
    pytest.param('F32', 'bfloat16', 6, 512, 8192, marks=pytest.mark.slow),
    pytest.param(
      'F32', 'float32', 8, 1024, 16384, marks=pytest.mark.slow
    ),  # 500 MB
  ],
)  # fmt: skip
def test_peak_memory(stored, dtype, layers, dim, vocab, tmp_path):
  weights = make(tmp_path / 'source', stored, layers, dim, vocab)
  weights = weights if dtype == 'float32' else weights // 2
  assert weights > 50e6
  loaded, saved = growth(tmp_path, 'source', dtype)
  print(
    f'{weights / 1e6:.0f} MB, x{loaded / weights:.3f} {saved / weights:.3f}'
  )
  assert 0.9 * weights < loaded < 1.2 * weights
  # saving holds one more tensor, the largest of which is an embedding
  assert saved < 1.5 * weights
