"""The machine that a benchmark runs on: one core of it, and what it is."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import jax

_FLAGS = ('avx2', 'avx512f', 'amx_tile', 'asimd', 'sve')  # of a CPU's vectors


def pin() -> None:
  """Keeps this process and its children on one core, unless JAX has plugins.

  Where a plugin brings an accelerator, the CPU only serves it. To be called
  before JAX counts the cores, which it does when it first needs a device.
  """
  only_cpu = os.environ.get('JAX_PLATFORMS') == 'cpu'
  if importlib.util.find_spec('jax_plugins') and not only_cpu:
    return
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


def describe() -> dict[str, Any]:
  """What figures depend on, for the result file."""
  model, flags = _cpu()
  device = jax.devices()[0]
  return {
    'backend': device.platform,
    'device': device.device_kind,
    'devices': jax.device_count(),
    'cpu': model,
    'cpu_flags': [flag for flag in _FLAGS if flag in flags],
    'cores': len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count(),
    'load_before': os.getloadavg()[0],
    'python': platform.python_version(),
    'jax': jax.__version__,
    'torch': _version('torch'),
  }


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _cpu() -> tuple[str, list[str]]:
  """The model's name and its flags, as far as Linux tells."""
  try:
    with open('/proc/cpuinfo') as f:
      pairs = [line.split(':', 1) for line in f if ':' in line]
  except OSError:
    return platform.processor(), []
  fields = {name.strip(): value.strip() for name, value in pairs}
  flags = fields.get('flags', fields.get('Features', '')).split()
  family, number = (fields.get(f) for f in ('cpu family', 'model'))
  name = fields.get('model name', platform.processor())
  if family and number:
    name += f', family {family}, model {number}'
  return name, flags
