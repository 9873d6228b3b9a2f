"""What a process of a federation runs: settings, data, model, compiled."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import build, defaults, problem, run_log
from experiments import workdir as workdir_lib
from experiments.config import Config, UsageError, from_mapping
from jaxfl import checkpoint, keys, log, probe
from jaxfl import method as method_lib
from jaxfl import typing as jt
from jaxfl.federation import book, verdict
from jaxfl.federation.names import Names
from jaxfl.federation.replica import Replica
from jaxfl.federation.site import Site
from jaxfl.models import native
from jaxfl.runtime import simulate

# what everybody must have alike, besides what the method reads
_SHARED = frozenset(
  {'method', 'seed', 'num_rounds', 'num_clients', 'batch_size', 'weighting'}
  | {'learning_rate'}
  | {'adapter', 'lora_rank', 'lora_alpha', 'lora_targets', 'dtype'}
  | {'frozen_digest'}
)
# settings of a simulation, which a federation decides by who is there
_SIMULATED = {'participation_rate': 1.0, 'dropout_rate': 0.0, 'block_size': 1}


# how a client computes its losses is its own affair
_OWN = frozenset({'in_layers', 'forwards_at_once', 'forward_dtype'})


def shared_settings(config: Config) -> frozenset[str]:
  """Names of the settings that all sites must have alike."""
  return (_SHARED | defaults.settings_read(config)) - _OWN


def check(config: Config, method: method_lib.Method, pipeline: int) -> None:
  """Refuses what a federation can't run.

  Raises:
    UsageError: naming the setting.
  """
  for name, only in _SIMULATED.items():
    if getattr(config, name) != only:
      raise UsageError(
        f'{name} is for simulations: here, who takes part is who is there'
      )
  if config.weighting != 'uniform':
    raise UsageError(
      'weighting must be uniform: a client could claim to have any number of'
      ' examples'
    )
  if method.private:
    raise UsageError(
      f'method {config.method} with epsilon_dp is not run by a federation yet:'
      ' a client that starts again would draw its noise anew for the same round'
    )
  if pipeline and config.method == 'fedkseed_pro':
    raise UsageError(
      'pipeline must be 0 for method fedkseed_pro: which seeds a client draws'
      ' depends on the rounds before'
    )


def header_of(config: Config, pipeline: int, digest_every: int) -> log.Header:
  """The header of a run's log, as its coordinator makes it; see `begin`."""
  return begin(config, pipeline, digest_every)[0]


def begin(
  config: Config, pipeline: int, digest_every: int
) -> tuple[log.Header, problem.Problem]:
  """The header of a new run's log, and its problem, with the base.

  Raises:
    UsageError: naming the setting that a federation can't have.
  """
  method = build.build_method(config, build.no_loss)
  check(config, method, pipeline)
  found = problem.build(config)
  build.check_params(method, found.params)
  header = run_log.header_of(config, method, found)
  # every site has data of its own
  own = {'data_digest': '', 'pipeline': pipeline, 'digest_every': digest_every}
  config_of_log = {**header.config, **own}
  return dataclasses.replace(header, config=config_of_log), found


def config_of(header: log.Header) -> Config:
  """The settings of a run.

  Raises:
    UsageError: if this version has others.
  """
  return from_mapping(run_log.settings_of(header))


def shared_of(header: log.Header) -> dict[str, Any]:
  """The settings of a run that all sites must have alike."""
  names = shared_settings(config_of(header))
  return {name: header.config.get(name) for name in sorted(names)}


def usable(header: log.Header) -> Callable[[jt.Message], bool]:
  """Whether a message of the run says anything that is finite."""
  return book.usable(build.build_method(config_of(header), build.no_loss))


def size(header: log.Header) -> Callable[[jt.Message], float]:
  """The size of a message of the run, for `coordinator.Plan`."""
  return book.size(build.build_method(config_of(header), build.no_loss))


def check_probe(config: Config) -> None:
  """Raises UsageError for a run whose messages can't be probed."""
  if build.build_method(config, build.no_loss).probe is None:
    raise UsageError(
      f'--probe: method {config.method} with these settings sends nothing that'
      ' a probe can check; methods spsa, fedkseed and decomfl do, without'
      ' privacy'
    )


class Bench:
  """A site's problem and programs.

  Attributes:
    config: the site's settings.
    problem: its data and model.
    method: of the run.
    site: for `jaxfl.federation.client`.
    server: the compiled server, which takes the state that it is given.
  """

  def __init__(
    self,
    names: Names,
    client: int | None,
    header: log.Header,
    given: dict[str, Any],
    own_data: bool,
  ):
    """Args:
    names: of the run.
    client: its id; None for a keeper.
    header: of the run's log.
    given: settings of this site by name; others are the run's.
    own_data: whether all of the data is this client's.

    Raises:
      UsageError: naming the setting that is wrong.
    """
    settings = run_log.settings_of(header) | given
    self.config = config = defaults.resolve(from_mapping(settings))
    pipeline = header.config['pipeline']
    if client is not None and not 0 <= client < config.num_clients:
      raise UsageError(
        f'--client must be in [0, {config.num_clients}), as the run has'
        f' num_clients={config.num_clients}; got {client}'
      )
    data = dataclasses.replace(config, num_clients=1) if own_data else config
    self.problem = found = problem.build(data)
    self.method = method = build.build_method(config, build.no_loss)
    check(config, method, pipeline)
    programs = simulate.compile_method(
      method,
      build=self._built,
      frozen=found.frozen,
      donate=True,
    )
    self.server = programs.server
    self.site = Site(
      names=names,
      client=client,
      header=run_log.header_of(config, method, found),
      shared=shared_settings(config),
      method=method,
      run_client=_alone(programs.client),
      batch_fn=lambda round: found.task.batches(
        config.seed,
        0 if own_data else client or 0,
        round,
        method.num_batches,
        config.batch_size,
      ),
      num_rounds=config.num_rounds,
      pipeline=pipeline,
      digest_every=header.config['digest_every'],
    )

  def _built(self, frozen: Any) -> method_lib.Method:
    """The method with its loss, of weights that are not trained."""
    loss_fn = functools.partial(self.problem.loss_fn, frozen)
    return build.build_method(self.config, loss_fn)

  def judge(self, path: pathlib.Path) -> verdict.Judge:
    """Probes on this site's data, for the whole run.

    Args:
      path: of the file that keeps what they found.

    Raises:
      UsageError: if the messages of the run can't be probed.
    """
    config, frozen = self.config, self.problem.frozen
    check_probe(config)

    @jax.jit
    def slope(frozen, *args):
      checks = self._built(frozen).probe
      assert checks is not None
      return checks.slope(*args)

    trust = probe.Trust(
      self.method,
      lambda round: jax.tree.map(lambda x: x[0], self.site.batch_fn(round)),
      keys.root(config.seed),
      num_messages=config.num_rounds * config.num_clients,
      num_clients=config.num_clients,
      slope=functools.partial(slope, frozen),
    )
    return verdict.Judge(trust, config.num_clients, path)

  def replica(self, directory: pathlib.Path, block: bytes) -> Replica:
    """The replica in a directory, at the start if there is none.

    Args:
      directory: of the process.
      block: the header of the run's log.

    Raises:
      UsageError: if the log there is damaged, or of another run.
      OSError: if it can't be opened.
    """
    try:
      return Replica(
        self.method,
        lambda: self.problem.params,
        self.server,
        self.config.num_clients,
        directory,
        block,
      )
    except ValueError as error:
      raise UsageError(str(error)) from error

  def claim(self, directory: pathlib.Path) -> None:
    """Makes a directory one that `experiments.replay` understands.

    Raises:
      UsageError: if it cannot be written.
    """
    workdir, found = workdir_lib.Workdir(directory), self.problem
    workdir_lib.claim(workdir, self.config)
    if found.shape is not None:
      workdir_lib.write_json(workdir.model, native.to_json(found.shape))
    if not workdir.base.exists():
      checkpoint.save_base(workdir.base, found.params)


def _alone(program):
  """A client by itself, of a program for blocks of clients."""
  one = lambda tree: jax.tree.map(lambda x: np.asarray(x)[None], tree)
  first = lambda tree: jax.tree.map(lambda x: x[0], tree)

  def run(state, local, batches, party):
    done = program(state, one(local), one(batches), one(party))
    return first(done)

  return run


def read_summary(directory: pathlib.Path) -> dict[str, Any] | None:
  """The summary that a process left; None if there is none."""
  path = workdir_lib.Workdir(directory).summary
  return json.loads(path.read_text()) if path.exists() else None
