"""Safetensors files, read and written a piece of a tensor at a time.

Nothing is mapped and nothing is unpickled: a reader's memory is what it asks
for. The format: https://huggingface.co/docs/safetensors.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {'F32': np.float32, 'BF16': ml_dtypes.bfloat16}
_READABLE = DTYPES | {'F16': np.float16, 'F64': np.float64}
_PIECE = 1 << 22  # bytes read at a time
_OTHER = ('.bin', '.pt', '.pth', '.ckpt', '.h5', '.msgpack', '.onnx', '.gguf')


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file: where it is, its dtype's code and its shape."""

  path: str
  start: int
  dtype: str
  shape: tuple[int, ...]

  def pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
    """The tensor as (rows of the first axis, their values).

    Raises:
      ValueError: if the file ends too early.
    """
    dtype = np.dtype(_READABLE[self.dtype])
    rows = self.shape[0] if self.shape else 1
    width = math.prod(self.shape[1:])
    step = max(1, _PIECE // max(1, width * dtype.itemsize))
    step = step if len(self.shape) > 1 else rows  # vectors come whole
    with open(self.path, 'rb') as file:
      file.seek(self.start)
      for row in range(0, rows, max(1, step)):
        count = min(step, rows - row)
        data = file.read(count * width * dtype.itemsize)
        if len(data) != count * width * dtype.itemsize:
          raise ValueError(f'{self.path} ends too early')
        values = np.frombuffer(data, dtype).reshape(count, *self.shape[1:])
        yield slice(row, row + count), values


def read_json(path: str) -> dict[str, Any]:
  """A JSON object.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no JSON object.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f'there is no {path}: a Hugging Face directory needs one'
    )
  try:
    with open(path, encoding='utf-8') as file:
      values = json.load(file)
  except ValueError as e:
    raise ValueError(f'{path} is not valid JSON: {e}') from e
  if not isinstance(values, dict):
    raise ValueError(f'{path} is not a JSON object')
  return values


def find(directory: str) -> dict[str, Stored]:
  """The tensors of a directory's model.safetensors, or of its shards.

  Raises:
    FileNotFoundError: if there is none, or a shard is missing.
    ValueError: if a file is damaged, or the index does not fit the shards.
  """
  single = os.path.join(directory, 'model.safetensors')
  if os.path.isfile(single):
    return _header(single)
  index = os.path.join(directory, 'model.safetensors.index.json')
  if not os.path.isfile(index):
    raise FileNotFoundError(_no_weights(directory))
  weights = read_json(index).get('weight_map')
  if not isinstance(weights, dict) or not weights:
    raise ValueError(f'{index}: weight_map is missing')
  found: dict[str, Stored] = {}
  for shard in sorted(set(map(str, weights.values()))):
    path = os.path.join(directory, shard)
    if os.path.basename(shard) != shard or not shard.endswith('.safetensors'):
      raise ValueError(f'{index}: {shard!r} is not the name of a shard')
    if not os.path.isfile(path):
      raise FileNotFoundError(f'{index} names {shard}, which is missing')
    tensors = _header(path)
    expected = {name for name, where in weights.items() if where == shard}
    if wrong := sorted(expected ^ set(tensors)):
      raise ValueError(f'{index} does not fit {shard}: see {wrong[0]!r}')
    found |= tensors
  return found


def _no_weights(directory):
  others = [x for x in sorted(os.listdir(directory)) if x.endswith(_OTHER)]
  text = f'there is no model.safetensors in {directory}'
  if not others:
    return text + (
      '; a checkpoint that has only a .bin file must be converted as '
      'AutoModel.from_pretrained(...).save_pretrained(...) of transformers does'
    )
  return (
    f'{text}, and {others[0]} is not read: such files can run code when they '
    'are loaded. Convert it where you trust it: in Python with transformers, '
    f'AutoModelForCausalLM.from_pretrained({directory!r})'
    '.save_pretrained(new_directory), or the AutoModel... of its task'
  )


def _header(path: str) -> dict[str, Stored]:
  try:
    with safe_open(path, framework='numpy'):
      pass  # it checks that the header is sound and fits the file
    with open(path, 'rb') as file:
      (size,) = struct.unpack('<Q', file.read(8))
      header = json.loads(file.read(size))
  except (SafetensorError, ValueError, struct.error) as e:
    raise ValueError(
      f'{path} is damaged or no safetensors file ({e}): download it again'
    ) from e
  header.pop('__metadata__', None)
  return {
    name: Stored(
      path, 8 + size + x['data_offsets'][0], x['dtype'], tuple(x['shape'])
    )
    for name, x in header.items()
  }


def check_dtype(name: str, tensor: Stored) -> None:
  """Refuses integers and quantised tensors."""
  if tensor.dtype not in _READABLE:
    raise ValueError(
      f'{tensor.path}: the tensor {name!r} has the dtype {tensor.dtype}, '
      f'expected one of {", ".join(_READABLE)}; quantised checkpoints are not '
      'supported'
    )


def write(
  path: str, tensors: Mapping[str, tuple[tuple[int, ...], Any]], dtype: str
) -> None:
  """Writes a safetensors file, one tensor in memory at a time.

  Args:
    path: of the file; replaced at once when all is written.
    tensors: of every name the shape and a function that makes the values.
    dtype: key of `DTYPES`.
  """
  item = np.dtype(DTYPES[dtype]).itemsize
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, (shape, _) in tensors.items():
    start, end = end, end + item * math.prod(shape)
    header[name] = {
      'dtype': dtype,
      'shape': list(shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  partial = f'{path}.partial'
  with open(partial, 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for name, (shape, make) in tensors.items():
      values = np.ascontiguousarray(make(), DTYPES[dtype])
      if values.shape != shape:
        raise ValueError(f'{name} has the shape {values.shape}, not {shape}')
      file.write(values.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
