"""experiments.federate as people start it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import build, defaults
from experiments.config import UsageError, from_mapping
from experiments.federation import roles, site
from jaxfl import log, probe
from jaxfl.federation import verdict
from jaxfl.federation.names import Names
from jaxfl.federation.replica import as_party
from tests.federation.harness import needs_server

pytestmark = pytest.mark.fast_compile

SETTINGS = (
  '--target=y', '--num_clients=2', '--num_rounds=6', '--mu=1e-2',
  '--learning_rate=0.05', '--num_perturbations=2',
)  # fmt: skip


def launch(module, *arguments):
  done = subprocess.run(
    [sys.executable, '-m', f'experiments.{module}', *arguments],
    capture_output=True,
    text=True,
    timeout=300,
  )
  return done


@pytest.fixture
def table(tmp_path):
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(60, 3))
  lines = [f'{a:.3f},{b:.3f},{a - b + c / 9:.3f}' for a, b, c in rows]
  path = tmp_path / 'table.csv'
  path.write_text('\n'.join(['a,b,y', *lines]) + '\n')
  return path


@needs_server
def test_a_local_federation_is_the_simulation(table, tmp_path):
  settings = (f'--dataset={table}', *SETTINGS)
  where = tmp_path / 'local'
  done = launch(
    'federate', '--role=local', f'--workdir={where}', '--digest_every=3',
    *settings,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads((where / 'summary.json').read_text())
  assert found['equal']
  assert found['rounds'] == 6
  assert found['digest'][:16] in done.stdout
  assert found['before'].keys() == found['after'].keys() != set()
  simulated = launch('train', f'--workdir={tmp_path / "train"}', *settings)
  assert simulated.returncode == 0, simulated.stderr
  expected = json.loads((tmp_path / 'train' / 'summary.json').read_text())
  assert found['digest'] == expected['digest']
  assert found['bytes_up'] == expected['bytes_up']
  again = launch('replay', f'--workdir={where / "client-1"}')
  assert again.returncode == 0, again.stderr
  assert 'equal to the digest of the live run' in again.stdout


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'participation_rate': 0.5}, 'participation_rate is for simulations'),
    ({'weighting': 'examples'}, 'weighting must be uniform'),
    ({'method': 'fedkseed_pro'}, 'pipeline must be 0 for method fedkseed_pro'),
    (
      {
        'method': 'dp_gd',
        'epsilon_dp': 1.0,
        'delta_dp': 1e-5,
        'research_float_noise': True,
      },
      'method dp_gd with epsilon_dp is not run',
    ),
  ],
)
def test_what_a_federation_refuses(settings, message):
  config = defaults.resolve(
    from_mapping({'dataset': 'minilm_sst2', 'num_clients': 2} | settings)
    if settings.get('method') == 'dp_gd'
    else from_mapping(settings)
  )
  method = build.build_method(
    config, build.no_loss, [10, 10] if config.epsilon_dp else None
  )
  with pytest.raises(UsageError, match=message):
    site.check(config, method, pipeline=1)


def test_what_sites_share():
  config = defaults.resolve(from_mapping({}))
  shared = site.shared_settings(config)
  assert {'mu', 'learning_rate', 'codec', 'seed', 'frozen_digest'} <= shared
  assert not {'dataset', 'data_dir', 'in_layers', 'model'} & shared


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'digest_every': 0}, '--digest_every must be >= 1'),
    ({'pipeline': -1}, '--pipeline must be in'),
    ({'rules': {'min_clients': 9}}, r'--min_clients must be in \[1, 4\]'),
    ({'rules': {'min_clients': None, 'quorum': 5}}, '--quorum must be in'),
  ],
)
def test_wrong_flags_of_a_coordinator(change, message):
  fields = {'rules': {'min_clients': None}, 'pipeline': 0, 'digest_every': 5}
  how = roles.Coordination(**fields | change)
  with pytest.raises(UsageError, match=message):
    how.of(4, how.pipeline)


def test_names_that_are_none():
  place = roles.Place(run='a.b', server='', credentials=None, directory=None)
  with pytest.raises(UsageError, match='--run: run must be 1 to 32 letters'):
    _ = place.names


def test_a_keeper_probes_with_its_own_examples(table, tmp_path):
  config = defaults.resolve(
    from_mapping(
      {'dataset': str(table), 'target': 'y', 'num_clients': 2, 'mu': 1e-2}
      | {'num_rounds': 80, 'num_perturbations': 2, 'learning_rate': 0.05}
    )
  )
  header = site.header_of(config, 0, 5)
  bench = site.Bench(Names('trial'), None, header, {}, True)
  judge = bench.judge(tmp_path / 'probes.json')
  method, params = bench.method, bench.problem.params
  state, levels = method.init(params), []
  for round in range(8):
    sent = [client_message(bench, state, n, round) for n in range(2)]
    sent[1] = sent[1] ^ 128  # of log8, the sign
    ids, ones = np.arange(2, dtype=np.int32), np.ones(2, np.float32)
    judge.judge(state, log.Record(round, ids, ones, np.stack(sent)))
    levels.append(verdict.decode(judge.verdict(), 2).levels)
  assert {liar for _, liar in levels} == {0}
  assert levels[-1][0] == probe.LEVELS


def client_message(bench, state, client, round):
  """What a client sends that has all of the data."""
  batches = bench.site.batch_fn(round)
  party = as_party(client, round)
  message, *_ = bench.site.run_client(state, (), batches, party)
  return np.asarray(message)


def test_a_run_that_no_probe_can_check():
  with pytest.raises(UsageError, match='--probe: method ferret'):
    site.check_probe(defaults.resolve(from_mapping({'method': 'ferret'})))
