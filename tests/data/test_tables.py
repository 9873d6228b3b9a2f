"""Tables of numbers: what is read, held out, scaled, and refused."""

import gzip
import zipfile

import numpy as np
import pytest

from jaxfl.data import arrays, known_tables, tables
from tests.data import tiny

CSV = 'size, who,price\n1,a,10\n2,b,20\n3,a,30\n4,b,40\n5,a,50\n'


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  data = text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def both(table, part='x'):
  """Train and test rows together."""
  return np.concatenate(
    [getattr(table, f'{part}_{split}') for split in ('train', 'test')]
  )


class TestSplit:
  def test_a_fifth_is_held_out_and_every_row_is_there_once(self):
    x, y = np.arange(50.0).reshape(25, 2), np.arange(25.0)
    table = tables.split(x, y, groups={'who': list('abcde') * 5})
    assert (len(table.y_train), len(table.y_test)) == (20, 5)
    assert sorted(both(table, 'y')) == sorted(y)
    for part in ('train', 'test'):
      own = getattr(table, f'y_{part}')
      assert (np.diff(own) > 0).all()  # the order of the file
      np.testing.assert_array_equal(getattr(table, f'x_{part}')[:, 0], 2 * own)
    who = ['abcde'[int(i) % 5] for i in table.y_train]
    assert table.groups == {'who': who}

  def test_it_follows_from_the_number_of_rows_alone(self):
    rng = np.random.default_rng(0)
    rows = np.arange(40)
    one = tables.split(rng.normal(size=(40, 3)), rows)
    other = tables.split(rng.normal(size=(40, 1)) * 1e6, rows)
    np.testing.assert_array_equal(one.y_test, other.y_test)
    # no run of rows, and pinned: figures of other days are of the same rows
    assert one.y_test.tolist() == [6, 7, 10, 12, 26, 27, 29, 33]

  def test_one_row_is_too_few(self):
    with pytest.raises(ValueError, match='1 rows; two at least'):
      tables.split(np.zeros((1, 1)), np.zeros(1))
    assert len(tables.split(np.zeros((2, 1)), np.zeros(2)).y_test) == 1


class TestCsv:
  @pytest.mark.parametrize(
    ('name', 'text'),
    [
      ('t.csv', CSV),
      ('t.csv.gz', CSV),
      ('t.tsv', CSV.replace(',', '\t')),
      ('t.csv', '\ufeff' + CSV.replace('\n', '\r\n')),
    ],
  )
  def test_all_other_columns_are_features(self, name, text, tmp_path):
    path = write(tmp_path / name, text)
    table = tables.load_csv(path, 'price', group='who')
    np.testing.assert_array_equal(both(table)[:, 0] * 10, both(table, 'y'))
    assert both(table).shape == (5, 1)
    assert table.label_names == ()
    assert table.groups == {
      'who': ['ab'[int(n) % 2 == 0] for n in table.x_train[:, 0]]
    }

  def test_classes_have_names(self, tmp_path):
    text = 'a,b,kind\n' + ''.join(f'{i},0,{"xyz"[i % 3]}\n' for i in range(9))
    path = write(tmp_path / 't.csv', text)
    table = tables.load_csv(path, 'kind', label_names=('z', 'x', 'y'))
    np.testing.assert_array_equal(both(table, 'y'), (both(table)[:, 0] + 1) % 3)
    assert table.y_train.dtype == np.int32
    assert table.label_names == ('z', 'x', 'y')
    assert table.groups['label'] == table.y_train.tolist()

  @pytest.mark.parametrize(
    ('text', 'target', 'options', 'message'),
    [
      (CSV, 'cost', {}, r"no column 'cost'; it has \['size', 'who', 'price'\]"),
      (CSV, 'price', {'group': 'city'}, "no column 'city'"),
      (CSV, 'price', {}, "line 2, column 'who': 'a' is no .* leave the column"),
      (CSV, 'who', {}, "line 2, column 'who': 'a' .* with --label_names"),
      (CSV, 'who', {'label_names': (*'ac',)}, "column 'who', row 2: label 'b'"),
      (CSV, 'who', {'label_names': (*'a',)}, 'two or more different names'),
      (CSV, 'who', {'label_names': (*'aa',)}, 'two or more different names'),
      ('a,b\n1,2\n\n3,\n', 'a', {}, "line 4, column 'b': '' is no finite"),
      ('a,b\n1,2\n3,nan\n', 'b', {}, "line 3, column 'b': 'nan'"),
      ('a,b\n1,2\n3,1e39\n', 'b', {}, "line 3, column 'b': '1e39'"),
      ('a,b\n1,2\n3,2\n', 'b', {}, "column 'b' is 2.0 in all rows"),
      ('a,b\n1,2\n3\n', 'a', {}, 'line 3: 1 cells, but the header has 2'),
      ('a,a\n1,2\n', 'a', {}, 'each once'),
      ('a,\n1,2\n', 'a', {}, 'name all columns'),
      ('a,b\n', 'a', {}, 'a header, but no rows'),
      ('a\n1\n2\n', 'a', {}, 'no columns for features'),
      ('', 'a', {}, 'empty'),
      ('a,b\n1,"2\n' + 'x' * 200_000, 'a', {}, 'line 3: field larger'),
    ],
  )
  def test_what_is_refused(self, text, target, options, message, tmp_path):
    path = write(tmp_path / 't.csv', text)
    with pytest.raises(ValueError, match=message):
      tables.load_csv(path, target, **options)

  def test_a_file_that_is_not_there(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no table at .*gone\.csv'):
      tables.load_csv(tmp_path / 'gone.csv', 'a')


class TestScale:
  TABLE = tables.Table(
    np.array([[0.0, 5, 1], [2, 5, 3], [4, 5, 8]]),
    np.array([-2.0, 1, 2]),
    np.array([[8.0, 6, 1]]),
    np.array([6.0]),
    (),
    {},
  )

  def test_by_the_extremes_of_the_train_rows(self):
    got = tables.scale(self.TABLE, 'minmax')
    want = [[-1, 0, -1], [0, 0, -3 / 7], [1, 0, 1]]
    np.testing.assert_allclose(got.x_train, want, rtol=1e-6)
    np.testing.assert_allclose(got.x_test, [[3, 1, -1]], rtol=1e-6)
    np.testing.assert_array_equal(got.y_train, np.float32([0, 0.75, 1]))
    np.testing.assert_array_equal(got.y_test, [2])

  def test_by_their_mean_and_variance(self):
    got = tables.scale(self.TABLE, 'standard')
    np.testing.assert_allclose(got.x_train.mean(0), 0, atol=1e-7)
    np.testing.assert_allclose(got.x_train.std(0), [1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(got.x_test[0, :2], [6 / (8 / 3) ** 0.5, 1])
    np.testing.assert_array_equal(got.y_train, [-1, 0.5, 1])

  def test_not_at_all(self):
    got = tables.scale(self.TABLE, 'none')
    for name in ('x_train', 'y_train', 'x_test', 'y_test'):
      np.testing.assert_array_equal(
        getattr(got, name), getattr(self.TABLE, name)
      )
      assert getattr(got, name).dtype == np.float32
    with pytest.raises(ValueError, match="feature_scaling .* got 'auto'"):
      tables.scale(self.TABLE, 'auto')

  def test_classes_stay(self):
    table = self.TABLE._replace(
      y_train=np.int32([2, 0, 1]), y_test=np.int32([1]), label_names=('a', 'b')
    )
    got = tables.scale(table, 'minmax')
    assert got.y_train.tolist() == [2, 0, 1]
    assert got.y_train.dtype == np.int32


def test_the_whole_of_a_client():
  x = np.arange(12.0).reshape(6, 2)
  partition = [np.array([4]), np.array([0, 2, 5]), np.array([1, 3])]
  task = arrays.task(
    {'x': x}, {'x': x[:1]}, partition, name='t', eval_batch_size=1
  )
  assert task.whole is not None
  for client, own in enumerate(partition):
    batch = task.whole(client)
    assert batch['x'].shape == (3, 2)
    assert batch['example_weight'].dtype == np.float32
    assert batch['example_weight'].sum() == task.num_examples[client]
    np.testing.assert_array_equal(batch['x'][: len(own)], x[own])
    np.testing.assert_array_equal(batch['x'][len(own) :], x[own[:1]].repeat(
      3 - len(own), 0))  # fmt: skip
    assert (batch['example_weight'][: len(own)] == 1).all()


HOUSES = (
  'longitude,latitude,housing_median_age,total_rooms,total_bedrooms,population,'
  'households,median_income,median_house_value,ocean_proximity\n'
  '-119.5,37,26,1000,,500,200,7.5,250000.5,INLAND\n'
  '-114,42,52,4000,100,9000,100,15.0001,500001,ISLAND\n'
)


class TestKnown:
  def test_houses(self, tmp_path):
    write(tmp_path / 'california_housing' / 'housing.csv', HOUSES)
    table = known_tables.load('california_housing', tmp_path)
    order = np.argsort(both(table, 'y'))
    # the middle of every range but 500 of 5,000 persons, 2.5 of 6 in a home
    want = [[0, 0, 0, 0, -0.8, -1 / 6, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1]]
    np.testing.assert_allclose(both(table)[order], want, atol=1e-6)
    np.testing.assert_allclose(both(table, 'y')[order], [0.5, 1])
    assert table.x_train.dtype == table.y_train.dtype == np.float32
    assert table.groups['ocean_proximity'][0] in ('INLAND', 'ISLAND')

  @pytest.mark.parametrize('years', [('',), range(2011, 2016)])
  def test_turbines(self, years, tmp_path):
    names = [
      f'gt_{year}' if year else 'gas_turbine_2011_2015' for year in years
    ]
    middle = '15,1010,50,5,30,1055,532.5,140,12.5,22.5,60'
    for name in names:
      header = 'AT,AP,AH,AFDP,GTEP,TIT,TAT,TEY,CDP,CO,NOX'
      write(
        tmp_path / 'gas_turbine' / f'{name}.csv',
        f'{header}\n{middle}\n{middle}\n',
      )
    table = known_tables.load('gas_turbine', tmp_path)
    np.testing.assert_allclose(both(table), np.zeros((2 * len(names), 9)))
    np.testing.assert_allclose(both(table, 'y'), 0.5)

  def sensors(self, folder, number, label, value, count=128):
    pairs = ' '.join(f'{i}:{value}' for i in range(1, count + 1))
    write(
      folder / 'gas_sensor_drift' / f'batch{number}.dat.gz',
      f'{label} {pairs}\n' * 2,
    )

  def test_sensors(self, tmp_path):
    self.sensors(tmp_path, 1, '1', 0)
    self.sensors(tmp_path, 10, '6;50.0', -100)
    table = known_tables.load('gas_sensor', tmp_path)
    assert table.label_names == tuple('123456')
    assert sorted(both(table, 'y')) == [0, 0, 5, 5]
    x = both(table)[both(table, 'y') == 5]
    large, larger = -np.log(101) / np.log(1001), -np.log(101) / np.log(1000001)
    want = [larger, -1, -1, -1, large, -1, -1, large] * 16
    np.testing.assert_allclose(x, [want, want], rtol=1e-6)
    batch = np.array(table.groups['batch'])
    np.testing.assert_array_equal(batch == 10, table.y_train == 5)
    np.testing.assert_array_equal(table.groups['label'], table.y_train)

  def test_blogs(self, tmp_path):
    folder = tmp_path / 'blogfeedback'
    line = ','.join(['-9999'] * 50 + ['99'] * 12 + ['1'] * 214 + ['0'] * 4)
    write(folder / 'blogData_train.csv', f'{line},15\n{line},0\n')
    with zipfile.ZipFile(folder / 'blogData_test.zip', 'w') as archive:
      archive.writestr('Test/blogData_test-2012.csv', f'{line},3000\n')
      archive.writestr('__MACOSX/Test/._blogData_test-2012.csv', 'no table')
    table = known_tables.load('blogfeedback', tmp_path)
    assert (table.x_train.shape, table.x_test.shape) == ((2, 280), (1, 280))
    np.testing.assert_allclose(table.y_train, [0.01, 0])
    np.testing.assert_array_equal(table.y_test, [1])
    x = table.x_test[0]
    np.testing.assert_allclose(x[:50], -1, rtol=1e-4)
    np.testing.assert_allclose(x[50:60], 0.5, rtol=1e-4)
    assert x[60] == 1
    np.testing.assert_allclose(x[61], 0.4, rtol=1e-4)
    assert (x[62:276] == 1).all()
    assert (x[276:] == 0).all()

  def test_a_row_is_scaled_whatever_the_others_are(self):
    rng = np.random.default_rng(0)
    for known in known_tables.NAMES.values():
      width = {'california_housing': 8, 'gas_turbine': 9}.get(known.folder)
      width = width or (280 if known.folder == 'blogfeedback' else 128)
      x = rng.normal(size=(4, width)) * 10.0 ** rng.integers(-2, 7, (4, width))
      got = known.features(x)
      np.testing.assert_array_equal(got[2:3], known.features(x[2:3]))
      assert np.abs(got).max() == 1

  @pytest.mark.parametrize(
    ('name', 'files', 'message'),
    [
      ('california_housing', {}, 'no housing.csv .*california_hou.* put it'),
      ('gas_turbine', {}, r'no gas_turbine_2011_2015.csv, or gt_2011.csv'),
      ('gas_turbine', {'gt_2011.csv': ','.join('abcdefghijk') + '\n' + '1,' * 10
                       + '1\n'}, 'no gas_turbine_2011'),
      ('gas_turbine', {'gas_turbine_2011_2015.csv': 'a,b\n1,2\n'},
       '2 columns, expected 11'),
      ('gas_sensor', {}, 'no batch1.dat ... batch10.dat'),
      ('gas_sensor', {'batch2.dat': '7 1:2\n'}, 'batch2.dat, line 1: expected'),
      ('gas_sensor', {'batch2.dat': '1 hello\n'}, "line 1: .* got '1 hello'"),
      ('gas_sensor', {'batch2.dat': '\n1 1:2\n'}, 'line 1: expected'),
      ('blogfeedback', {}, 'no blogData_train'),
      ('blogfeedback', {'blogData_train.csv': '1,2\n'}, '281 .* got 2 columns'),
      ('blogfeedback', {'blogData_train.csv': '1,x\n'}, 'train.csv: .*x'),
      ('blogfeedback', {'blogData_train.csv.zip': 'x'}, 'not a whole zip'),
      ('california_housing', {'housing.csv': 'a,b\n1,2\n'},
       "no column 'households'"),
      ('california_housing', {'housing.csv': HOUSES.replace('9000', 'many')},
       "line 3, column 'population': 'many'"),
    ],
  )  # fmt: skip
  def test_files_that_are_missing_or_wrong(
    self, name, files, message, tmp_path
  ):
    folder = tmp_path / known_tables.NAMES[name].folder
    for file, text in files.items():
      write(folder / file, text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      known_tables.load(name, tmp_path)


@pytest.mark.parametrize(
  ('name', 'train', 'test', 'mean'),
  [
    ('california_housing', (16_512, 8), 4_128, 206_855.816909 / 500_001),
    ('gas_turbine', (29_386, 9), 7_347, 2.372468249 / 45),
    ('gas_sensor', (3_142, 128), 785, 2.115100586),
    ('blogfeedback', (52_397, 280), 7_624, 6.764719354 / 1500),
  ],
)
def test_the_files_themselves(name, train, test, mean):
  folder = tiny.shared_data(known_tables.NAMES[name].folder)
  table = known_tables.load(name, folder.parent)
  assert (table.x_train.shape, len(table.y_test)) == (train, test)
  assert table.x_train.dtype == np.float32
  y = table.y_train if name == 'blogfeedback' else both(table, 'y')
  np.testing.assert_allclose(y.mean(dtype=np.float64), mean, rtol=1e-5)
  # ranges are neither too wide nor too narrow to learn from
  size = np.abs(table.x_train)
  assert size.max() <= 1
  binary = 214 if name == 'blogfeedback' else 0
  ends = np.sort((size == 1).mean(0))
  assert ends[: len(ends) - binary].max() < 0.1
  assert np.median(table.x_train.std(0)) > 0.05
