"""Makes a model of its base and a file of `experiments.export`.

python -m experiments.rebuild model.seeds --out=DIR
python -m experiments.rebuild model.seeds --out=DIR --base_model=BASE
python -m experiments.rebuild model.seeds --out=NAME.safetensors

DIR is the whole model in the layout of its base, which transformers loads where
that is Hugging Face's; NAME.safetensors is what was trained alone. Another base
than that of the run is refused by its digest; `--base_model` says where it is,
if not where the run had it. Prints how long each step took.
"""

import sys
import time

import jax
from absl import app, flags, logging

from experiments import fine_tune, models, replayer, seeds_file
from experiments.config import UsageError
from jaxfl import digest as digest_lib

_OUT = flags.DEFINE_string('out', None, 'Directory, or NAME.safetensors.')
_BASE_MODEL = flags.DEFINE_string(
  'base_model', None, 'Where the base is; default where the run had it.'
)


def main(argv):
  if len(argv) != 2:
    raise app.UsageError('expected one file, of experiments.export')
  clock = _Clock()
  try:
    if not _OUT.value:
      raise UsageError('--out is needed: where to write')
    if whole := not _OUT.value.endswith('.safetensors'):
      models.check_new(_OUT.value)
    seeds = seeds_file.read(argv[1])
    base = fine_tune.load_base(seeds, _BASE_MODEL.value)
    loaded = clock.lap()
    params = jax.block_until_ready(fine_tune.weights(seeds, base.trainable))
    rebuilt = clock.lap()
    found = digest_lib.digest(params)
    print(f'digest {found}')
    if found != seeds.digest:
      raise UsageError(
        f'the file promises the digest {seeds.digest}: its method is not exact'
        ' on this kind of device (see "What is exact" in README.md)'
      )
    if whole:
      models.export(base, params, _OUT.value)
    else:
      replayer.write_tensors(params, _OUT.value)
  except (UsageError, ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(
    f'{_OUT.value} written: {loaded:.1f} s for the base, {rebuilt:.1f} s to'
    f' rebuild from {seeds.form}, {clock.lap():.1f} s to check and write'
  )


class _Clock:
  """Seconds between laps."""

  def __init__(self):
    self._last = time.monotonic()

  def lap(self) -> float:
    now, last = time.monotonic(), self._last
    self._last = now
    return now - last


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main)
