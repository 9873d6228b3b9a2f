"""The simulator: populations, bounded memory, resuming, private states."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfl import digest, keys, log, wire
from jaxfl.methods import fed_avg, spsa
from jaxfl.runtime import simulate
from tests import methods_table as table

pytestmark = pytest.mark.fast_compile


def test_population_samples_without_replacement_and_repeatably():
  population = simulate.Population(
    num_clients=50, participation_rate=0.2, dropout_rate=0.5, seed=2**63
  )
  seen = set()
  for round in range(200):
    sampled, answers = population.sample(round)
    assert len(set(sampled.tolist())) == len(sampled) == 10
    assert (np.diff(sampled) > 0).all()
    assert set(answers) <= set(sampled)
    again = population.sample(round)
    np.testing.assert_array_equal(again[1], answers)
    seen |= set(sampled.tolist())
  assert len(seen) == 50


def test_rounds_are_independent():
  """Answers and samples of one round tell nothing about the next."""
  rounds, n = 2000, 8
  population = simulate.Population(num_clients=n, dropout_rate=0.5)
  answers = np.zeros((rounds, n))
  for round in range(rounds):
    answers[round, population.sample(round)[1]] = 1
  answers -= answers.mean(0)
  lagged = answers[:-1].T @ answers[1:] / rounds / 0.25
  assert np.abs(lagged).max() < 5 / np.sqrt(rounds)
  population = simulate.Population(num_clients=100, participation_rate=0.1)
  cohorts = [set(population.sample(r)[0].tolist()) for r in range(rounds)]
  overlap = [len(a & b) for a, b in itertools.pairwise(cohorts)]
  variance = 10 * 0.1 * 0.9 * 90 / 99  # hypergeometric
  assert abs(np.mean(overlap) - 1) < 4 * np.sqrt(variance / rounds)


def test_share_that_answers():
  population = simulate.Population(num_clients=100, dropout_rate=0.3)
  answers = [len(population.sample(r)[1]) for r in range(200)]
  error = np.sqrt(0.3 * 0.7 / (200 * 100))
  assert abs(np.mean(answers) / 100 - 0.7) < 4 * error


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_clients': 0}, 'num_clients must be >= 1'),
    ({'participation_rate': 1.5}, 'no more clients can be sampled'),
    ({'participation_rate': 0.0}, 'participation_rate must be in'),
    ({'participation_rate': 0.1}, 'samples nobody; it must be more than'),
    ({'dropout_rate': 1.0}, 'dropout_rate must be in'),
    ({'weights': (1,)}, 'must have 3 entries'),
    ({'weights': (1, 2, 0.5)}, 'whole numbers .* got 0.5 for client 2'),
  ],
)
def test_impossible_populations_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    simulate.Population(**({'num_clients': 3} | changes))


def test_weights_too_large_to_divide_exactly_are_refused():
  method = table.CASES['spsa'].build(num_perturbations=1000)
  population = simulate.Population(num_clients=2, weights=(2**23, 2**23))
  rounds = simulate.simulate(
    method, method.init(table.params()), table.batch_fn(1000), population,
    num_rounds=1,
  )  # fmt: skip
  with pytest.raises(ValueError, match='may add up to 16777216'):
    next(rounds)


@pytest.mark.parametrize('case', ['spsa', 'spsa-one-sided', 'fed_avg'])
def test_batches_without_the_leading_axis_are_refused(case):
  method = table.CASES[case].build()
  rounds = simulate.simulate(
    method, method.init(table.params()), table.batch_fn(7),
    simulate.Population(num_clients=2), num_rounds=1,
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"client 0: 'noise' has shape \(7, 4\)"):
    next(rounds)


def test_overflow_stops_the_run_with_the_tensor():
  method = table.CASES['spsa'].build(learning_rate=200.0)
  rounds = simulate.simulate(
    method, method.init(table.params()), table.batch_fn(2),
    simulate.Population(num_clients=2), num_rounds=50,
  )  # fmt: skip
  with pytest.raises(FloatingPointError, match=r'round \d+: .*layer/w'):
    list(rounds)


def test_weights_count():
  """A client of weight 3 counts like three clients that send the same."""
  slope = jnp.arange(4.0)
  loss = lambda p, b: jnp.vdot(p['w'], slope) * b['scale'][0]
  method = fed_avg.fed_avg(loss, client_optimizer=optax.sgd(1.0))
  population = simulate.Population(num_clients=2, weights=(3, 1))
  batches = lambda round, client: {
    'scale': np.full((1, 1), [1.0, 5.0][client], np.float32)
  }
  state = method.init({'w': np.zeros(4, np.float32)})
  (done,) = simulate.simulate(method, state, batches, population, num_rounds=1)
  np.testing.assert_allclose(done.state.params['w'], -2.0 * slope, rtol=1e-5)


class Counting:
  """FedAvg-like method whose clients count their own rounds privately."""

  @staticmethod
  def build():
    base = table.CASES['fed_sgd'].build()

    def client(state, local, batches, party):
      message, _, metrics = base.client(state, (), batches, party)
      factor = 1.0 / local['rounds'].astype(jnp.float32)
      message = jax.tree.map(lambda x: x * factor, message)
      return message, {'rounds': local['rounds'] + 1}, metrics

    return base._replace(
      client=client, init_local=lambda params: {'rounds': jnp.int32(1)}
    )


def test_private_states_follow_their_clients():
  method = Counting.build()
  population = simulate.Population(
    num_clients=7, participation_rate=0.5, dropout_rate=0.3
  )
  rounds = list(
    simulate.simulate(
      method, method.init(table.params()), table.batch_fn(1), population,
      num_rounds=9, block_size=3,
    )
  )  # fmt: skip
  taken = np.ones(7, int)
  for round in range(9):
    taken[population.sample(round)[1]] += 1
  np.testing.assert_array_equal(rounds[-1].local['rounds'], taken)


@pytest.mark.parametrize('build', [Counting.build, table.CASES['spsa'].build])
def test_a_run_resumed_from_its_log_is_the_same_run(build, tmp_path):
  method = build()
  population = simulate.Population(num_clients=5, dropout_rate=0.2)
  header = log.Header(
    spec=keys.SPEC,
    base_digest=digest.digest(table.params()),
    config={},
    params=wire.describe(table.params()),
    message=wire.describe(method.message(table.params())),
  )

  def run(path, num_rounds, **start):
    start = {'state': method.init(table.params())} | start
    opened = (
      log.RoundLog.open(path, 'a')
      if path.exists()
      else log.RoundLog.create(path, header)
    )
    with opened as rounds_log:
      rounds = simulate.simulate(
        method, start.pop('state'), table.batch_fn(method.num_batches),
        population, num_rounds=num_rounds, log=rounds_log, **start,
      )  # fmt: skip
      # private states change in place with the next round: keep copies
      return [r._replace(local=jax.tree.map(np.array, r.local)) for r in rounds]

  whole = run(tmp_path / 'whole.log', 10)
  part = run(tmp_path / 'part.log', 6)
  # goes on from a state of round 4 that is older than the log
  rest = run(
    tmp_path / 'part.log', 10, first_round=4,
    state=part[3].state, local=part[3].local,
  )  # fmt: skip
  assert [r.round for r in rest] == list(range(5, 11))
  assert digest.digest(rest[-1].state) == digest.digest(whole[-1].state)
  fields = ('bytes_up', 'bytes_down', 'forwards', 'projected_grads')
  for a, b in zip(rest, whole[4:], strict=True):
    assert all(getattr(a, f) == getattr(b, f) for f in fields)
  with (
    log.RoundLog.open(tmp_path / 'whole.log') as a,
    log.RoundLog.open(tmp_path / 'part.log') as b,
  ):
    assert a.digest == b.digest


@pytest.mark.parametrize(
  'name',
  ['spsa', pytest.param('fedkseed', marks=pytest.mark.slow), 'fed_avg'],
)
def test_a_donated_state_is_written_over(name):
  """The same weights, from a server without a second copy of them."""
  method = table.CASES[name].build()
  digests = []
  for donate in (False, True):
    programs = simulate.compile_method(method, donate=donate)
    state = jax.tree.map(jnp.copy, method.init(table.params()))
    first = jax.tree.leaves(state.params)[0]
    for done in simulate.simulate(
      method, state, table.batch_fn(method.num_batches),
      simulate.Population(num_clients=2), num_rounds=3, programs=programs,
    ):  # fmt: skip
      last = done.state
    digests.append(digest.digest(last))
    assert first.is_deleted() == donate
  assert digests[0] == digests[1]


_THOUSAND = """
import resource
import jax, jax.numpy as jnp, numpy as np
from jaxfl import keys
from jaxfl.methods import spsa
from jaxfl.runtime import simulate
# 1 MB of weights: 1,000 copies would be 1 GB
loss = lambda p, b: jnp.vdot(p['w'], p['w']) * jnp.mean(b['x'])
method = spsa.spsa(loss, keys.root(0), learning_rate=1e-3, mu=1e-3)
batches = lambda round, client: {'x': np.ones((1, 2), np.float32)}
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for done in simulate.simulate(
    method, method.init({'w': np.ones((512, 512), np.float32)}), batches,
    simulate.Population(num_clients=1000), num_rounds=1, block_size=4):
  pass
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
assert done.forwards == 2000, done
print('MB', grown // 1024)
"""


def test_a_thousand_clients_in_bounded_memory():
  done = subprocess.run(
    [sys.executable, '-c', _THOUSAND],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout.split()[-1]) < 300


def test_frames_are_what_the_server_gets(monkeypatch):
  """The sender applies the decoded value too: no float skips the wire."""
  sent = []
  to_bytes = wire.to_bytes
  monkeypatch.setattr(
    wire, 'to_bytes', lambda m: sent.append(to_bytes(m)) or sent[-1]
  )
  method = spsa.spsa(
    table.loss_fn, table.ROOT, learning_rate=0.05, mu=1e-2, codec='sign1'
  )
  state = method.init(table.params())
  (done,) = simulate.simulate(
    method, state, table.batch_fn(1), simulate.Population(num_clients=3),
    num_rounds=1,
  )  # fmt: skip
  messages = np.stack([wire.from_bytes(f) for f in sent[:3]])
  padded = simulate.pad(messages, np.arange(3), np.ones(3), 0, 3)
  again = jax.jit(method.server)(state, *padded)
  assert digest.digest(again) == digest.digest(done.state)


def test_programs_of_many_seeds_are_compiled_once():
  traced = []

  def build(root):
    traced.append(root)
    return spsa.spsa(table.loss_fn, root, learning_rate=0.05, mu=1e-2)

  def digest_of(root, programs):
    method = build(root)
    *_, last = simulate.simulate(
      method,
      method.init(table.params()),
      table.batch_fn(method.num_batches),
      simulate.Population(num_clients=2),
      num_rounds=3,
      programs=programs,
    )
    return digest.digest(last.state)

  programs = simulate.shared_programs(build)
  roots = [keys.root(seed) for seed in (3, 4)]
  found = [digest_of(root, programs(root)) for root in roots]
  assert sum(isinstance(root, jax.core.Tracer) for root in traced) == 2
  assert found == [digest_of(root, None) for root in roots]
  assert found[0] != found[1]
