"""A keeper's probes: what it tells, what the coordinator makes of it."""

import asyncio

import jax
import numpy as np
import pytest

from jaxfl import byzantine, codecs, digest, keys, log, probe
from jaxfl.federation import book, stream, verdict
from jaxfl.federation.server import LocalServer
from jaxfl.runtime import replay
from tests import methods_table as table
from tests.federation.harness import Toy, needs_server, programs, run

pytestmark = pytest.mark.fast_compile

CLIENTS, LIAR, ROUNDS = 4, 2, 60


def test_a_verdict_and_its_bytes():
  said = verdict.Verdict(300, 0.5, bytes([0, 8, 3]))
  data = verdict.encode(said)
  assert len(data) == 2 + 4 + 3
  assert verdict.decode(data, 3) == said
  for bad in (
    b'',
    data[:-1],
    data + b'\0',
    data[:-1] + b'\x09',
    verdict.encode(said._replace(limit=float('nan'))),
    verdict.encode(said._replace(limit=0.0)),
  ):
    with pytest.raises(ValueError):
      verdict.decode(bad, 3)


def trust():
  """Probes of the toy method, half as many as there are messages."""
  method, _ = programs('spsa')
  examples = table.batch_fn(method.num_batches)
  return probe.Trust(
    method,
    lambda round: jax.tree.map(lambda x: x[0], examples(round, 99)),
    keys.root(5),
    num_messages=CLIENTS * ROUNDS,
    num_clients=CLIENTS,
    share=0.5,
  )


def record_of(round):
  """A round in which everybody claims what it should not."""
  method, _ = programs('spsa')
  like = method.message(table.params())
  zeros = np.zeros((CLIENTS, *like.shape), like.dtype)
  ids, ones = np.arange(CLIENTS, dtype=np.int32), np.ones(CLIENTS, np.float32)
  return log.Record(round, ids, ones, zeros)


def test_a_judge_goes_on_from_its_file(tmp_path):
  method, _ = programs('spsa')
  state, path = method.init(table.params()), tmp_path / 'probes.json'
  judge = verdict.Judge(trust(), CLIENTS, path)
  judge.judge(state, record_of(0))
  first = judge.verdict()
  judge.save()
  found = trust()
  again = verdict.Judge(found, CLIENTS, path)
  assert again.round == 1
  assert again.verdict() == first
  assert found.probes == CLIENTS
  again.judge(state, record_of(0))  # was judged before
  assert found.probes == CLIENTS
  again.judge(state, record_of(1))
  assert found.probes == 2 * CLIENTS
  again.skip(9)
  again.skip(5)
  assert verdict.decode(again.verdict(), CLIENTS).round == 9
  for damaged in ('{"round": 7', '{"round": 7, "trust": []}', '[]'):
    path.write_text(damaged)
    found = trust()
    assert verdict.Judge(found, CLIENTS, path).round == 0
    assert found.probes == 0


def test_size_is_that_of_the_scalars():
  method, _ = programs('spsa')
  values = np.array([3.0, -4.0], np.float32)
  code = codecs.codec('log8', 16.0)
  message = np.asarray(code.encode(values, keys.root(0)))
  decoded = np.asarray(method.values(message))
  expected = np.sqrt(np.mean(decoded**2))
  assert book.size(method)(message) == pytest.approx(expected)
  assert expected == pytest.approx(12.5**0.5, rel=0.1)


@needs_server
def test_who_lies_weighs_nothing(tmp_path):
  """Signs flipped by one; the coordinator is replaced, the keeper restarted."""
  code = codecs.codec('log8', 16.0)
  lies = byzantine.tamper('sign_flip', [LIAR], codec=code, num_values=2)
  flip = lambda round, x: np.asarray(lies(round, np.array([LIAR]), x[None]))[0]
  with LocalServer(tmp_path) as server:
    toy = Toy(server.url, tmp_path, num_rounds=ROUNDS, num_clients=CLIENTS)
    toy.probes, toy.pause_s = True, 0.02
    path = tmp_path / 'probes.json'
    keep = lambda: asyncio.create_task(
      toy.follow(None, judge=verdict.Judge(trust(), CLIENTS, path))
    )

    async def main():
      first = asyncio.create_task(toy.coordinate())
      clients = [
        toy.follow(n, tamper=flip if n == LIAR else None)
        for n in range(CLIENTS)
      ]
      keeper = keep()
      work = asyncio.gather(*clients)
      await toy.until(20)
      second = asyncio.create_task(toy.coordinate())
      await stream.end(first)
      await stream.end(keeper)
      ends = await asyncio.gather(keep(), work)
      status = await second
      (kept, _), others = ends
      return {kept, *(digest for digest, _ in others)}, status

    digests, status = run(main())
  with log.RoundLog.open(tmp_path / 'client-0' / 'rounds.log') as found:
    weights = [record.weights.tolist() for record in found]
    method, compiled = programs('spsa')
    *_, (_, state) = replay.replay(
      compiled.server,
      method.init(table.params()),
      found,
      method.recorded(table.params()),
      num_slots=CLIENTS,
    )
  assert digests == {digest.digest(state.params)}
  assert weights[0] == [0] * CLIENTS  # nobody is known yet
  assert np.min(np.delete(weights[8], LIAR)) > 0
  last = np.mean(weights[-20:], axis=0)
  assert last[LIAR] == 0
  assert np.delete(last, LIAR).min() > 4
  assert status.levels[LIAR] == 0
