"""Snapshots are caches: usable ones are found, all others are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfl import checkpoint, digest, keys, log, wire
from tests import methods_table as table


def rounds_log(path, num_rounds):
  """A log of rounds with one byte from one client."""
  header = log.Header(
    spec=keys.SPEC,
    base_digest='0' * 64,
    config={},
    params=[],
    message=wire.describe(np.uint8(0)),
  )
  opened = log.RoundLog.create(path, header)
  for round in range(num_rounds):
    opened.append(round, [0], [1], np.array([round % 256], np.uint8))
  return opened


def state(seed=0):
  """A state with NamedTuples, an optax state and a bfloat16 leaf."""
  params = table.params() | {'half': jnp.ones(3, jnp.bfloat16) * seed}
  opt = optax.adam(0.1)
  return {'params': params, 'opt': opt.init(params), 'n': jnp.int32(seed)}


def save(snapshots, round, rounds, seed=0, local=()):
  snapshots.save(
    checkpoint.Snapshot(round, state(seed), local, {'bytes_up': seed}), rounds
  )


def test_the_newest_snapshot_comes_back_bit_for_bit(tmp_path):
  local = {'residual': np.arange(6.0, dtype=np.float32).reshape(3, 2)}
  with rounds_log(tmp_path / 'a.log', 10) as rounds:
    snapshots = checkpoint.Snapshots(tmp_path / 's')
    for round in (2, 5, 9):
      save(snapshots, round, rounds, round, local)
    snapshots.close()
    snapshots = checkpoint.Snapshots(tmp_path / 's')
    found = snapshots.newest(
      state(), jax.tree.map(np.zeros_like, local), rounds
    )
    snapshots.close()
  assert found.round == 9
  assert found.ledger == {'bytes_up': 9}
  assert digest.digest(found.state) == digest.digest(state(9))
  assert jax.tree.structure(found.state) == jax.tree.structure(state(9))
  np.testing.assert_array_equal(found.local['residual'], local['residual'])
  found.local['residual'][0] = 7  # the simulator writes in place


def test_snapshots_of_another_log_are_skipped(tmp_path, caplog):
  snapshots = checkpoint.Snapshots(tmp_path / 's')
  with rounds_log(tmp_path / 'a.log', 10) as rounds:
    save(snapshots, 3, rounds)
    save(snapshots, 9, rounds)
    snapshots.close()
  snapshots = checkpoint.Snapshots(tmp_path / 's')
  # the same first rounds, but fewer of them
  with rounds_log(tmp_path / 'short.log', 5) as rounds:
    assert snapshots.newest(state(), (), rounds).round == 3
  assert 'snapshot of round 9 skipped' in caplog.text
  other = log.Header(
    spec=keys.SPEC, base_digest='1' * 64, config={}, params=[],
    message=wire.describe(np.uint8(0)),
  )  # fmt: skip
  with log.RoundLog.create(tmp_path / 'other.log', other) as rounds:
    assert snapshots.newest(state(), (), rounds) is None
  snapshots.close()


def test_base_round_trip_and_wrong_bases(tmp_path):
  params = table.params()
  right = digest.digest(params)
  checkpoint.save_base(tmp_path / 'base', params)
  spec = wire.describe(params)
  found = checkpoint.load_base(tmp_path / 'base', spec, right)
  assert digest.digest(found) == right
  with pytest.raises(ValueError, match='the log starts from 000000000000'):
    checkpoint.load_base(tmp_path / 'base', spec, '0' * 64)
  with pytest.raises(ValueError, match='no usable base checkpoint'):
    checkpoint.load_base(tmp_path / 'nowhere', spec, right)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='no usable base checkpoint'):
    checkpoint.load_base(tmp_path / 'empty', spec, right)


def test_base_of_any_tree_comes_back_by_path(tmp_path):
  """Lists of more than ten, and paths that sort between others."""
  params = {
    'l': [np.full(2, i, np.float32) for i in range(12)],
    'l-1': np.ones(1, np.float32),
    'm': {'b': jnp.ones(2, jnp.bfloat16)},
  }
  checkpoint.save_base(tmp_path / 'base', params)
  (tmp_path / 'base.orbax-checkpoint-tmp-9').mkdir()  # of a crash
  checkpoint.save_base(tmp_path / 'base', params)
  found = checkpoint.load_base(
    tmp_path / 'base', wire.describe(params), digest.digest(params)
  )
  np.testing.assert_array_equal(found['l/10'], params['l'][10])
  assert [p.name for p in tmp_path.iterdir()] == ['base']


def test_base_written_on_a_device_that_is_not_here(tmp_path):
  """Orbax records where arrays were, and asks for these devices again."""
  params = {'w': jnp.arange(6.0)}
  checkpoint.save_base(tmp_path / 'base', params)
  record = tmp_path / 'base' / '_sharding'
  device = str(jax.devices()[0])
  assert device in record.read_text()
  record.write_text(record.read_text().replace(device, 'cuda:0'))
  found = checkpoint.load_base(
    tmp_path / 'base', wire.describe(params), digest.digest(params)
  )
  np.testing.assert_array_equal(found['w'], params['w'])
