"""Keys and values in int8: what is kept of them, and attention to what is kept, in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import LSRA, Attention, BigBird, LinearAttention, masks
from effjax.attention.kv_cache import Int8Rows, empty, put
from effjax.layers import Context, Rope
from tests.attention.cached_test import COUNTS, calls
from tests.modules import normal, random_params

B, T, D, N, K, H = 3, 9, 8, 2, 1, 4
X = normal(B, T, D, seed=4)
ATTENTION = Attention(N, K, mask=masks.Causal())


def exact(rows: Int8Rows) -> np.ndarray:
  """What they stand for, in float64."""
  return np.asarray(rows.q, np.float64) * np.asarray(rows.scale, np.float64)


def project(params, name: str, x) -> np.ndarray:
  y = np.asarray(x, np.float64) @ np.asarray(params[name]["kernel"], np.float64)
  return y.reshape(*y.shape[:-1], -1, H)


def attended(query, key, value, mask) -> np.ndarray:
  """Attention in float64 of queries [T, N, H] to keys and values [T, K, H]."""
  key, value = (np.repeat(x, N // K, axis=1) for x in (key, value))
  weights = np.exp(np.einsum("tnh,snh->nts", query, key) / np.sqrt(H))
  weights *= np.asarray(mask.dense(T))[..., : len(query), : len(key)]
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  return np.einsum("nts,snh->tnh", weights, value).reshape(len(query), -1)


@pytest.fixture(scope="module")
def params():
  return random_params(ATTENTION, X)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(3, 3)])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_query_attends_to_what_is_kept(mask, padding, params):
  module = ATTENTION.clone(mask=mask)
  apply = jax.jit(functools.partial(module.apply, {"params": params}))
  cache, query = module.init_cache(D, B, T, jnp.int8), project(params, "query", X)
  for x, ids, place, ends in calls(padding):
    y, cache = apply(x, Context(segment_ids=ids), cache)
    key, value = exact(cache.key), exact(cache.value)
    assert cache.ends.tolist() == ends.tolist()
    for row, end in enumerate(ends):
      want = attended(query[row, :end], key[row, :end], value[row, :end], mask)
      want = want @ np.asarray(params["out"]["kernel"], np.float64)
      there = np.asarray(ids[row]) >= 0
      np.testing.assert_allclose(y[row, there], want[place[row, there]], atol=1e-5)
      assert not key[row, end:].any()
      assert not value[row, end:].any()
  for name, rows in (("key", cache.key), ("value", cache.value)):
    total = COUNTS.sum(1)
    off = np.abs(exact(rows) - project(params, name, X))
    for row, end in enumerate(total):
      bound = np.asarray(rows.scale)[row, :end] / 2
      assert (off[row, :end] <= bound * (1 + 1e-4)).all()
      assert (off[row, :end].max(-1) > 0).all()


def test_what_comes_out_is_as_near_as_scores_and_values_are(params):
  """|softmax(s + e) v' − softmax(s) v| ≤ (exp(2 max |e|) − 1) max |v| + max |v' − v|."""
  identity = {**params, "out": {"kernel": jnp.eye(D)}}
  cache = ATTENTION.init_cache(D, B, T, jnp.int8)
  y, cache = jax.jit(ATTENTION.apply)({"params": identity}, X, Context(), cache)
  query, key, value = (project(params, name, X) for name in ("query", "key", "value"))
  for row in range(B):
    want = attended(query[row], key[row], value[row], ATTENTION.mask)
    key_step, value_step = (np.asarray(x.scale)[row].max() / 2 for x in (cache.key, cache.value))
    error = np.abs(query[row]).sum(-1).max() * key_step / np.sqrt(H)
    bound = (np.exp(2 * error) - 1) * np.abs(value[row]).max() + value_step
    off = np.abs(y[row] - want)
    assert 0 < off.max() <= bound * (1 + 1e-4)


def test_rows_that_are_no_numbers_are_none_alone():
  x = np.asarray(normal(2, 3, K, H)).copy()
  x[0, 1, 0, 2], x[1, 0, 0, 0], x[1, 2] = np.nan, -np.inf, 0
  slots = jnp.array([[4, 0, 6], [1, 5, 2]])  # slot 5 is one past the end
  rows = jax.jit(put)(empty((2, 5, K, H), jnp.int8), jnp.asarray(x), slots)
  kept = np.asarray(rows.astype(jnp.float32))[:, :, 0]
  assert np.isnan(kept[0, 0]).all()
  assert np.isnan(kept[1, 1]).all()
  assert np.isnan(kept).sum() == 2 * H
  np.testing.assert_allclose(kept[0, 4], x[0, 0, 0], atol=np.abs(x[0, 0]).max() / 250)
  assert not kept[0, 1:4].any()
  assert not kept[1, [0, 2, 3, 4]].any()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_sizes_of_all_orders(size):
  x = np.float32(size) * np.array([[1.0, -0.5, 0.25, 0.0]], np.float32)
  kept = Int8Rows.of(jnp.asarray(x)).astype(jnp.float32)
  least = 127 * np.finfo(np.float32).tiny  # what is less may count as 0
  np.testing.assert_allclose(kept, x, atol=max(float(np.abs(x).max()) / 250, least))


@pytest.mark.parametrize(("kept", "wide"), [("bfloat16", "float32"), ("float32", "float32")])
def test_they_are_read_in_the_type_of_activations(kept, wide):
  rows = Int8Rows.of(normal(5, H).astype(kept))
  assert (rows.q.dtype, rows.scale.dtype) == (jnp.int8, jnp.float32)
  got = rows.astype(kept)
  assert got.dtype == kept
  step = np.float64(jnp.finfo(kept).eps)
  np.testing.assert_allclose(got.astype(wide), exact(rows), rtol=step)


def test_it_takes_a_byte_an_entry_and_a_scale_a_head():
  size = lambda dtype: sum(x.nbytes for x in jax.tree.leaves(ATTENTION.init_cache(D, B, T, dtype)))
  written = B * T
  floats = size(jnp.float32) - written
  assert size(jnp.int8) - written == floats / 4 + 2 * B * T * K * 4


MIXERS = {
  "rotary": Attention(N, K, rope=Rope(), mask=masks.Causal()),
  "sinks": Attention(N, sinks=True, mask=masks.Causal() & masks.SlidingWindow(2, 0)),
  "BigBird": BigBird(N, block=2, number=1),
  "linear": LinearAttention(N, chunk=2),
  "LSRA": LSRA(N, kernel=3, rope=Rope()),
}


@pytest.mark.parametrize("module", MIXERS.values(), ids=MIXERS)
def test_every_mixer_goes_on_where_its_rows_ended(module):
  """In three calls, padded on either side, what one call through such a cache gives."""
  params = random_params(module, X)
  apply = jax.jit(functools.partial(module.apply, {"params": params}))
  whole, kept = apply(X, Context(), module.init_cache(D, B, T, jnp.int8))
  plain = apply(X, Context(), module.init_cache(D, B, T))[0]
  whole, off = np.asarray(whole), np.abs(np.asarray(whole) - np.asarray(plain)).max()
  assert off < 0.1 and (off > 1e-5) == (module is not MIXERS["linear"])
  for padding in ("right", "left"):
    cache = module.init_cache(D, B, T, jnp.int8)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, kept)
    for x, ids, place, _ in calls(padding):
      y, cache = apply(x, Context(segment_ids=ids), cache)
      row, column = np.nonzero(np.asarray(ids) >= 0)
      want = whole[row, place[row, column]]
      np.testing.assert_allclose(np.asarray(y)[row, column], want, atol=1e-5)


@pytest.mark.parametrize("module", [ATTENTION, LSRA(N, kernel=3)])
def test_what_is_gone_back_over_is_written_again(module):
  params = random_params(module, X)
  apply = jax.jit(functools.partial(module.apply, {"params": params}))
  start = lambda x: apply(x, Context(), module.init_cache(D, B, T, jnp.int8))[1]
  positions = jnp.full((B, 2), 4) + jnp.arange(2)[None]
  y, _ = apply(X[:, :2], Context(positions=positions), start(X[:, :8]))
  want, _ = apply(X[:, :2], Context(), start(X[:, :4]))
  np.testing.assert_allclose(y, want, atol=1e-6)


def test_rows_are_chosen_among_as_of_any_cache(params):
  """As a search over beams does, which copies rows of the cache."""
  apply = jax.jit(functools.partial(ATTENTION.apply, {"params": params}))
  _, cache = apply(X[:, :5], Context(), ATTENTION.init_cache(D, B, T, jnp.int8))
  rows = np.array([2, 2, 0])
  y, _ = apply(X[rows, 5:6], Context(), jax.tree.map(lambda x: x[rows], cache))
  want, _ = apply(X[:, 5:6], Context(), cache)
  np.testing.assert_allclose(y, np.asarray(want)[rows], atol=1e-6)


@pytest.mark.parametrize("mode", ["x64", "strict"])
def test_64_bits_and_strict_types_change_nothing(mode, params):
  module = ATTENTION
  step = lambda: module.apply(
    {"params": params}, X, Context(), module.init_cache(D, B, T, jnp.int8)
  )
  want = jax.jit(step)()
  with jax.enable_x64(True) if mode == "x64" else jax.numpy_dtype_promotion("strict"):
    got = jax.jit(lambda: step())()
  chex.assert_trees_all_equal_dtypes(got, want)
  chex.assert_trees_all_close(got[0], want[0], atol=1e-5)


@pytest.mark.parametrize("module", [ATTENTION, LSRA(N, kernel=3)])
def test_types_of_neither_floats_nor_int8_are_refused(module):
  for dtype in (jnp.int32, jnp.uint8, bool, jnp.complex64):
    with pytest.raises(ValueError, match=r"dtype=\w+ of a cache; allowed: types of floats, and"):
      module.init_cache(D, B, T, dtype)
