"""Gradient inversion: what formats carry, how errors are measured, and rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.attacks import images, inversion, report, table, wires
from experiments.attacks import victim as victim_lib
from experiments.attacks.victim import DIRECTIONS, loss_fn
from experiments.config import UsageError
from jaxfl import perturb, wire
from jaxfl.methods import ferret, spsa

pytestmark = pytest.mark.fast_compile

EFFORT = inversion.Effort(restarts=2, steps=300)


@pytest.fixture(scope='module')
def pictures():
  return images.strokes()


@pytest.fixture(scope='module')
def prior(pictures):
  return inversion.prior_of(pictures.public)


@pytest.fixture(scope='module')
def victim(pictures):
  return victim_lib.make(pictures.private[:1], pictures.private_labels[:1], 3)


def attack(form, victim, prior):
  starts = inversion.draw_starts(EFFORT, 1, victim.x.shape[1], 0)
  found, _ = inversion.reconstruct(
    form.mismatch,
    form.send(victim).evidence,
    victim.params,
    victim.labels,
    prior,
    starts,
    EFFORT,
  )
  return inversion.error(found, victim.x, prior.mean).relative


def test_a_gradient_gives_its_example_away_and_noise_hides_it(victim, prior):
  assert attack(wires.dense(), victim, prior) < 0.05
  assert attack(wires.dp_gd(1.0), victim, prior) > 0.5
  # the same attack gets through noise that protects nobody
  assert attack(wires.dp_gd(1e5), victim, prior) < 0.2


@pytest.mark.slow
def test_more_scalars_give_more_away_and_noise_hides_them(victim, prior):
  few, some, many = (
    attack(wires.scalars(k, 'float32'), victim, prior) for k in (1, 16, 256)
  )
  assert few > 0.7
  assert many < 0.05
  assert many < some < few
  assert attack(wires.private_scalars(256, 1.0), victim, prior) > 0.5


def test_directions_and_scalars_are_those_of_spsa(victim):
  g = victim_lib.gradient(victim.params, victim.x, victim.labels)
  tree = jax.grad(loss_fn)(
    victim.params, {'features': victim.x, 'label': victim.labels}
  )
  expected = perturb.project(tree, victim.directions[:64])
  found = victim.rows[:64] @ g
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(victim.scalars[:64], expected, atol=3e-3)
  one_byte = lambda root: spsa.spsa(
    loss_fn,
    root,
    learning_rate=1.0,
    mu=victim_lib.MU,
    num_perturbations=16,
    weights='float32',
  )
  frame = wire.to_bytes(victim_lib.message(one_byte, victim))
  sent = wires.scalars(16, 'log8').send(victim)
  assert sent.num_bytes == len(frame)
  level = 2.0**0.2
  ratio = sent.evidence['values'][:16] / victim.scalars[:16]
  assert np.all((ratio > level**-0.51) & (ratio < level**0.51))


@pytest.mark.slow
def test_coordinates_are_those_of_ferret(victim):
  one_bit = lambda root: ferret.ferret(
    loss_fn,
    root,
    client_optimizer=optax.sgd(1.0),
    coordinates=16,
    max_block_size=1 << 14,
  )
  message = victim_lib.message(one_bit, victim)
  sent = wires.coordinates(16, 'sign1').send(victim)
  assert sent.num_bytes == len(wire.to_bytes(message))
  bits = np.unpackbits(np.asarray(message['coordinates']), bitorder='little')
  values = np.asarray(sent.evidence['values'])[:16]
  np.testing.assert_array_equal(values < 0, bits[1:17])
  g = victim_lib.gradient(victim.params, victim.x, victim.labels)
  exact = wires.coordinates(16, 'float32').send(victim).evidence
  predicted = exact['rows'][:16] @ g
  np.testing.assert_allclose(predicted, exact['values'][:16], atol=1e-3)


@pytest.mark.slow
def test_a_true_input_explains_every_message(pictures):
  victim = victim_lib.make(pictures.private[:2], pictures.private_labels[:2], 0)
  for form in (wires.dense(), wires.local_steps(), wires.dp_gd(8.0),
               wires.sketch(64), wires.private_scalars(64, 8.0)):  # fmt: skip
    evidence = form.send(victim).evidence
    fit = jax.jit(form.mismatch)(
      evidence, victim.params, victim.x, victim.labels, jnp.float32(0.0)
    )
    # half a chi-squared number: noise is as large as it is said to be
    count = 64 if 'rows' in evidence else len(evidence['values'])
    assert fit < 0.5 * count + 4.0 * np.sqrt(0.5 * count), form.label
    if form.epsilon:
      assert fit > 0.5 * count - 4.0 * np.sqrt(0.5 * count), form.label


def test_the_error_does_not_depend_on_the_order():
  rng = np.random.default_rng(0)
  truth, mean = rng.random((5, 7)), np.full(7, 0.5)
  found = truth + rng.normal(scale=0.05, size=truth.shape)
  first = inversion.error(found, truth, mean)
  assert inversion.error(found[rng.permutation(5)], truth, mean) == first
  expected = np.square(found - truth).sum() / np.square(truth - mean).sum()
  assert first.relative == pytest.approx(expected)
  guess = np.broadcast_to(mean, truth.shape)
  assert inversion.error(guess, truth, mean).relative == pytest.approx(1.0)
  flat = inversion.error(truth + 0.1, truth, mean)
  assert flat.psnr == pytest.approx(20.0)
  with pytest.raises(ValueError, match='shapes differ'):
    inversion.error(truth[:4], truth, mean)


def test_victims_are_no_public_pictures(pictures):
  public = {x.tobytes() for x in pictures.public}
  assert not any(x.tobytes() in public for x in pictures.private)
  assert pictures.public.min() >= 0
  assert pictures.public.max() <= 1
  assert set(pictures.public_labels) == set(range(10))


@pytest.mark.slow
def test_a_table_of_two_rows():
  settings = table.Settings(seeds=2, large_batch=2, restarts=1, steps=8)
  chosen = [wires.dense(), wires.dp_gd(3.0)]
  found = json.loads(json.dumps(table.make(settings, chosen)))
  assert found['parameters'] < DIRECTIONS
  labels = [row['label'] for row in found['rows'] if row['batch'] == 2]
  assert labels == [
    table.NOTHING,
    table.LABELS,
    'dense gradient',
    'dense gradient, epsilon 3',
  ]
  for row in found['rows']:
    assert len(row['errors']) == 2
    if row['label'] == table.NOTHING:
      assert row['errors'] == [1.0, 1.0]
      assert row['bytes'] == 0
    elif row['family'] != 'no message':
      assert row['bytes'] > 4 * found['parameters']
  assert report.table(found).row_count == 4
  report.draw(found)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'seeds': 0}, 'seeds must be >= 1, got 0'),
    ({'steps': 3}, 'steps must be >= 8, got 3'),
    ({'small_batch': 8}, 'small_batch must be below large_batch, 8, got 8'),
    ({'large_batch': 5000}, 'large_batch must be at most 1000'),
  ],
)
def test_mistakes(change, message):
  with pytest.raises(UsageError, match=message):
    table.make(table.Settings(**change), [])


def test_missing_images_are_named(tmp_path):
  settings = table.Settings(data_dir=str(tmp_path))
  with pytest.raises(FileNotFoundError, match='no images of mnist'):
    table.make(settings, [])
