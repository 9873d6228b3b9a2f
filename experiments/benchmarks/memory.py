"""Peak memory of an operation in a process of its own."""

import concurrent.futures
import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from typing import Any

# makes the arguments; takes them and returns when the result is there
Prepared = tuple[Callable[[], Any], Callable[[Any], Any]]


def peak(prepare: Callable[[], Prepared]) -> int | None:
  """Bytes that a fresh process gains at its peak, compiled before.

  Args:
    prepare: picklable; called in the process, compiles.

  Returns:
    None where Linux does not tell.
  """
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(_measure, prepare).result()


def _measure(prepare):
  make, run = prepare()
  gc.collect()
  with contextlib.suppress(AttributeError):  # not glibc
    # what is free in the heap would be used again and not count
    ctypes.CDLL(None).malloc_trim(0)
  try:
    with open('/proc/self/clear_refs', 'w') as f:
      f.write('5')  # forgets the peak so far
    before = _status('VmRSS')
  except OSError:
    return None
  run(make())
  return _status('VmHWM') - before


def _status(field):
  """Bytes, from what Linux says about this process."""
  with open('/proc/self/status') as f:
    lines = dict(line.split(':', 1) for line in f)
  return int(lines[field].split()[0]) * 1024
