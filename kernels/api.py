"""Many directions on a whole tensor: which of the implementations does it.

  * 'xla': plain XLA; any device, number of devices, type and distribution.
  * 'xla_tiles': the same by tiles, for a CPU and tensors beyond its cache; not
    for 'walsh' and low-rank directions, which tiles would cut.
  * 'mosaic_tpu', 'mosaic_gpu': Pallas kernels for a TPU, and for an NVIDIA GPU
    from Hopper on; 'rademacher' in float32 or bfloat16. On the GPU there is
    one for whole Walsh pools, too, and rectangles may have directions of their
    own if they are made of whole tiles.

The bits of `add` and `add_units` are the same for all of them, except that
tiles change the last bits of 'gaussian'. The sums of `project` are grouped
otherwise.

None chooses for the default device: tiles for a lone CPU, a kernel for a lone
accelerator that has one, and 'xla' otherwise; a program for several devices may
have sharded tensors, which a kernel can't follow. (Under `shard_map`, call the
kernel with the offset of the shard.) A name insists: a ValueError says why it
can't be.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import custom_batching
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  lowrank,
  tiles,
  walsh,
  xla,
)

IMPLEMENTATIONS = ('xla', 'xla_tiles', 'mosaic_tpu', 'mosaic_gpu')
_MADE_FOR = {'cpu': 'xla_tiles', 'tpu': 'mosaic_tpu', 'gpu': 'mosaic_gpu'}
_TYPES = (np.dtype(jnp.float32), np.dtype(jnp.bfloat16))
_NO_TILES = ('walsh', *lowrank.RANKS)
_JAX = (0, 10)  # the first version whose Pallas has what the kernels use


def _devices() -> list:
  """The devices of the platform that programs are for by default."""
  # a device, its platform, or None
  default = jax.config.jax_default_device  # pyright: ignore
  return jax.devices(getattr(default, 'platform', default))


def _is_hopper(device) -> bool:
  """Whether a GPU is one of NVIDIA's with compute capability >= 9.0."""
  major = getattr(device, 'compute_capability', '').partition('.')[0]
  return device.platform == 'gpu' and major.isdigit() and int(major) >= 9


def _obstacle(name: str, dtype, distribution: str) -> str | None:
  """Why the default device can't run this one."""
  if name == 'xla_tiles' and distribution in _NO_TILES:
    return f'{distribution!r} directions have no tiles'
  if not name.startswith('mosaic'):
    return None
  device = _devices()[0]
  if distribution != 'rademacher':
    return f"the distribution must be 'rademacher', got {distribution!r}"
  if dtype not in _TYPES:
    return f'the type must be float32 or bfloat16, got {dtype}'
  if jax.__version_info__ < _JAX:
    return f'JAX must be 0.10 or newer, got {jax.__version__}'
  if name == 'mosaic_tpu' and device.platform != 'tpu':
    return f'the default device must be a TPU, got {device}'
  if name == 'mosaic_gpu' and not _is_hopper(device):
    return (
      'the default device must be an NVIDIA GPU of compute capability 9.0 or'
      f' more, got {device}'
    )
  return None


def choose(implementation: str | None, dtype, distribution: str) -> str:
  """The name of the implementation for a tensor; see above.

  Args:
    implementation: one of `IMPLEMENTATIONS`, or None.
    dtype: of the tensor.
    distribution: one of `xla.DISTRIBUTIONS` or `lowrank.RANKS`.

  Raises:
    ValueError: if the name is unknown, or it can't be used.
  """
  if implementation is None:
    first, *others = _devices()
    name = _MADE_FOR.get(first.platform, 'xla')
    if others or _obstacle(name, dtype, distribution):
      return 'xla'
    return name
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation must be one of {IMPLEMENTATIONS} or None, got'
      f' {implementation!r}'
    )
  obstacle = _obstacle(implementation, dtype, distribution)
  if obstacle:
    raise ValueError(f'implementation {implementation!r}: {obstacle}')
  return implementation


def _plan(x, count, name, plan):
  """The array, and the plan for `count` directions, on all of it if None.

  Without tiles the array keeps its shape and so, under GSPMD, its sharding.
  """
  if plan is not None:
    return x, plan
  tiled = name == 'xla_tiles'
  if tiled:
    x = x.reshape(xla.view(x.shape))
  return x, tiles.Plan([((0, 0), x.shape)], np.array([[0, count]]), tiled)


def _kernel(name, function, plan, x, *args):
  """A function of a Pallas module, imported only now, on the view of `x`.

  A kernel fills the device, so that under `vmap` they run one by one.
  """
  module = importlib.import_module(f'jaxfl.kernels.{name}')

  def run(spans, x, *args):
    if plan is None:
      return getattr(module, function)(x, *args)
    mine = plan._replace(spans=spans)
    return getattr(module, function)(x, *args, plan=mine)

  spans = jnp.zeros((0, 2), jnp.int32) if plan is None else plan.spans
  view = x.reshape(xla.view(x.shape))
  return custom_batching.sequential_vmap(run)(jnp.asarray(spans), view, *args)


def _uses_kernel(name, x, keys, plan):
  if not name.startswith('mosaic') or not (x.size and len(keys)):
    return False
  if plan is None:
    return True
  module = importlib.import_module(f'jaxfl.kernels.{name}')
  return hasattr(module, 'fits') and module.fits(plan, x.shape)


def add(w, keys, scales, *, distribution, plan=None, implementation=None):
  """`w + scales[k] * z_k` for a whole tensor, in order.

  Args:
    w: float[...]; the (R, C) view if there is a plan.
    keys: uint32[K, 2], leaf keys.
    scales: float32[K].
    distribution: one of `xla.DISTRIBUTIONS` or `lowrank.RANKS`.
    plan: a `tiles.Plan`, which says what to add where; not for low rank.
    implementation: see above; for 'gaussian' None is 'xla'.

  Returns:
    An array like `w`, with the bits of K `xla.add`.

  Raises:
    ValueError: if the implementation can't be used.
  """
  if implementation is None and distribution == 'gaussian':
    implementation = 'xla'  # tiles would change last bits
  name = choose(implementation, w.dtype, distribution)
  if _uses_kernel(name, w, keys, plan):
    return _kernel(name, 'add', plan, w, keys, scales).reshape(w.shape)
  if distribution in lowrank.RANKS:
    return lowrank.replay(w, keys, scales, distribution=distribution)
  x, plan = _plan(w, len(keys), name, plan)
  x = tiles.add(x, keys, scales, plan, distribution=distribution)
  return x.reshape(w.shape)


def add_units(
  w, scale, keys, units, *, distribution, plan=None, implementation=None
):
  """Grid weights plus `units[k] * Z_k` grid steps, for a whole tensor.

  Args:
    w: float32[...], multiples of 1 / scale[0] below `tiles.LIMIT` of them; the
      (R, C) view if there is a plan.
    scale: a power of two and its inverse, float32[] each.
    keys: uint32[K, 2], leaf keys.
    units: int32[K].
    distribution: a key of `xla.LARGEST` or `lowrank.RANKS`.
    plan: as for `add`.
    implementation: see above.

  Returns:
    An array like `w`, and bool[], as `tiles.add_units` has them.

  Raises:
    ValueError: if the implementation can't be used.
  """
  name = choose(implementation, w.dtype, distribution)
  if _uses_kernel(name, w, keys, plan):
    x, fits = _kernel(name, 'add_units', plan, w, tuple(scale), keys, units)
    return x.reshape(w.shape), fits
  if distribution in lowrank.RANKS:
    total = lambda old: lowrank.add_units(
      old, keys, units, distribution=distribution
    )
    return tiles.on_grid(w, scale, total, False)
  x, plan = _plan(w, len(keys), name, plan)
  x, fits = tiles.add_units(
    x, scale, keys, units, plan, distribution=distribution
  )
  return x.reshape(w.shape), fits


def add_pools(w, scale, keys, units):
  """Grid weights plus all directions of Walsh pools; exact.

  Args:
    w: float32[...], not small, multiples of 1 / scale[0].
    scale: a power of two and its inverse, float32[] each.
    keys: uint32[P, 4], of P pools.
    units: int32[P, 4096]; ask `tiles.sum_exceeds`.

  Returns:
    An array like `w`, and bool[]: all entries were and are on the grid.
  """
  name = choose(None, w.dtype, 'rademacher')
  if name == 'mosaic_gpu':
    args = w, tuple(scale), keys, units
    x, fits = _kernel('mosaic_gpu_walsh', 'add_pools', None, *args)
  else:
    x, fits = walsh.add_units(
      w.reshape(xla.view(w.shape)),
      scale,
      keys,
      units,
      looped=name == 'xla_tiles',
    )
  return x.reshape(w.shape), fits


def project(x, keys, *, distribution, plan=None, implementation=None):
  """The inner products `<z_k, x>` of a whole tensor.

  Args:
    x: float[...]; the (R, C) view if there is a plan.
    keys: uint32[K, 2], leaf keys.
    distribution: one of `xla.DISTRIBUTIONS` or `lowrank.RANKS`.
    plan: a `tiles.Plan`, as `tiles.project` has it; not for low rank.
    implementation: see above.

  Returns:
    float32[K], sums in float32.

  Raises:
    ValueError: if the implementation can't be used.
  """
  name = choose(implementation, x.dtype, distribution)
  if _uses_kernel(name, x, keys, plan):
    return _kernel(name, 'project', plan, x, keys)
  if distribution in lowrank.RANKS:
    return lowrank.project(x, keys, distribution=distribution)
  x, plan = _plan(x, len(keys), name, plan)
  return tiles.project(x, keys, plan, distribution=distribution)
