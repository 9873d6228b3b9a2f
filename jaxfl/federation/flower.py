"""Letters over Flower: a `Post` on its Grid, and a ClientApp.

A letter is a `ConfigRecord`, the only one of a message, of type `query`.
"""

import time
from collections.abc import Callable, Mapping

from absl import logging
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid  # pyright: ignore[reportMissingImports]

from jaxfl.federation.letters import Letter

_LETTER = 'letter'


def encode(letter: Letter) -> RecordDict:
  """A letter as the content of a message."""
  return RecordDict({_LETTER: ConfigRecord(dict(letter))})


def decode(message: Message) -> Letter | str:
  """The letter of a message, or why there is none."""
  if message.has_error():
    return f'error {message.error.code}: {message.error.reason}'
  record = message.content.get(_LETTER)
  if not isinstance(record, ConfigRecord):
    return 'an answer without a letter'
  return dict(record)


class GridPost:
  """A `Post` on a Grid."""

  def __init__(self, grid: Grid):
    self._grid = grid
    self._asked: dict[str, tuple[int, float]] = {}  # node and end by message

  def nodes(self) -> set[int]:
    return set(self._grid.get_node_ids())

  def send(self, letters: Mapping[int, Letter], ttl_s: float) -> None:
    messages = [
      Message(
        content=encode(letter),
        dst_node_id=node,
        message_type=MessageType.QUERY,
        ttl=ttl_s,
        group_id=str(letter['open']),
      )
      for node, letter in letters.items()
    ]
    end = time.monotonic() + ttl_s
    ids = self._grid.push_messages(messages)
    for node, name in zip(letters, ids, strict=True):
      if name is None:  # asked again when the time for an answer is over
        logging.warning('node %d could not be asked', node)
      else:
        self._asked[name] = node, end

  def receive(self) -> list[tuple[int, Letter | str]]:
    if not self._asked:
      return []
    answers = []
    for message in self._grid.pull_messages(list(self._asked)):
      asked = self._asked.pop(message.metadata.reply_to_message_id, None)
      if asked is not None:
        answers.append((asked[0], decode(message)))
    now = time.monotonic()
    self._asked = {k: v for k, v in self._asked.items() if now < v[1]}
    return answers


def client_app(answer: Callable[[Letter, Context], Letter]) -> ClientApp:
  """A ClientApp that answers questions.

  Args:
    answer: question and context of the node -> answer. What it raises is told
      to the server, which asks again later.
  """
  app = ClientApp()

  @app.query()
  def query(message: Message, context: Context) -> Message:
    question = decode(message)
    if isinstance(question, str):
      raise ValueError(question)
    return Message(encode(answer(question, context)), reply_to=message)

  return app
