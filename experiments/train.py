"""Fine-tunes a model over simulated clients and keeps a log that rebuilds it.

python -m experiments.train
python -m experiments.train --workdir=DIR --resume
python -m experiments.train --config=experiments/configs/fed_avg.py
python -m experiments.train --method=spsa --codec=sign1 --config.mu=2e-3
python -m experiments.train --mesh_clients=8
python -m experiments.train --multihost  # on every host; see experiments/launch

Where a run is computed is no setting of it: it may go on elsewhere.
"""

import dataclasses
import datetime
import json
import pathlib
import sys

from absl import app, flags, logging
from jax.sharding import Mesh

from experiments import report, runner, setting_flags
from experiments import workdir as workdir_lib
from experiments.config import Config, UsageError, from_mapping
from jaxfl.runtime import distributed
from jaxfl.runtime import mesh as mesh_lib

flags.adopt_module_key_flags(setting_flags)  # in --help
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run; default runs/DATE-TIME.'
)
_RESUME = flags.DEFINE_bool('resume', False, 'Go on with the run in --workdir.')
_AUTO_RESUME = flags.DEFINE_bool(
  'auto_resume',
  False,
  'Go on with the run in --workdir if there is one, else start it: for a'
  ' command that is run again by itself.',
)
_TENSORBOARD = flags.DEFINE_bool(
  'tensorboard',
  False,
  'Write held-out metrics, losses and bytes to WORKDIR/tensorboard, too.',
)
_MESH_CLIENTS = flags.DEFINE_integer(
  'mesh_clients', None, 'Devices to spread clients over; see --mesh_model.'
)
_MESH_MODEL = flags.DEFINE_integer(
  'mesh_model',
  None,
  'Devices that share the weights of a replica, default 1. Without'
  ' --mesh_clients, clients are spread over all devices.',
)
_MULTIHOST = flags.DEFINE_bool(
  'multihost',
  False,
  'Run on all hosts that started this command; settings and directory are'
  ' those of the first. Outside of a cluster it needs the next three.',
)
_PROCESSES = {
  'coordinator_address': flags.DEFINE_string(
    'coordinator_address', None, 'host:port of process 0.'
  ),
  'num_processes': flags.DEFINE_integer(
    'num_processes', None, 'Processes of --multihost.'
  ),
  'process_id': flags.DEFINE_integer(
    'process_id', None, 'Which of them this is, from 0.'
  ),
}


def devices() -> Mesh | None:
  """The mesh that the flags ask for; None for the simulator.

  Raises:
    UsageError: naming the flags that are wrong.
  """
  given = {k: v.value for k, v in _PROCESSES.items() if v.value is not None}
  if given and not _MULTIHOST.value:
    raise UsageError(f'--{min(given)} is for --multihost')
  try:
    if _MULTIHOST.value:
      distributed.initialize(**given)
  except ValueError as error:
    raise UsageError(f'--multihost: {error}') from error
  asked = (_MESH_CLIENTS, _MESH_MODEL)
  if not _MULTIHOST.value and all(flag.value is None for flag in asked):
    return None
  num_model = 1 if _MESH_MODEL.value is None else _MESH_MODEL.value
  with distributed.together(UsageError):
    try:
      return mesh_lib.make(_MESH_CLIENTS.value, num_model)
    except ValueError as error:
      raise UsageError(f'--mesh_clients, --mesh_model: {error}') from error


def settings(workdir: workdir_lib.Workdir) -> Config:
  """The settings to run with, those of the first process.

  Raises:
    UsageError: if they are wrong, or not those of the run in the directory.
  """
  text = b''
  with distributed.together(UsageError):
    if distributed.is_first():
      there, found = None, workdir.config.exists()
      resume = _RESUME.value or (_AUTO_RESUME.value and found)
      if resume and found:
        there = workdir_lib.read_config(workdir)
      config, given = setting_flags.asked_for(there)
      config = workdir_lib.choose(workdir, config, given, resume)
      text = json.dumps(dataclasses.asdict(config)).encode()
  return from_mapping(json.loads(distributed.share_bytes(text)))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
  stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  directory = pathlib.Path(_WORKDIR.value or f'runs/{stamp}')
  alike = (UsageError, FloatingPointError, runner.Stopped)
  try:
    for flag in (_RESUME, _AUTO_RESUME):
      if flag.value and not _WORKDIR.value:
        raise UsageError(f'--{flag.name} needs --workdir')
    mesh = devices()
    if not distributed.is_first():
      logging.set_verbosity(logging.ERROR)
    with distributed.leave_at_once(*alike):
      config = settings(workdir_lib.Workdir(directory))
      summary = runner.run(config, directory, mesh, _TENSORBOARD.value)
  except (UsageError, FloatingPointError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    if (
      distributed.is_first() and workdir_lib.Workdir(directory).config.exists()
    ):
      print(
        '\nStopped; every finished round is in the log. To go on:\n'
        f'  python -m experiments.train --workdir={directory} --resume'
      )
    sys.exit(130)
  if summary is None:
    return
  report.show(summary)
  print(
    f'{directory}/curve.png shows the run. To rebuild it from its log:\n'
    f'  python -m experiments.replay --workdir={directory}'
  )


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=setting_flags.parse)
