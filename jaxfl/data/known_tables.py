"""Four public tables that private methods are measured on.

  * california_housing (20,640 rows, 8 features): the median house value of a
    district, `california_housing/housing.csv`.
  * gas_turbine (36,733 rows, 9 features): carbon monoxide in the exhaust,
    `gas_turbine/gas_turbine_2011_2015.csv`, or `gt_2011.csv` to `gt_2015.csv`.
  * gas_sensor (13,910 rows if all ten batches are there, 128 features): which
    of 6 gases it is, `gas_sensor_drift/batch*.dat`.
  * blogfeedback (52,397 rows and 7,624 to test, 280 features): comments within
    a day, `blogfeedback/blogData_train.csv` and `blogData_test-*.csv`.

Files are below `data_dir` and may be gzipped, those of blogfeedback in zip
files. Its test rows are the official ones; of the others `tables.split` holds
out a fifth.

**Ranges.** A range that is computed from the rows is a private output. The
ranges below are constants: features go to [-1, 1], targets to [0, 1], values
beyond are clipped. `_HOUSING` comes from what the numbers mean: the borders of
California, the codes of the census of 1990 (house values above $500,000 are
coded as 500,001, incomes end at 15, ages at 52). Humidity is a percentage, an
hour of a post one of 72. **For all others the only source is the files
themselves**: their extremes or orders of magnitude, rounded outwards or to
powers of ten, and for population and ratios of households round numbers that
few districts exceed. These files are public; for a private table such numbers
have to be agreed on without looking.

Housing has the features of scikit-learn's copy: income, age, rooms, bedrooms
and persons per household, population, latitude, longitude. The 207 districts
whose bedrooms the file leaves out get one per household, a constant. Its column
`ocean_proximity` and the `batch` of a gas sensor row are for partitions
(`groups`). The files of gas sensors may have the concentration after the class
(`1;10.0`); it is not used. Counts in gas_sensor and blogfeedback spread over
many orders of magnitude: their map is sign(x) log(1 + |x|).

References:
  Pace and Barry, "Sparse spatial autoregressions", Statistics and Probability
    Letters 33, 1997.
  Kaya, Tufekci and Uzun, "Predicting CO and NOx emissions from gas turbines:
    novel data and a benchmark PEMS", 2019,
    https://doi.org/10.3906/elk-1807-87.
  Vergara et al., "Chemical gas sensor drift compensation using classifier
    ensembles", 2012, https://doi.org/10.1016/j.snb.2012.01.074.
  Buza, "BlogFeedback", https://archive.ics.uci.edu/dataset/304.
"""

import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import numpy as np

from jaxfl.data import files, tables

# lowest and highest value of every feature, and highest of the target
_HOUSING = (
  (0, 15),  # median income, 10,000 dollars
  (0, 52),  # median age of houses, years
  (0, 10),  # rooms per household
  (0, 2),  # bedrooms per household
  (0, 5000),  # population of the district
  (0, 6),  # persons per household
  (32, 42),  # latitude
  (-125, -114),  # longitude
)
_HOUSING_TARGET = 500_001  # dollars
_TURBINE = (
  (-10, 40),  # ambient temperature, Celsius
  (980, 1040),  # ambient pressure, mbar
  (0, 100),  # ambient humidity, per cent
  (2, 8),  # air filter difference pressure, mbar
  (15, 45),  # exhaust pressure, mbar
  (1000, 1110),  # inlet temperature, Celsius
  (510, 555),  # after temperature, Celsius
  (100, 180),  # energy yield, MWh; copies of the file swap it and the next
  (9, 16),  # compressor discharge pressure, mbar
)
_TURBINE_TARGET = 45  # mg of CO per cubic metre
# magnitudes of a sensor's eight features: change, relative change, and moving
# averages of three rates while the response rises and while it falls
_SENSOR = np.array([1e6, 1e2, 1e2, 1e2, 1e3, 1e2, 1e2, 1e3])
_SENSOR_FEATURES = 128
_SENSOR_GASES = tuple('123456')
# magnitudes of runs of features: statistics of counts of comments and links,
# counts, hours since the post, its length, words and weekdays, parent pages
_BLOG = ((50, 1e4), (10, 1e4), (1, 72), (1, 1e5), (214, 1), (4, 1e4))
_BLOG_TARGET = 1500  # comments


class Known(NamedTuple):
  """A data set.

  Attributes:
    folder: below the data, with its files.
    read: the folder -> a table as in the files.
    features: float[N, D] -> [-1, 1], by constants.
    target: what is made 1; None for classes.
  """

  folder: str
  read: Callable[[pathlib.Path], tables.Table]
  features: Callable[[np.ndarray], np.ndarray]
  target: float | None


def _linear(ranges):
  low, high = np.array(ranges, np.float64).T
  return lambda x: 2 * (np.clip(x, low, high) - low) / (high - low) - 1


def _logarithmic(magnitudes):
  def squash(x):
    logs = np.sign(x) * np.log1p(np.abs(x)) / np.log1p(magnitudes)
    return np.clip(logs, -1, 1)

  return squash


def _housing(folder):
  path = files.find(folder, 'housing.csv') or _missing(folder, 'housing.csv')
  cells = tables.read_csv(path)
  homes = tables.column(cells, 'households')
  beds = tables.column(cells, 'total_bedrooms')
  beds = tuple(b or h for b, h in zip(beds, homes, strict=True))
  cells.columns['total_bedrooms'] = beds
  get = lambda name: tables.numbers(cells, name)
  households, people = np.maximum(get('households'), 1), get('population')
  x = np.stack(
    [
      get('median_income'),
      get('housing_median_age'),
      get('total_rooms') / households,
      get('total_bedrooms') / households,
      people,
      people / households,
      get('latitude'),
      get('longitude'),
    ],
    axis=1,
  )
  near = tables.column(cells, 'ocean_proximity')
  return tables.split(
    x, get('median_house_value'), groups={'ocean_proximity': near}
  )


def _turbine(folder):
  years = [f'gt_{year}.csv' for year in range(2011, 2016)]
  merged = files.find(folder, 'gas_turbine_2011_2015.csv')
  paths = [merged] if merged else [files.find(folder, name) for name in years]
  found = []
  for path in paths:
    if path is None:
      _missing(folder, f'gas_turbine_2011_2015.csv, or {", ".join(years)}')
    cells = tables.read_csv(path)
    if len(cells.columns) != 11:
      raise ValueError(f'{path}: {len(cells.columns)} columns, expected 11')
    names = list(cells.columns)[:10]
    found.append(np.stack([tables.numbers(cells, n) for n in names], axis=1))
  rows = np.concatenate(found)
  return tables.split(rows[:, :9], rows[:, 9])


def _sensor(folder):
  x, y, batch = [], [], []
  for number in range(1, 11):
    if (path := files.find(folder, f'batch{number}.dat')) is None:
      continue
    for line, text in enumerate(files.read_text(path).splitlines(), 1):
      label, *pairs = text.split() or ['']
      label = label.split(';')[0]
      try:
        places, values = zip(*(pair.split(':') for pair in pairs), strict=True)
        row = np.array(values, np.float64)
        good = list(map(int, places)) == list(range(1, _SENSOR_FEATURES + 1))
      except ValueError:
        row, good = np.zeros(0), False
      if not good or not np.isfinite(row).all() or label not in _SENSOR_GASES:
        raise ValueError(
          f'{path}, line {line}: expected a class from 1 to 6 and'
          f' {_SENSOR_FEATURES} features, as in "1 1:0.5 2:0.1 ..."; got'
          f' {text[:40]!r}'
        )
      x.append(row)
      y.append(int(label) - 1)
      batch.append(number)
  if not x:
    _missing(folder, 'batch1.dat ... batch10.dat')
  return tables.split(
    np.stack(x),
    np.array(y, np.int32),
    label_names=_SENSOR_GASES,
    groups={'batch': batch, 'label': y},
  )


def _blog(folder):
  train, test = (
    np.concatenate(
      [_blog_rows(name, data) for name, data in _members(folder, prefix)]
      or _missing(folder, f'{prefix}*.csv, or a zip file with them')
    )
    for prefix in ('blogData_train', 'blogData_test')
  )
  return tables.Table(
    train[:, :-1], train[:, -1], test[:, :-1], test[:, -1], (), {}
  )


def _blog_rows(name, data):
  try:
    rows = np.loadtxt(io.BytesIO(data), np.float32, delimiter=',', ndmin=2)
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error
  if rows.shape[1] != 281 or not np.isfinite(rows).all():
    raise ValueError(
      f'{name}: expected 281 finite numbers a line, got {rows.shape[1]} columns'
    )
  return rows


def _members(
  folder: pathlib.Path, prefix: str
) -> Iterator[tuple[pathlib.Path, bytes]]:
  """Names and bytes of the csv files whose names begin with a prefix."""
  paths = sorted(folder.iterdir()) if folder.is_dir() else []
  for path in (p for p in paths if p.name.startswith(prefix)):
    if path.suffix != '.zip':
      if '.csv' in path.suffixes:
        yield path, files.read_bytes(path)
      continue
    try:
      with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
          inner = pathlib.PurePath(name).name
          if inner.startswith(prefix) and inner.endswith('.csv'):
            yield path / name, archive.read(name)
    except zipfile.BadZipFile as error:
      raise ValueError(f'{path}: not a whole zip file: {error}') from error


def _missing(folder: pathlib.Path, names: str) -> NoReturn:
  raise FileNotFoundError(
    f'no {names} (or .gz) in {str(folder)!r}; put it there, below --data_dir'
  )


NAMES = {
  'california_housing': Known(
    'california_housing', _housing, _linear(_HOUSING), _HOUSING_TARGET
  ),
  'gas_turbine': Known(
    'gas_turbine', _turbine, _linear(_TURBINE), _TURBINE_TARGET
  ),
  'gas_sensor': Known(
    'gas_sensor_drift', _sensor, _logarithmic(np.tile(_SENSOR, 16)), None
  ),
  'blogfeedback': Known(
    'blogfeedback',
    _blog,
    _logarithmic(np.concatenate([np.full(n, b) for n, b in _BLOG])),
    _BLOG_TARGET,
  ),
}


def load(
  name: str, data_dir: str | os.PathLike, scaling: str = 'auto'
) -> tables.Table:
  """Reads a data set.

  Args:
    name: one of `NAMES`.
    data_dir: the folder with the folder of the data set.
    scaling: `auto` for the constants above, else as in `tables.scale`.

  Returns:
    A float32 table.

  Raises:
    FileNotFoundError: saying which files belong where.
    ValueError: naming the file and the line that is wrong.
  """
  known = NAMES[name]
  table = known.read(pathlib.Path(data_dir).expanduser() / known.folder)
  if scaling != 'auto':
    return tables.scale(table, scaling)
  x_train, x_test = (
    known.features(x).astype(np.float32) for x in (table.x_train, table.x_test)
  )
  if known.target is None:
    return table._replace(x_train=x_train, x_test=x_test)
  y_train, y_test = (
    (np.clip(y, 0, known.target) / known.target).astype(np.float32)
    for y in (table.y_train, table.y_test)
  )
  return tables.Table(x_train, y_train, x_test, y_test, (), table.groups)
