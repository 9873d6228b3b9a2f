"""The default task: Python source that every Python installation carries.

Eight packages of the standard library are eight clients, so their data differ
by nature: `asyncio` does not read like `xml`. Nothing is downloaded. The files
are those of the running interpreter, and `digest` of a task tells which they
were: other Python versions have somewhat different text.

Every package is cut into blocks; every eighth block is held out for evaluation
and belongs to no client. `from_files` does the same with the user's own text.
"""

import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Sequence

import numpy as np

from jaxfl.data import batching

PACKAGES = (
  'asyncio',
  'email',
  'importlib',
  'logging',
  'multiprocessing',
  'unittest',
  'urllib',
  'xml',
)
BLOCK = 4096  # bytes of text in a block, at most
HELD_OUT = 8  # one block in eight


def load(
  num_clients: int = 8,
  *,
  length: int = 128,
  eval_batch_size: int = 32,
  eval_examples: int = 512,
) -> batching.Task:
  """The default task.

  With 8 clients a client is a package. With fewer a client has several
  packages, with more a package is shared out among several clients by blocks
  of text; when there are more clients than blocks, a block serves several.

  Args:
    num_clients: how many clients, at least one.
    length: target bytes of an example, T; an example has one byte more.
    eval_batch_size: examples in a batch of the evaluation.
    eval_examples: held-out examples to evaluate, evenly over the packages.

  Returns:
    A `batching.Task` whose batches are `{'tokens': uint8[..., T + 1]}`.

  Raises:
    FileNotFoundError: if this Python has no source of a package.
    ValueError: if an argument is not positive.
  """
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  sources = {name: _read_package(root / name) for name in PACKAGES}
  return _make_task(
    'python_text',
    sources,
    num_clients,
    length,
    eval_batch_size,
    eval_examples,
  )


def from_files(
  path: str | os.PathLike,
  num_clients: int | None = None,
  *,
  length: int = 128,
  eval_batch_size: int = 32,
  eval_examples: int = 512,
) -> batching.Task:
  """The same task on your own text.

  Args:
    path: a folder. Its sub-folders are the clients, with all files below them;
      if it has none, its files are. Names that begin with a dot are left out.
    num_clients: how many clients; as many as there are sources if None.
    length: as in `load`.
    eval_batch_size: as in `load`.
    eval_examples: as in `load`.

  Returns:
    As `load`.

  Raises:
    FileNotFoundError: if there is no such folder.
    ValueError: if it holds no files, or if a client's text is too short.
  """
  root = pathlib.Path(path)
  if not root.is_dir():
    raise FileNotFoundError(f'no folder at {os.fspath(path)!r}')
  entries = [p for p in sorted(root.iterdir()) if not p.name.startswith('.')]
  folders = [p for p in entries if p.is_dir()]
  sources = {
    p.name: [f.read_bytes() for f in _files_below(p)]
    for p in (folders or entries)
  }
  if not sources:
    raise ValueError(f'no files in {os.fspath(path)!r}')
  return _make_task(
    root.name,
    sources,
    len(sources) if num_clients is None else num_clients,
    length,
    eval_batch_size,
    eval_examples,
  )


def _files_below(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  return [
    p
    for p in sorted(path.rglob('*'))
    if p.is_file()
    and not any(x.startswith('.') for x in p.relative_to(path).parts)
  ]


def _read_package(path: pathlib.Path) -> list[bytes]:
  """The `.py` files of a package, but no tests, in the order of their paths."""
  files = [
    p
    for p in sorted(path.rglob('*.py'))
    if not {'test', 'tests'} & set(p.relative_to(path).parts)
  ]
  if not files:
    raise FileNotFoundError(
      f'this Python has no source files in {os.fspath(path)!r}; use '
      'from_files with text of your own'
    )
  return [p.read_bytes() for p in files]


def _blocks(data: bytes, size: int) -> list[np.ndarray]:
  """Cuts text into uint8[N] of at most `size`, after a line if it can."""
  blocks, start = [], 0
  while start < len(data):
    stop = start + size
    line = data.rfind(b'\n', start, stop) + 1
    stop = line if line and stop < len(data) else stop
    blocks.append(np.frombuffer(data[start:stop], np.uint8))
    start = stop
  return blocks


def _share_out(sources: Sequence[Sequence], num_clients: int) -> list[list]:
  """Gives sources, or shares of their blocks, to clients.

  Returns:
    The (source, block) pairs of every client.
  """
  count = len(sources)
  clients = []
  for client in range(num_clients):
    place = client // count
    pairs = []
    for source in range(client % count, count, num_clients):
      blocks = sources[source]
      sharers = range(source, num_clients, count) or range(1)
      own = blocks[place :: len(sharers)] or [blocks[place % len(blocks)]]
      pairs.extend((source, block) for block in own)
    clients.append(pairs)
  return clients


def _eval_tokens(held_out, length, batch_size, examples):
  """uint8[N, B, length + 1]: evenly spaced windows without overlap."""
  share = -(-examples // len(held_out))
  chosen = []
  for blocks in held_out:
    windows = [
      block[start : start + length + 1]
      for block in blocks
      for start in range(0, len(block) - length, length)
    ]
    picks = np.linspace(0, len(windows) - 1, min(share, len(windows)))
    chosen.extend(windows[int(i)] for i in picks)
  batch_size = min(batch_size, len(chosen))
  count = len(chosen) // batch_size
  tokens = np.stack(chosen[: count * batch_size])
  return tokens.reshape(count, batch_size, length + 1)


def _split(source: str, files: Sequence[bytes], length: int):
  """The blocks of a source that clients may have, and those held out."""
  total = sum(len(data) for data in files)
  size = min(BLOCK, max(total // (4 * HELD_OUT), 4 * length))
  blocks = [block for data in files for block in _blocks(data, size)]
  blocks = [block for block in blocks if len(block) > length]
  held_out = blocks[HELD_OUT - 1 :: HELD_OUT]
  if not held_out:
    raise ValueError(
      f'the text of {source!r} is too short: it has {len(blocks)} blocks of '
      f'at most {BLOCK} and more than {length} bytes, {HELD_OUT} are needed'
    )
  del blocks[HELD_OUT - 1 :: HELD_OUT]
  return blocks, held_out


def _make_task(
  name, sources, num_clients, length, eval_batch_size, eval_examples
) -> batching.Task:
  """Splits sources (name -> files) into clients and held-out examples."""
  for what, value in (
    ('num_clients', num_clients),
    ('length', length),
    ('eval_batch_size', eval_batch_size),
    ('eval_examples', eval_examples),
  ):
    if value < 1:
      raise ValueError(f'{what} must be positive, got {value}')
  splits = [_split(source, files, length) for source, files in sources.items()]
  train, held_out = zip(*splits, strict=True)
  clients = _share_out(train, num_clients)
  texts = [[block for _, block in client] for client in clients]
  names = list(sources)
  digest = hashlib.sha256()
  for blocks in train + held_out:
    for block in blocks:
      digest.update(len(block).to_bytes(4, 'big') + block.tobytes())
  return batching.Task(
    name=name,
    num_examples=np.array(
      [sum(len(block) // length for block in blocks) for blocks in texts],
      np.int64,
    ),
    batches=batching.window_batches(texts, length),
    eval_batches={
      'tokens': _eval_tokens(held_out, length, eval_batch_size, eval_examples)
    },
    client_names=tuple(
      '+'.join(dict.fromkeys(names[source] for source, _ in client))
      for client in clients
    ),
    digest=digest.hexdigest(),
  )
