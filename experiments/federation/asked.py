"""A run whose server asks, see docs/flower.md: its server, and a site.

What carries questions and answers is elsewhere.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from experiments import defaults, report
from experiments import workdir as workdir_lib
from experiments.config import Config, UsageError, from_mapping
from experiments.federation import site
from jaxfl import checkpoint, digest, log
from jaxfl.federation import answers, book, handshake, letters, questions
from jaxfl.federation.names import Names
from jaxfl.federation.records import read_header
from jaxfl.models import native

_SETTINGS = frozenset(f.name for f in dataclasses.fields(Config))
# of the run, besides the settings, and their defaults
RUN = {'run': 'flower', 'workdir': '', 'min_clients': 0, 'deadline_s': 300.0}
_POLL_S = 0.5
_NOT_GIVEN = ''  # a TOML file has no null


def read(
  values: Mapping[str, Any], others: Mapping[str, Any], what: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Settings, and other values, from a config of Flower's.

  Args:
    values: by name; an empty text is not given.
    others: values that are no settings, with their defaults.
    what: the config is called, in errors.

  Returns:
    The settings that are given; all of the others.

  Raises:
    UsageError: naming what is unknown or of the wrong type.
  """
  given = {k: v for k, v in values.items() if v != _NOT_GIVEN}
  found = dict(others)
  for name in given.keys() - _SETTINGS:
    if name not in others:
      known = ', '.join(sorted(others))
      raise UsageError(
        f'{what}: unknown {name!r}; there are {known}, and the settings of'
        ' experiments.train'
      )
    kind = type(others[name])
    if kind is float and type(given[name]) is int:
      given[name] = float(given[name])
    if type(given[name]) is not kind:
      raise UsageError(
        f'{what}: {name} must be of type {kind.__name__}, got {given[name]!r}'
      )
    found[name] = given[name]
  return {k: v for k, v in given.items() if k in _SETTINGS}, found


def _names(run: str) -> Names:
  try:
    return Names(run)
  except ValueError as error:
    raise UsageError(str(error)) from error


# The server.


def serve(
  post: letters.Post,
  run_config: Mapping[str, Any],
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Runs the server of a run to its end; goes on with one that is there.

  Args:
    post: carries questions and answers.
    run_config: settings by name, and those of `RUN`.
    say: told after every round how the run stands.

  Returns:
    The summary, also in the directory.

  Raises:
    UsageError: naming what is wrong.
    questions.Excluded: if no site takes part.
  """
  started = time.monotonic()
  settings, how = read(run_config, RUN, 'run-config')
  directory = how['workdir'] or f'runs/{_names(how["run"]).run}'
  workdir = workdir_lib.Workdir(directory)
  live = _open(workdir, settings)
  try:
    config = site.config_of(live.header)
    hub = questions.Hub(
      live,
      _rules(config.num_clients, how),
      handshake.passport(live.header, site.shared_of(live.header)),
      site.usable(live.header),
      config.num_rounds,
      time.monotonic(),
    )
    watch = lambda status: say(describe(status))
    status = questions.serve(post, hub, poll_s=_POLL_S, watch=watch)
    summary = {
      'rounds': status.round,
      'digest': status.digest,
      'log_digest': live.digest,
      'bytes_up': status.bytes_up,
      'bytes_down': status.bytes_down,
      'refused': status.refused,
      'failed': dict(status.failed),
      'excluded': status.excluded,
      'differing': status.differing,
      'wall_s': time.monotonic() - started,
    }
  finally:
    live.close()
  workdir_lib.write_json(workdir.summary, summary)
  return summary


def _rules(num_clients: int, how: Mapping[str, Any]) -> book.Rules:
  try:
    return book.Rules(
      num_clients=num_clients,
      min_clients=how['min_clients'] or num_clients,
      deadline_s=how['deadline_s'],
    )
  except ValueError as error:
    raise UsageError(f'run-config: {error}') from error


def _open(workdir, settings):
  """The log of the run: the one that is there, or a new one with its base."""
  there = workdir.log.exists()
  asked = defaults.resolve(from_mapping(settings))
  config = workdir_lib.choose(workdir, asked, set(settings), resume=there)
  try:
    if there:
      return log.RoundLog.open(workdir.log, 'a')
    header, found = site.begin(config, pipeline=0, digest_every=1)
    workdir_lib.claim(workdir, config)
    if found.shape is not None:
      workdir_lib.write_json(workdir.model, native.to_json(found.shape))
    checkpoint.save_base(workdir.base, found.params)
    return log.RoundLog.create(workdir.log, header)
  except (ValueError, OSError) as error:
    raise UsageError(str(error)) from error


def describe(status: questions.Status) -> str:
  """A status in a line."""
  loss = status.losses.get(status.round)
  words = [
    f'round {status.round} of {status.num_rounds}',
    f'{len(status.members)} clients',
    *([] if loss is None else [f'loss {loss:.4f}']),
    f'up {report.amount(status.bytes_up)}',
    f'down {report.amount(status.bytes_down)} each',
  ]
  return ', '.join(words)


# A site.


def answer(
  question: letters.Letter,
  node_config: Mapping[str, Any],
  run_config: Mapping[str, Any],
) -> letters.Letter:
  """Answers a question at a site; what does not fit is said to the server.

  Args:
    question: of the server.
    node_config: what is this site's own: `client`, its id; `workdir`;
      `own_data`, whether all of the dataset is its own; settings of its data
      and model.
    run_config: of the run, for its name.
  """
  client = node_config.get('client')
  if type(client) is not int:
    return answers.refusal(
      -1, f'node-config: client must be the id of this site, got {client!r}'
    )
  try:
    return _answer(question, client, node_config, run_config)
  except (UsageError, answers.Refused, FloatingPointError) as error:
    logging.error('this site does not take part: %s', error)
    return answers.refusal(client, str(error))


def _answer(question, client, node_config, run_config):
  own = {'client': client, 'workdir': 'runs', 'own_data': False}
  given, how = read(node_config, own, 'node-config')
  _, run = read(run_config, RUN, 'run-config')
  name = f'{_names(run["run"]).run}-client-{client}'
  directory = pathlib.Path(how['workdir']) / name
  block = answers.header_block(directory, question)
  if block is None:
    return answers.missing_header(client)
  bench = site.Bench(
    _names(run['run']), client, read_header(block), given, how['own_data']
  )
  answers.check(bench.site, block)
  bench.claim(directory)
  replica = bench.replica(directory, block)
  try:
    reply = answers.answer(bench.site, replica, question)
    if 'params' in reply:
      summary = {
        'rounds': replica.round,
        'digest': digest.digest(replica.state.params),
        'log_digest': replica.log.digest,
      }
      workdir_lib.write_json(workdir_lib.Workdir(directory).summary, summary)
    return reply
  finally:
    replica.close()
