"""What a client brings to a run, over whatever network."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxfl import log
from jaxfl import method as method_lib
from jaxfl import typing as jt
from jaxfl.federation import verdict
from jaxfl.federation.names import Names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
  """What a process brings to a run.

  Attributes:
    names: of the run.
    client: its id; None for a keeper, which sends no messages.
    header: of the log as this site's settings, base and model make it.
    shared: names of the settings that must be those of the run.
    method: of the run.
    run_client: state, local, batches, party -> message, local, metrics;
      compiled.
    batch_fn: round -> batches; deterministic.
    num_rounds: of the run.
    pipeline: rounds that a message may be ahead of the log.
    digest_every: rounds between two comparisons of digests.
    judge: of a keeper that probes what clients claim; None for no probes.
    tamper: round, message -> what is sent in its place; of liars, in tests.
  """

  names: Names
  client: int | None
  header: log.Header
  shared: frozenset[str]
  method: method_lib.Method
  run_client: Callable[..., Any]
  batch_fn: Callable[[int], jt.Batch]
  num_rounds: int
  pipeline: int
  digest_every: int
  judge: verdict.Judge | None = None
  tamper: Callable[[int, jt.Message], jt.Message] | None = None
