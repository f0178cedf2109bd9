"""Linear attention against a dense matrix of scores in float64, and step by step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention.linear import LinearAttention, LinearState, feature_map, linear_attention
from effjax.layers import Context
from tests.modules import normal

B, T, N, H = 2, 11, 2, 4
PACKED = jnp.array([[5, 5, 5, 2, 2, 2, 2, 2, 2, 0, 0], [-1, -1, 1, 1, -1, 1, 1, 4, 4, 4, -1]])
attention = jax.jit(linear_attention, static_argnames=("causal", "chunk"))


@pytest.fixture
def arrays():
  drawn = np.random.default_rng(0).normal(size=(3, B, T, N, H))
  return [jax.device_put(x.astype(jnp.float32)) for x in drawn]


def dense(q, k, v, causal=True, ids=None):
  """φ(q) φ(k)ᵀ as a T × T matrix, masked and normalised, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  scores = np.einsum("btnh,bsnh->bnts", phi(q), phi(k))
  seen = np.tri(q.shape[1], dtype=bool) if causal else True
  if ids is not None:
    ids = np.asarray(ids)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    seen = (seen & same)[:, None]
  scores = np.where(seen, scores, 0)
  scores /= np.maximum(scores.sum(-1, keepdims=True), 1e-300)
  return np.einsum("bnts,bsnh->btnh", scores, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("ids", [None, PACKED], ids=["one segment", "packed"])
def test_equals_the_dense_matrix(arrays, causal, chunk, ids):
  got, _ = attention(*arrays, causal=causal, chunk=chunk, segment_ids=ids)
  np.testing.assert_allclose(got, dense(*arrays, causal, ids), atol=2e-6)


def test_step_by_step_equals_parallel(arrays):
  whole, end = attention(*arrays, chunk=4)
  state, steps = LinearState.empty(B, N, H, H), []
  for t in range(T):
    y, state = attention(*(x[:, t : t + 1] for x in arrays), state=state)
    steps.append(y)
  np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=2e-6)
  chex.assert_trees_all_close(state, end, atol=1e-5)


def test_a_state_goes_on_within_a_packed_row(arrays):
  whole, _ = attention(*arrays, segment_ids=PACKED, chunk=4)
  parts, state = [], None
  for piece in (slice(0, 5), slice(5, 11)):
    y, state = attention(
      *(x[:, piece] for x in arrays), segment_ids=PACKED[:, piece], state=state, chunk=4
    )
    parts.append(y)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-6)
  assert state.segment.tolist() == [0, 4]


def test_padding_gives_nothing_even_where_it_is_not_finite(arrays):
  q, k, v = arrays
  spoil = lambda x: jnp.where((PACKED < 0)[..., None, None], jnp.nan, x)
  y, state = attention(q, k, v, segment_ids=PACKED, chunk=4)
  other, same = attention(spoil(q), spoil(k), spoil(v), segment_ids=PACKED, chunk=4)
  np.testing.assert_array_equal(y, other)
  np.testing.assert_array_equal(state.sums, same.sums)
  assert not y[PACKED < 0].any()


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_not_finite_reaches_those_who_see_it_alone(arrays, causal):
  @jax.jit
  def run(dy, *arrays):
    apply = lambda *arrays: linear_attention(*arrays, causal=causal, segment_ids=PACKED, chunk=4)
    y, pull, _ = jax.vjp(apply, *arrays, has_aux=True)
    return y, *pull(dy)

  ids, dy = np.asarray(PACKED), np.array(normal(B, T, N, H, seed=1))
  spoilt = ((ids == 2) | (ids == 4) | (ids < 0))[..., None, None]  # documents, and padding
  dy = np.where(spoilt, np.float32(0), dy)
  others = lambda arrays: [np.where(spoilt, 0, x) for x in arrays]
  clean = others(run(dy, *arrays))
  for fill in np.float32([np.nan, np.inf, 1e30]):
    bad = run(dy, *(np.where(spoilt, fill, x) for x in arrays))
    chex.assert_trees_all_close(others(bad), clean, atol=1e-6)


def test_what_is_not_finite_stays_visible(arrays):
  q, k, v = arrays
  for spoilt in ((q, k.at[0, 6].set(jnp.nan), v), (q, k, v.at[0, 6].set(jnp.inf))):
    y, state = attention(*spoilt, segment_ids=PACKED, chunk=4)
    lost = np.isnan(y).all((-1, -2))
    assert lost[0].tolist() == [False] * 6 + [True] * 3 + [False] * 2 and not lost[1].any()
    _, state = attention(*(x[:, :8] for x in spoilt), segment_ids=PACKED[:, :8], chunk=4)
    after = [x[:, 8:9] for x in arrays]
    y, _ = attention(*after, segment_ids=PACKED[:, 8:9], state=state)
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()
  y, _ = attention(q.at[0, 6].set(jnp.nan), k, v, segment_ids=PACKED, chunk=4)
  assert np.flatnonzero(np.isnan(y).all((-1, -2))[0]).tolist() == [6]


def test_a_token_reaches_later_ones_of_its_segment_only(arrays):
  q, k, v = arrays
  value = lambda v, t: attention(q, k, v, segment_ids=PACKED, chunk=4)[0][:, t].sum()
  reached = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(v, jnp.arange(T)) != 0
  reached = np.asarray(reached.any((-1, -2)))  # [T, B, S]
  ids = np.asarray(PACKED)
  same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
  np.testing.assert_array_equal(reached.swapaxes(0, 1), same & np.tri(T, dtype=bool))


def test_gradients_equal_those_of_one_chunk(arrays):
  loss = lambda arrays, chunk: jnp.square(attention(*arrays, chunk=chunk)[0]).sum()
  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  grads = [gradient(arrays, chunk) for chunk in (3, 64)]
  for got, wanted in zip(*grads, strict=True):
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_bfloat16_inputs_are_summed_in_float32():
  x = jnp.ones((1, 600, 1, 2), jnp.bfloat16)
  y, state = attention(x, x, x)
  assert (y.dtype, state.sums.dtype) == (jnp.bfloat16, jnp.float32)
  assert (state.norms == 1200).all()  # not a bfloat16
  assert (y == 1).all()


def test_the_program_does_not_grow_with_the_length():
  def operations(length):
    x = jnp.ones((1, length, 1, 2))
    return len(jax.make_jaxpr(linear_attention)(x, x, x).eqns)

  assert operations(64 * 4) == operations(64 * 40)


def test_the_feature_map_keeps_its_relative_precision():
  x = jnp.array([-80.0, -20.0, 0.0, 3.0])
  np.testing.assert_allclose(feature_map(x), [*np.exp([-80.0, -20.0, 0.0]), 4.0], rtol=1e-6)
  assert np.isfinite(jax.grad(lambda x: feature_map(x).sum())(jnp.array([200.0, -200.0]))).all()


def test_the_module_decodes_what_it_computes_in_parallel(key):
  x = jax.random.normal(key, (2, 5, 8))
  module = LinearAttention(2)
  params = jax.jit(module.init)(key, x)
  apply = jax.jit(module.apply)
  whole, none = apply(params, x)
  # A prompt of 3 tokens and one of padding.
  prompt = Context(segment_ids=jnp.array([[0, 0, 0, -1]] * 2))
  padded = x[:, :4].at[:, 3].set(jnp.nan)
  y, cache = apply(params, padded, prompt, module.init_cache(8, 2, 5))
  steps = [y[:, :3]]
  for t in (3, 4):
    # With a cache a row is one sequence, whatever its ids.
    step = Context(segment_ids=jnp.full((2, 1), 7 * t))
    y, cache = apply(params, x[:, t : t + 1], step, cache)
    steps.append(y)
  np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=1e-6)
  assert none is None


def test_flops_stop_growing_at_the_chunk():
  module = LinearAttention(4, chunk=9)
  assert module.flops(16, 9) == module.flops(16, 90) == 2 * 4 * 16**2 + 4 * 16 * (5 + 4)
  assert LinearAttention(4, causal=False).flops(16, 5) == 2 * 4 * 16**2 + 4 * 16 * (5 + 2 * 4)


@pytest.mark.parametrize("length", [1, 9, 10_000])
def test_flops_of_decoding_do_not_depend_on_the_length(length):
  # One pair of tokens, the state taking one in, and the state read.
  assert LinearAttention(4).flops(16, length, 1) == 2 * 4 * 16**2 + 4 * 16 + 2 * 2 * 16 * 4


def test_impossible_arguments_are_refused(arrays, key):
  state = LinearState.empty(B, N, H, H)
  with pytest.raises(ValueError, match="chunk=0; allowed: from 1"):
    linear_attention(*arrays, chunk=0)
  with pytest.raises(ValueError, match="state with causal=False"):
    linear_attention(*arrays, causal=False, state=state)
  with pytest.raises(ValueError, match="heads=3; allowed: divisors of the width, 8"):
    LinearAttention(3).init(key, jnp.ones((1, 2, 8)))
  with pytest.raises(ValueError, match="a cache with causal=False"):
    LinearAttention(2, causal=False).init_cache(8, 1, 4)
