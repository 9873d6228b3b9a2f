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
# many tests build the same program anew: compile each of them once a session
_CACHE = tempfile.TemporaryDirectory(prefix='jaxfl-tests-')
jax.config.update('jax_compilation_cache_dir', _CACHE.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@pytest.fixture(autouse=True, scope='module')
def _no_programs_of_other_modules():
  """Programs take gigabytes otherwise; the cache on disk has them still."""
  yield
  jax.clear_caches()
