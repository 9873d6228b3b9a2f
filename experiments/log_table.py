"""The rounds of a log as a table, see `experiments.log`."""

import csv
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
from rich.table import Table

from experiments import build, replayer, run_log
from experiments.config import UsageError, from_mapping
from experiments.workdir import Workdir
from jaxfl import digest, metrics, wire
from jaxfl import log as log_lib


class Found(NamedTuple):
  """What a log says.

  Attributes:
    workdir: of the run.
    path: of the log.
    header: of the log.
    digest: the chain after the last round.
    torn_bytes: at the end of the file, of no whole round.
    rows: of every round; None for what is not known.
  """

  workdir: Workdir
  path: pathlib.Path
  header: log_lib.Header
  digest: str
  torn_bytes: int
  rows: list[dict[str, Any]]


def read(place: str) -> Found:
  """Reads a log, and what the run measured if that is beside it.

  Args:
    place: the run's directory, or the log.

  Raises:
    UsageError: if there is no log, or its settings are of another version.
    ValueError: if it is damaged, saying where; or the metrics are.
  """
  path = pathlib.Path(place)
  workdir = Workdir(path if path.is_dir() else path.parent)
  path = workdir.log if path.is_dir() else path
  if not path.exists():
    raise UsageError(f'{path}: no such log')
  measured: dict[int, metrics.Row] = {}
  if workdir.metrics.exists():
    every = metrics.read(workdir.metrics)
    measured = {x.round: x for x in every if x.metric == every[0].metric}
  with log_lib.RoundLog.open(path) as log:
    header = log.header
    config = from_mapping(run_log.settings_of(header))
    sizes = header.config.get('num_examples')
    method = build.build_method(config, build.no_loss, sizes)
    of_clients = method.release is None
    rows = [_row(x, of_clients, measured.get(x.round + 1)) for x in log]
    return Found(workdir, path, header, log.digest, log.torn_bytes, rows)


def _row(
  record: log_lib.Record, of_clients: bool, measured: metrics.Row | None
) -> dict[str, Any]:
  """A round; what it sent is known if the log has messages of clients."""
  sent = None
  if of_clients:
    sent = 0
    for i in range(len(record.ids)):
      one = jax.tree.map(lambda x, i=i: x[i], record.messages)
      sent += len(wire.to_bytes(one))
  row: dict[str, Any] = {
    'round': record.round + 1,
    'clients': record.ids.tolist() if of_clients else None,
    'weights': [int(x) for x in record.weights] if of_clients else None,
    'bytes_up': sent,
  }
  for name in ('bytes_up', 'bytes_down', 'metric', 'value'):
    key = f'total_{name}' if name.startswith('bytes') else name
    row[key] = None if measured is None else getattr(measured, name)
  return row


def table(found: Found, show: int) -> Table:
  """The first and the last rounds.

  Args:
    found: a log.
    show: rounds, half of them from the end; 0 for all.
  """
  rows = found.rows
  left_out = max(0, len(rows) - show) if show else 0
  head = (len(rows) - left_out + 1) // 2 if left_out else len(rows)
  result = Table(title=str(found.path))
  names = ('round', 'clients', 'bytes up', 'up in all', 'down in all', 'value')
  for name in names:
    result.add_column(name, justify='left' if name == 'clients' else 'right')
  for row in rows[:head]:
    result.add_row(*_cells(row))
  if left_out:
    result.add_row('...', f'{left_out} rounds')
  for row in rows[head + left_out :]:
    result.add_row(*_cells(row))
  return result


def _cells(row):
  number = lambda x: '' if x is None else f'{x:,}'
  who = row['clients']
  if who is None:
    who = 'a release'
  else:
    pairs = zip(who, row['weights'], strict=True)
    who = ' '.join(f'{i}' if w == 1 else f'{i}:{w}' for i, w in pairs)
  value = ''
  if row['value'] is not None:
    value = f'{row["metric"].replace("_", " ")} {row["value"]:.4f}'
  return (
    str(row['round']),
    who or 'nobody',
    number(row['bytes_up']),
    number(row['total_bytes_up']),
    number(row['total_bytes_down']),
    value,
  )


def description(found: Found) -> str:
  """What the header says, and what reading it has checked."""
  config = found.header.config
  torn = f', {found.torn_bytes} torn bytes at its end' * (found.torn_bytes > 0)
  return (
    f'method {config["method"]}, dataset {config["dataset"]}, seed'
    f' {config["seed"]}; base {found.header.base_digest[:16]}\n'
    f'{len(found.rows)} rounds, {found.path.stat().st_size:,} bytes{torn};'
    f' checksums and chain are right\nlog digest {found.digest}'
  )


def write(found: Found, out: str) -> None:
  """Writes all rounds; as JSON with header and digest.

  Raises:
    OSError: if the file can't be written.
  """
  with open(out, 'w', newline='', encoding='utf-8') as file:
    if out.endswith('.json'):
      whole = {
        'header': dataclasses.asdict(found.header),
        'digest': found.digest,
        'rounds': found.rows,
      }
      json.dump(whole, file, indent=1)
      return
    names = list(found.rows[0]) if found.rows else ['round']
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    for row in found.rows:
      writer.writerow(
        {
          k: ' '.join(map(str, x)) if isinstance(x, list) else x
          for k, x in row.items()
        }
      )


def verify(found: Found) -> str:
  """Rebuilds the weights; says what they were compared with.

  Raises:
    UsageError: if the base is missing or damaged, or the digest is not that of
      the live run.
  """
  if found.path.absolute() != found.workdir.log:
    raise UsageError(f'verify: {found.path} is not the log of a run directory')
  params, rounds, _ = replayer.rebuild(found.workdir.path)
  got = digest.digest(params)
  live = replayer.live_digest(found.workdir, rounds)
  if live is None:
    return (
      f'rebuilt digest {got}; the live run recorded none for round {rounds}'
    )
  if live != got:
    raise UsageError(f'rebuilt digest {got}, but the live run recorded {live}')
  return f'rebuilt digest {got}, equal to that of the live run'
