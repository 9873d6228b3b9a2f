"""A method's own defaults, and settings that nothing would read."""

import dataclasses

from experiments import build, problem
from experiments.config import Config, UsageError

# read by methods of scalars if they have a budget, and what they then don't
_PRIVATE_SCALARS = frozenset(
  {'delta_dp', 'clip_norm', 'microbatch_size', 'research_float_noise'}
)
_NOT_PRIVATE = frozenset({'sides', 'codec_scale', 'forwards_at_once'})

_LORA = ('adapter', ('lora',))
_KRUM = ('aggregator', ('krum', 'multi_krum'))
# settings that are read only where another one has some value
_NEEDS = {
  'lora_rank': _LORA,
  'lora_alpha': _LORA,
  'lora_targets': _LORA,
  'dirichlet_alpha': ('partition', ('dirichlet',)),
  'labels_per_client': ('partition', ('label',)),
  'trim_fraction': ('aggregator', ('trimmed_mean',)),
  'num_byzantine': _KRUM,
  'clip_value': ('aggregator', ('mean', 'sign_vote')),
  'partition_column': ('partition', ('dirichlet', 'label', 'column')),
}


def _entry(config: Config) -> build.Entry:
  """The method's entry, as the config's privacy asks."""
  entry = build.METHODS[config.method]
  if entry.if_private is not None:
    reads = entry.settings | {'epsilon_dp'}
    if config.epsilon_dp is not None:
      reads = (reads | _PRIVATE_SCALARS) - _NOT_PRIVATE
      entry = dataclasses.replace(
        entry, defaults=entry.defaults | entry.if_private
      )
    entry = dataclasses.replace(entry, settings=reads)
  return entry


def settings_read(config: Config) -> frozenset[str]:
  """Names of the settings that a config's method reads."""
  return _entry(config).settings


def resolve(config: Config) -> Config:
  """Fills in the method's defaults; refuses settings that it does not read.

  Raises:
    UsageError: naming the method or the setting.
  """
  if config.method not in build.METHODS:
    raise UsageError(
      f'method must be one of {", ".join(build.METHODS)}; got {config.method!r}'
    )
  entry = _entry(config)
  own = frozenset().union(*(e.settings for e in build.METHODS.values()))
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
