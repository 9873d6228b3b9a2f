"""From settings to methods: one entry each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from experiments import problem
from experiments.config import Config, UsageError
from jaxfl import keys, schedules
from jaxfl import method as method_lib
from jaxfl import typing as jt
from jaxfl.methods import fed_avg, spsa
from jaxfl.runtime import simulate


@dataclasses.dataclass(frozen=True)
class Entry:
  """How a method is built, its own defaults, and the settings it reads."""

  build: Callable[[Config, jt.LossFn], method_lib.Method]
  defaults: dict[str, Any]
  settings: frozenset[str]


def _schedule(config, name, value):
  return schedules.make(
    name, value, config.num_rounds, warmup_rounds=config.warmup_rounds
  )


def _spsa(config: Config, loss_fn: jt.LossFn) -> method_lib.Method:
  return spsa.spsa(
    loss_fn,
    keys.root(config.seed),
    learning_rate=_schedule(config, config.schedule, config.learning_rate),
    mu=schedules.make(config.mu_schedule, config.mu, config.num_rounds),
    num_perturbations=config.num_perturbations,
    codec=config.codec,
    codec_scale=config.codec_scale,
    distribution=config.distribution,
    sides=config.sides,
    scaling=config.scaling,
    weight_decay=config.weight_decay,
    weights=config.weights,
    forward_dtype=config.forward_dtype,
    num_rounds=config.num_rounds,
  )


def _fed_avg(config: Config, loss_fn: jt.LossFn) -> method_lib.Method:
  assert config.learning_rate is not None  # resolve() has filled it in
  client = optax.sgd(config.learning_rate)
  if config.weight_decay:
    client = optax.chain(optax.add_decayed_weights(config.weight_decay), client)
  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer=client,
    server_optimizer=optax.sgd(
      config.server_lr, momentum=config.server_momentum or None
    ),
    local_steps=config.local_steps,
  )


_SCHEDULE = {'schedule', 'warmup_rounds'}
_SPSA = frozenset(
  _SCHEDULE
  | {'num_perturbations', 'mu', 'mu_schedule', 'codec', 'codec_scale'}
  | {'distribution', 'sides', 'scaling', 'weights', 'forward_dtype'}
)
_FED = frozenset({'local_steps', 'server_lr', 'server_momentum'})

METHODS = {
  'spsa': Entry(_spsa, {'learning_rate': 0.014}, _SPSA),
  'fed_avg': Entry(_fed_avg, {'learning_rate': 0.3}, _FED),
  'fed_sgd': Entry(
    _fed_avg,
    {'learning_rate': 0.3, 'local_steps': 1},
    _FED - {'local_steps'},
  ),
}


_LORA = ('adapter', ('lora',))
# settings that are read only where another one has some value
_NEEDS = {
  'lora_rank': _LORA,
  'lora_alpha': _LORA,
  'lora_targets': _LORA,
  'dirichlet_alpha': ('partition', ('dirichlet',)),
  'labels_per_client': ('partition', ('label',)),
  'partition_column': ('partition', ('dirichlet', 'label', 'column')),
}


def resolve(config: Config) -> Config:
  """Fills in the method's defaults; refuses settings that it does not read.

  Raises:
    UsageError: naming the method or the setting.
  """
  if config.method not in METHODS:
    raise UsageError(
      f'method must be one of {", ".join(METHODS)}; got {config.method!r}'
    )
  entry = METHODS[config.method]
  own = frozenset().union(*(e.settings for e in METHODS.values()))
  changed = {
    f.name
    for f in dataclasses.fields(config)
    if getattr(config, f.name) not in (f.default, entry.defaults.get(f.name))
  }
  if stray := sorted(changed & (own - entry.settings)):
    raise UsageError(
      f'{stray[0]} does not apply to method {config.method}; it reads'
      f' {", ".join(sorted(entry.settings))}'
    )
  kind = problem.kind_of(config)
  reads = problem.SETTINGS[kind]
  if stray := sorted(
    changed & (frozenset().union(*problem.SETTINGS.values()) - reads)
  ):
    raise UsageError(
      f'{stray[0]} does not apply to dataset {config.dataset}, which is of the'
      f' kind {kind}; it reads {", ".join(sorted(reads))}'
    )
  for name in sorted(changed & set(_NEEDS)):
    other, values = _NEEDS[name]
    if (found := getattr(config, other)) not in values:
      raise UsageError(
        f'{name} does not apply to {other} {found}; it is for'
        f' {other} {" or ".join(values)}'
      )
  unset = {
    k: v
    for k, v in entry.defaults.items()
    if getattr(config, k) is None or k in own - entry.settings
  }
  return dataclasses.replace(config, **unset)


def no_loss(params, batch):
  """In place of a loss where none is evaluated: in servers and replays."""
  raise AssertionError('a server step must not evaluate a loss')


def build_method(config: Config, loss_fn: jt.LossFn) -> method_lib.Method:
  """The method of a resolved config.

  Raises:
    UsageError: for combinations that the method refuses.
  """
  try:
    method = METHODS[config.method].build(config, loss_fn)
  except ValueError as error:
    raise UsageError(str(error)) from error
  if config.objective != 'loss' and method.backwards:
    raise UsageError(
      f'objective {config.objective} has no gradient, which method'
      f' {config.method} needs; use objective loss or a zeroth-order method'
    )
  return method


def build_population(
  config: Config, method: method_lib.Method, num_examples
) -> simulate.Population:
  """Who takes part; weights are 1 or the number of examples.

  Raises:
    UsageError: if the weights are too large for the method.
  """
  weights = None
  if config.weighting == 'examples':
    weights = tuple(int(n) for n in num_examples)
  try:
    population = simulate.Population(
      num_clients=config.num_clients,
      participation_rate=config.participation_rate,
      dropout_rate=config.dropout_rate,
      weights=weights,
      seed=config.seed,
    )
    simulate.check_weights(method, population)
  except ValueError as error:
    raise UsageError(str(error)) from error
  return population
