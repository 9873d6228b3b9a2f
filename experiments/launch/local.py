"""Rehearses a launcher on this machine, with a process for each host.

python -m experiments.launch.local --launcher=slurm --hosts=2 \\
    --workdir=runs/NAME -- --num_rounds=20

What comes after `--` is for `experiments.train`. Processes run on CPUs, in the
environment that the launcher makes for them; signals are passed on to all.
"""

import pathlib
import signal
import subprocess
import sys

from absl import app, flags

from experiments.launch import rehearsal

_LAUNCHER = flags.DEFINE_enum(
  'launcher', 'slurm', [*rehearsal.LAUNCHERS], 'What to rehearse.'
)
_HOSTS = flags.DEFINE_integer('hosts', 2, 'How many hosts.', lower_bound=1)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')


def main(argv):
  if not _WORKDIR.value:
    raise app.UsageError('--workdir is needed')
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  hosts = rehearsal.hosts(_LAUNCHER.value, _HOSTS.value, workdir, argv[1:])
  processes = [
    subprocess.Popen(host.command, cwd=rehearsal.ROOT, env=host.environment)
    for host in hosts
  ]

  def pass_on(signum, frame):
    del frame  # Unused.
    for process in processes:
      process.send_signal(signum)

  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, pass_on)
  sys.exit(max(abs(process.wait()) for process in processes))


if __name__ == '__main__':
  app.run(main)
