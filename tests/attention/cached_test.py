"""Through a cache a query sees the tokens its row holds, and nothing else, whatever the mask."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import LSRA, Attention, BigBird, LinearAttention, masks
from effjax.layers import Context, Rope
from tests.modules import normal, random_params

B, T, D, N = 3, 9, 8, 2
X = normal(B, T, D, seed=4)
COUNTS = np.array([[3, 0, 2], [1, 3, 1], [2, 2, 3]])  # tokens of each row in each of three calls
MASKS = {
  "full": masks.Full(),
  "causal": masks.Causal(),
  "window": masks.SlidingWindow(3, 3),
  "not a window": ~masks.SlidingWindow(1, 1),
  "dilated": masks.Dilated(2, 2),
  "longformer": masks.longformer(1, (0, 4)),
  "prefix": masks.Causal() | masks.Prefix(4),
}


def calls(padding: str):
  """Tokens [B, 3] and segment ids of each call, and where its tokens stand in X."""
  ends = COUNTS.cumsum(1)
  for call, count in enumerate(COUNTS.T):
    column = np.arange(3)[None]
    there = column < count[:, None] if padding == "right" else column >= 3 - count[:, None]
    place = np.maximum(ends[:, call, None] - count[:, None] + there.cumsum(1) - 1, 0)
    x = np.take_along_axis(np.asarray(X), place[..., None], axis=1)
    ids = np.where(there, 7 * call, -1).astype(np.int32)
    yield jnp.where(there[..., None], x, jnp.nan), jnp.asarray(ids), place, ends[:, call]


def alone(params, x, mask):
  """Attention in float64, of a row of `x` to all of it."""
  kernel = lambda name: np.asarray(params[name]["kernel"], np.float64)
  query, key, value = (
    (np.asarray(x, np.float64) @ kernel(name)).reshape(len(x), N, -1)
    for name in ("query", "key", "value")
  )
  scores = np.einsum("tnh,snh->nts", query, key) / np.sqrt(D // N)
  seen = np.asarray(mask.dense(T))[..., : len(x), : len(x)]
  weights = np.exp(scores) * seen
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  return np.einsum("nts,snh->tnh", weights, value).reshape(len(x), D) @ kernel("out")


@pytest.mark.parametrize("length", [T, 40])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_query_sees_what_its_row_holds(mask, length):
  module = Attention(N, mask=mask)
  params = random_params(module, X)
  apply = jax.jit(functools.partial(module.apply, {"params": params}))
  for padding in ("right", "left"):
    cache = module.init_cache(D, B, length)
    for x, ids, place, ends in calls(padding):
      y, cache = apply(x, Context(segment_ids=ids), cache)
      assert cache.ends.tolist() == ends.tolist()
      for row, end in enumerate(ends):
        want = alone(params, X[row, :end], mask)
        there = np.asarray(ids[row]) >= 0
        np.testing.assert_allclose(y[row, there], want[place[row, there]], atol=1e-5)
      assert np.isfinite(np.asarray(y)[np.asarray(ids) < 0]).all()


MIXERS = {
  "rotary": Attention(N, 1, rope=Rope(), mask=masks.Causal()),
  "sinks": Attention(N, sinks=True, mask=masks.Causal() & masks.SlidingWindow(2, 0)),
  "BigBird": BigBird(N, block=2, number=1),
  "linear": LinearAttention(N, chunk=2),
  "LSRA": LSRA(N, kernel=3, rope=Rope()),
}


@pytest.mark.parametrize("length", [T, 40])
@pytest.mark.parametrize("module", MIXERS.values(), ids=MIXERS)
def test_rows_go_on_where_they_ended(module, length):
  """Without positions: what a call gives is what one call for the whole row would."""
  params = random_params(module, X)
  apply = jax.jit(functools.partial(module.apply, {"params": params}))
  whole = np.asarray(apply(X)[0])
  for padding in ("right", "left"):
    cache = module.init_cache(D, B, length)
    for x, ids, place, _ in calls(padding):
      y, cache = apply(x, Context(segment_ids=ids), cache)
      row, column = np.nonzero(np.asarray(ids) >= 0)
      np.testing.assert_allclose(
        np.asarray(y)[row, column], whole[row, place[row, column]], atol=1e-5
      )


@pytest.mark.parametrize("module", [Attention(N, mask=masks.Full()), LSRA(N, kernel=3)])
def test_going_on_from_an_earlier_position_forgets_what_came_after(module):
  params = random_params(module, X)
  apply = jax.jit(functools.partial(module.apply, {"params": params}))
  start = lambda x: apply(x, Context(), module.init_cache(D, B, T))[1]
  positions = jnp.full((B, 2), 4) + jnp.arange(2)[None]
  y, cache = apply(X[:, :2], Context(positions=positions), start(X[:, :8]))
  want, fresh = apply(X[:, :2], Context(), start(X[:, :4]))
  np.testing.assert_allclose(y, want, atol=1e-6)
  ends = lambda cache: getattr(cache, "attention", cache).ends.tolist()
  assert ends(cache) == ends(fresh) == [6] * B


@pytest.mark.parametrize("module", [Attention(N), LSRA(N, kernel=2, rope=Rope()), BigBird(N)])
def test_a_position_that_a_cache_lacks(module):
  """Refused where it is known; else NaN for that token alone, of which nothing is written."""
  params = random_params(module, X)
  apply = functools.partial(module.apply, {"params": params})
  cache = module.init_cache(D, B, 4)
  positions = jnp.array([[0, 1], [2, 4], [9, 3]])
  with pytest.raises(ValueError, match=r"positions: 4 at \[1, 1\]; allowed: 0 … 3, the slots"):
    apply(X[:, :2], Context(positions=positions), cache)
  with pytest.raises(ValueError, match=r"positions: -1 at \[0, 0\]"):
    apply(X[:1, :1], Context(positions=jnp.array([[-1]])), module.init_cache(D, 1, 4))
  ids = jnp.array([[0, 0], [0, 0], [-1, 0]])
  y, new = jax.jit(apply)(X[:, :2], Context(positions=positions, segment_ids=ids), cache)
  lost = np.array([[False, False], [False, True], [False, False]])
  assert np.isnan(y[1, 1]).all()
  assert np.isfinite(np.asarray(y)[~lost]).all()
  inside = Context(segment_ids=jnp.where(lost, -1, ids), positions=jnp.where(lost, 0, positions))
  want, kept = apply(X[:, :2], inside, cache)
  np.testing.assert_allclose(np.asarray(y)[~lost], np.asarray(want)[~lost], atol=1e-6)
  chex.assert_trees_all_close(new, kept, atol=1e-6)


def test_a_full_cache_says_so():
  module = Attention(N)
  params = random_params(module, X)
  apply = functools.partial(module.apply, {"params": params})
  _, cache = apply(X[:, :4], Context(), module.init_cache(D, B, 4))
  with pytest.raises(ValueError, match=r"positions: 4 at \[0, 0\]; allowed: 0 … 3"):
    apply(X[:, :1], Context(), cache)
