"""Shifted sparse attention against its definition by rolling, in float64, and plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, attend, masks
from effjax.attention.longlora import ShiftedSparseAttention, mean_keys, shifted_group_attention
from effjax.layers import Context, Rope

B, T, N, H = 2, 10, 4, 4
PACKED = jnp.array([[0] * 3 + [2] * 5 + [1] * 2, [-1] + [7] * 6 + [-1] * 3])
attention = jax.jit(shifted_group_attention, static_argnames=("group", "causal", "logit_softcap"))


def arrays(kv_heads=N, length=T):
  rng = np.random.default_rng(0)
  draw = lambda n: jax.device_put(rng.normal(size=(B, length, n, H)).astype(np.float32))
  return draw(N), draw(kv_heads), draw(kv_heads)


def seen(length, group, causal, ids):
  """Who sees whom, [B, N, T, T]: token numbers rolled, cut into groups and looked up."""
  grid = np.zeros((B, N, length, length), bool)
  for b, n in np.ndindex(B, N):
    rolled = np.roll(np.arange(-(-length // group) * group), -(group // 2) if n >= N // 2 else 0)
    for block in rolled.reshape(-1, group):
      for q in block[block < length]:
        for k in block[block < length]:
          near = abs(q - k) < group  # not across the wrap-around
          grid[b, n, q, k] = near and (k <= q or not causal) and ids[b, q] == ids[b, k] >= 0
  return grid


def dense(q, k, v, visible):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (x.repeat(N // x.shape[2], axis=2) for x in (k, v))
  weights = np.exp(np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)) * visible
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  return np.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  ("group", "kv_heads", "ids"),
  [(5, 4, None), (4, 4, PACKED), (3, 2, PACKED), (4, 1, None), (7, 1, PACKED)],
)
def test_equals_the_rolled_definition(group, kv_heads, ids, causal):
  qkv = arrays(kv_heads)
  got = attention(*qkv, group=group, causal=causal, segment_ids=ids)
  everywhere = np.zeros((B, T), int) if ids is None else np.asarray(ids)
  np.testing.assert_allclose(got, dense(*qkv, seen(T, group, causal, everywhere)), atol=2e-6)


@pytest.mark.parametrize("group", [T, T + 3])
def test_one_group_is_plain_attention(group):
  qkv = arrays(2)
  got = attention(*qkv, group=group, segment_ids=PACKED, logit_softcap=2.0)
  plain = functools.partial(attend, mask=masks.Causal(), logit_softcap=2.0)
  plain = jax.jit(plain)(*qkv, segment_ids=PACKED)
  np.testing.assert_allclose(got, plain, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_reaches_what_it_should_and_nothing_across_the_wrap_around(causal):
  q, k, v = arrays()
  value = lambda v, t: attention(q, k, v, group=4, causal=causal)[:, t].sum()
  reached = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(v, jnp.arange(T))
  reached = np.moveaxis(np.asarray((reached != 0).any(-1)), 0, 2)  # [B, S, T, N]
  everywhere = np.zeros((B, T), int)
  np.testing.assert_array_equal(reached.transpose(0, 3, 2, 1), seen(T, 4, causal, everywhere))
  assert not reached[:, -2:, :2].any()
  assert not reached[:, :2, -2:].any()


def test_padding_and_batch_rows_do_not_matter():
  spoil = lambda x: jnp.where((PACKED < 0)[..., None, None], 9.0, x)
  q, k, v = arrays()
  y = attention(q, k, v, group=4, segment_ids=PACKED)
  other = attention(spoil(q), spoil(k), spoil(v), group=4, segment_ids=PACKED)
  np.testing.assert_allclose(other, y, atol=1e-6)
  assert not y[PACKED < 0].any()
  one = attention(*(x[1:] for x in (q, k, v)), group=4, segment_ids=PACKED[1:])
  np.testing.assert_allclose(one, y[1:], atol=1e-6)


def test_bfloat16_stays_and_is_close():
  qkv = arrays()
  y = attention(*(x.astype(jnp.bfloat16) for x in qkv), group=4)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), attention(*qkv, group=4), atol=0.05)


def test_the_module_trains_in_groups_and_decodes_in_full(key):
  x = jax.random.normal(key, (2, 6, 8))
  full = Attention(2, kv_heads=1, rope=Rope())
  sparse = ShiftedSparseAttention(2, kv_heads=1, rope=Rope(), group=4)
  params = jax.jit(full.init)(key, x)
  apply = lambda module, *cache: jax.jit(module.apply)(params, x, Context(), *cache)[0]
  decoded = apply(sparse, sparse.init_cache(8, 2, 6))
  y, z = apply(full), apply(sparse)
  np.testing.assert_allclose(decoded, y, atol=1e-6)
  np.testing.assert_allclose(z[:, :2], y[:, :2], atol=1e-6)
  assert float(jnp.abs(z - y)[:, 2:].max(-1).min()) > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_flops_count_the_keys_in_the_groups(causal):
  wanted = seen(T, 4, causal, np.zeros((B, T), int)).sum(-1).mean()
  assert mean_keys(T, 4, causal) == wanted
  mask = masks.Causal() if causal else masks.Full()
  module = ShiftedSparseAttention(4, mask=mask, group=4)
  assert module.flops(16, T) == 2 * 4 * 16**2 + 4 * 16 * wanted
  quarter = ShiftedSparseAttention(4).flops(16, T)
  assert quarter == ShiftedSparseAttention(4, group=3).flops(16, T)
  assert ShiftedSparseAttention(4, group=T).flops(16, T) == Attention(4).flops(16, T)
  assert module.flops(16, T, T) == module.flops(16, T)
  assert module.flops(16, T, 1) == Attention(4, mask=mask).flops(16, T, 1)  # with a cache


def test_what_it_cannot_do_is_refused(key):
  x = jnp.ones((1, 5, 12))
  with pytest.raises(ValueError, match="group=1; allowed: from 2"):
    ShiftedSparseAttention(4, group=1).init(key, x)
  with pytest.raises(ValueError, match="3 query heads; allowed: even"):
    ShiftedSparseAttention(3).init(key, x)
  for module in (
    ShiftedSparseAttention(4, mask=masks.SlidingWindow(2, 0)),
    ShiftedSparseAttention(4, cross=True),
  ):
    with pytest.raises(ValueError, match=r"allowed: Causal\(\) or Full\(\), and cross=False"):
      module.init(key, x, Context(memory=x))
