"""Runs with clients that lie; the parts of `experiments.byzantine`."""

import concurrent.futures
import functools
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import build, defaults
from experiments import problem as problem_lib
from experiments.config import from_mapping
from jaxfl import byzantine, codecs, keys, probe
from jaxfl.runtime import simulate

NUM_CLIENTS = 10  # one more has the trusted examples, and takes no part
FRACTIONS = (0.1, 0.3, 0.5, 0.6)
TURNCOAT = 'turncoat'  # signs are flipped after a third of the rounds
_BASE = {
  'dataset': 'minilm_sst2',
  'num_clients': NUM_CLIENTS + 1,
  'batch_size': 64,
  'block_size': NUM_CLIENTS,
}
_SCALARS = {'mu': 0.01, 'schedule': 'linear', 'num_rounds': 100}
METHODS: dict[str, dict[str, Any]] = {
  'decomfl': _SCALARS | {'num_perturbations': 4, 'learning_rate': 0.05},
  'spsa': _SCALARS | {'num_perturbations': 4, 'learning_rate': 0.1},
  'fedkseed': _SCALARS | {'local_steps': 4, 'learning_rate': 0.025},
  'fed_avg': {'local_steps': 4, 'learning_rate': 1.0, 'num_rounds': 20},
  'spsa, 300 rounds': _SCALARS
  | {'method': 'spsa', 'num_perturbations': 4, 'num_rounds': 300}
  | {'learning_rate': 0.05},
  'spsa, Dirichlet': _SCALARS
  | {'method': 'spsa', 'partition': 'dirichlet', 'num_perturbations': 4}
  | {'learning_rate': 0.1},
}
_KRUM = {'aggregator': 'multi_krum', 'num_byzantine': 3}
_TRIMMED = {'aggregator': 'trimmed_mean', 'trim_fraction': 0.3}
_SIGNS = {'aggregator': 'sign_vote', 'clip_value': 0.2}
_COMPARABLE: dict[str, dict[str, Any]] = {
  'mean': {},
  'median': {'aggregator': 'median'},
  'trimmed_mean': _TRIMMED,
  'multi_krum': _KRUM,
}
# 'probe' and 'oracle' are the mean with weights of trust
AGGREGATORS: dict[str, dict[str, dict[str, Any]]] = {
  'spsa': {'mean': {}, 'clip': {'clip_value': 0.5}, 'sign_vote': _SIGNS}
  | {'probe': {}, 'oracle': {}},
  'fedkseed': {'mean': {}, 'probe': {}, 'oracle': {}},
  'decomfl': _COMPARABLE | {'sign_vote': _SIGNS, 'probe': {}, 'oracle': {}},
  'fed_avg': _COMPARABLE | {'clip': {'clip_value': 1.0}, 'oracle': {}},
  'spsa, 300 rounds': {'mean': {}, 'probe': {}, 'oracle': {}},
  'spsa, Dirichlet': {'mean': {}, 'probe': {}, 'oracle': {}},
}


class Job(NamedTuple):
  """What the clients of a run do, and what is done about it."""

  aggregator: str
  attack: str | None
  fraction: float


class Setting(NamedTuple):
  """Runs of a method and a seed, which share data and the clients' program."""

  method: str
  seed: int
  data_dir: str
  jobs: tuple[Job, ...]


def jobs(method: str) -> list[Job]:
  """The runs of a method."""
  found, fractions = [], FRACTIONS
  for aggregator in AGGREGATORS[method]:
    attacks: tuple[str, ...] = byzantine.ATTACKS
    if aggregator == 'probe':
      attacks = (*attacks, TURNCOAT)
    if aggregator == 'oracle':  # liars are absent, whatever they send
      attacks = ('replay',)
    if ',' in method:  # less of it
      fractions = (0.5,)
      attacks = attacks if aggregator == 'probe' else ('replay',)
    found.append(Job(aggregator, None, 0.0))
    found += [Job(aggregator, a, f) for a in attacks for f in fractions]
  return found


def missing(
  rows: Sequence[Mapping[str, Any]], num_seeds: int, data_dir: str
) -> list[Setting]:
  """What is to be run beside the rows that are there."""
  names = ('method', 'seed', 'aggregator', 'attack', 'fraction')
  done = {tuple(row[name] for name in names) for row in rows}
  settings = []
  for seed in range(num_seeds):
    for method in METHODS:
      left = [job for job in jobs(method) if (method, seed, *job) not in done]
      if left:
        settings.append(Setting(method, seed, data_dir, tuple(left)))
  return settings


class Runs:
  """The runs of a setting."""

  def __init__(self, setting: Setting):
    self.setting = setting
    self.config = self._config({})
    problem = problem_lib.build(self.config)
    self.params, self._evaluate = problem.params, problem.evaluate
    self._loss_fn = functools.partial(problem.loss_fn, problem.frozen)
    self._task = problem.task
    self._code = None
    if codec := self.config.codec:
      self._code = codecs.codec(codec, scale=self.config.codec_scale)
    # all runs see the same batches
    self._batches = functools.cache(self._draw)
    self._client = None
    self.method, self.programs = self.built('mean')
    self._judge = None
    if self.method.probe is not None:
      self._judge = probe.Trust(
        self.method,
        self._trusted,
        keys.root(self.config.seed),
        num_messages=self.config.num_rounds * NUM_CLIENTS,
        num_clients=NUM_CLIENTS,
      )

  def _config(self, changes):
    name = self.setting.method
    given = {'method': name} | _BASE | METHODS[name] | changes
    given |= {'seed': self.setting.seed, 'data_dir': self.setting.data_dir}
    return defaults.resolve(from_mapping(given))

  def _draw(self, round, client):
    config, count = self.config, self.method.num_batches
    return self._task.batches(
      config.seed, client, round, count, config.batch_size
    )

  def _trusted(self, round):
    """A minibatch of the client that takes no part."""
    return {name: x[0] for name, x in self._batches(round, NUM_CLIENTS).items()}

  def built(self, aggregator: str):
    """The method with an aggregator, and its programs."""
    config = self._config(AGGREGATORS[self.setting.method][aggregator])
    method = build.build_method(config, self._loss_fn)
    programs = simulate.compile_method(method)
    self._client = self._client or programs.client
    return method, programs._replace(client=self._client)

  def tamper(self, job: Job) -> byzantine.Tamper | None:
    """What liars do, the first clients."""
    if job.attack is None:
      return None
    turncoat = job.attack == TURNCOAT
    return byzantine.tamper(
      'sign_flip' if turncoat else job.attack,
      range(num_liars(job)),
      codec=self._code,
      num_values=self.method.projected_grads,
      honest_rounds=self.config.num_rounds // 3 if turncoat else 0,
    )

  def run(self, job: Job, method, programs) -> dict[str, Any]:
    """One run; what JSON can hold of it."""
    trust = judge = None
    if job.aggregator == 'probe':
      trust = judge = self._judge
      assert judge is not None
      judge.reset()
    elif job.aggregator == 'oracle':
      trust = functools.partial(_oracle, num_liars(job))
    start, state, rounds, forwards = time.perf_counter(), None, 0, 0
    state = method.init(self.params)
    try:
      for done in simulate.simulate(
        method,
        state,
        self._batches,
        simulate.Population(num_clients=NUM_CLIENTS, seed=self.config.seed),
        num_rounds=self.config.num_rounds,
        block_size=self.config.block_size,
        programs=programs,
        tamper=self.tamper(job),
        trust=trust,
      ):
        state, rounds = done.state, done.round
        forwards += done.forwards
    except FloatingPointError:  # weights left their range
      pass
    row = {'method': self.setting.method, 'seed': self.setting.seed}
    row |= job._asdict() | self._evaluate(state.params)
    row['seconds'] = round(time.perf_counter() - start, 2)
    if rounds < self.config.num_rounds:
      row['stopped_after'] = rounds
    if judge is not None:
      row['probe_forwards'] = judge.forwards / forwards
      row['levels'] = [r.level for _, r in sorted(judge.records.items())]
    return row


def num_liars(job: Job) -> int:
  return round(job.fraction * NUM_CLIENTS)


def _oracle(num_liars, state, messages, cohort):
  """Weights from somebody who knows the liars."""
  del state, messages  # Unused.
  return (cohort.id >= num_liars).astype(np.float32)


def execute(setting: Setting) -> list[dict[str, Any]]:
  """Makes the runs of a setting."""
  runs, rows = Runs(setting), []
  built = functools.cache(runs.built)
  for job in setting.jobs:
    rows.append(runs.run(job, *built(job.aggregator)))
  return rows


def run(settings: Sequence[Setting], num_jobs: int) -> Iterator[list[dict]]:
  """Makes all runs, a setting in a process of its own; yields its rows."""
  with concurrent.futures.ProcessPoolExecutor(
    num_jobs, multiprocessing.get_context('spawn'), max_tasks_per_child=1
  ) as pool:
    yield from pool.map(execute, settings)


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Mean and standard deviation over seeds of every cell."""
  cells: dict[tuple, list[Mapping[str, Any]]] = {}
  for row in rows:
    cell = tuple(row[k] for k in ('method', 'aggregator', 'attack', 'fraction'))
    cells.setdefault(cell, []).append(row)
  result = []
  for (method, aggregator, attack, fraction), found in cells.items():
    values = [row['accuracy'] for row in found]
    result.append(
      {
        'method': method,
        'aggregator': aggregator,
        'attack': attack,
        'fraction': fraction,
        'accuracy': statistics.fmean(values),
        'std': statistics.stdev(values) if len(values) > 1 else None,
        'stopped': sum('stopped_after' in row for row in found),
      }
    )
  return result
