"""Greedy generation against the loop that recomputes everything."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfl import keys
from jaxfl.models import generate, transformer
from jaxfl.models.config import Config
from jaxfl.models.rotary import Rope

pytestmark = pytest.mark.fast_compile

SIZES = {
  'vocab_size': 23, 'num_layers': 2, 'model_dim': 16, 'num_heads': 4,
  'num_kv_heads': 4, 'head_dim': 4, 'mlp_dim': 24,
}  # fmt: skip
CONFIGS = {
  'gqa and rope': Config(
    **SIZES | {'num_kv_heads': 2},
    norm='rms',
    rope=Rope(theta=100.0),
    gated=True,
    activation='silu',
    qk_norm=True,
  ),
  'learned positions': Config(
    **SIZES,
    learned_positions=True,
    max_positions=16,
    position_offset=2,
    positions_from_mask=True,
    activation='relu',
  ),
  'windows and softcaps': Config(
    **SIZES | {'num_layers': 3, 'num_kv_heads': 1},
    norm='rms_plus_one',
    norm_place='both',
    rope=Rope(theta=100.0),
    local_rope=Rope(theta=10.0),
    sliding=(True, False, True),
    sliding_window=3,
    attention_softcap=2.0,
    logit_softcap=3.0,
    embed_scale=4.0,
    gated=True,
    tie_embeddings=False,
  ),
  'narrow embeddings': Config(
    **SIZES,
    embed_dim=8,
    learned_positions=True,
    max_positions=32,
    norm_place='post',
    final_norm=False,
    tie_embeddings=False,
  ),
}
LENGTHS = np.array([7, 1, 4])
NEW = 8


@functools.cache
def params_of(name):
  config = CONFIGS[name]
  rng = np.random.default_rng(1)

  def noisy(path, x):  # large biases would make all positions alike
    noise = 0.1 if keys.path_str(path).endswith('bias') else 0.5
    return x + noise * rng.standard_normal(x.shape, np.float32)

  tree = jax.jit(lambda key: transformer.init(config, key))(jax.random.key(0))
  return jax.tree_util.tree_map_with_path(noisy, tree)


@pytest.fixture(scope='module')
def prompts():
  tokens = np.random.default_rng(2).integers(1, 23, (3, 7))
  mask = (np.arange(7)[None, :] < LENGTHS[:, None]).astype(np.uint8)
  return np.where(mask, tokens, 5), mask


@functools.cache
def naive_of(name):
  """Every token from a pass over the whole text, without a cache or a mask."""
  config, params = CONFIGS[name], params_of(name)
  logits = jax.jit(lambda x: transformer.logits(config, params, x))
  tokens = np.random.default_rng(2).integers(1, 23, (3, 7))
  rows = np.arange(3)
  text = np.zeros((3, 7 + NEW), int)  # zeros lie behind what a token sees
  text[:, :7] = np.where(np.arange(7)[None, :] < LENGTHS[:, None], tokens, 0)
  for end in LENGTHS[:, None].T + np.arange(NEW)[:, None]:
    text[rows, end] = np.argmax(logits(text)[rows, end - 1], axis=-1)
  return np.stack(
    [row[n : n + NEW] for row, n in zip(text, LENGTHS, strict=True)]
  )


@functools.cache
def compiled(name, **kwargs):
  kwargs = {'max_new_tokens': NEW, 'eos_ids': (), **kwargs}
  return jax.jit(lambda *args: generate.greedy(CONFIGS[name], *args, **kwargs))


_SLOW = ('learned positions', 'narrow embeddings')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else [])
    for name in CONFIGS
  ],
)
def test_equals_the_naive_loop(name, prompts):
  made = compiled(name)(params_of(name), *prompts)
  assert (made.shape, made.dtype) == ((3, NEW), jnp.int32)
  want = naive_of(name)
  assert len(np.unique(want)) > 4  # the reference does not repeat one token
  np.testing.assert_array_equal(made, want)


def test_rows_equal_rows_alone(prompts):
  """Alone: without the other rows, and without padding."""
  name, (tokens, mask) = 'windows and softcaps', prompts
  run = compiled(name)
  for row, length in ((1, 1), (2, 4)):
    part = slice(row, row + 1), slice(0, length)
    alone = run(params_of(name), tokens[part], mask[part])
    np.testing.assert_array_equal(alone, naive_of(name)[row : row + 1])


def test_what_the_padding_holds_does_not_matter(prompts):
  tokens, mask = prompts
  run, params = compiled('gqa and rope'), params_of('gqa and rope')
  other = np.where(mask, tokens, 11)
  np.testing.assert_array_equal(
    run(params, tokens, mask), run(params, other, mask)
  )


def test_ends_are_kept_and_padding_follows(prompts):
  name = 'gqa and rope'
  full = naive_of(name)
  eos_ids = (int(full[0, 2]), int(full[1, 4]))
  made = compiled(name, eos_ids=eos_ids, pad_id=22)(params_of(name), *prompts)
  for row, want in zip(np.asarray(made), full, strict=True):
    hits = np.flatnonzero(np.isin(want, eos_ids))
    end = hits[0] + 1 if len(hits) else NEW
    np.testing.assert_array_equal(row[:end], want[:end])
    assert (row[end:] == 22).all()
  assert (np.asarray(made) == 22).any()


def test_stops_when_all_rows_have_ended(prompts):
  name = 'gqa and rope'
  config, params, full = CONFIGS[name], params_of(name), naive_of(name)
  run = jax.jit(
    lambda eos: generate._generate(config, params, *prompts, NEW, eos, 0)
  )
  assert run(())[1] == NEW - 1
  eos_ids = tuple(int(x) for x in full[:, 1])
  ends = [np.flatnonzero(np.isin(row, eos_ids))[0] for row in full]
  assert run(eos_ids)[1] == max(ends) < NEW - 1
  firsts = tuple(int(x) for x in full[:, 0])
  made, steps = run(firsts)
  assert steps == 0
  np.testing.assert_array_equal(made[:, 0], full[:, 0])
  assert (made[:, 1:] == 0).all()


def test_ties_go_to_the_first(prompts):
  name = 'gqa and rope'
  params = jax.tree.map(jnp.zeros_like, params_of(name))
  made = compiled(name, pad_id=9)(params, *prompts)
  np.testing.assert_array_equal(made, np.zeros((3, NEW)))


def test_vmap_over_params(prompts):
  name = 'windows and softcaps'
  one = params_of(name)
  other = jax.tree.map(lambda x: -x, one)
  eos_ids = (int(naive_of(name)[0, 1]),)
  run = lambda p: generate.greedy(
    CONFIGS[name], p, *prompts, max_new_tokens=NEW, eos_ids=eos_ids
  )
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), one, other)
  made = jax.jit(jax.vmap(run))(stacked)
  alone = jax.jit(run)
  np.testing.assert_array_equal(made[0], alone(one))
  np.testing.assert_array_equal(made[1], alone(other))
  assert (made[0] != made[1]).any()


def test_bfloat16(prompts):
  """Every token is a likeliest one, up to the precision of the logits."""
  name, (tokens, mask) = 'gqa and rope', prompts
  config = CONFIGS[name]
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(name))
  made = np.asarray(compiled(name)(params, tokens, mask))
  score = jax.jit(lambda text: transformer.logits(config, params, text))
  for row, length in enumerate(LENGTHS):
    text = np.concatenate([tokens[row, :length], made[row]])[None]
    text = np.pad(text, ((0, 0), (0, 15 - text.shape[1])))
    logits = np.asarray(score(text))[0, length - 1 : length - 1 + NEW]
    chosen = np.take_along_axis(logits, made[row][:, None], axis=1)[:, 0]
    gap = logits.max(axis=1) - chosen
    assert (gap < 0.05 * np.abs(logits).max(axis=1)).all()


@pytest.mark.parametrize(
  ('changes', 'new', 'message'),
  [
    ({}, 10, r'prompts of 7 tokens and max_new_tokens 10 exceed the 16'),
    ({}, 0, 'max_new_tokens must be >= 1, got 0'),
    ({'causal': False}, 2, 'causal=False'),
    ({'head': 'none'}, 2, "head='none'"),
  ],
)
def test_what_cannot_be_generated_is_refused(changes, new, message, prompts):
  config = dataclasses.replace(CONFIGS['learned positions'], **changes)
  params = params_of('learned positions')
  with pytest.raises(ValueError, match=message):
    generate.greedy(config, params, *prompts, max_new_tokens=new, eos_ids=())


def test_all_positions_can_be_used(prompts):
  name = 'learned positions'
  run = compiled(name, max_new_tokens=9)
  made = run(params_of(name), *prompts)
  np.testing.assert_array_equal(made[:, :NEW], naive_of(name))


def test_a_mask_of_another_shape_is_refused(prompts):
  tokens, mask = prompts
  name = 'gqa and rope'
  with pytest.raises(ValueError, match=r'got \[3, 7\] and \[3, 6\]'):
    compiled(name)(params_of(name), tokens, mask[:, 1:])
