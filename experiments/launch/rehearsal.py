"""What a launcher starts on each host, for hosts that are all this machine.

The launcher itself runs, with commands in place of `srun`, `gcloud` and
`kubectl` that note what they are given.
"""

import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import yaml

DIRECTORY = pathlib.Path(__file__).parent
ROOT = DIRECTORY.parents[1]
# launcher: command in whose place we stand, script, variables of its user
LAUNCHERS = {
  'slurm': ('srun', 'slurm.sbatch', {}),
  'tpu_vm': (
    'gcloud',
    'tpu_vm.sh',
    {'TPU_NAME': 'slice', 'ZONE': 'zone', 'CHECKOUT': str(ROOT)},
  ),
  'jobset': (
    'kubectl',
    'jobset.sh',
    {'IMAGE': 'image', 'CLAIM': 'claim', 'DEVICE': 'cpu', 'DEVICES': '1'},
  ),
}
_SLURM_PORTS = range(2**16 - 2**12, 2**16)  # JAX takes one by the job's number


class Host(NamedTuple):
  """What is started on a host: a command, and variables that it finds."""

  command: list[str]
  variables: dict[str, str]

  @property
  def environment(self) -> dict[str, str]:
    """Ours, with this Python, on CPUs, and the host's own variables."""
    path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
    return os.environ | {'PATH': path, 'JAX_PLATFORMS': 'cpu'} | self.variables


def hosts(
  launcher: str,
  num_hosts: int,
  workdir: str | os.PathLike,
  arguments: Sequence[str],
) -> list[Host]:
  """What a launcher starts on each host.

  Args:
    launcher: one of `LAUNCHERS`.
    num_hosts: how many.
    workdir: of the run.
    arguments: for `experiments.train`.

  Raises:
    RuntimeError: if the launcher fails.
  """
  port = _free_port()
  variables = LAUNCHERS[launcher][2] | {
    'WORKDIR': str(workdir),
    'HOSTS': str(num_hosts),
    'SLURM_JOB_ID': str(port - _SLURM_PORTS.start),
  }
  found, text = noted(launcher, variables, arguments)
  if launcher == 'slurm':
    return _tasks(found, num_hosts, variables['SLURM_JOB_ID'])
  if launcher == 'tpu_vm':
    return _workers(found, num_hosts, port)
  return _pods(yaml.safe_load(text), port)


def noted(
  launcher: str, variables: dict[str, str], arguments: Sequence[str]
) -> tuple[list[str], str]:
  """What a launcher hands over: arguments of its command, and standard input.

  Args:
    launcher: one of `LAUNCHERS`.
    variables: of its environment.
    arguments: for `experiments.train`.

  Raises:
    RuntimeError: with the errors of a launcher that fails.
  """
  command, script, _ = LAUNCHERS[launcher]
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    path = directory / command
    path.write_text(
      '#!/usr/bin/env bash\n'
      f'printf "%s\\0" "$@" > {name}/arguments; cat > {name}/input\n'
    )
    path.chmod(0o755)
    there = os.environ | {'PATH': f'{name}:{os.environ["PATH"]}'} | variables
    done = subprocess.run(
      ['bash', str(DIRECTORY / script), *arguments],
      env=there, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
      raise RuntimeError(f'{script}: {done.stderr}')
    found = (directory / 'arguments').read_text().split('\0')[:-1]
    return found, (directory / 'input').read_text()


def _tasks(srun: list[str], num_hosts: int, job: str) -> list[Host]:
  """With the variables that JAX reads under Slurm."""
  start = next(i for i, x in enumerate(srun) if not x.startswith('-'))
  alike = {
    'SLURM_JOB_ID': job,
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': str(num_hosts),
  }
  return [
    Host(
      srun[start:], alike | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)}
    )
    for i in range(num_hosts)
  ]


def _workers(gcloud: list[str], num_hosts: int, port: int) -> list[Host]:
  """With the flags that stand for the slice, which JAX cannot ask here."""
  (command,) = [
    x.removeprefix('--command=') for x in gcloud if x.startswith('--command=')
  ]
  command += f' --coordinator_address=127.0.0.1:{port}'
  command += f' --num_processes={num_hosts} --process_id='
  return [Host(['bash', '-c', f'{command}{i}'], {}) for i in range(num_hosts)]


def _pods(jobset: dict, port: int) -> list[Host]:
  """With the variables of a pod; only the name of pod 0 is another."""
  (replicated,) = jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  (container,) = job['template']['spec']['containers']
  alike = {x['name']: x['value'] for x in container['env']} | {
    'COORDINATOR': f'127.0.0.1:{port}',
    'KUBERNETES_SERVICE_HOST': '127.0.0.1',
  }
  found = []
  for i in range(job['completions']):
    own = alike | {'JOB_COMPLETION_INDEX': str(i)}
    fill = lambda text, own=own: re.sub(
      r'\$\((\w+)\)', lambda match: own[match[1]], text
    )
    words = container['command'] + container['args']
    found.append(Host([fill(x) for x in words], own))
  return found


def _free_port() -> int:
  for port in _SLURM_PORTS[os.getpid() % 2**11 :]:
    with socket.socket() as s:
      try:
        s.bind(('127.0.0.1', port))
      except OSError:
        continue
      return port
  raise RuntimeError(f'all ports from {_SLURM_PORTS.start} on are taken')
