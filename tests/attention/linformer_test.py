"""Linformer against its formula in float64, and against full attention where the two are one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, masks
from effjax.attention.linformer import Linformer, linformer_attention, project_length
from effjax.layers import Context
from effjax.peft import lora
from effjax.quant import dequantize, quantize

B, T, N, H, M, R = 2, 7, 2, 4, 9, 3
attention = jax.jit(linformer_attention)
LENGTHS = np.array([7, 4])
IDS = jnp.where(np.arange(T)[None] < LENGTHS[:, None], 3, -1)


@pytest.fixture
def arrays():
  """q, k, v [B, T, N, H] and E, F [M, R]."""
  rng = np.random.default_rng(0)
  shapes = [(B, T, N, H)] * 3 + [(M, R)] * 2
  return tuple(jax.device_put(rng.normal(size=shape).astype(jnp.float32)) for shape in shapes)


def formula(q, k, v, e, f):
  """One sequence without padding, [T, N, H], in float64."""
  q, k, v, e, f = (np.asarray(a, np.float64) for a in (q, k, v, e, f))
  k = np.einsum("tr,tnh->rnh", e[: len(k)], k)
  v = np.einsum("tr,tnh->rnh", f[: len(v)], v)
  weights = np.exp(np.einsum("tnh,rnh->ntr", q, k) / np.sqrt(q.shape[-1]))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("ntr,rnh->tnh", weights, v)


def test_equals_the_formula_on_each_sequence_without_its_padding(arrays):
  q, k, v, e, f = arrays
  got = np.asarray(attention(q, k, v, e, f, segment_ids=IDS))
  for row, length in enumerate(LENGTHS):
    wanted = formula(*(a[row, :length] for a in (q, k, v)), e, f)
    np.testing.assert_allclose(got[row, :length], wanted, atol=1e-5)
    assert (got[row, length:] == 0).all()


def test_no_ids_mean_no_padding(arrays):
  np.testing.assert_allclose(
    attention(*arrays)[1], formula(*(a[1] for a in arrays[:3]), *arrays[3:]), atol=1e-5
  )


def test_padding_reaches_nobody_even_where_it_is_not_finite(arrays):
  q, k, v, e, f = arrays
  spoil = lambda x: x.at[1, 4:].set(jnp.nan)
  y = attention(q, k, v, e, f, segment_ids=IDS)
  other = attention(q, spoil(k), spoil(v), e, f, segment_ids=IDS)
  np.testing.assert_array_equal(y, other)


def test_identity_projections_give_full_attention(key):
  x = jax.random.normal(key, (2, 7, 16))
  module = Linformer(4, length=7, rank=7, shared=True)
  params = jax.jit(module.init)(key, x)["params"]
  params = params | {"key_length": {"kernel": jnp.eye(7)}}
  apply = lambda module: jax.jit(module.apply)({"params": params}, x)
  got, cache = apply(module)
  full, _ = apply(Attention(4, mask=masks.Full()))
  np.testing.assert_allclose(got, full, atol=1e-5)
  assert cache is None


def test_sharing_leaves_one_projection(key):
  x = jnp.ones((1, 4, 8))
  shapes = lambda shared: jax.eval_shape(Linformer(2, 4, 2, shared=shared).init, key, x)["params"]
  assert set(shapes(False)) - set(shapes(True)) == {"value_length"}


def test_maps_along_the_length_may_be_weights_of_any_representation(key):
  x = jax.random.normal(key, (2, 5, 8))
  module = Linformer(2, length=6, rank=3)
  changed = lambda params: lora.add(quantize(params), key, rank=2, targets="kernel$")
  params = jax.jit(lambda: changed(module.init(key, x)["params"]))()
  plain = jax.jit(lambda params: dequantize(lora.merge(params)))(params)
  assert type(params["key_length"]["kernel"]).__name__ == "LoRA"
  value = jax.jit(lambda params: module.apply({"params": params}, x)[0])
  np.testing.assert_allclose(value(params), value(plain), atol=1e-5)


def test_gradients_reach_both_projections(arrays):
  q, k, v, e, f = arrays
  loss = lambda e, f: jnp.square(linformer_attention(q, k, v, e, f, segment_ids=IDS)).sum()
  for grad in map(np.asarray, jax.jit(jax.grad(loss, (0, 1)))(e, f)):
    assert np.isfinite(grad).all()
    assert (grad[:T] != 0).all()
    assert not grad[T:].any()


def test_bfloat16_loses_nothing_on_the_way_along_the_length():
  x = jnp.ones((2, 1000, 2, 4), jnp.bfloat16)
  y = jax.jit(project_length)(x, jnp.ones((1000, 3)))
  assert y.dtype == jnp.bfloat16
  assert (y == 1000).all()  # a sum kept in bfloat16 would stop at 256


def test_flops_do_not_grow_with_the_length():
  module = Linformer(4, length=64, rank=8)
  assert module.flops(16, 64) == module.flops(16, 8) == 2 * 16 * (4 * 16 + 4 * 8)


def test_what_it_cannot_do_is_refused(key):
  x = jnp.ones((1, 5, 16))
  with pytest.raises(ValueError, match="causal=True; allowed: False"):
    Linformer(4, 8, 2, causal=True).init(key, x)
  with pytest.raises(ValueError, match="sequence of length 5; allowed: up to 4"):
    Linformer(4, 4, 2).init(key, x)
  with pytest.raises(ValueError, match="heads=3; allowed: divisors of the width, 16"):
    Linformer(3, 8, 2).init(key, x)
  with pytest.raises(ValueError, match="a cache; allowed: none"):
    Linformer(4, 8, 2).init_cache(16, 1, 8)
  with pytest.raises(ValueError, match="a cache; allowed: none"):
    Linformer(4, 8, 2).init(key, x, Context(), ())
