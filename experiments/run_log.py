"""The log of a run: what its header says, and whether it is this run's."""

import dataclasses
import json
from typing import Any

from experiments import problem as problem_lib
from experiments.config import Config, UsageError
from experiments.workdir import Workdir, write_json
from jaxfl import checkpoint, keys, wire
from jaxfl import digest as digest_lib
from jaxfl import log as log_lib
from jaxfl import method as method_lib
from jaxfl.models import native
from jaxfl.runtime import distributed

DIGESTS = ('data_digest', 'frozen_digest')
FEDERATION = ('pipeline', 'digest_every')
# in a log beside the settings; of private runs, and of federated ones
_BESIDE = (*DIGESTS, 'num_examples', *FEDERATION)


def settings_of(header: log_lib.Header) -> dict[str, Any]:
  """The settings that a run was started with."""
  return {k: v for k, v in header.config.items() if k not in _BESIDE}


def header_of(
  config: Config, method: method_lib.Method, problem: problem_lib.Problem
) -> log_lib.Header:
  """The header of a run's log.

  A private run's has no digest of the data: whoever knows all records but one
  could try what the last one is. It has the numbers of examples, which are
  public, and the scale of what is released.
  """
  base = problem.params
  digests = dict.fromkeys(DIGESTS, '') | {
    'data_digest': '' if method.private else problem.task.digest,
    'frozen_digest': digest_lib.digest(problem.frozen),
  }
  sizes = {}
  if method.private:
    sizes['num_examples'] = [int(n) for n in problem.task.num_examples]
  return log_lib.Header(
    spec=keys.SPEC,
    base_digest=digest_lib.digest(base),
    config=dataclasses.asdict(config) | digests | sizes,
    params=wire.describe(base),
    message=wire.describe(method.recorded(base)),
  )


def _by_name(header):
  """Everything in a header by name, settings and digests too."""
  return dataclasses.asdict(header) | dict(header.config)


def check_alike(header: log_lib.Header) -> None:
  """Raises UsageError if processes have other data, models or settings."""
  texts = distributed.exchange(json.dumps(_by_name(header)))
  first, *others = [json.loads(text) for text in texts]
  for process, other in enumerate(others, 1):
    if different := [
      k for k in first if k != 'config' and other.get(k) != first[k]
    ]:
      raise UsageError(
        f'process {process} does not run what process 0 runs: it differs in'
        f' {", ".join(different)}'
      )


def open_log(
  header: log_lib.Header, workdir: Workdir, problem: problem_lib.Problem
) -> log_lib.RoundLog:
  """Opens the log of a run, or starts it, with base and shape beside it.

  Raises:
    UsageError: if it is the log of another run.
    ValueError: if it, or the base, is damaged.
    OSError: if it can't be opened.
  """
  if not workdir.log.exists():
    if problem.shape is not None:
      write_json(workdir.model, native.to_json(problem.shape))
    checkpoint.save_base(workdir.base, problem.params)
    checkpoint.load_base(workdir.base, header.params, header.base_digest)
    return log_lib.RoundLog.create(workdir.log, header)
  if problem.shape is not None:
    _check_shape(workdir, problem.shape)
  log = log_lib.RoundLog.open(workdir.log, 'a')
  there, here = _by_name(log.header), _by_name(header)
  different = [k for k in here if k != 'config' and there.get(k) != here[k]]
  if different:
    log.close()
    raise UsageError(
      f'{workdir.log} is the log of another run: it differs in'
      f' {", ".join(different)}'
    )
  return log


def _check_shape(workdir, shape):
  """Equal weights in a model of another shape are another model."""
  try:
    there = native.from_json(json.loads(workdir.model.read_text()))
  except FileNotFoundError:
    write_json(workdir.model, native.to_json(shape))
    return
  except ValueError as error:
    raise UsageError(f'{workdir.model}: {error}') from error
  different = [
    f.name
    for f in dataclasses.fields(shape)
    if getattr(there, f.name) != getattr(shape, f.name)
  ]
  if different:
    raise UsageError(
      f'{workdir.model} is the shape of another model: it differs in'
      f' {", ".join(different)}'
    )
