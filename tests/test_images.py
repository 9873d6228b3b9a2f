"""Images in idx files, as a data set of the launchers."""

import gzip
import struct

import numpy as np
import pytest

from experiments import defaults, problem, replay, runner
from experiments.config import UsageError, from_mapping
from jaxfl import digest
from jaxfl.data import images
from tests.data import tiny

pytestmark = pytest.mark.fast_compile

SIDE = 8


def write_idx(path, x):
  """Writes uint8[...] in the format, gzipped if the name ends in .gz."""
  header = bytes([0, 0, 8, x.ndim]) + struct.pack(f'>{x.ndim}I', *x.shape)
  data = header + x.astype(np.uint8).tobytes()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


def write_pair(folder, pair, x, y, suffix=''):
  folder.mkdir(parents=True, exist_ok=True)
  write_idx(folder / f'{pair}-images-idx3-ubyte{suffix}', x)
  write_idx(folder / f'{pair}-labels-idx1-ubyte{suffix}', y)


def draw(count, seed=0):
  """Images whose label, 0 to 2, is the row that is bright."""
  rng = np.random.default_rng(seed)
  y = np.resize(np.arange(3), count)
  x = rng.integers(0, 60, (count, SIDE, SIDE))
  x[np.arange(count), 2 * y + 1] += 180
  return x.astype(np.uint8), y


@pytest.fixture
def folder(tmp_path):
  write_pair(tmp_path / 'data', 'train', *draw(90), '.gz')
  write_pair(tmp_path / 'data', 't10k', *draw(33, 1))
  return tmp_path / 'data'


def config_of(folder, **settings):
  fixed = {
    'dataset': str(folder), 'num_clients': 3, 'num_rounds': 2,
    'batch_size': 4, 'eval_every': 1, 'learning_rate': 1e-3,
  }  # fmt: skip
  return defaults.resolve(from_mapping(fixed | settings))


def test_both_pairs_are_read_as_they_are(folder):
  (x_train, y_train), (x_test, y_test) = draw(90), draw(33, 1)
  data = images.load(folder)
  np.testing.assert_array_equal(data.x_train, x_train)
  np.testing.assert_array_equal(data.y_train, y_train)
  np.testing.assert_array_equal(data.x_test, x_test)
  np.testing.assert_array_equal(data.y_test, y_test)
  assert data.split_again is None
  assert (data.x_train.dtype, data.y_train.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize('pair', ['train', 't10k'])
def test_one_pair_alone_is_split_again(pair, tmp_path):
  x, y = draw(100)
  write_pair(tmp_path, pair, x, y)
  data = images.load(tmp_path)
  assert data.split_again == pair
  assert (len(data.y_train), len(data.y_test)) == (85, 15)
  assert np.bincount(data.y_test).tolist() == [5, 5, 5]
  # every image once, in the order of the file
  both = [*data.x_train.tolist(), *data.x_test.tolist()]
  assert sorted(both) == sorted(x.tolist())
  kept, held = images.again(y)
  np.testing.assert_array_equal(data.x_test, x[held])
  np.testing.assert_array_equal(data.x_train, x[kept])
  assert (np.diff(held) > 0).all()
  # all over the file: of every label the 4th, 10th, 17th ... of 33 or 34
  np.testing.assert_array_equal(held[y[held] == 0] // 3, [3, 10, 16, 23, 30])


def test_batches_are_functions_of_their_address(folder):
  found = problem.build(config_of(folder))
  task = found.task
  batch = task.batches(5, 1, 7, 3, 4)
  assert batch['images'].shape == (3, 4, SIDE, SIDE, 1)
  assert batch['images'].dtype == np.float32
  assert batch['label'].shape == (3, 4)
  again = task.batches(5, 1, 7, 3, 4)
  assert all(np.array_equal(batch[k], again[k]) for k in batch)
  # the label is where the brightness is, in any order
  rows = batch['images'].mean((3, 4)).reshape(12, SIDE)
  np.testing.assert_array_equal(
    rows.argmax(1), 2 * batch['label'].reshape(12) + 1
  )
  assert task.eval_batches['images'].shape == (2, 32, SIDE, SIDE, 1)
  assert task.eval_batches['example_weight'].sum() == 33


@pytest.mark.parametrize(
  ('name', 'pixel', 'value'),
  [('mnist', 255, (1 - 0.1307) / 0.3081), ('mnist', 0, -0.1307 / 0.3081),
   ('letters', 255, 1.0), ('letters', 0, -1.0)],
)  # fmt: skip
def test_pixels_are_normalised(name, pixel, value):
  x = np.full((2, SIDE, SIDE), pixel, np.uint8)
  y = np.zeros(2, np.int32)
  task = images.task(
    images.Images(x, y, x, y, None),
    [np.arange(2)],
    name=name,
    eval_batch_size=2,
  )
  got = task.batches(0, 0, 0, 1, 2)['images']
  np.testing.assert_allclose(got, value, rtol=1e-6)


def test_a_run_learns_and_replays(folder, tmp_path):
  config = config_of(
    folder, method='fed_avg', learning_rate=0.2, local_steps=6, batch_size=8,
    num_rounds=3, partition='dirichlet', weighting='examples',
  )  # fmt: skip
  summary = runner.run(config, tmp_path / 'run')
  assert summary['after']['accuracy'] > 0.9 > summary['before']['accuracy']
  params, rounds, _ = replay.rebuild(tmp_path / 'run')
  assert rounds == 3
  assert digest.digest(params) == summary['digest']


@pytest.mark.slow
def test_a_zeroth_order_run_on_accuracy_replays(folder, tmp_path):
  config = config_of(
    folder, num_perturbations=2, objective='accuracy', model='cnn',
    forward_dtype='bfloat16',
  )  # fmt: skip
  summary = runner.run(config, tmp_path / 'run')
  params, rounds, _ = replay.rebuild(tmp_path / 'run')
  assert rounds == 2
  assert digest.digest(params) == summary['digest'] != summary['base_digest']


def test_partitions(folder):
  config = config_of(folder, partition='column', partition_column='label')
  found = problem.build(config)
  assert 'client 0: 0 30\n  client 1: 1 30' in found.notes
  found = problem.build(
    config_of(folder, partition='label', labels_per_client=1)
  )
  assert 'client 0: ' in found.notes
  assert [len({*found.task.batches(0, c, 0, 1, 30)['label'][0]}) for c in
          range(3)] == [1, 1, 1]  # fmt: skip


def test_names_are_looked_for_under_data_dir(folder, tmp_path):
  for place in ('root', 'root/mnist', 'root/MNIST/raw', 'root/mnist_t10k'):
    root = tmp_path / place.replace('/', '_').lower()
    write_pair(root / place.removeprefix('root').lstrip('/'), 't10k', *draw(40))
    config = config_of('mnist', data_dir=str(root))
    assert problem.kind_of(config) == 'images'
    found = problem.build(config)
    assert found.task.name == 'mnist'
    assert 't10k-images alone: split again, 34 to train' in found.notes
    assert 'not those of papers' in found.notes
  assert 'split again' not in problem.build(config_of(folder)).notes


def cut(path, end):
  path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda d: (d / 't10k-labels-idx1-ubyte').unlink(),
     'lacks t10k-labels-idx1-ubyte'),
    (lambda d: cut(d / 't10k-images-idx3-ubyte', 500),
     r'damaged; an array of \[33, 8, 8\] takes 2112 bytes, .* has 484'),
    (lambda d: cut(d / 't10k-images-idx3-ubyte', 9), 'no idx file of bytes'),
    (lambda d: cut(d / 't10k-images-idx3-ubyte', 0), 'begins with nothing'),
    (lambda d: cut(d / 'train-images-idx3-ubyte.gz', 500), 'not a whole gzip'),
    (lambda d: write_idx(d / 't10k-labels-idx1-ubyte', np.zeros((33, 1))),
     r'no idx file .* 00 00 08 02, expected 00 00 08 01'),
    (lambda d: write_idx(d / 't10k-labels-idx1-ubyte', np.zeros(32)),
     r'\[33, 8, 8\] .* \[32\]; expected'),
    (lambda d: write_pair(d, 't10k', np.zeros((0, 8, 8)), np.zeros(0)),
     'none of them 0'),
    (lambda d: write_pair(d, 't10k', np.zeros((3, 8, 9)), np.zeros(3)),
     'expected one size'),
  ],
)  # fmt: skip
def test_files_that_are_damaged_or_missing(spoil, message, folder):
  spoil(folder)
  with pytest.raises(UsageError, match=message):
    problem.build(config_of(folder))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'dataset': 'mnist'}, 'needs --data_dir'),
    ({'dataset': 'fashion_mnist', 'data_dir': 'no'}, 'no images of fashion'),
    ({'model': 'gpt2'}, 'leave model out, or say cnn'),
    ({'objective': 'f1'}, 'loss or accuracy'),
    ({'partition': 'column'}, 'needs partition_column'),
    ({'num_clients': 91}, '90'),
  ],
)
def test_settings_that_do_not_fit(settings, message, folder):
  with pytest.raises(UsageError, match=message):
    problem.build(config_of(**{'folder': folder} | settings))


def test_too_few_images_to_split():
  with pytest.raises(ValueError, match='6 images are too few'):
    images.again(np.zeros(6))
  kept, held = images.again(np.zeros(7))
  assert (len(kept), held.tolist()) == (6, [3])


def test_settings_of_text_are_refused(folder):
  with pytest.raises(UsageError, match='adapter does not apply to dataset'):
    config_of(folder, adapter='lora')


def test_mnists_own_test_images():
  data = images.load(tiny.shared_data('mnist_t10k'))
  assert data.split_again == 't10k'
  assert data.x_train.shape == (8500, 28, 28)
  assert data.x_test.shape == (1500, 28, 28)
  assert np.bincount(data.y_test).tolist() == [
    147, 170, 155, 152, 147, 134, 143, 155, 146, 151
  ]  # fmt: skip
