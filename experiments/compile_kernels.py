"""Compiles the Pallas kernels ahead of time, for devices that are not there.

    python -m venv side && . side/bin/activate
    pip install 'jax[cuda12]==0.10.2' libtpu absl-py
    pip install --no-deps -e .
    python -m experiments.compile_kernels \\
      --out=experiments/results/compile_kernels.json

Takes about three minutes on one core, and neither a TPU nor a GPU. Lowering
alone (which the tests do) leaves open whether a compiler takes the result: this
runs the compilers. Targets for which the packages are missing are skipped, and
named. A row of the result has

  * `seconds`: to lower and compile.
  * `temporary`, `aliased`: bytes; `aliased` is what is updated in place.
  * `code`: bytes of the program (TPU).
  * `registers`, `spilled`: of every thread, and bytes that did not fit (GPU);
    the largest of the program's kernels.

The GPU's assembler writes the latter to a folder that is deleted afterwards;
that a disassembler is missing does not matter.
"""

import itertools
import json
import os
import pathlib
import re
import tempfile
import time
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # no device is touched
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # not on a cloud machine

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jaxfl.kernels import (  # pyright: ignore[reportMissingImports]
  arg_specs,
  mosaic_gpu,
  mosaic_tpu,
  xla,
)

_OUT = flags.DEFINE_string('out', None, 'JSON file for the results.')

# What the compiler has to know of an H100: the limits of compute capability 9.0
# (CUDA C++ Programming Guide), and sizes that no choice of ours depends on.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "H100"
"""

TARGETS = {
  'v5e': (mosaic_tpu, {'platform': 'tpu', 'topology_name': 'v5e:2x2'}),
  'v6e': (mosaic_tpu, {'platform': 'tpu', 'topology_name': 'v6e:2x2'}),
  'sm_90a': (
    mosaic_gpu,
    {'platform': 'cuda', 'target_config': _H100, 'topology': '1x1x1'},
  ),
}
COUNT = 4096  # directions
_TYPES = (jnp.float32, jnp.bfloat16, jnp.int32)


def device(target: dict):
  """A device to compile for; ValueError says why there is none."""
  try:
    described = topologies.get_topology_desc(**target)
  except Exception as error:  # whatever a missing plugin raises
    raise ValueError(f'{type(error).__name__}: {error}') from error
  return described.devices[0]


def arguments(operation: str, shape, dtype, sharding) -> list:
  """Types of the arguments of a kernel for `COUNT` directions."""
  spec = lambda *args: jax.ShapeDtypeStruct(*args, sharding=sharding)
  args = [spec(xla.view(shape), dtype), spec((COUNT, 2), jnp.uint32)]
  if operation == 'add':
    amounts = jnp.int32 if dtype == jnp.int32 else jnp.float32
    args.append(spec((COUNT,), amounts))
  return args


def assembler_report(folder: pathlib.Path) -> dict[str, int]:
  """What the GPU's assembler said since the last call, if anything."""
  text = ''
  for path in folder.iterdir():
    text += path.read_text() if path.suffix == '.ptxas' else ''
    path.unlink()
  if not text:
    return {}
  registers = re.findall(r'Used (\d+) registers', text)
  spilled = re.findall(r'(\d+) bytes spill (?:stores|loads)', text)
  return {
    'registers': max(map(int, registers)),
    'spilled': max(map(int, spilled)),
  }


def compile_one(module, operation: str, shape, dtype, sharding) -> dict:
  """Compiles a kernel; what `add` works on is donated."""
  # an equal kernel would be taken from the memory, without a report
  jax.clear_caches()
  donated = 0 if operation == 'add' else ()
  jitted = jax.jit(getattr(module, operation), donate_argnums=donated)
  start = time.perf_counter()
  lowered = jitted.lower(*arguments(operation, shape, dtype, sharding))
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory: Any = compiled.memory_analysis()
  return {
    'seconds': round(seconds, 2),
    'temporary': memory.temp_size_in_bytes,
    'aliased': memory.alias_size_in_bytes,
    'code': memory.generated_code_size_in_bytes,
  }


def compile_all(folder: pathlib.Path) -> tuple[list[dict], dict[str, str]]:
  """All rows, and why targets were skipped."""
  rows, skipped = [], {}
  for target, (module, description) in TARGETS.items():
    try:
      sharding = jax.sharding.SingleDeviceSharding(device(description))
    except ValueError as error:
      skipped[target] = str(error)
      continue
    for (name, shape), dtype, operation in itertools.product(
      arg_specs.SHAPES.items(), _TYPES, ('add', 'project')
    ):
      if operation == 'project' and dtype == jnp.int32:
        continue
      row = {
        'target': target,
        'operation': operation,
        'shape': name,
        'type': jnp.dtype(dtype).name,
        **compile_one(module, operation, shape, dtype, sharding),
        **assembler_report(folder),
      }
      print(*row.values(), flush=True)
      rows.append(row)
  return rows, skipped


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  with tempfile.TemporaryDirectory(prefix='jaxfl-ptxas-') as folder:
    os.environ['MOSAIC_GPU_DUMP_PTXAS'] = '1'
    os.environ['MOSAIC_GPU_DUMP_TO'] = folder
    rows, skipped = compile_all(pathlib.Path(folder))
  print('skipped:', skipped or 'none')
  if _OUT.value:
    result = {
      'jax': jax.__version__,
      'directions': COUNT,
      'shapes': arg_specs.SHAPES,
      'skipped': skipped,
      'rows': rows,
    }
    pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  app.run(main)
