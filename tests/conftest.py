"""Eight fake CPU devices, set before JAX is imported; rank promotion raises."""

import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_FLAG = '--xla_force_host_platform_device_count=8'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# how long an example takes says more about the machine than about the code
hypothesis.settings.register_profile('untimed', deadline=None)
hypothesis.settings.load_profile('untimed')

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Many tests build the same program anew: compile each of them once a session.
# Commands that tests start have a directory of their own, as one that is killed
# may leave half a file.
_CACHE = tempfile.TemporaryDirectory(prefix='jaxfl-tests-')
_SETTINGS = {
  'jax_compilation_cache_dir': f'{_CACHE.name}/here',
  'jax_persistent_cache_min_compile_time_secs': 0.0,
  'jax_persistent_cache_min_entry_size_bytes': -1,
}
for _name, _value in _SETTINGS.items():
  jax.config.update(_name, _value)
  os.environ[_name.upper()] = str(_value)
os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{_CACHE.name}/commands'


@pytest.fixture(autouse=True, scope='module')
def _programs(request):
  """Compiles as the module's marker says, and forgets them in the end.

  Programs take gigabytes otherwise; the cache on disk has them still.
  """
  fast = request.node.get_closest_marker('fast_compile') is not None
  jax.config.update('jax_disable_most_optimizations', fast)
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(int(fast))
  yield
  jax.clear_caches()
