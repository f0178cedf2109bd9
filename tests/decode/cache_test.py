"""Prefill and steps against one pass over the whole sequence, for each kind of mixer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, BigBird, masks
from effjax.attention.linear import LinearAttention
from effjax.attention.longlora import ShiftedSparseAttention
from effjax.attention.lsra import LSRA
from effjax.decode import bucket, prefill, unrolled
from effjax.layers import Rope
from effjax.models import LayerSpec, Transformer, TransformerConfig, presets
from tests.modules import apply, random_params

V, T, WIDTH = 23, 12, 8
LENGTHS = np.array([0, 1, 5, 8])
MIXERS = {
  "attention": Attention(4, 2, rope=Rope()),
  "window": Attention(4, mask=masks.Causal() & masks.SlidingWindow(3, 0), sinks=True),
  "BigBird": BigBird(4, block=3, number=1),
  "LongLoRA": ShiftedSparseAttention(4, group=T),
  "linear": LinearAttention(4, chunk=4),
  "LSRA": LSRA(2, kernel=4, dynamic=True, rope=Rope()),
}


@pytest.fixture(scope="module")
def model():
  module = Transformer(presets.TINY)
  return module, random_params(module, np.zeros((1, 1), np.int32))


def test_buckets_cover_waste_little_and_are_few():
  for n in range(1, 5000):
    assert n <= bucket(n) <= max(16, 1.25 * n)
    assert bucket(bucket(n)) == bucket(n)
  assert len({bucket(n) for n in range(1, 8193)}) <= 4 * 9 + 1


@functools.partial(jax.jit, static_argnums=0)
def one_pass(module, params, tokens):
  """Logits without a cache, and the cache after all tokens."""
  cache = module.init_cache(len(tokens), T)
  logits = module.apply({"params": params}, tokens)
  return logits, module.apply({"params": params}, tokens, cache=cache)[1]


@functools.partial(jax.jit, static_argnums=0)
def steps(module, params, tokens, cache):
  """Logits [T, B, V] of steps from each row's prompt to its end, and the cache after them."""

  def step(cache, i):
    position = jnp.minimum(LENGTHS + i, T - 1)[:, None]
    logits, cache = module.apply(
      {"params": params},
      jnp.take_along_axis(tokens, position, axis=1),
      positions=position,
      segment_ids=jnp.where(LENGTHS + i < T, 3, -1)[:, None],
      cache=cache,
    )
    return cache, logits[:, 0]

  cache, logits = jax.lax.scan(step, cache, jnp.arange(T))
  return logits, cache


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_each_token_is_absorbed_once(mixer):
  """Ragged prompts, a row without one and rows that end early included."""
  config = TransformerConfig(V, 16, (LayerSpec(mixer, None),) * 2, context=T)
  module = Transformer(config)
  tokens = np.random.default_rng(2).integers(0, V, (4, T)).astype(np.int32)
  params = random_params(module, tokens)
  whole, end = one_pass(module, params, tokens)
  whole = np.asarray(whole)
  number, row = np.nonzero(LENGTHS[None] + np.arange(T)[:, None] < T)
  fill = jax.jit(functools.partial(prefill, module), static_argnames="padding")
  for padding in ("right", "left"):
    prompts = np.full((4, WIDTH), -100)
    for i, n in enumerate(LENGTHS):
      prompts[i, slice(n) if padding == "right" else slice(WIDTH - n, None)] = tokens[i, :n]
    cache = fill(params, prompts, LENGTHS, module.init_cache(4, T), padding=padding)
    logits, cache = steps(module, params, tokens, cache)
    np.testing.assert_allclose(
      np.asarray(logits)[number, row], whole[row, LENGTHS[row] + number], atol=1e-5
    )
    chex.assert_trees_all_close(cache, end, atol=1e-5)
    assert np.isfinite(logits).all()


def test_padding_is_on_a_side(model):
  module, params = model
  with pytest.raises(ValueError, match="padding='both'; allowed: 'right' or 'left'"):
    prefill(module, params, np.ones((1, 2), int), np.ones(1, int), None, padding="both")


def test_unrolled_is_the_same_model(model):
  module, params = model
  tokens = np.arange(10)[None]
  flat, flat_params = unrolled(module, params)
  assert len(flat_params) == len(params) + 1
  expected = apply(module, params, tokens)
  np.testing.assert_allclose(apply(flat, flat_params, tokens), expected, atol=1e-5)


@pytest.mark.parametrize(("lengths", "message"), [([3, 9], "lengths: 9"), ([-1, 2], "lengths: -1")])
def test_lengths_that_are_none_are_refused(model, lengths, message):
  module, params = model
  tokens, cache = jnp.zeros((2, 8), jnp.int32), module.init_cache(2, 16)
  with pytest.raises(ValueError, match=message):
    prefill(module, params, tokens, jnp.array(lengths), cache)
