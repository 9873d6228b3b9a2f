"""Runs a wheel from SITE: `PYTHONPATH=SITE python check_wheel.py SITE`."""

import pathlib
import sys

import jax
import jaxfl.kernels
import numpy as np

from jaxfl import digest, keys, objectives, perturb
from jaxfl.data import python_text
from jaxfl.methods import spsa
from jaxfl.models import native
from jaxfl.runtime import simulate

site = pathlib.Path(sys.argv[1]).resolve()
top = {p.name for p in site.iterdir() if not p.name.endswith('.dist-info')}
assert top == {'jaxfl'}, f'the wheel installs more than jaxfl: {top}'
for module in (jaxfl.kernels, perturb, native):
  assert site in pathlib.Path(module.__file__).resolve().parents, module
config, params = native.load_embedded()
method = spsa.spsa(
  objectives.lm_loss(config), keys.root(0), learning_rate=1e-4, mu=1e-3
)
task = python_text.load(2, length=16)
batches = lambda round, client: task.batches(0, client, round, 1, 2)
for done in simulate.simulate(
  method,
  method.init(params),
  batches,
  simulate.Population(num_clients=2),
  num_rounds=2,
):
  assert np.isfinite(done.loss)
print(f'wheel: jax {jax.__version__}, digest', digest.digest(done.state)[:16])
