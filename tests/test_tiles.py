import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxfl.kernels import tiles, xla  # pyright: ignore[reportMissingImports]

from jaxfl import keys, perturb
from tests import reference

EXACT = ['rademacher', 'popcount16']
ALL = [*EXACT, 'gaussian']
SHAPES = {
  'empty': (0, 5),
  'ragged': (2, 83, 7),
  'scalar': (),
  'vector': (600,),
}
SIZE = 300  # entries of a tile


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  monkeypatch.setattr(tiles, 'SIZE', SIZE)


def is_shape(x):
  return isinstance(x, tuple)


def normals(seed=0, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  make = lambda shape: np.asarray(rng.normal(size=shape), np.float32)
  return jax.tree.map(make, shapes, is_leaf=is_shape)


def directions(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(2**32, size=(count, 2), dtype=np.uint32)


def assert_same_bits(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.tobytes() == expected.tobytes()


def inner_products(delta, ds, distribution):
  """float64[K], from the reference."""
  return np.array(
    [
      sum(
        np.sum(reference.field(d, path, x.shape, distribution) * np.float64(x))
        for path, x in keys.named_leaves(delta)
      )
      for d in ds
    ]
  )


@pytest.mark.parametrize(
  'shape',
  [
    *[(1, 1), (1, 299), (1, 300), (1, 301), (1, 1500), (1, 1501), (2, 997)],
    *[(63, 5), (64, 4), (64, 5), (640, 1), (700, 4), (3200, 33), (129, 129)],
  ],
)
def test_tiles_cover_a_rectangle_once(shape):
  seen = np.zeros((64 + shape[0], 7 + shape[1]), int)
  cut = tiles.cut(((64, 7), shape))
  for (row, col), (rows, cols) in cut:
    assert row % 64 == 0
    assert rows * cols <= SIZE
    seen[row : row + rows, col : col + cols] += 1
  assert (seen[64:, 7:] == 1).all()
  assert seen.sum() == np.prod(shape)
  assert len({size for _, size in cut}) <= 4


def test_tiles_of_usual_sizes_have_one_shape(monkeypatch):
  monkeypatch.setattr(tiles, 'SIZE', 2**17)
  for rows, cols in itertools.product([768, 3072, 4096], [768, 3200, 16384]):
    sizes = {size for _, size in tiles.cut(((0, 0), (rows, cols)))}
    assert len(sizes) == 1
    assert np.prod(next(iter(sizes))) >= 2**16


@pytest.mark.parametrize('distribution', EXACT)
def test_tiles_do_not_change_the_bits(distribution):
  params, ds = normals(), directions(11)
  coefficients = np.linspace(-0.3, 0.7, 11).astype(np.float32)
  params['narrow'] = jnp.asarray(params['vector'], jnp.bfloat16)
  run = lambda name: jax.jit(
    lambda params: perturb.replay(
      params,
      ds,
      coefficients,
      distribution=distribution,
      implementation=name,
    )
  )(params)
  tiled = run('xla_tiles')
  jax.tree.map(assert_same_bits, tiled, run('xla'))
  for path in SHAPES:
    w = params[path]
    for d, c in zip(ds, coefficients, strict=True):
      w = np.asarray(reference.perturb(w, d, path, c, distribution))
    assert_same_bits(tiled[path], w)


@pytest.mark.parametrize('dtype', ['float32', 'int32'])
def test_signs_are_added_together_as_one_by_one(dtype):
  rng, ks = np.random.default_rng(0), jnp.asarray(directions(8))
  whole = dtype == 'int32'
  one, kind = (xla.add_units, np.int32) if whole else (xla.add, np.float32)
  start = jnp.asarray(-rng.integers(0, 9, (83, 7)).astype(np.float32), dtype)
  assert whole or np.signbit(start[start == 0]).all()
  amounts = rng.integers(-(2**31), 2**31, 8) if whole else rng.normal(size=8)
  amounts = jnp.asarray(amounts, kind).at[3].set(0)
  w, together = start, jax.jit(functools.partial(xla.add_signs, offset=(64, 3)))
  for count in range(9):
    assert_same_bits(together(start, ks, amounts, count), w)
    if count < 8:
      w = one(
        w, ks[count], amounts[count], distribution='rademacher', offset=(64, 3)
      )


@pytest.mark.parametrize('traced', [False, True])
def test_rectangles_take_their_spans(traced):
  # full passes, remainders, one and none, of both kinds
  spans = np.array([[0, 19], [19, 20], [20, 20], [21, 37]])
  rectangles = [((64 * i, 0), (64, 9)) for i in range(4)]
  ks = jnp.asarray(directions(40))
  units = np.random.default_rng(0).integers(-99, 99, 40).astype(np.int32)
  w = np.zeros((256, 9), np.float32)
  scale = np.float32(1), np.float32(1)

  def run(spans, tiled):
    plan = tiles.Plan(rectangles, spans, tiled)
    kind = {'distribution': 'rademacher'}
    new, fits = tiles.add_units(w, scale, ks, units, plan, **kind)
    return new, fits, tiles.add(w, ks, units / np.float32(7), plan, **kind)

  found = jax.jit(functools.partial(run, tiled=True))
  found = found(spans) if traced else jax.jit(lambda: run(spans, True))()
  jax.tree.map(assert_same_bits, found, jax.jit(lambda: run(spans, False))())
  assert found[1]


@pytest.mark.parametrize('distribution', EXACT)
def test_tiles_do_not_change_integer_sums(distribution):
  ds, rng = directions(4), np.random.default_rng(0)
  params = jax.tree.map(lambda w: np.rint(w * 64) / 64 + 0, normals())
  units = jax.tree.map(lambda w: rng.integers(-99, 99, 4, np.int32), params)
  exponents = jax.tree.map(lambda w: np.int32(6), params)
  f = jax.jit(
    perturb.replay_int, static_argnames=('distribution', 'implementation')
  )
  run = lambda params, name: f(
    params,
    ds,
    units,
    exponents,
    distribution=distribution,
    implementation=name,
  )
  new, overflow = run(params, 'xla_tiles')
  jax.tree.map(assert_same_bits, (new, overflow), run(params, 'xla'))
  assert not any(jax.tree.leaves(overflow))
  changed = [np.any(new[path] != w) for path, w in params.items()]
  assert sum(changed) == len(SHAPES) - 1  # all but `empty`
  # one bad entry, in the last tile of two tensors
  params['ragged'][1, 82, 6] = 2.0**18
  params['vector'][599] = 0.5 / 64
  found = run(params, 'xla_tiles')[1]
  assert {path for path, flag in found.items() if flag} == {'ragged', 'vector'}


@pytest.mark.parametrize('distribution', ALL)
@pytest.mark.parametrize('name', ['xla', 'xla_tiles'])
def test_project_is_the_inner_product(distribution, name):
  delta, ds = normals(), directions(6)
  expected = inner_products(delta, ds, distribution)
  actual = jax.jit(
    lambda delta: perturb.project(
      delta, ds, distribution=distribution, implementation=name
    )
  )(delta)
  assert actual.dtype == jnp.float32
  scale = np.sqrt(sum(np.sum(np.square(x)) * x.size for x in delta.values()))
  np.testing.assert_allclose(actual, expected, atol=1e-7 * scale)
  assert perturb.project(delta, ds[:0]).shape == (0,)


def test_project_of_narrow_types_sums_wide(monkeypatch):
  monkeypatch.setattr(tiles, 'SIZE', 2**14)
  rng, ds = np.random.default_rng(0), directions(8)
  x = rng.normal(0, 1e-5, (512, 300)) + 3e-6
  for dtype in (jnp.float16, jnp.bfloat16):
    delta = {'w': jnp.asarray(x, dtype)}
    wide = {'w': np.asarray(delta['w'], np.float64)}
    expected = inner_products(wide, ds, 'rademacher')
    actual = jax.jit(
      lambda x: perturb.project(x, ds, implementation='xla_tiles')
    )(delta)
    assert actual.dtype == jnp.float32
    scale = np.linalg.norm(wide['w']) * np.sqrt(x.size)
    error = np.max(np.abs(np.asarray(actual) - expected))
    assert error < 2e-8 * scale


def test_many_clients_at_once():
  shapes = {'a': (130, 5)}
  each = [normals(seed, shapes) for seed in range(3)]
  params = jax.tree.map(lambda *xs: np.stack(xs), *each)
  ds = np.stack([directions(4, seed) for seed in range(3)])
  c = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)

  def client(params, ds, c):
    kwargs = {'implementation': 'xla_tiles'}
    new = perturb.replay(params, ds, c, **kwargs)
    return new, perturb.project(params, ds, **kwargs)

  many, products = jax.jit(jax.vmap(client))(params, ds, c)
  for i, one in enumerate(each):
    expected = inner_products(one, ds[i], 'rademacher')
    np.testing.assert_allclose(products[i], expected, atol=1e-4)
    w = one['a']
    for d, scale in zip(ds[i], c[i], strict=True):
      w = reference.perturb(w, d, 'a', scale, 'rademacher')
    assert_same_bits(many['a'][i], w)


def test_a_sharded_tensor_is_not_gathered():
  # with several devices there are no tiles unless one asks for them
  w, ds = normals(0, {'a': (512, 8)}), directions(3)
  devices = np.array(jax.devices()).reshape(4, 2)
  sharding = NamedSharding(Mesh(devices, ('r', 'c')), PartitionSpec('r', 'c'))
  placed = jax.device_put(w, sharding)

  def f(params, **kwargs):
    moved = perturb.replay(params, ds, np.ones(3, np.float32), **kwargs)
    return moved, perturb.project(params, ds, **kwargs)

  compiled = jax.jit(f).lower(placed).compile()
  text = compiled.as_text() or ''
  assert 'all-gather' not in text
  assert 'all-to-all' not in text
  assert 'collective-permute' not in text
  tiled = jax.jit(lambda x: f(x, implementation='xla_tiles'))
  expected, products = tiled(w)
  for run in (compiled, tiled):
    new, sums = run(placed)
    jax.tree.map(assert_same_bits, new, expected)
    np.testing.assert_allclose(sums, products, atol=1e-4)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_lowers_for_accelerators(platform):
  params = normals(0, {'a': (130, 30)})
  ds, c = jnp.asarray(directions(4)), jnp.zeros(4)
  units, exponents = {'a': np.zeros(4, np.int32)}, {'a': 8}

  def lower(f, *args, **kwargs):
    names = ('distribution', 'implementation')
    traced = jax.jit(f, static_argnames=names).trace(*args, **kwargs)
    traced.lower(lowering_platforms=(platform,))

  for distribution, name in itertools.product(ALL, ['xla', 'xla_tiles']):
    kwargs = {'distribution': distribution, 'implementation': name}
    lower(perturb.project, params, ds, **kwargs)
  kwargs = {'distribution': 'rademacher', 'implementation': 'xla_tiles'}
  lower(perturb.replay, params, ds, c, **kwargs)
  lower(perturb.replay_int, params, ds, units, exponents, **kwargs)


def test_errors_of_project_name_what_is_wrong():
  w, ds = {'a': np.zeros(3, np.float32)}, directions(2)
  with pytest.raises(ValueError, match="'rademacher', 'popcount16', 'gauss"):
    perturb.project(w, ds, distribution='cauchy')
  with pytest.raises(TypeError, match="'a' must be of a floating type"):
    perturb.project({'a': np.zeros(3, int)}, ds)
  with pytest.raises(ValueError, match=r'directions must be uint32\[K, 2\]'):
    perturb.project(w, ds[0])
