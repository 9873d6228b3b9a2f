"""The client's side of `letters`: a replica that answers, and then ends.

Every question may reach a process of its own. What lasts is in the directory:
the header of the run's log, `rounds.log`, and a snapshot.
"""

import os
import pathlib

import jax
import numpy as np

from jaxfl import digest, wire
from jaxfl.federation import handshake, records
from jaxfl.federation.letters import CHAIN_BYTES, Letter, field
from jaxfl.federation.replica import Replica, as_party
from jaxfl.federation.site import Site

_HEADER = 'header'


class Refused(ValueError):
  """Why this site does not take part."""


def refusal(client: int, text: str) -> Letter:
  """The answer of a site that does not take part."""
  return {'client': client, 'refused': text}


def missing_header(client: int) -> Letter:
  """The answer of a site that has nothing of the run yet."""
  return {'client': client, 'rounds': -1}


def header_block(directory: pathlib.Path, question: Letter) -> bytes | None:
  """The header of the run, from the question or else from the directory.

  Args:
    directory: of this run at this site; the header is kept there.
    question: of the server.

  Returns:
    Its bytes; None if the server has to send it.

  Raises:
    Refused: if the directory has another run, or the question is wrong.
    OSError: if the directory can't be written.
  """
  path = directory / _HEADER
  kept = path.read_bytes() if path.exists() else None
  block = field(question, 'header', bytes, kept)
  if block is None:
    return None
  try:
    run = bytes.fromhex(records.Tail(block).chain)[:CHAIN_BYTES]
  except ValueError as error:
    raise Refused(f'the header of the run is none: {error}') from error
  if run != field(question, 'run', bytes) or kept not in (None, block):
    raise Refused(
      f'{directory} holds another run: move it away, or give the run another'
      ' name'
    )
  if kept is None:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{_HEADER}.{os.getpid()}')
    temporary.write_bytes(block)
    os.replace(temporary, path)
  return block


def check(site: Site, block: bytes) -> None:
  """Raises Refused if the site does not fit the run; says in what."""
  header = records.read_header(block)
  text = handshake.difference(header, site.header, site.shared)
  if text is not None:
    raise Refused(text)


def answer(site: Site, replica: Replica, question: Letter) -> Letter:
  """Applies the records of a question, and computes the message.

  Args:
    site: what this client brings; `check` has accepted it.
    replica: of the run, from its directory.
    question: of the server.

  Returns:
    The answer.

  Raises:
    Refused: if the server has another log than the replica.
    ValueError: if the question is wrong, or the method has state of its own.
    FloatingPointError: if a weight has left its range.
  """
  _receive(replica, question)
  if field(question, 'rebuild', bool, False):
    replica.forget()
  else:
    replica.restore()
  restored = replica.round
  while replica.round < replica.log.num_rounds:
    replica.step()
  if replica.round > restored:
    replica.save()
  assert site.client is not None
  reply: Letter = {
    'client': site.client,
    'rounds': replica.round,
    'digest': bytes.fromhex(replica.digest())[:CHAIN_BYTES],
  }
  if 'header' in question:
    header = replica.log.header
    shared = {name: header.config.get(name) for name in site.shared}
    own = handshake.passport(site.header, shared)
    reply['passport'] = handshake.encode(own)
  if replica.round == site.num_rounds:
    reply['params'] = bytes.fromhex(digest.digest(replica.state.params))
  elif replica.round == field(question, 'open', int):
    reply |= _message(site, replica)
  return reply


def _receive(replica, question):
  """Adds the records that are new to the log, on disk."""
  since = field(question, 'since', int)
  live = replica.log
  for round, entry in enumerate(field(question, 'records', list), since):
    chain, record = entry[:CHAIN_BYTES].hex(), entry[CHAIN_BYTES:]
    if round < live.num_rounds:
      if live.digest_at(round + 1)[: len(chain)] != chain:
        raise Refused(
          f'the server has another record of round {round} than {live.path}:'
          ' it has lost rounds; move the directory away to follow it'
        )
      continue
    headers = {records.ROUND: str(round), records.CHAIN: chain}
    if round > live.num_rounds:
      return  # it is told how many there are, and begins there
    if not replica.receive(record, headers):
      raise ValueError(f'the record of round {round} is none')


def _message(site, replica):
  """The message for the open round, and its loss."""
  local = site.method.init_local(replica.state.params)
  if jax.tree.leaves(local):
    raise ValueError('a method with private state of clients is not run here')
  round = replica.round
  party = as_party(site.client, round)
  message, _, metrics = site.run_client(
    replica.state, local, site.batch_fn(round), party
  )
  message, loss = jax.device_get((message, metrics['loss']))
  if site.tamper is not None:
    message = site.tamper(round, message)
  frame = wire.varint(round) + wire.to_bytes(message)
  return {'message': frame, 'loss': float(np.asarray(loss))}
