"""What a run is called on the server: streams, subjects, buckets.

    RUN_up     RUN.hello.ID, RUN.up.ID, RUN.digest.ID: what clients send;
               RUN.trust: what a keeper's probes say of them
    RUN_log    RUN.log: the header of the log and its records, nothing else;
               RUN.note: what the coordinator has to say beside them
    RUN_lease  key-value bucket: who is the coordinator
    RUN_snap   object store: snapshots

ID is a client's number, RUN the name of the run.
"""

import dataclasses
import re

_RUN = re.compile(r'[A-Za-z0-9_-]{1,32}')


@dataclasses.dataclass(frozen=True)
class Names:
  """The names of a run.

  Attributes:
    run: letters, digits, `_` and `-`, 1 to 32.

  Raises:
    ValueError: if `run` is no such name.
  """

  run: str

  def __post_init__(self):
    if not _RUN.fullmatch(self.run):
      raise ValueError(
        'run must be 1 to 32 letters, digits, _ or -, as it is part of the'
        f' names of subjects; got {self.run!r}'
      )

  @property
  def up_stream(self) -> str:
    return f'{self.run}_up'

  @property
  def log_stream(self) -> str:
    return f'{self.run}_log'

  @property
  def log(self) -> str:
    return f'{self.run}.log'

  @property
  def note(self) -> str:
    return f'{self.run}.note'

  @property
  def trust(self) -> str:
    return f'{self.run}.trust'

  @property
  def lease(self) -> str:
    return f'{self.run}_lease'

  @property
  def snapshots(self) -> str:
    return f'{self.run}_snap'

  def sent(self, kind: str, client: int | str) -> str:
    """The subject of a kind of message of a client; '*' for all."""
    return f'{self.run}.{kind}.{client}'

  def sender(self, subject: str) -> tuple[str, int] | None:
    """Kind and client of a subject of `sent`; None if it is none."""
    run, _, rest = subject.partition('.')
    kind, _, client = rest.partition('.')
    if run != self.run or kind not in KINDS or not client.isdecimal():
      return None
    number = int(client)
    return (kind, number) if str(number) == client else None


KINDS = ('hello', 'up', 'digest')
