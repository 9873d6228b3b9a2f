"""From settings to methods: one entry each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from experiments import plans, problem
from experiments.config import Config, UsageError
from experiments.plans import NumExamples
from jaxfl import aggregate, keys, private_scalars, schedules
from jaxfl import method as method_lib
from jaxfl import typing as jt
from jaxfl.methods import (
  decomfl,
  diff2,
  dp_sgd,
  dp_sketch,
  fed_avg,
  fedkseed,
  ferret,
  spsa,
)
from jaxfl.runtime import simulate


@dataclasses.dataclass(frozen=True)
class Entry:
  """How a method is built, its own defaults, and the settings it reads."""

  build: Callable[..., method_lib.Method]  # config, loss_fn, num_examples
  defaults: dict[str, Any]
  settings: frozenset[str]
  if_private: dict[str, Any] | None = None  # defaults if epsilon_dp is given


def _filled(value: Any) -> Any:
  """A setting that `resolve` has filled in."""
  assert value is not None
  return value


def _schedule(config, name, value):
  return schedules.make(
    name, value, config.num_rounds, warmup_rounds=config.warmup_rounds
  )


def _zeroth_order(config: Config) -> dict[str, Any]:
  """The arguments that the zeroth-order methods share."""
  return {
    'learning_rate': _schedule(
      config, config.schedule, _filled(config.learning_rate)
    ),
    'mu': schedules.make(config.mu_schedule, config.mu, config.num_rounds),
    'codec': _filled(config.codec),
    'codec_scale': config.codec_scale,
    'distribution': config.distribution,
    'forward_dtype': config.forward_dtype,
    'in_layers': _form(config),
    'forwards_at_once': config.forwards_at_once,
    'num_rounds': config.num_rounds,
    'aggregator': _aggregator(config),
  }


def _aggregator(config: Config) -> aggregate.Aggregator:
  """How the values of clients are merged.

  Raises:
    ValueError: if a round can't have enough clients for it.
  """
  present = round(config.participation_rate * config.num_clients)
  least = 2 * config.num_byzantine + 3
  if 'krum' in config.aggregator and present < least:
    raise ValueError(
      f'num_byzantine {config.num_byzantine} needs {least} clients in a round'
      f' for aggregator {config.aggregator}; there are {present}'
    )
  return aggregate.Aggregator(
    name=config.aggregator,
    trim_fraction=config.trim_fraction,
    num_byzantine=config.num_byzantine,
    clip_value=config.clip_value,
  )


def _form(config: Config) -> str | None:
  """How the loss perturbs the weights; None for losses that can't.

  A layer at a time by default: as fast as a whole copy, with the same bits and
  less memory. But a copy for generations, which would make every layer anew for
  every token.
  """
  ours = problem.kind_of(config) in ('text', 'rows')
  if config.in_layers == 'auto':
    return 'temporary' if ours and config.objective != 'f1' else None
  if config.in_layers == 'none':
    return None
  if not ours:
    raise UsageError(
      f'in_layers {config.in_layers} is for transformers, and dataset'
      f' {config.dataset} has another model; use in_layers none'
    )
  return config.in_layers


def _spsa(
  config: Config, loss_fn: jt.LossFn, num_examples: NumExamples
) -> method_lib.Method:
  return spsa.spsa(
    loss_fn,
    keys.root(config.seed),
    num_perturbations=_filled(config.num_perturbations),
    sides=config.sides,
    scaling=config.scaling,
    weight_decay=config.weight_decay,
    weights=config.weights,
    privacy=_scalars(config, num_examples),
    **_zeroth_order(config),
  )


def _fedkseed(
  config: Config, loss_fn: jt.LossFn, num_examples: NumExamples
) -> method_lib.Method:
  return fedkseed.fedkseed(
    loss_fn,
    keys.root(config.seed),
    num_seeds=config.num_seeds,
    local_steps=_filled(config.local_steps),
    send_indices=config.send_indices,
    pro=config.method == 'fedkseed_pro',
    importance_weight=config.importance_weight,
    weight_decay=config.weight_decay,
    privacy=_scalars(config, num_examples),
    **_zeroth_order(config),
  )


def _decomfl(
  config: Config, loss_fn: jt.LossFn, num_examples: NumExamples
) -> method_lib.Method:
  del num_examples  # Unused.
  return decomfl.decomfl(
    loss_fn,
    keys.root(config.seed),
    local_steps=_filled(config.local_steps),
    num_perturbations=_filled(config.num_perturbations),
    sides=config.sides,
    weights=config.weights,
    **_zeroth_order(config),
  )


def _client_optimizer(config: Config) -> optax.GradientTransformation:
  learning_rate = _filled(config.learning_rate)
  if config.client_optimizer == 'adamw':
    return optax.adamw(learning_rate, weight_decay=config.weight_decay)
  sgd = optax.sgd(learning_rate)
  if not config.weight_decay:
    return sgd
  return optax.chain(optax.add_decayed_weights(config.weight_decay), sgd)


def _server_optimizer(
  config: Config, server_lr: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
  if config.server_optimizer == 'adam':
    if config.server_momentum:
      raise UsageError(
        'server_momentum does not apply to server_optimizer adam'
      )
    return optax.adam(server_lr)
  return optax.sgd(server_lr, momentum=config.server_momentum or None)


def _fed_avg(
  config: Config, loss_fn: jt.LossFn, num_examples: NumExamples
) -> method_lib.Method:
  del num_examples  # Unused.
  return fed_avg.fed_avg(
    loss_fn,
    client_optimizer=_client_optimizer(config),
    server_optimizer=_server_optimizer(config, _filled(config.server_lr)),
    local_steps=_filled(config.local_steps),
    aggregator=_aggregator(config),
  )


def _ferret(
  config: Config, loss_fn: jt.LossFn, num_examples: NumExamples
) -> method_lib.Method:
  del num_examples  # Unused.
  server_lr = _schedule(config, config.schedule, _filled(config.server_lr))
  if config.server_optimizer == 'sgd' and not config.server_momentum:
    server: dict[str, Any] = {'server_lr': server_lr}  # exact
  else:
    table = schedules.table(server_lr, config.num_rounds, 'server_lr')
    at = lambda step: schedules.at(table, jnp.asarray(step))
    server = {'server_optimizer': _server_optimizer(config, at)}
  return ferret.ferret(
    loss_fn,
    keys.root(config.seed),
    client_optimizer=_client_optimizer(config),
    local_steps=_filled(config.local_steps),
    coordinates=config.coordinates,
    allocation=config.allocation,
    codec=_filled(config.codec),
    distribution=config.distribution,
    max_block_size=config.max_block_size,
    num_rounds=config.num_rounds,
    aggregator=_aggregator(config),
    **server,
  )


def _scalars(
  config: Config, num_examples: NumExamples
) -> private_scalars.Settings | None:
  """How clients hide their examples; None if they do not."""
  if config.epsilon_dp is None:
    return None
  return private_scalars.Settings(
    plans.scalars(config, num_examples),
    clip_norm=config.clip_norm,
    num_examples=num_examples,
    microbatch_size=config.microbatch_size,
    research_float_noise=config.research_float_noise,
  )


def _dp_sketch(
  config: Config, loss_fn: jt.LossFn, num_examples: NumExamples
) -> method_lib.Method:
  rate, own = _filled(config.learning_rate), {}
  if config.privacy_unit == 'client':
    rate = config.server_lr or 1.0
    own = {
      'client_optimizer': _client_optimizer(config),
      'local_steps': config.local_steps or 1,
      'batch_size': config.batch_size,
    }
  else:
    for name in (
      'server_lr',
      'local_steps',
      'client_optimizer',
      'weight_decay',
    ):
      if getattr(config, name) != getattr(Config, name):
        raise ValueError(
          f'{name} is for privacy_unit client; a record has learning_rate alone'
        )
  return dp_sketch.dp_sketch(
    loss_fn,
    keys.root(config.seed),
    plan=plans.sketch(config, num_examples),
    learning_rate=_schedule(config, config.schedule, rate),
    clip_norm=config.clip_norm,
    num_examples=num_examples,
    unit=config.privacy_unit,
    distribution=config.distribution,
    microbatch_size=config.microbatch_size,
    **own,
  )


def _dp_sgd(
  config: Config, loss_fn: jt.LossFn, num_examples: NumExamples
) -> method_lib.Method:
  return dp_sgd.dp_sgd(
    loss_fn,
    plan=plans.dp_sgd(config, num_examples),
    learning_rate=_schedule(
      config, config.schedule, _filled(config.learning_rate)
    ),
    clip_norm=config.clip_norm,
    num_examples=num_examples,
    microbatch_size=config.microbatch_size,
    research_float_noise=config.research_float_noise,
  )


def _diff2(
  config: Config, loss_fn: jt.LossFn, num_examples: NumExamples
) -> method_lib.Method:
  return diff2.diff2(
    loss_fn,
    plan=plans.diff2(config, num_examples),
    learning_rate=_schedule(
      config, config.schedule, _filled(config.learning_rate)
    ),
    clip_norm=config.clip_norm,
    clip_norm_diff=config.clip_norm_diff,
    num_examples=num_examples,
    unit=config.privacy_unit,
    microbatch_size=config.microbatch_size,
    allow_unstable=config.allow_unstable,
    research_float_noise=config.research_float_noise,
  )


_AGGREGATOR = frozenset(
  {'aggregator', 'trim_fraction', 'num_byzantine', 'clip_value'}
)
_ZEROTH_ORDER = _AGGREGATOR | frozenset(
  {'schedule', 'warmup_rounds', 'mu', 'mu_schedule', 'codec', 'codec_scale'}
  | {'distribution', 'forward_dtype', 'in_layers', 'forwards_at_once'}
)
_SPSA = _ZEROTH_ORDER | {
  'num_perturbations', 'sides', 'scaling', 'weights', 'weight_decay'
}  # fmt: skip
_FEDKSEED = _ZEROTH_ORDER | {
  'num_seeds', 'local_steps', 'send_indices', 'weight_decay'
}  # fmt: skip
_DECOMFL = _ZEROTH_ORDER | {
  'num_perturbations', 'local_steps', 'sides', 'weights'
}  # fmt: skip
_FED = _AGGREGATOR | frozenset(
  {'local_steps', 'server_lr', 'server_momentum', 'weight_decay'}
  | {'client_optimizer', 'server_optimizer'}
)
_FERRET = _FED | {
  'schedule', 'warmup_rounds', 'coordinates', 'allocation', 'codec',
  'distribution', 'max_block_size',
}  # fmt: skip
_DP_GD = frozenset(
  {'schedule', 'warmup_rounds', 'epsilon_dp', 'delta_dp', 'privacy_unit'}
  | {'clip_norm', 'microbatch_size', 'research_float_noise'}
)
_DIFF2 = _DP_GD | {
  'clip_norm_diff', 'restart_interval', 'budget_share', 'allow_unstable',
  'local_steps', 'sampling_rate', 'local_share',
}  # fmt: skip
_DP_SGD = (_DP_GD - {'privacy_unit'}) | {'sampling_rate'}
_DP_SKETCH = (_DP_GD - {'research_float_noise'}) | {
  'coordinates', 'distribution', 'local_steps', 'server_lr',
  'client_optimizer', 'weight_decay',
}  # fmt: skip
METHODS = {
  'spsa': Entry(
    _spsa,
    {'learning_rate': 0.014, 'num_perturbations': 16, 'codec': 'log8'},
    _SPSA,
    {'codec': 'linear8'},
  ),
  'fedkseed': Entry(
    _fedkseed,
    {'learning_rate': 9e-4, 'local_steps': 16, 'codec': 'log8'},
    _FEDKSEED,
    {'codec': 'linear8'},
  ),
  'fedkseed_pro': Entry(
    _fedkseed,
    {'learning_rate': 9e-4, 'local_steps': 16, 'codec': 'log8'},
    _FEDKSEED | {'importance_weight'},
    {'codec': 'linear8'},
  ),
  'decomfl': Entry(
    _decomfl,
    {
      'learning_rate': 8e-3, 'local_steps': 1, 'num_perturbations': 16,
      'codec': 'log8',
    },
    _DECOMFL,
  ),
  'ferret': Entry(
    _ferret,
    {
      'learning_rate': 0.3, 'local_steps': 8, 'server_lr': 0.1,
      'codec': 'sign1',
    },
    _FERRET,
  ),
  'fed_avg': Entry(
    _fed_avg, {'learning_rate': 0.3, 'local_steps': 8, 'server_lr': 1.0}, _FED
  ),
  'fed_sgd': Entry(
    _fed_avg,
    {'learning_rate': 0.3, 'local_steps': 1, 'server_lr': 1.0},
    _FED - {'local_steps'},
  ),
  'dp_gd': Entry(_diff2, {'learning_rate': 0.3}, _DP_GD),
  'dp_sgd': Entry(_dp_sgd, {'learning_rate': 0.3}, _DP_SGD),
  'diff2': Entry(_diff2, {'learning_rate': 0.3}, _DIFF2),
  'dp_sketch': Entry(_dp_sketch, {'learning_rate': 0.3}, _DP_SKETCH),
}  # fmt: skip


def no_loss(params, batch):
  """In place of a loss where none is evaluated: in servers and replays."""
  raise AssertionError('a server step must not evaluate a loss')


def build_method(
  config: Config,
  loss_fn: jt.LossFn,
  num_examples: NumExamples = None,
) -> method_lib.Method:
  """The method of a resolved config.

  Args:
    config: of the run.
    loss_fn: params, batch -> float[].
    num_examples: of the clients; a private method without them can follow
      the log, but can't make any of it.

  Raises:
    UsageError: for combinations that the method refuses.
  """
  try:
    method = METHODS[config.method].build(config, loss_fn, num_examples)
  except (ImportError, ValueError) as error:
    raise UsageError(str(error)) from error
  if config.objective != 'loss' and method.backwards:
    raise UsageError(
      f'objective {config.objective} has no gradient, which method'
      f' {config.method} needs; use objective loss or a zeroth-order method'
    )
  return method


def check_params(method: method_lib.Method, params: jt.Params) -> None:
  """Raises UsageError if the method can't train these parameters."""
  try:
    method.message(params)
  except ValueError as error:
    raise UsageError(str(error)) from error


def build_population(
  config: Config, method: method_lib.Method, num_examples
) -> simulate.Population:
  """Who takes part; weights are 1 or the number of examples.

  Raises:
    UsageError: if the weights are too large for the method, or it needs all
      clients in every round and does not have them.
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
    simulate.check_population(method, population)
  except ValueError as error:
    raise UsageError(str(error)) from error
  return population
