"""Boxes: the bits of whole copies, in less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxfl import (
  adapters,
  digest,
  estimators,
  int8,
  keys,
  lazy,
  objectives,
  perturb,
  pool,
)
from jaxfl.estimators import Passes
from jaxfl.method import Party
from jaxfl.methods import decomfl, fedkseed, spsa
from jaxfl.models import transformer
from jaxfl.models.config import Config
from jaxfl.runtime import mesh as mesh_lib

DIRECTION = keys.fold(keys.root(5), 1, 2)
MU = np.float32(1e-2)
# layers with 64 and 128 rows, biases of one row, and a tied table
DECODER = Config(
  vocab_size=300, num_layers=3, model_dim=64, num_heads=2, num_kv_heads=2,
  head_dim=32, mlp_dim=128, max_positions=32, learned_positions=True,
  output_bias=True,
)  # fmt: skip
# no size is a multiple of 64, and the head is a matrix of its own
ODD = Config(
  vocab_size=50, num_layers=2, model_dim=24, num_heads=2, num_kv_heads=2,
  head_dim=12, mlp_dim=40, norm='rms', max_positions=16, gated=True,
  learned_positions=True, tie_embeddings=False, embed_dim=20,
)  # fmt: skip
ENCODER = Config(
  vocab_size=50, num_layers=2, model_dim=24, num_heads=2, num_kv_heads=2,
  head_dim=12, mlp_dim=40, norm_place='post', embed_norm=True,
  final_norm=False, causal=False, max_positions=16, learned_positions=True,
  type_vocab=2, head='classify', num_labels=3, head_dense=True,
)  # fmt: skip
CONFIGS = {'decoder': DECODER, 'odd': ODD, 'encoder': ENCODER}
SLOW = pytest.mark.slow
EXACT = ['rademacher', 'popcount16', 'rank4']


@functools.cache
def model(name):
  """Parameters, all of them random, and a loss."""
  config = CONFIGS[name]
  shapes = jax.eval_shape(
    functools.partial(transformer.init, config), jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape).astype(np.float32))
  params = jax.tree.map(draw, shapes)
  if config.head == 'classify':
    scores = objectives.class_scores(config, 'head')
    return params, objectives.classification_loss(scores)
  return params, objectives.lm_loss(config)


def batch(rows=2, length=12):
  tokens = np.random.default_rng(1).integers(0, 50, (rows, length))
  mask = np.ones((rows, length), np.int8)
  mask[1, -3:] = 0
  label = np.arange(rows, dtype=np.int32)
  return {'tokens': tokens.astype(np.int32), 'mask': mask, 'label': label}


def opened(box):
  """What the loop over the layers makes of a box, all layers in turn."""
  if box.scale.ndim:
    return jax.lax.map(lambda layer: layer.unbox(), box)
  return box.unbox()


def assert_same_bits(a, b):
  assert digest.digest(a) == digest.digest(b)


@pytest.mark.parametrize(
  ('name', 'distribution'),
  [
    ('decoder', 'rademacher'),
    pytest.param('odd', 'popcount16', marks=SLOW),
    ('encoder', 'rank4'),
  ],
)
def test_every_parameter_has_the_bits_of_perturb(name, distribution):
  params, _ = model(name)
  params = params | {'layers': params['layers'] | {'gate': jnp.arange(3.0)}}
  whole = perturb.perturb(params, DIRECTION, MU, distribution=distribution)
  boxes = lazy.perturbed(params, DIRECTION, MU, distribution=distribution)
  found = jax.jit(functools.partial(jax.tree.map, opened, is_leaf=lazy.is_box))(
    boxes
  )
  assert_same_bits(found, whole)


def test_walsh_directions_in_boxes():
  rng = np.random.default_rng(7)
  shapes = {
    'embed': (200, 150),
    'layers': {'aligned': (2, 64, 128), 'odd': (2, 40, 150), 'vector': (2, 9)},
  }
  params = jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  direction = pool.directions(keys.root(5), np.int32(1234), 'walsh')
  whole = perturb.perturb(params, direction, MU, distribution='walsh')
  boxes = lazy.perturbed(params, direction, MU, distribution='walsh')
  open_all = functools.partial(jax.tree.map, opened, is_leaf=lazy.is_box)
  assert_same_bits(jax.jit(open_all)(boxes), whole)
  index = np.array([[3, 199, 64], [0, 3, 131]])
  rows = jax.jit(lazy.take)(boxes['embed'], index)
  assert_same_bits(rows, whole['embed'][index])


@pytest.mark.parametrize(
  ('name', 'distribution'),
  [
    pytest.param('decoder', 'rank4', marks=SLOW),
    ('odd', 'rademacher'),
    pytest.param('encoder', 'popcount16', marks=SLOW),
  ],
)
def test_losses_are_those_of_a_whole_copy(name, distribution):
  params, loss_fn = model(name)

  def sides(move, passes):
    loss_at = lambda s: loss_fn(move(params, DIRECTION, s), batch())
    return jnp.stack(estimators._both_sides(loss_at, MU, passes))

  run = jax.jit(sides, static_argnums=(0, 1))
  kind = functools.partial
  whole = run(kind(perturb.perturb, distribution=distribution), Passes())
  assert abs(whole[0] - whole[1]) > 1e-3
  for form, at_once in zip(lazy.FORMS, (1, 2), strict=True):
    move = kind(lazy.perturbed, distribution=distribution, form=form)
    found = run(move, estimators.passes(form, at_once))
    np.testing.assert_allclose(found, whole, rtol=3e-6)


@pytest.mark.parametrize('distribution', EXACT)
def test_rows_that_are_looked_up(distribution):
  table = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
  params = {'t': table}
  whole = perturb.perturb(params, DIRECTION, MU, distribution=distribution)
  box = lazy.perturbed(params, DIRECTION, MU, distribution=distribution)['t']
  index = np.array([[0, 31, 32, 63], [64, 199, -1, 64]])
  found = lazy.take(box.astype('bfloat16'), index)
  assert_same_bits(found, whole['t'].astype('bfloat16')[index])
  every = np.arange(300) % 200  # more than there are
  assert_same_bits(lazy.take(box, every), whole['t'][every])


@pytest.mark.parametrize('distribution', ['rademacher', 'rank4'])
@pytest.mark.parametrize('form', lazy.FORMS)
@pytest.mark.parametrize('axis', [0, 1])
def test_many_outputs_come_in_parts(axis, form, distribution):
  rng = np.random.default_rng(0)
  shape = (16, 200) if axis == 0 else (200, 16)
  params = {'w': rng.normal(size=shape).astype(np.float32)}
  kind = {'distribution': distribution, 'form': form}
  x = rng.normal(size=(2, 3, 16)).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=1)
  def outputs(params, entries):
    box = lazy.perturbed(params, DIRECTION, MU, **kind)['w']
    return lazy.wide_dot(x, box, axis, entries=entries)

  w = perturb.perturb(params, DIRECTION, MU, distribution=distribution)['w']
  expected = x @ (w if axis == 0 else w.T)
  for entries in (16 * 64, 16 * 128, 10**9):
    np.testing.assert_allclose(
      outputs(params, entries), expected, rtol=1e-5, atol=1e-5
    )


def test_split_keeps_steps_that_16_bits_lose():
  params = {'w': jnp.ones((64, 8), jnp.bfloat16)}
  x = jnp.ones((1, 64), jnp.bfloat16)
  small = np.float32(2.0**-12)  # below half of the last bit of one
  z = perturb.field(DIRECTION, 'w', (64, 8)).sum(0)

  def moved(form):
    box = lazy.perturbed(params, DIRECTION, small, form=form)['w']
    return box.dot_z(x, 0) if form == 'split' else lazy.dot(x, box)[0] - 64.0

  assert not np.asarray(moved('temporary')).any()
  np.testing.assert_array_equal(moved('split')[0], z)


def compiled(config, form, at_once, *, count=1, rows=1):
  params = jax.eval_shape(
    functools.partial(transformer.init, config), jax.random.key(0)
  )
  loss_fn = objectives.lm_loss(config)
  tokens = jax.ShapeDtypeStruct((count, rows, 16), jnp.int32)
  directions = jax.ShapeDtypeStruct((count, 2), jnp.uint32)
  passes = estimators.passes(form, at_once, num_perturbations=count)

  def step(params, directions, mu, tokens):
    moved = estimators.perturber(
      params, distribution='rademacher', dtype=None, in_layers=form
    )
    return estimators.two_sided(
      loss_fn, moved, directions, {'tokens': tokens}, mu, passes
    )

  run = jax.jit(step)
  return run.lower(params, directions, MU, tokens).compile()


def sized(num_layers):
  return Config(
    vocab_size=64, num_layers=num_layers, model_dim=128, num_heads=2,
    num_kv_heads=2, head_dim=64, mlp_dim=512, norm='rms', max_positions=16,
    learned_positions=True,
  )  # fmt: skip


@pytest.mark.parametrize(
  ('form', 'at_once'), [('temporary', 1), pytest.param('split', 2, marks=SLOW)]
)
def test_memory_and_program_do_not_grow_with_the_layers(form, at_once):
  layer = 4 * (4 * 128 * 128 + 2 * 128 * 512)  # bytes
  few, many = (compiled(sized(n), form, at_once) for n in (2, 16))
  temp = lambda run: run.memory_analysis().temp_size_in_bytes
  assert temp(many) - temp(few) < layer / 2
  # one matrix or two, their parts of z, and the activations of 32 tokens
  assert temp(many) < 2.5 * layer
  instructions = lambda run: run.as_text().count(' = ')
  assert instructions(many) < 1.02 * instructions(few)


@pytest.mark.parametrize('count', [1, 3])
def test_passes_at_once_are_one_product_with_each_weight(count):
  """`split`: W is an operand as it is, of both sides of all directions."""
  run = compiled(sized(3), 'split', 2 * count, count=count, rows=2)
  products = re.findall(
    r'= (\w+\[[\d,]*\])\S* (?:dot|custom-call)\(', run.as_text()
  )
  up = [shape for shape in products if shape.endswith(',512]')]
  sizes = [
    int(np.prod([int(n) for n in re.findall(r'\d+', x)[1:]])) for x in up
  ]
  assert sizes == [2 * count * 2 * 15 * 512] * 2  # with W and with z


def methods(loss_fn, **kind):
  rate = {'learning_rate': 1e-3, 'mu': 1e-3, 'codec': 'float32'} | kind
  root = keys.root(3)
  return {
    'spsa': spsa.spsa(loss_fn, root, num_perturbations=2, **rate),
    'fedkseed': fedkseed.fedkseed(
      loss_fn, root, local_steps=2, num_seeds=8, **rate
    ),
    'decomfl': decomfl.decomfl(
      loss_fn, root, local_steps=2, num_perturbations=2, **rate
    ),
  }


@pytest.mark.parametrize(
  ('name', 'form', 'at_once'),
  [
    ('spsa', 'temporary', 1),
    pytest.param('spsa', 'split', 4, marks=SLOW),
    pytest.param('fedkseed', 'temporary', 2, marks=SLOW),
    pytest.param('decomfl', 'split', 2, marks=SLOW),
  ],
)
def test_messages_of_methods(name, form, at_once):
  params, loss_fn = model('odd')
  party = Party(np.int32(1), np.int32(0), np.float32(1))

  def message(**kind):
    method = methods(loss_fn, **kind)[name]
    batches = jax.tree.map(
      lambda x: np.stack([x] * method.num_batches), batch()
    )
    return jax.jit(method.client)(method.init(params), (), batches, party)[0]

  whole = message()
  found = message(in_layers=form, forwards_at_once=at_once)
  # a loss of 4 and its last bits, over 2 mu
  np.testing.assert_allclose(found, whole, atol=5e-3)
  assert np.abs(whole).max() > 0.1
  with pytest.raises(ValueError, match='in_layers must be one of temporary'):
    methods(loss_fn, in_layers='all')


LORA = adapters.lora(
  rank=4, targets=('*/attention/[qv]/kernel',), also=('final_norm/*',)
)


def moved_lora(trainable):
  """Factors that are not zero."""
  add = lambda x: (
    x
    + np.float32(0.1)
    * np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32)
  )
  return jax.tree.map(add, trainable)


@pytest.mark.parametrize(
  'frozen_dtype', ['float32', pytest.param('bfloat16', marks=SLOW)]
)
def test_lora_is_added_in_the_layers(frozen_dtype):
  params, loss_fn = model('decoder')
  params = jax.tree.map(lambda x: x.astype(frozen_dtype), params)
  trainable, frozen = LORA.init(params, keys.root(0))
  trainable = moved_lora(trainable)
  boxes = LORA.merge(frozen, lazy.perturbed(trainable, DIRECTION, MU))
  whole = LORA.merge(frozen, perturb.perturb(trainable, DIRECTION, MU))
  found = jax.tree.map(
    lambda x: (
      jax.lax.map(lambda y: y.unbox(), x)
      if isinstance(x, adapters.LowRank)
      else opened(x)
      if lazy.is_box(x)
      else x
    ),
    boxes,
    is_leaf=lazy.is_box,
  )
  for (path, a), (_, b) in zip(
    keys.named_leaves(found), keys.named_leaves(whole), strict=True
  ):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    # products of the same factors, summed in whatever order
    bound = 1e-6 if frozen_dtype == 'float32' else 2.0**-7
    np.testing.assert_allclose(a, b, atol=bound, err_msg=path)
  run = jax.jit(loss_fn)
  expected = run(whole, batch())
  split = lazy.perturbed(trainable, DIRECTION, MU, form='split')
  bound = 1e-6 if frozen_dtype == 'float32' else 2e-2
  for tree in (boxes, LORA.merge(frozen, split)):
    np.testing.assert_allclose(run(tree, batch()), expected, rtol=bound)


def test_memory_of_lora_is_the_base_and_one_layer():
  config, adapter = sized(16), adapters.lora(targets=('layers/*/kernel',))
  params = transformer.init(config, jax.random.key(0))
  trainable, frozen = adapter.init(params, keys.root(0))
  loss_fn = objectives.lm_loss(config)

  def loss(frozen, trainable, direction, tokens):
    moved = lazy.perturbed(trainable, direction, MU)
    return loss_fn(adapter.merge(frozen, moved), {'tokens': tokens})

  tokens = np.zeros((1, 16), np.int32)
  run = jax.jit(loss).lower(frozen, trainable, DIRECTION, tokens).compile()
  layer = 4 * (4 * 128 * 128 + 2 * 128 * 512)
  # of sixteen that a merged model would have
  assert run.memory_analysis().temp_size_in_bytes < 2 * layer


def test_eight_bits():
  params, loss_fn = model('decoder')
  trainable, frozen = LORA.init(params, keys.root(0))
  held = int8.quantise(frozen)
  assert_same_bits(held, int8.quantise(frozen))
  opened = nn.meta.unbox(held)
  for (path, a), (_, b) in zip(
    keys.named_leaves(opened), keys.named_leaves(frozen), strict=True
  ):
    if 'layers/' in path and path.endswith('/kernel') and np.size(b):
      step = np.abs(b).max(axis=1, keepdims=True) / 127
      assert (np.abs(a - b) <= 0.5001 * step).all()
      assert np.abs(a - b).max() > 0.3 * step.max()
    else:
      np.testing.assert_array_equal(a, b)
  units = held['layers']['mlp']['up']['kernel'].units
  assert units.dtype == np.int8
  assert adapters.count(held) == adapters.count(frozen)
  # the model sees what is opened, box or not, and is near to what it was
  run = jax.jit(loss_fn)
  tree = LORA.merge(held, trainable)
  assert isinstance(
    tree['layers']['attention']['q']['kernel'], adapters.LowRank
  )
  same = run(LORA.merge(opened, trainable), batch())
  np.testing.assert_allclose(run(tree, batch()), same, rtol=1e-6)
  logits = jax.jit(functools.partial(transformer.logits, DECODER))
  tokens = batch()['tokens']
  exact, rounded = logits(params, tokens), logits(tree, tokens)
  assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
  'form', ['temporary', pytest.param('split', marks=SLOW)]
)
def test_sharded_weights_are_not_gathered(form):
  params, loss_fn = model('decoder')
  mesh = mesh_lib.make(1, 2).local_mesh
  put = lambda x: jax.device_put(
    x, NamedSharding(mesh, mesh_lib.spec_of(x.shape, 2))
  )
  step = lambda params, direction, batch: loss_fn(
    lazy.perturbed(params, direction, MU, form=form), batch
  )
  sharded = jax.tree.map(put, params)
  assert not sharded['layers']['mlp']['up']['kernel'].is_fully_replicated
  whole = jax.device_put(batch(), NamedSharding(mesh, PartitionSpec()))
  run = jax.jit(step).lower(sharded, DIRECTION, whole).compile()
  np.testing.assert_allclose(
    run(sharded, DIRECTION, whole),
    jax.jit(step)(params, DIRECTION, batch()),
    rtol=1e-6,
  )
  gathered = [
    shape
    for line in run.as_text().splitlines()
    if ' all-gather(' in line
    for shape in re.findall(r'\[([\d,]+)\]', line.split(' all-gather(')[0])
  ]
  # activations of 2 rows of 11 tokens, but neither kernels nor the table
  assert gathered
  assert not [x for x in gathered if not {'2', '22'} & set(x.split(','))]
  opened_bits = jax.jit(
    functools.partial(jax.tree.map, opened, is_leaf=lazy.is_box)
  )
  assert_same_bits(
    opened_bits(lazy.perturbed(sharded, DIRECTION, MU)),
    perturb.perturb(params, DIRECTION, MU),
  )
