"""Models in the project's own layout, and the one that comes with the package.

A directory has two files: `config.json`, the fields of the `Config` and
`"model_type": "jaxfl"`, and `model.safetensors`, whose tensors are named by
their paths, such as `layers/attention/q/kernel`. Hugging Face directories are
read by `hf`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from jaxfl import keys
from jaxfl import typing as jt
from jaxfl.models import rotary, transformer
from jaxfl.models.config import Config
from jaxfl.models.config_json import MODEL_TYPE
from jaxfl.models.config_json import from_json as from_json
from jaxfl.models.config_json import to_json as to_json
from jaxfl.models.hf_heads import Wish, native_pool

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
_DTYPES = ('float32', 'bfloat16', 'float16')

Directory = str | os.PathLike[str]


def is_native(directory: Directory) -> bool:
  """Whether `save` wrote a directory: its config.json says so."""
  try:
    fields = json.loads((pathlib.Path(directory) / CONFIG).read_text('utf-8'))
  except (OSError, ValueError):
    return False
  return isinstance(fields, dict) and fields.get('model_type') == MODEL_TYPE


def save(
  directory: Directory,
  config: Config,
  params: jt.Params,
  *,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a model; other files in the directory stay.

  Both files are written beside their places first. config.json goes away
  before the weights are replaced and comes back last: after a crash the
  directory has the old model, the new one, or none.

  Args:
    directory: where to; made if absent.
    config: the model's shape.
    params: nested dict of arrays, float32, bfloat16 or float16.
    metadata: text for the header of the weights.

  Raises:
    ValueError: if the parameters are not those of the config.
  """
  directory = pathlib.Path(directory)
  tensors = {name: np.asarray(x) for name, x in keys.named_leaves(params)}
  _check(tensors, _shapes(config), 'the parameters')
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  text = json.dumps(to_json(config), indent=2, sort_keys=True) + '\n'
  directory.mkdir(parents=True, exist_ok=True)
  places = [directory / WEIGHTS, directory / CONFIG]
  news = [place.with_name(place.name + '.new') for place in places]
  news[0].write_bytes(to_bytes(tensors, dict(metadata) if metadata else None))
  news[1].write_text(text, 'utf-8')
  for new in news:
    _sync(new)
  places[1].unlink(missing_ok=True)
  _sync(directory)
  for new, place in zip(news, places, strict=True):
    os.replace(new, place)
    _sync(directory)


def _sync(path):
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def load(
  directory: Directory | None,
  *,
  head: str | None = None,
  num_labels: int | None = None,
  pool: str | None = None,
  key: jax.Array | None = None,
) -> tuple[Config, jt.Params]:
  """Reads what `save` wrote.

  A classifier that the model does not have, or has with another number of
  classes or another pooling, is made anew: normal with standard deviation 0.02,
  no bias.

  Args:
    directory: the model's; None for the embedded one.
    head: `lm`, `mlm`, `classify` or `none`; None for the model's own.
    num_labels: classes of `classify`; None for the model's.
    pool: what `classify` reads: `first`, `mean` or `last`; None for the
      model's, or the last position of decoders and the first of encoders.
    key: typed key of a new classifier.

  Returns:
    The config, and the parameters as a nested dict of arrays.

  Raises:
    FileNotFoundError: if there is no such directory or it lacks a file.
    ValueError: if a file is damaged or of another format, the tensors do not
      have the names, shapes and dtypes of the config, or the head can't be had.
  """
  wish = Wish(head=head, num_labels=num_labels, pool=pool)
  if directory is None:
    with resources.as_file(
      resources.files('jaxfl.models').joinpath('embedded')
    ) as path:
      return _load(path, wish, key)
  return _load(pathlib.Path(directory), wish, key)


def byte_config(
  *,
  num_layers: int = 4,
  model_dim: int = 128,
  num_heads: int = 2,
  mlp_dim: int = 512,
) -> Config:
  """The shape of a small model of bytes, quick in forward passes on a CPU.

  A pre-norm decoder with RMS norms, rotary positions, squared ReLU (So et al.,
  "Primer", 2021, https://arxiv.org/abs/2109.08668), tied embeddings and an
  output bias. What counts in a forward pass on a CPU is the softmax of the
  attention: two heads instead of four save a fifth of the time at T = 128,
  GELU instead of the squared ReLU costs a thirtieth more, and the kind of norm
  costs nothing.

  Raises:
    ValueError: if a size is not positive or the heads do not fit.
  """
  if num_heads < 1 or model_dim % (2 * num_heads):
    raise ValueError(
      f'model_dim {model_dim} is not a multiple of twice num_heads {num_heads}'
    )
  return Config(
    vocab_size=256,
    num_layers=num_layers,
    model_dim=model_dim,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=model_dim // num_heads,
    mlp_dim=mlp_dim,
    activation='relu2',
    norm='rms',
    norm_eps=1e-6,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    rope=rotary.Rope(theta=10_000.0),
    output_bias=True,
  )


def load_embedded() -> tuple[Config, jt.Params]:
  """The byte model that comes with the package; see its MODEL_CARD.md.

  Returns:
    As `load`.
  """
  return load(None)


def _load(directory: pathlib.Path, wish: Wish, key):
  for path in (directory / CONFIG, directory / WEIGHTS):
    if not path.is_file():
      lack = (
        'no such directory' if not directory.is_dir() else f'no {path.name}'
      )
      raise FileNotFoundError(f'no model at {str(directory)!r}: {lack}')
  where = str(directory / CONFIG)
  try:
    fields = json.loads((directory / CONFIG).read_text('utf-8'))
  except ValueError as error:
    raise ValueError(f'{where} is not valid JSON: {error}') from error
  if not isinstance(fields, dict):
    raise ValueError(f'{where} is not a JSON object')
  stored = from_json(fields, where)
  found = _read(directory / WEIGHTS)
  _check(found, _shapes(stored), str(directory / WEIGHTS))
  config, fresh = _with_head(stored, wish, str(directory))
  wanted = _shapes(config)
  new = {}
  if fresh:
    if key is None:
      raise ValueError(f'{directory}: the head is new and needs a key')
    dtype = found['embed/embedding'].dtype
    head = jax.jit(lambda k: transformer.init(config, k)['head'])(key)
    new = {
      f'head/{name}': x.astype(dtype) for name, x in keys.named_leaves(head)
    }
  if lack := sorted(set(wanted) - set(found) - set(new)):
    raise ValueError(
      f'{directory} has no {config.head} head: it lacks {", ".join(lack)}'
    )
  leaves = {name: new[name] if name in new else found[name] for name in wanted}
  return config, _nest({name: jnp.asarray(x) for name, x in leaves.items()})


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with safe_open(path, framework='numpy') as file:
      return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except SafetensorError as error:
    raise ValueError(f'{path} is damaged: {error}') from error


def _shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  tree = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  return dict(keys.named_leaves(tree))  # pyright: ignore[reportReturnType]


def _check(found, wanted, where):
  """Refuses tensors that are not those of the config."""
  if set(wanted) != set(found):
    raise ValueError(
      f'{where}: missing tensors {sorted(set(wanted) - set(found))}, '
      f'unexpected tensors {sorted(set(found) - set(wanted))}'
    )
  for name, leaf in wanted.items():
    x = found[name]
    if x.shape != leaf.shape or x.dtype.name not in _DTYPES:
      raise ValueError(
        f'{where}: {name!r} is {x.dtype}{list(x.shape)}, expected '
        f'float32{list(leaf.shape)}'
      )


def _with_head(config: Config, wish: Wish, where: str) -> tuple[Config, bool]:
  """The config with the head that is wished, and whether the head is new."""
  head = wish.head or config.head
  if head != 'classify':
    for name in ('num_labels', 'pool'):
      if getattr(wish, name) is not None:
        raise ValueError(f'{name} is for the head classify, not for {head}')
    if head in ('lm', 'mlm') and (head == 'lm') != config.causal:
      raise ValueError(f'{where}: causal={config.causal} has no {head} head')
    return dataclasses.replace(config, head=head, num_labels=0), False
  had = config.head == 'classify'
  num_labels = wish.num_labels or config.num_labels
  if not num_labels:
    raise ValueError(f'{where} has no classifier: num_labels must be given')
  own = config.pool if had else native_pool(config)
  pool = wish.pool or own
  if had and (num_labels, pool) == (config.num_labels, config.pool):
    return config, False
  made = dataclasses.replace(
    config,
    head='classify',
    num_labels=num_labels,
    pool=pool,
    head_dense=not config.causal and pool == 'first',
    head_bias=not config.causal,
  )
  return made, True


def _nest(named: Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict from entries by path."""
  tree: dict[str, Any] = {}
  for name, x in named.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = x
  return tree
