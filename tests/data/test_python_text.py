"""The default task: splits, addresses of batches, the user's own text."""

import numpy as np
import pytest

from jaxfl.data import batching, python_text


def _texts(folder, sizes):
  """Files of lines that never repeat, in folders `a`, `b` ..."""
  rng = np.random.default_rng(0)
  for name, size in zip('abcdef', sizes, strict=False):
    (folder / name).mkdir()
    data = rng.integers(32, 127, size, np.uint8)
    data[79::80] = ord('\n')
    (folder / name / 'text.txt').write_bytes(data.tobytes())
  return folder


@pytest.mark.parametrize('num_clients', [1, 5, 8, 100])
def test_any_number_of_clients(num_clients):
  task = python_text.load(num_clients)
  assert task.num_examples.shape == (num_clients,)
  assert len(task.client_names) == num_clients
  assert task.num_examples.min() > 0
  assert task.num_examples.sum() == python_text.load(8).num_examples.sum()
  assert task.digest == python_text.load(8).digest
  last = task.batches(0, num_clients - 1, 0, 2, 3)['tokens']
  assert (last.shape, last.dtype) == ((2, 3, 129), np.uint8)


def test_more_clients_than_blocks_share_blocks():
  task = python_text.load(2000)
  assert task.num_examples.min() > 0


def test_eight_clients_are_the_packages():
  assert python_text.load(8).client_names == python_text.PACKAGES


def test_batches_depend_on_their_address_alone():
  task, again = python_text.load(8, length=32), python_text.load(8, length=32)
  first = task.batches(7, 3, 11, 2, 4)['tokens']
  task.batches(7, 3, 12, 1, 1)
  np.testing.assert_array_equal(first, again.batches(7, 3, 11, 2, 4)['tokens'])
  for address in [(8, 3, 11), (7, 4, 11), (7, 3, 12)]:
    assert (first != task.batches(*address, 2, 4)['tokens']).any()


@pytest.mark.parametrize('address', [(-1, 0, 0), (0, 2**32, 0), (0, 0, -1)])
def test_addresses_out_of_range(address):
  with pytest.raises(ValueError, match='out of range'):
    batching.generator(*address)


def test_windows_are_uniform_and_stay_inside_their_text():
  texts = [np.arange(5, dtype=np.uint8), np.arange(10, 14, dtype=np.uint8)]
  windows = batching.Windows(texts, 2)
  drawn = windows.draw(np.random.default_rng(0), (5000,))
  starts, counts = np.unique(drawn[:, 0], return_counts=True)
  assert starts.tolist() == [0, 1, 2, 10, 11]
  assert (drawn == drawn[:, :1] + np.arange(3)).all()
  assert abs(counts - 1000).max() < 5 * np.sqrt(800)


def test_clients_and_held_out_text_are_disjoint(tmp_path):
  length = 16
  path = _texts(tmp_path, [40_000, 9_000, 5_000])
  task = python_text.from_files(path, 5, length=length, eval_examples=60)
  seen = [
    {
      row.tobytes()
      for row in task.batches(0, c, 0, 1, 4000)['tokens'].reshape(
        -1, length + 1
      )
    }
    for c in range(5)
  ]
  held_out = task.eval_batches['tokens'].reshape(-1, length + 1)
  seen.append({row.tobytes() for row in held_out})
  assert len(seen[-1]) == len(held_out)
  assert sum(map(len, seen)) == len(set.union(*seen))


def test_sub_folders_are_clients_and_files_where_there_are_none(tmp_path):
  path = _texts(tmp_path, [9_000, 9_000])
  assert python_text.from_files(path).client_names == ('a', 'b')
  task = python_text.from_files(path / 'a')
  assert (task.name, task.client_names) == ('a', ('text.txt',))


def test_errors_name_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no folder at .*nowhere'):
    python_text.from_files(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='no files in'):
    python_text.from_files(tmp_path)
  (tmp_path / 'short.txt').write_text('too short')
  with pytest.raises(ValueError, match=r"text of 'short.txt' is too short"):
    python_text.from_files(tmp_path)
  with pytest.raises(ValueError, match='num_clients must be positive'):
    python_text.load(0)


def test_a_python_without_source_is_an_error(monkeypatch, tmp_path):
  monkeypatch.setattr(
    python_text.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)}
  )
  with pytest.raises(FileNotFoundError, match='has no source files'):
    python_text.load()
