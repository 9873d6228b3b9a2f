"""Adapters: which part of a model is trained, and how the model is put back.

    trainable, frozen = adapter.init(params, key)
    loss_fn = lambda t, batch: model_loss(adapter.merge(frozen, t), batch)
    method = spsa(loss_fn, root, ...)            # or any other method
    params = adapter.merge(frozen, trainable)    # ordinary params, to export

A method sees nothing but the trainable tree: that is what it perturbs, sends
and logs. `merge(*init(params))` is `params` again, bit for bit. The set is that
of FedPEFT without the adapters that change the forward pass:

  * `full`: everything.
  * `lora`: `W + alpha / rank * A B` for chosen matrices.
  * `head_only`, `bias_only`: the task head; the biases (BitFit).
  * `subset`: the parameters that match some patterns.

Patterns are those of `fnmatch`, case-sensitive, on the whole path of a
parameter (`jaxfl.keys.path_str`); `*` matches slashes, too.

References:
  Sun et al., "Conquering the communication constraints to enable large
    pre-trained models in federated learning" (FedPEFT), 2022,
    https://arxiv.org/abs/2210.01708
  Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022,
    https://arxiv.org/abs/2106.09685
  Ben Zaken et al., "BitFit: Simple parameter-efficient fine-tuning for
    transformer-based masked language-models", ACL 2022,
    https://arxiv.org/abs/2106.10199
"""

import dataclasses
import difflib
import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxfl import keys, lazy
from jaxfl import typing as jt

HEAD = ('head/*',)
_VECTORS = ('bias', 'scale')  # matrices only because layers are stacked


class Adapter(NamedTuple):
  """A map between the params of a model and the part of them that is trained.

  Attributes:
    init: params, key -> (trainable, frozen). The key is uint32[2], shared by
      all replicas, as of `keys.root`; only `lora` uses it. `trainable` is a
      tree of dicts with the paths of `params`; `frozen` has the structure of
      `params`, with an empty array of the same dtype where a parameter is
      trained as it is. Raises ValueError where the adapter does not fit.
    merge: frozen, trainable -> params. Differentiable and jittable. Every
      parameter has the dtype that it had in `init`, so that with parameters of
      16 bits a small change of the trainable part can be rounded away. Boxes of
      `jaxfl.lazy` stay boxes, and so does a matrix whose factors or base are.
  """

  init: Callable[[jt.Params, jt.Array | None], tuple[jt.Params, jt.Params]]
  merge: Callable[[jt.Params, jt.Params], jt.Params]


def full() -> Adapter:
  """Trains every parameter."""
  return subset(('*',))


def head_only(*, patterns: Sequence[str] = HEAD) -> Adapter:
  """Trains the task head (linear probing)."""
  return subset(patterns)


def bias_only(*, also: Sequence[str] = ()) -> Adapter:
  """Trains everything whose name ends in `bias`, norms included, like BitFit.

  Args:
    also: patterns of parameters to train as well; `HEAD` for a fresh head.
  """
  return subset(('*bias', *_patterns('also', also)))


def subset(patterns: Sequence[str]) -> Adapter:
  """Trains the parameters whose paths match a pattern.

  Args:
    patterns: `fnmatch` patterns; each must match something.

  Raises:
    ValueError: if there is no pattern; by `init`, if one matches nothing.
  """
  patterns = _patterns('patterns', patterns)
  if not patterns:
    raise ValueError('patterns must have at least one pattern, got none')

  def init(params, key):
    del key  # Unused: nothing is drawn.
    chosen = _matching(params, patterns, 'patterns')
    return _split(params, chosen, {})

  return Adapter(init, lambda frozen, trainable: _merge(frozen, trainable, 0.0))


def lora(
  *,
  rank: int = 8,
  alpha: float = 16.0,
  targets: Sequence[str] = ('*/attention/q/kernel', '*/attention/v/kernel'),
  also: Sequence[str] = (),
) -> Adapter:
  """Low-rank updates `W + alpha / rank * A B` of chosen matrices.

  W is [..., in, out], A [..., in, rank] and B [..., rank, out], float32; the
  leading axes are those of stacked layers, each with factors of its own. In the
  trainable tree they are `PATH/a` and `PATH/b`. B starts as zero. A starts
  uniform in +-1/sqrt(in), the default of the authors' code and of Hugging
  Face's PEFT (Kaiming-uniform with slope sqrt(5); the paper says Gaussian and
  no width): addressed by position under `keys.leaf_key(stream(key, 'lora'))`,
  so that all replicas draw the same bits.

  Args:
    rank: columns of A, at most min(in, out) of every target.
    alpha: scale of the update; see above.
    targets: patterns of matrices; the default is the paper's choice.
    also: patterns of parameters to train as they are; `HEAD` for a fresh head.

  Raises:
    ValueError: if `rank` or `alpha` is not positive or there is no target; by
      `init`, if a pattern matches nothing, a target is no matrix, is in `also`
      or is too small for the rank.
  """
  if rank < 1:
    raise ValueError(f'rank must be >= 1, got {rank}')
  if not 0 < alpha < math.inf:
    raise ValueError(f'alpha must be > 0 and finite, got {alpha}')
  targets, also = _patterns('targets', targets), _patterns('also', also)
  if not targets:
    raise ValueError('targets must have at least one pattern, got none')

  def init(params, key):
    if getattr(key, 'dtype', None) != np.uint32 or np.shape(key) != (2,):
      raise ValueError(f'key must be uint32[2], as of keys.root, got {key!r}')
    low_rank = _matching(params, targets, 'targets')
    whole = _matching(params, also, 'also')
    if both := sorted(low_rank & whole):
      raise ValueError(f'{both[0]!r} is matched by targets and by also')
    base = keys.stream(key, 'lora')
    factors = {
      path: _factors(path, np.shape(leaf), rank, keys.leaf_key(base, path))
      for path, leaf in keys.named_leaves(params)
      if path in low_rank
    }
    return _split(params, whole, factors)

  scale = alpha / rank
  return Adapter(
    init, lambda frozen, trainable: _merge(frozen, trainable, scale)
  )


def count(tree: jt.Params) -> int:
  """Number of entries of all tensors: `count(trainable) / count(params)`."""
  leaves = jax.tree.leaves(tree, is_leaf=lazy.is_box)
  return sum(math.prod(np.shape(x)) for x in leaves)


def _patterns(field: str, patterns: Sequence[str]) -> tuple[str, ...]:
  if isinstance(patterns, str):
    raise ValueError(f'{field} must be a list of patterns, got {patterns!r}')
  return tuple(patterns)


def _matching(params, patterns, field) -> set[str]:
  """Paths that match any pattern; every pattern must match something."""
  paths = [path for path, _ in keys.named_leaves(params)]
  found = set()
  for pattern in patterns:
    matches = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
    if not matches:
      near = difflib.get_close_matches(pattern, paths, n=5, cutoff=0.4)
      near = near or paths[:5]
      raise ValueError(
        f'{field}: pattern {pattern!r} matches no parameter; near it:'
        f' {", ".join(near)}'
      )
    found.update(matches)
  return found


def _factors(path, shape, rank, key):
  """A and B of one matrix."""
  if len(shape) < 2 or path.rsplit('/', 1)[-1] in _VECTORS:
    raise ValueError(
      f'targets: {path!r} of shape {shape} is not a matrix; narrow the pattern'
      ' or train it as it is with also'
    )
  *stack, rows, columns = shape
  if rank > min(rows, columns):
    raise ValueError(
      f'rank must be at most min(in, out) of every target, got {rank} for'
      f' {path!r} of shape {shape}'
    )
  position = np.arange(math.prod(stack) * rows * rank, dtype=np.uint32)
  key0, key1 = np.asarray(key)[:, None]
  bits, _ = keys.threefry2x32(key0, key1, np.zeros_like(position), position)
  # multiples of 2**-23 in [-1, 1): exact in float32
  u = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - 1
  a = u * np.float32(1.0 / math.sqrt(rows))
  return {
    'a': a.reshape(*stack, rows, rank),
    'b': np.zeros((*stack, rank, columns), np.float32),
  }


def _split(params, whole, factors):
  """The trainable tree of dicts, and the rest in the structure of params."""
  trainable: dict[str, Any] = {}
  frozen = []
  for path, leaf in keys.named_leaves(params):
    if path in whole:
      _insert(trainable, path, leaf)
      frozen.append(np.zeros(0, jnp.result_type(leaf)))
    else:
      frozen.append(leaf)
    if path in factors:
      _insert(trainable, path, factors[path])
  return trainable, jax.tree.structure(params).unflatten(frozen)


def _insert(tree: dict[str, Any], path: str, value: Any) -> None:
  """Puts a value at a path of nested dicts."""
  *above, last = path.split('/')
  for name in above:
    tree = tree.setdefault(name, {})
    if not isinstance(tree, dict):
      break
  if not isinstance(tree, dict) or last in tree:
    raise ValueError(f'the path {path!r} runs through another parameter')
  tree[last] = value


def _merge(frozen, trainable, scale):
  """Params from both parts; `scale` is that of low-rank updates."""
  given = dict(keys.named_leaves(trainable, lazy.is_box))
  merged = []
  for path, leaf in keys.named_leaves(frozen, lazy.is_box):
    if path in given:
      leaf = _cast(given.pop(path), _dtype(leaf))
    elif np.shape(leaf) == (0,):
      raise ValueError(f'trainable has no {path!r}')
    elif f'{path}/a' in given and f'{path}/b' in given:
      factors = given.pop(f'{path}/a'), given.pop(f'{path}/b')
      leaf = _low_rank(leaf, *factors, scale)
    merged.append(leaf)
  if given:
    raise ValueError(
      f'trainable has {next(iter(given))!r}, for which frozen has no place:'
      ' both must come from one call of init'
    )
  whole = jax.tree.structure(frozen, is_leaf=lazy.is_box)
  return whole.unflatten(merged)


def _dtype(x):
  return x.dtype if lazy.is_box(x) else jnp.result_type(x)


def _cast(x, dtype):
  if _dtype(x) == dtype:
    return x
  return (x if lazy.is_box(x) else jnp.asarray(x)).astype(dtype)


@lazy.register('alpha_by_rank', 'form', 'casts')
@dataclasses.dataclass(frozen=True)
class LowRank(lazy.Box):
  """`base + alpha_by_rank * a b`, of a matrix or a stack of them, in a box.

  Attributes:
    base: float[..., D, F], an array or a box.
    a: float[..., D, rank], an array or a box.
    b: float[..., rank, F], an array or a box.
    alpha_by_rank: a number.
    form: see `lazy.FORMS`.
    casts: see `lazy.Box`.
  """

  base: Any
  a: Any
  b: Any
  alpha_by_rank: float
  form: str
  casts: tuple[str, ...] = ()

  @property
  def shape(self):
    return self.base.shape

  @property
  def made_dtype(self):
    return self.base.dtype

  def make(self):
    parts = (nn.meta.unbox(x) for x in (self.base, self.a, self.b))
    return _add_low_rank(*parts, self.alpha_by_rank)

  def dot(self, x, axis=0):
    if self.form == 'temporary':
      return super().dot(x, axis)
    first, second = (self.a, self.b) if axis == 0 else (self.b, self.a)
    update = lazy.dot(lazy.dot(x, first, axis), second, axis)
    total = lazy.dot(x, self.base, axis).astype(jnp.float32)
    return (total + self.alpha_by_rank * update).astype(x.dtype)


def _low_rank(w, a, b, scale: float):
  """The sum, or where something is in a box a box of it."""
  if not any(map(lazy.is_box, (w, a, b))):
    return _add_low_rank(w, a, b, scale)
  return LowRank(w, a, b, scale, getattr(a, 'form', lazy.FORMS[0]))


# jitted by itself: outside of a jit, `merge` copies nothing that is frozen, and
# has the same last bits at every place that calls it so
@functools.partial(jax.jit, static_argnums=3)
def _add_low_rank(w, a, b, scale: float):
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  return _add(jnp.asarray(w), scale * product)


@jax.custom_jvp
def _add(w: jax.Array, update: jax.Array) -> jax.Array:
  """`w + update`, rounded once to the dtype of w.

  An update of zero keeps every bit of w (-0.0 + 0.0 would be 0.0), and has a
  derivative all the same.
  """
  total = (w.astype(jnp.float32) + update).astype(w.dtype)
  return jnp.where(update == 0, w, total)


@_add.defjvp
def _add_jvp(primals, tangents):
  w, update = primals
  return _add(w, update), tangents[0] + tangents[1].astype(w.dtype)
