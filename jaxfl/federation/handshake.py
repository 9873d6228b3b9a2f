"""What a client and a run must have in common, compared item by item.

A passport is a dict of short texts. A client compares its own with the header
of the log before it does anything, and says in words what differs; then it
sends it, and the coordinator, which trusts nobody, compares again.
"""

import hashlib
import json
from typing import Any

import jax
import numpy as np

from jaxfl import digest, keys, log, perturb

Passport = dict[str, str]

BYE = b'{}'  # in place of a passport, of a client that leaves
_MAX_BYTES = 4096
_HEX = 16  # digits of a hash


def draws(distribution: str) -> str:
  """A fingerprint of what this device draws: 16 hex digits.

  Directions of a few tensors along one key; a device whose draws differ in one
  bit has another one.
  """
  if distribution == 'walsh':
    distribution = 'rademacher'  # its pools are made of the same words
  key = keys.fold(keys.root(20231), 1)
  shapes = {'a/w': (130, 67), 'b': (5,), 'c/layers': (2, 64, 3)}
  drawn = {
    path: perturb.field(key, path, shape, distribution=distribution)
    for path, shape in shapes.items()
  }
  return digest.digest(jax.tree.map(np.asarray, drawn))[:_HEX]


def _short(value: Any) -> str:
  text = json.dumps(value, sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()[:_HEX]


def passport(header: log.Header, shared: dict[str, Any]) -> Passport:
  """The passport of a run.

  Args:
    header: of its log.
    shared: the settings that all sites must have in common.
  """
  return {
    'spec': header.spec,
    'draws': draws(str(shared.get('distribution', 'rademacher'))),
    'base_digest': header.base_digest[:_HEX],
    'params': _short(header.params),
    'message': _short(header.message),
    'config': _short(shared),
  }


def encode(own: Passport) -> bytes:
  """As it is sent."""
  return json.dumps(own, sort_keys=True, separators=(',', ':')).encode()


def compare(data: bytes, expected: Passport) -> str | None:
  """Why a passport is refused; None if it is the expected one."""
  if len(data) > _MAX_BYTES:
    return f'a handshake of {len(data)} bytes'
  try:
    found = json.loads(data)
  except (ValueError, RecursionError):
    return 'the handshake is no JSON'
  if not isinstance(found, dict) or found.keys() != expected.keys():
    return f'the handshake must have the fields {", ".join(expected)}'
  for name, value in expected.items():
    if found[name] != value:
      return f'{name} differs: the run has {value}, the client {found[name]!r}'
  return None


def difference(
  run: log.Header, own: log.Header, shared: frozenset[str]
) -> str | None:
  """What differs between a run and what a client would do, in words.

  Args:
    run: header of the run's log.
    own: the header of the client's settings, base and model.
    shared: names of settings that must be equal.
  """
  for name in sorted(shared):
    there, here = run.config.get(name), own.config.get(name)
    if json.dumps(there) != json.dumps(here):
      return f'{name} is {there!r} in the run and {here!r} here'
  if run.spec != own.spec:
    return f'the seed contract is {run.spec!r} in the run, {own.spec!r} here'
  for what, there, here in (
    ('parameter', run.params, own.params),
    ('part of a message', run.message, own.message),
  ):
    if (text := _first_difference(there, here)) is not None:
      return f'{what} {text}'
  if run.base_digest != own.base_digest:
    return (
      f'the base weights have the digest {own.base_digest[:_HEX]} here and'
      f' {run.base_digest[:_HEX]} in the run: another model, or another seed'
    )
  return None


def _first_difference(there, here):
  run = {path: [dtype, list(shape)] for path, dtype, shape in there}
  own = {path: [dtype, list(shape)] for path, dtype, shape in here}
  text = lambda leaf: f'{leaf[0]}{leaf[1]}' if leaf else 'missing'
  for path in sorted(run.keys() | own.keys()):
    if run.get(path) != own.get(path):
      return (
        f'{path!r} is {text(run.get(path))} in the run and'
        f' {text(own.get(path))} here'
      )
  return None
