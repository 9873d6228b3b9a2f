"""Runs over a real server: equal to the simulator's, whatever breaks."""

import asyncio

import numpy as np
import pytest

from experiments.federation.line import BackgroundLine
from jaxfl import digest as digest_lib
from jaxfl import log
from jaxfl.federation import client, provision, stream
from jaxfl.federation.server import LocalServer
from tests import methods_table as table
from tests.federation.harness import NAMES, Toy, needs_server, programs, run

pytestmark = [needs_server, pytest.mark.fast_compile]


@pytest.fixture
def server(tmp_path):
  with LocalServer(tmp_path) as found:
    yield found


@pytest.mark.parametrize('case', ['spsa', 'fedkseed', 'ferret'])
def test_a_federation_is_the_simulation(case, server, tmp_path):
  toy = Toy(server.url, tmp_path, case)
  digests, status = run(toy.run())
  expected = toy.simulated
  assert set(digests) == {expected_digest(expected)}
  assert status.round == toy.num_rounds
  assert status.bytes_up == toy.num_rounds * expected.bytes_up
  assert sorted(status.attested) == [4, 8, 12]
  assert None not in status.attested.values()
  assert status.losses[12] < status.losses[4]
  logs = [log.verify(tmp_path / f'client-{n}' / 'rounds.log') for n in range(3)]
  assert len({x.digest for x in logs}) == 1
  assert logs[0].num_rounds == toy.num_rounds


def expected_digest(done):
  return digest_lib.digest(done.state.params)


def test_batches_are_loaded_while_a_client_waits(server, tmp_path):
  toy = Toy(server.url, tmp_path, num_clients=2, num_rounds=3)
  loaded, there = [], []

  def batch_fn(round):
    loaded.append(round)
    there.append(toy.statuses[-1].round)
    return table.batch_fn(programs(toy.case)[0].num_batches)(round, 0)

  async def main():
    work = asyncio.create_task(toy.coordinate())
    first = asyncio.create_task(toy.follow(0, batch_fn=batch_fn))
    while loaded != [0, 1]:  # the round is open, as another client is awaited
      await asyncio.sleep(0.01)
    *ends, status = await asyncio.gather(first, toy.follow(1), work)
    assert status.round == 3
    return [digest for digest, _ in ends]

  assert set(run(main())) == {expected_digest(toy.simulated)}
  assert loaded == [0, 1, 2]
  assert there[:2] == [0, 0]


def test_a_pipeline_ends_alike_and_replays(server, tmp_path):
  toy = Toy(server.url, tmp_path, pipeline=3, num_rounds=20)
  digests, status = run(toy.run())
  assert len(set(digests)) == 1
  assert status.round == 20
  live = toy.replicas[0]
  live.log = log.RoundLog.open(tmp_path / 'client-1' / 'rounds.log')
  live.restart()
  while live.round < 20:
    live.step()
  assert expected_digest(live) == digests[0]
  live.log.close()


def test_the_server_is_killed(server, tmp_path):
  toy = Toy(server.url, tmp_path, num_rounds=30, pause_s=0.05)

  async def main():
    work = asyncio.create_task(toy.run())
    for at in (4, 11):
      await toy.until(at)
      server.kill()
      await asyncio.sleep(0.3)
      server.start()
    return await work

  digests, _ = run(main())
  assert set(digests) == {expected_digest(toy.simulated)}


def test_a_task_that_drops_its_cancellation_is_ended():
  async def stubborn(dropped):
    while True:
      try:
        await asyncio.sleep(60)
      except asyncio.CancelledError:
        if dropped:
          raise
        dropped.append(True)

  async def main():
    dropped = []
    task = asyncio.create_task(stubborn(dropped))
    await asyncio.sleep(0)
    await stream.end(task)
    return dropped, task.cancelled()

  assert run(main()) == ([True], True)


def test_coordinators_and_clients_come_and_go(server, tmp_path):
  """A coordinator is replaced, a client crashes and comes back, one is late."""
  toy = Toy(server.url, tmp_path, num_rounds=80, num_clients=4, min_clients=2)
  toy.deadline_s, toy.pause_s = 1.0, 0.08

  async def main():
    first = asyncio.create_task(toy.coordinate())
    stays = asyncio.create_task(toy.follow(0))
    crashes = asyncio.create_task(toy.follow(1))
    await toy.until(5)
    second = asyncio.create_task(toy.coordinate())
    await asyncio.sleep(0.2)  # it stands by
    await stream.end(first)
    await stream.end(crashes)
    await toy.until(toy.statuses[-1].round + 3)
    late = asyncio.create_task(toy.follow(3))
    back = asyncio.create_task(toy.follow(1))
    status = await second
    return [d for d, _ in await asyncio.gather(stays, back, late)], status

  digests, status = run(main())
  assert len(set(digests)) == 1
  assert status.round == 80
  with log.RoundLog.open(tmp_path / 'client-3' / 'rounds.log') as found:
    cohorts = [set(record.ids.tolist()) for record in found]
  assert {0} in cohorts  # while client 1 was away
  assert any(3 in cohort for cohort in cohorts)
  assert log.verify(tmp_path / 'client-1' / 'rounds.log').num_rounds == 80


def test_hostile_clients_cost_nothing(server, tmp_path):
  """Garbage of one, nan of another, and a settings mismatch that is named."""
  toy = Toy(server.url, tmp_path, num_clients=4, min_clients=3)
  toy.deadline_s = 2.0
  method, _ = programs(toy.case)
  nan = lambda round, message: np.full_like(message, 128)  # of log8
  assert not np.isfinite(method.values(nan(0, np.zeros(2, np.uint8)))).any()

  async def garbage():
    async with toy.connection('client-3') as nc:
      await client.find(nc, NAMES)
      js = nc.jetstream()
      for data in (b'', b'\xff' * 50, b'\x00' + b'x' * 200):
        await js.publish(NAMES.sent('up', 3), data)
        await js.publish(NAMES.sent('digest', 3), data)
        await js.publish(NAMES.sent('hello', 3), data)

  async def main():
    work = asyncio.create_task(toy.coordinate())
    honest = [asyncio.create_task(toy.follow(n)) for n in (0, 1)]
    liar = asyncio.create_task(toy.follow(2, tamper=nan))
    await garbage()
    other = toy.header
    other = log.Header(**vars(other) | {'base_digest': '1' * 64})
    with pytest.raises(
      client.Refused, match='the base weights have the digest'
    ):
      await toy.follow(3, header=other)
    status = await work
    return [d for d, _ in await asyncio.gather(*honest, liar)], status

  digests, status = run(main())
  assert len(set(digests)) == 1
  assert set(status.refused[2]) <= {'not finite', 'late'}
  assert status.refused[2]['not finite'] > 0
  assert status.refused[3]['no handshake'] >= 3
  with log.RoundLog.open(tmp_path / 'client-0' / 'rounds.log') as found:
    assert all(record.ids.tolist() == [0, 1] for record in found)


def test_a_replica_that_differs_is_rebuilt(server, tmp_path):
  toy = Toy(server.url, tmp_path, num_rounds=20)

  def flip(done):
    live = toy.replicas[1]
    if done.round == 6 and not flip.done:
      flip.done = True
      path = next(iter(live.state.params))
      w = np.array(live.state.params[path], copy=True)
      w.flat[0] += 1.0
      live.state = live.state._replace(params={**live.state.params, path: w})

  flip.done = False

  async def main():
    return await asyncio.gather(
      toy.coordinate(), toy.follow(0), toy.follow(1, flip), toy.follow(2)
    )

  status, *ends = run(main())
  assert flip.done
  assert len({digest for digest, _ in ends}) == 1
  assert status.attested[20] is not None


def test_a_device_that_computes_other_bits_is_named(server, tmp_path):
  toy = Toy(server.url, tmp_path, deadline_s=2.0)

  def wrong(done):
    toy.replicas[1].digest = lambda: 'f' * 64

  async def main():
    work = asyncio.gather(toy.coordinate(), toy.follow(0), toy.follow(2))
    with pytest.raises(client.Diverged, match='does not compute the same bits'):
      await toy.follow(1, wrong)
    return await work

  _, *ends = run(main())
  assert len({digest for digest, _ in ends}) == 1


def test_who_comes_late_starts_from_a_snapshot(server, tmp_path):
  toy = Toy(server.url, tmp_path, num_rounds=60, min_clients=2, pause_s=0.05)
  applied = []

  async def main():
    work = asyncio.create_task(toy.coordinate())
    clients = [asyncio.create_task(toy.follow(n)) for n in (0, 1)]
    keeper = asyncio.create_task(toy.follow(None))
    await toy.until(20)
    late = toy.follow(2, lambda done: applied.append(done.round))
    ends = await asyncio.gather(late, *clients, keeper)
    await work
    return [digest for digest, _ in ends]

  assert len(set(run(main()))) == 1
  assert min(applied) > 4  # rounds before it were not computed again
  assert log.verify(tmp_path / 'client-2' / 'rounds.log').num_rounds == 60


def test_credentials_and_bytes_on_the_socket(tmp_path):
  """TLS and keys; 256 projected gradients cost at most 1.6 B each, all in."""
  made = provision.provision(tmp_path / 'keys', NAMES.run, 1)
  with (
    LocalServer(made.server) as server,
    BackgroundLine(target=('127.0.0.1', server.port)) as line,
  ):
    toy = Toy(server.url, tmp_path, num_clients=1, case='spsa-256')
    toy.credentials, toy.num_rounds = made.credentials, 14
    toy.urls = {0: f'nats://127.0.0.1:{line.port}'}
    marks = {}

    def watch(done):
      marks[done.round, done.sent] = line.up, line.down, done.bytes_up

    async def main():
      return await asyncio.gather(toy.coordinate(), toy.follow(0, watch))

    status, (digest, done) = run(main())
  assert digest == expected_digest(toy.simulated)
  assert status.bytes_up == done.bytes_up == 14 * (done.bytes_up // 14)
  first, last = marks[3, 3], marks[13, 13]
  sent = (last[2] - first[2]) // (done.bytes_up // 14)
  assert sent == 10
  per_gradient = (last[0] - first[0]) / (sent * 256)
  assert 1.0 < per_gradient <= 1.6
