"""Clients that are asked, over a post in this process, and over Flower."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import types

import numpy as np
import pytest

from experiments import defaults, replayer, runner
from experiments import workdir as workdir_lib
from experiments.config import Config, UsageError, from_mapping
from experiments.federation import asked, flower_trial
from jaxfl import digest as digest_lib
from jaxfl import log, wire
from jaxfl.federation import answers, book, handshake, questions, replica
from tests import methods_table as table
from tests.federation.harness import Toy, header_of, programs

pytestmark = pytest.mark.fast_compile

ROOT = pathlib.Path(__file__).parents[2]
APP = ROOT / 'experiments' / 'flower'
needs_flower = pytest.mark.skipif(
  importlib.util.find_spec('flwr') is None,
  reason="flwr is missing: pip install -e '.[flower]'",
)
# importing flwr 1.42 warns
ignore_warnings = pytest.mark.filterwarnings('ignore::DeprecationWarning')


class Post:
  """Sites in this process, by node; time passes when the server waits.

  A site is a function of a question; it returns an answer, a text in place of
  one, or None if it never answers. `delays` has for how long a node is silent.
  """

  def __init__(self, sites):
    self.sites, self.delays = dict(sites), {}
    self.now, self._mail = 0.0, []
    self.asked = []  # node and question

  def nodes(self):
    return set(self.sites)

  def send(self, letters, ttl_s):
    for node, letter in letters.items():
      self.asked.append((node, letter))
      answer = self.sites[node](dict(letter))
      if answer is not None:
        self._mail.append((self.now + self.delays.get(node, 0), node, answer))

  def receive(self):
    due = [(node, answer) for at, node, answer in self._mail if at <= self.now]
    self._mail = [mail for mail in self._mail if mail[0] > self.now]
    return due

  def sleep(self, seconds):
    self.now += seconds


class Run:
  """A run of the toy method with a server that asks."""

  def __init__(self, directory, case='spsa', **changes):
    self.toy = Toy('', directory, case, **changes)
    self.directory = directory
    self.header = header_of(case)

  def site(self, number, **changes):
    """A site whose every answer begins from its directory."""
    method, compiled = programs(self.toy.case)

    def answer(letter):
      directory = self.directory / f'client-{number}'
      site = self.toy.site(number, **changes)
      try:
        block = answers.header_block(directory, letter)
        if block is None:
          return answers.missing_header(number)
        answers.check(site, block)
        live = replica.Replica(
          method,
          table.params,
          compiled.server,
          self.toy.num_clients,
          directory,
          block,
        )
        with contextlib.closing(live):
          self.toy.replicas[number] = live
          return answers.answer(site, live, letter)
      except answers.Refused as error:
        return answers.refusal(number, str(error))

    return answer

  def sites(self):
    return {100 + n: self.site(n) for n in range(self.toy.num_clients)}

  def serve(self, post, watch=lambda status: None, rounds=None):
    toy, path = self.toy, self.directory / 'rounds.log'
    if path.exists():
      live = log.RoundLog.open(path, 'a')
    else:
      live = log.RoundLog.create(path, self.header)
    with live:
      hub = questions.Hub(
        live,
        toy.plan().rules,
        handshake.passport(self.header, {'case': toy.case}),
        book.usable(programs(toy.case)[0]),
        rounds or toy.num_rounds,
        post.now,
      )
      return questions.serve(
        post,
        hub,
        poll_s=1.0,
        watch=watch,
        clock=lambda: post.now,
        sleep=post.sleep,
      )

  @property
  def cohorts(self):
    with log.RoundLog.open(self.directory / 'rounds.log') as found:
      return [record.ids.tolist() for record in found]

  @property
  def simulated(self):
    return digest_lib.digest(self.toy.simulated.state.params)

  def check(self, status):
    """All replicas are what the log says."""
    assert status.round == self.toy.num_rounds
    live = replica.Replica(
      programs(self.toy.case)[0],
      table.params,
      programs(self.toy.case)[1].server,
      self.toy.num_clients,
      self.directory,
      questions.block_of(self.directory / 'rounds.log'),
    )
    with contextlib.closing(live):
      while live.round < status.round:
        live.step()
      assert status.digest == digest_lib.digest(live.state.params)
      for number in status.members:
        path = self.directory / f'client-{number}' / 'rounds.log'
        assert log.verify(path).digest == live.log.digest


@pytest.mark.parametrize('case', ['spsa', 'fedkseed'])
def test_a_run_is_the_simulation(case, tmp_path):
  run = Run(tmp_path, case)
  status = run.serve(Post(run.sites()))
  assert status.digest == run.simulated
  run.check(status)
  assert status.bytes_up == 12 * run.toy.simulated.bytes_up
  assert sorted(status.attested) == list(range(13))
  assert None not in status.attested.values()
  assert status.losses[12] < status.losses[1]
  assert not status.refused
  assert not status.failed


def test_who_is_late_is_not_waited_for(tmp_path):
  run = Run(tmp_path, deadline_s=30.0)
  post = Post(run.sites())
  seen = []

  def watch(status):
    seen.append(post.now)
    if status.round == 3:
      post.delays[102] = 40.0
    if status.round == 8:
      post.delays.clear()

  post.delays |= {100: 1.0, 101: 1.0}
  status = run.serve(post, watch)
  run.check(status)
  assert run.cohorts[2:5] == [[0, 1, 2], [0, 1], [0, 1]]
  assert 30 <= seen[3] - seen[2] < 35  # the deadline, and only once
  assert seen[4] - seen[3] < 5
  assert status.refused == {2: {'late': 1}}
  assert status.differing == {}


def test_a_client_is_killed_and_comes_back(tmp_path, monkeypatch):
  """Between the log and the snapshot; later as another node."""
  run = Run(tmp_path, deadline_s=10.0)
  post = Post(run.sites())
  alive, save = post.sites[101], replica.Replica.save

  def killed(letter):
    with monkeypatch.context() as patch:
      patch.setattr(replica.Replica, 'save', lambda self: 1 / 0)
      with contextlib.suppress(ZeroDivisionError):
        alive(letter)
    return 'error 8: the ClientApp crashed'

  def watch(status):
    if status.round == 3:
      post.sites[101] = killed
    if status.round == 6:
      del post.sites[101]
    if status.round == 8:
      post.sites[777] = alive

  status = run.serve(post, watch)
  assert replica.Replica.save is save
  run.check(status)
  assert run.cohorts[3:8] == [[0, 2]] * 5
  assert [0, 1, 2] in run.cohorts[8:]
  assert status.failed['client 1'] > 0
  assert status.members == (0, 1, 2)


def test_a_directory_is_lost(tmp_path):
  run = Run(tmp_path)
  post = Post(run.sites())

  def watch(status):
    if status.round == 5:
      shutil.rmtree(tmp_path / 'client-1')

  status = run.serve(post, watch)
  run.check(status)
  assert status.digest == run.simulated


def test_the_server_is_killed(tmp_path):
  run = Run(tmp_path)

  def watch(status):
    if status.round == 5:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run.serve(Post(run.sites()), watch)
  status = run.serve(Post(run.sites()))
  run.check(status)
  assert status.digest == run.simulated


def test_who_comes_late_gets_the_log_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(questions, '_MAX_RECORDS', 40)
  run = Run(tmp_path, min_clients=2)
  sites = run.sites()
  late = sites.pop(102)
  post = Post(sites)

  def watch(status):
    if status.round == 9:
      post.sites[102] = late

  status = run.serve(post, watch)
  run.check(status)
  parts = [x['records'] for node, x in post.asked if node == 102]
  assert [] in parts
  assert len([x for x in parts if x]) > 1
  assert all(sum(map(len, x)) <= 40 or len(x) == 1 for x in parts)
  assert 2 in status.members


def other_base(run):
  return dataclasses.replace(run.header, base_digest='1' * 64)


def other_shape(run):
  params = [['layer/w', 'float32', [3, 6]], *run.header.params[1:]]
  return dataclasses.replace(run.header, params=params)


def other_setting(run):
  return dataclasses.replace(
    run.header, config={**run.header.config, 'case': 'ferret'}
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (other_base, 'the base weights have the digest 1111111111111111 here'),
    (other_shape, "parameter '"),
    (other_setting, "case is 'spsa' in the run and 'ferret' here"),
  ],
)
def test_who_does_not_fit_is_refused(change, message, tmp_path):
  run = Run(tmp_path, min_clients=2, deadline_s=5.0)
  sites = run.sites() | {102: run.site(2, header=change(run))}
  status = run.serve(Post(sites))
  run.check(status)
  assert message in status.excluded['node 102']
  assert status.refused[2] == {'no handshake': 1}
  assert run.cohorts == [[0, 1]] * 12


def test_nobody_fits(tmp_path):
  run = Run(tmp_path, num_clients=2)
  sites = {n: run.site(n, header=other_base(run)) for n in range(2)}
  with pytest.raises(questions.Excluded, match='node 0: client 0: the base'):
    run.serve(Post(sites))


def test_two_nodes_with_one_id(tmp_path):
  """The second has to wait until the first is gone."""
  run = Run(tmp_path)
  post = Post(run.sites())
  post.delays |= {100: 2.0, 102: 2.0}

  def watch(status):
    if status.round == 2:
      post.sites[500] = run.site(1)
    if status.round == 6:
      assert status.failed['node 500'] > 0
      del post.sites[101]

  status = run.serve(post, watch)
  run.check(status)
  assert all(1 in cohort for cohort in run.cohorts[:6])
  assert any(node == 500 and x['open'] > 6 for node, x in post.asked)
  assert status.members == (0, 1, 2)


def test_a_directory_of_another_run(tmp_path):
  run = Run(tmp_path, min_clients=2, deadline_s=5.0)
  other = dataclasses.replace(run.header, base_digest='2' * 64)
  path = tmp_path / 'client-2'
  path.mkdir()
  log.RoundLog.create(path / 'rounds.log', other).close()
  (path / 'header').write_bytes(questions.block_of(path / 'rounds.log'))
  status = run.serve(Post(run.sites()))
  assert (
    'client-2 holds another run: move it away' in (status.excluded['node 102'])
  )


def test_garbage_costs_nothing(tmp_path):
  """Wrong answers are counted, and of no other effect."""
  run = Run(tmp_path, num_clients=4, num_rounds=16, deadline_s=5.0)
  post = Post(run.sites())
  honest, method = post.sites[103], programs('spsa')[0]
  nan = np.full(method.message(table.params()).shape, 128, np.uint8)
  changes = [
    lambda x: {},
    lambda x: {'client': 'three'},
    lambda x: x | {'client': 0},
    lambda x: x | {'rounds': -2},
    lambda x: x | {'rounds': x['rounds'] + 0.5},
    lambda x: x | {'digest': b'short'},
    lambda x: x | {'message': [1, 2]},
    lambda x: x | {'message': b'\xff' * 50},
    lambda x: x | {'message': x['message'][:-1]},
    lambda x: x | {'message': x['message'][:1] + wire.to_bytes(nan)},
    lambda x: {k: v for k, v in x.items() if k != 'message'},
    lambda x: {k: v for k, v in x.items() if k != 'digest'},
  ]
  used = []

  def liar(letter):
    answer = honest(letter)
    if 'message' not in answer:
      return answer
    honest_now, which = len(used) % 2 == 0, len(used) // 2 % len(changes)
    used.append(which)
    return answer if honest_now else changes[which](answer)

  post.sites[103] = liar
  # the others take their time, so that the liar is heard
  post.delays |= {100: 4.0, 101: 4.0, 102: 4.0}
  status = run.serve(post)
  run.check(status)
  assert set(used) == set(range(len(changes)))
  assert set(map(tuple, run.cohorts)) == {(0, 1, 2), (0, 1, 2, 3)}
  assert status.failed['client 3'] >= 9
  assert status.refused[3]['damaged'] >= 9
  assert status.refused[3]['not finite'] == 1
  assert status.excluded == {}


def test_a_replica_that_differs_is_named_and_rebuilt(tmp_path):
  run = Run(tmp_path)
  post = Post(run.sites())

  def watch(status):
    if status.round == 4:  # what its snapshot says is as wrong as its weights
      folder = tmp_path / 'client-1' / 'snapshots'
      [old] = folder.iterdir()
      live = run.toy.replicas[1]
      live.state = live.state._replace(
        params={k: v + 1 for k, v in live.state.params.items() if k != 'layer'}
        | {'layer': live.state.params['layer']}
      )
      live.save()
      assert not old.exists()

  status = run.serve(post, watch)
  assert status.differing == {1: [4]}
  assert status.excluded == {}
  assert status.attested[12] is not None
  live = replica.Replica(
    programs('spsa')[0], table.params, programs('spsa')[1].server, 3,
    tmp_path / 'client-1', questions.block_of(tmp_path / 'rounds.log'),
  )  # fmt: skip
  with contextlib.closing(live):
    live.restore()
    assert digest_lib.digest(live.state.params) == status.digest


def test_a_device_that_computes_other_bits_is_left_out(tmp_path):
  run = Run(tmp_path, deadline_s=5.0)
  post = Post(run.sites())
  honest = post.sites[101]

  def other(letter):
    answer = honest(letter)
    wrong = answer.get('rounds', 0) >= 3
    return answer | ({'digest': b'\xff' * 8} if wrong else {})

  post.sites[101] = other
  status = run.serve(post)
  run.check(status)
  assert 'does not compute the same bits' in status.excluded['client 1']
  assert status.differing[1] == [3, 4]
  assert status.members == (0, 2)


def test_a_server_that_lost_rounds_is_noticed(tmp_path):
  run = Run(tmp_path)
  run.serve(Post(run.sites()), rounds=5)
  (tmp_path / 'rounds.log').unlink()
  with pytest.raises(questions.Excluded, match='5 rounds and the server 0'):
    run.serve(Post(run.sites()))


# Settings, and whole runs of experiments.


def test_settings_of_flower_are_named():
  read = lambda values: asked.read(values, asked.RUN, 'run-config')
  given, how = read({'mu': 0.1, 'method': '', 'deadline_s': 5})
  assert given == {'mu': 0.1}
  assert how == asked.RUN | {'deadline_s': 5.0}
  with pytest.raises(UsageError, match="run-config: unknown 'moo'"):
    read({'moo': 1})
  with pytest.raises(UsageError, match='min_clients must be of type int'):
    read({'min_clients': 1.5})


def test_the_app_has_all_settings():
  with open(APP / 'pyproject.toml', 'rb') as file:
    app = tomllib.load(file)
  found = app['tool']['flwr']['app']['config']
  names = {f.name for f in dataclasses.fields(Config)}
  assert found == asked.RUN | dict.fromkeys(names, '')


@pytest.fixture
def rows(tmp_path):
  """A table for two sites."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 2))
  table = np.column_stack([x, x @ [1.0, -2.0]])
  path = tmp_path / 'rows.csv'
  np.savetxt(path, table, delimiter=',', header='a,b,y', comments='')
  return path


@pytest.fixture
def run_config(rows, tmp_path):
  return {
    'num_perturbations': 2, 'dataset': str(rows), 'target': 'y',
    'num_clients': 2, 'num_rounds': 2, 'workdir': str(tmp_path / 'server'),
    'deadline_s': 120.0,
  }  # fmt: skip


def ended(tmp_path, run):
  """The digest that server and sites have and that their replays have."""
  sites = (tmp_path / 'sites').glob(f'{run}-client-*/summary.json')
  directories = [tmp_path / 'server', *(path.parent for path in sites)]
  assert len(directories) == 3
  found = set()
  for directory in directories:
    params, rounds, _ = replayer.rebuild(directory)
    found.add(digest_lib.digest(params))
    found.add(replayer.live_digest(workdir_lib.Workdir(directory), rounds))
  [digest] = found
  return digest


def simulated(tmp_path, run_config):
  settings, _ = asked.read(run_config, asked.RUN, '')
  config = defaults.resolve(from_mapping(settings))
  return runner.run(config, tmp_path / 'simulated')['digest']


def test_experiments_that_are_asked(run_config, tmp_path):
  run_config['num_rounds'] = 1
  own = {'workdir': str(tmp_path / 'sites')}
  answered = lambda **node: (
    lambda letter: asked.answer(letter, own | node, run_config)
  )
  sites = {10 + n: answered(client=n) for n in range(2)}
  wrong = {
    20: {'client': 5},
    21: {'client': '1'},
    22: {'client': 1, 'mu': 0.5},
    23: {'client': 1, 'clients': 2},
  }
  sites |= {n: answered(**node) for n, node in wrong.items()}
  lines = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(asked, '_POLL_S', 0.01)
    summary = asked.serve(Post(sites), run_config, lines.append)
  assert ended(tmp_path, 'flower') == simulated(tmp_path, run_config)
  assert lines[0].startswith('round 1 of 1, 2 clients, loss ')
  text = {int(k.split()[1]): v for k, v in summary['excluded'].items()}
  assert 'client 5: --client must be in [0, 2)' in text[20]
  assert "client must be the id of this site, got '1'" in text[21]
  assert 'mu is 0.001 in the run and 0.5 here' in text[22]
  assert "node-config: unknown 'clients'" in text[23]
  with pytest.raises(UsageError, match='its mu is 0.001, not 0.1'):
    asked.serve(Post({}), run_config | {'mu': 0.1})
  with pytest.raises(UsageError, match='deadline_s must be > 0'):
    asked.serve(Post({}), run_config | {'deadline_s': 0})


def test_what_is_asked_needs_no_network():
  """Neither nats nor Flower."""
  code = (
    'import sys; import experiments.federation.asked;'
    ' assert not {"nats", "flwr"} & {x.split(".")[0] for x in sys.modules}'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


# Flower itself.


@needs_flower
@ignore_warnings
def test_letters_over_flower():
  from flwr.app import Error, RecordDict

  from jaxfl.federation import flower

  came = lambda content=None, error=None: types.SimpleNamespace(
    content=content, error=error, has_error=lambda: error is not None
  )
  question = {'run': b'12345678', 'open': 3, 'since': 1, 'records': [b'a', b'']}
  answer = {'client': 1, 'digest': b'8', 'loss': 0.5, 'rebuild': True}
  for letter in (question, answer):
    assert flower.decode(came(flower.encode(letter))) == letter
  assert 'without a letter' in flower.decode(came(RecordDict()))
  failed = came(error=Error(8, 'crashed'))
  assert flower.decode(failed) == 'error 8: crashed'


@pytest.mark.slow
@needs_flower
def test_a_federation_of_flower(run_config, tmp_path):
  """A run that is the simulation; another, with a SuperNode that is killed."""
  where = {'workdir': str(tmp_path / 'sites')}
  configs = [where | {'client': n} for n in range(2)]
  with flower_trial.Federation(tmp_path, configs) as federation:
    marks = federation.run(run_config | {'run': 'first'})
    cost = flower_trial.per_round(marks, 2)
    assert cost['up'] > 2 * 1000  # see docs/flower.md
    assert ended(tmp_path, 'first') == simulated(tmp_path, run_config)
    (tmp_path / 'server').rename(tmp_path / 'server-first')
    path = tmp_path / 'server' / 'rounds.log'

    def kill():
      while not path.exists() or log.verify(path).num_rounds < 2:
        time.sleep(0.2)
      os.killpg(federation.nodes[1].pid, signal.SIGKILL)
      federation.nodes[1].wait()
      federation.nodes[1] = federation.start_node(1)

    killing = threading.Thread(target=kill)
    killing.start()
    federation.run(run_config | {'run': 'second', 'num_rounds': 4})
    killing.join()
  summary = json.loads((tmp_path / 'server' / 'summary.json').read_text())
  assert summary['digest'] == ended(tmp_path, 'second')
  assert summary['differing'] == summary['excluded'] == {}
