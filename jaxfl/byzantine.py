"""What clients that lie send in place of their honest message.

    sign_flip   minus what it should be
    max_byte    the largest values that the code has, of the opposite sign
    constant    the same value everywhere, in every round
    replay      its first message, again and again
    small_bias  a small shift, which all liars share, of every value

The last is a form of "A little is enough" (Baruch, Baruch, Goldberg, NeurIPS
2019, arXiv:1902.06156): each message alone looks honest.

An attack changes decoded values and encodes them again, so that it works with
every codec of `jaxfl.codecs`; what a code holds decides how large a lie can be.
Messages without a code are float tensors, whose largest value is `LARGEST`.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from jaxfl import checks, codecs
from jaxfl import typing as jt

ATTACKS = ('sign_flip', 'max_byte', 'constant', 'replay', 'small_bias')
LARGEST = np.float32(2.0**100)  # of floats and of bfloat16
_CONSTANT, _BIAS = np.float32(1.0), np.float32(0.5)  # the latter of the rms

# round, ids int32[C], messages [C, ...] -> messages
Tamper = Callable[[int, np.ndarray, jt.Message], jt.Message]


def lie(attack: str, values: np.ndarray, round: int) -> np.ndarray:
  """The values in place of honest ones; `replay` is of whole messages.

  Args:
    attack: one of `ATTACKS`, but `replay`.
    values: float32[K], honest.
    round: liars of one round agree on the signs of their bias.
  """
  if attack == 'sign_flip':
    return -values
  if attack == 'max_byte':
    return np.where(values < 0, LARGEST, -LARGEST)
  if attack == 'constant':
    return np.full_like(values, _CONSTANT)
  both = np.array([-1, 1], np.float32)
  signs = np.random.default_rng(round).choice(both, values.shape)
  return values + _BIAS * np.sqrt(np.mean(np.square(values))) * signs


@functools.cache
def _both(codec: codecs.Codec, num_values: int):
  """Programs that decode and encode stacked messages."""
  decode = jax.jit(jax.vmap(lambda code: codec.decode(code, num_values)))
  return decode, jax.jit(jax.vmap(codec.encode))


def tamper(
  attack: str,
  liars: Collection[int],
  *,
  codec: codecs.Codec | None = None,
  num_values: int = 0,
  honest_rounds: int = 0,
) -> Tamper:
  """Replaces the messages of liars; for `simulate`.

  Args:
    attack: one of `ATTACKS`.
    liars: their ids.
    codec: of the messages: an array, or the entry `projected_grads` or
      `coordinates` of a dict. Without one, all tensors are values.
    num_values: values in a code.
    honest_rounds: rounds before the first lie.

  Raises:
    ValueError: for an unknown attack.
  """
  checks.one_of('attack', attack, ATTACKS)
  first: dict[int, Any] = {}  # the messages that are sent again
  decode, encode = (None, None) if codec is None else _both(codec, num_values)

  def values_of(messages):
    """Where messages have their code, if they are dicts."""
    names = ('projected_grads', 'coordinates')
    if isinstance(messages, dict):
      return next(name for name in names if name in messages)
    return None

  def change(round, ids, messages):
    (liars_at,) = np.nonzero(np.isin(ids, list(liars)))
    if round < honest_rounds or not liars_at.size:
      return messages
    mine = jax.tree.map(lambda x: x[liars_at], messages)
    if attack == 'replay':
      for i, client in zip(liars_at, ids[liars_at].tolist(), strict=True):
        own = jax.tree.map(lambda x, i=i: x[i], messages)
        first.setdefault(client, own)
      old = [first[client] for client in ids[liars_at].tolist()]
      sent = jax.tree.map(lambda *xs: np.stack(xs), *old)
    elif decode is None or encode is None:
      sent = jax.tree.map(
        lambda x: np.stack(
          [lie(attack, row.astype(np.float32), round) for row in x]
        ).astype(x.dtype),
        mine,
      )
    else:
      name = values_of(mine)
      values = np.asarray(decode(mine if name is None else mine[name]))
      values = [lie(attack, row, round).astype(np.float32) for row in values]
      # of stochastic codecs
      words = [(client, round) for client in ids[liars_at].tolist()]
      code = np.asarray(encode(np.stack(values), np.array(words, np.uint32)))
      sent = code if name is None else mine | {name: code}

    def put(honest, lies):
      honest = np.array(honest)
      honest[liars_at] = lies
      return honest

    return jax.tree.map(put, messages, sent)

  return change
