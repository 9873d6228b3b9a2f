"""Questions and answers between a server and clients that can't speak first.

They are replicas all the same: the server sends every one the records that it
lacks, and gets the message for the open round. What carries the letters is a
`Post`. A letter is a dict. A question has

    run       bytes, the first 8 of the chain after the log's header
    open      the open round; `num_rounds` when all are closed
    since     the round of the first record
    records   of these rounds: each the first 8 bytes of the chain after it,
              and the bytes that it has in the log
    header    bytes of the log's header, for who was not met before
    rebuild   true, for a replica that differs: to begin anew from base and log

and an answer

    client    its id
    rounds    that it has applied; -1 if it lacks the header
    digest    the first 8 bytes of the digest of its state after them
    message   of the open round, varint of the round and a frame, if it has all
              rounds before it
    loss      of that message
    params    the digest of the trained weights, 32 bytes, after the last round
    passport  of `handshake`, if the question had a header

or, in place of all but the first, `refused`, a text: why it does not take part.
"""

from collections.abc import Mapping
from typing import Any, Protocol

CHAIN_BYTES = 8
Letter = dict[str, Any]  # of int, float, bool, str, bytes and list[bytes]
_NONE: Any = object()


def field(letter: Letter, name: str, kind: type, default: Any = _NONE) -> Any:
  """A field of a letter; ValueError if it is missing or of another type."""
  value = letter.get(name, default)
  if value is _NONE:
    raise ValueError(f'{name} is missing')
  if value is default:
    return value
  if type(value) is not kind:
    raise ValueError(
      f'{name} must be {kind.__name__}, got {type(value).__name__}'
    )
  return value


class Post(Protocol):
  """Carries letters between the server and nodes."""

  def nodes(self) -> set[int]:
    """Those that can be asked now."""
    ...

  def send(self, letters: Mapping[int, Letter], ttl_s: float) -> None:
    """Asks nodes; an answer that takes longer than `ttl_s` is lost."""
    ...

  def receive(self) -> list[tuple[int, Letter | str]]:
    """Answers that have come, by node; a text says why there is none."""
    ...
