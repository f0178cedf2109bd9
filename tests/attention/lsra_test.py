"""The convolutions against torch's and a plain loop; the two halves against their parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, masks
from effjax.attention.lsra import LSRA, convolve
from effjax.layers import Context
from effjax.peft import lora
from effjax.quant import dequantize, quantize

B, T, D, N, W = 2, 9, 8, 2, 3
PACKED = jnp.array([[3, 3, 3, 1, 1, 1, 1, 0, 0], [4, 4, 4, 4, 4, 4, -1, -1, -1]])
X, SHARED, DYNAMIC = (
  jax.device_put(np.random.default_rng(0).normal(size=shape).astype(jnp.float32))
  for shape in ((B, T, D), (1, 1, N, W), (B, T, N, W))
)
convolution = jax.jit(convolve, static_argnames="causal")


def loop(x, taps, causal, ids):
  """The definition, one product at a time, in float64."""
  x = np.asarray(x, np.float64)
  weights = np.exp(np.broadcast_to(np.asarray(taps, np.float64), (B, T, N, W)))
  weights /= weights.sum(-1, keepdims=True)
  y = np.zeros_like(x)
  for b, t, c, j in np.ndindex(B, T, D, W):
    s = t + j - (W - 1 if causal else W // 2)
    if 0 <= s < T and ids[b, s] == ids[b, t] >= 0:
      y[b, t, c] += weights[b, t, c * N // D, j] * x[b, s, c]
  return y


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [SHARED, DYNAMIC], ids=["lightweight", "dynamic"])
@pytest.mark.parametrize("ids", [None, PACKED], ids=["one segment", "packed"])
def test_equals_the_definition(taps, causal, ids):
  got = convolution(X, taps, causal=causal, segment_ids=ids)
  everywhere = np.zeros((B, T)) if ids is None else np.asarray(ids)
  np.testing.assert_allclose(got, loop(X, taps, causal, everywhere), atol=1e-6)


def test_lightweight_equals_torch_depthwise_convolution():
  torch = pytest.importorskip("torch", reason="torch is installed with Python 3.11 only")
  tensor = lambda a: torch.tensor(np.array(a))
  kernel = torch.softmax(tensor(SHARED[0, 0]), -1).repeat_interleave(D // N, 0)[:, None]
  x = tensor(X).mT
  centred = torch.nn.functional.conv1d(x, kernel, padding=W // 2, groups=D).mT
  causal = torch.nn.functional.conv1d(torch.nn.functional.pad(x, (W - 1, 0)), kernel, groups=D).mT
  np.testing.assert_allclose(convolution(X, SHARED, causal=False), centred, atol=1e-6)
  np.testing.assert_allclose(convolution(X, SHARED, causal=True), causal, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_reaches_its_neighbours_in_its_segment_only(causal):
  value = lambda x, t: convolution(x, DYNAMIC, causal=causal, segment_ids=PACKED)[:, t].sum()
  reached = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(X, jnp.arange(T))
  reached = np.asarray((reached != 0).any(-1)).swapaxes(0, 1)
  ids, t = np.asarray(PACKED), np.arange(T)
  same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
  back = t[:, None] - t[None]
  near = (back >= 0) & (back < W) if causal else abs(back) <= W // 2
  np.testing.assert_array_equal(reached, same & near)


def test_padding_gives_nothing_even_where_it_is_not_finite():
  spoilt = jnp.where((PACKED < 0)[..., None], jnp.nan, X)
  y = convolution(X, DYNAMIC, causal=False, segment_ids=PACKED)
  taps = jnp.where((PACKED < 0)[..., None, None], jnp.nan, DYNAMIC)
  other = convolution(spoilt, taps, causal=False, segment_ids=PACKED)
  np.testing.assert_array_equal(y, other)
  assert not y[PACKED < 0].any()


def test_bfloat16_is_summed_in_float32():
  x = jnp.ones((1, 31, 1), jnp.bfloat16)
  y = convolution(x, jnp.zeros((1, 1, 1, 31)), causal=True)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y[0, :, 0].astype(jnp.float32), np.arange(1, 32) / 31, rtol=2**-8)


@pytest.mark.parametrize(
  ("dynamic", "causal"), [(False, False), (True, True)], ids=["lightweight", "dynamic"]
)
def test_the_halves_are_an_attention_and_a_convolution(dynamic, causal, key):
  module = LSRA(N, W, causal=causal, dynamic=dynamic)
  x = jnp.concatenate([X, X + 1], -1)
  params = jax.jit(module.init)(key, x)["params"]
  context = Context(segment_ids=PACKED)
  y, cache = jax.jit(module.apply)({"params": params}, x, context)
  attention = Attention(N, mask=masks.Causal() if causal else masks.Full())
  far, _ = jax.jit(attention.apply)({"params": params["attention"]}, x[..., :D], context)
  x, params = jax.tree.map(np.asarray, (x, params))
  value, gate = np.split(x[..., D:] @ params["glu"]["kernel"], 2, -1)
  inputs = value / (1 + np.exp(-gate))
  if dynamic:
    taps = (inputs @ params["taps"]["kernel"]).reshape(B, T, N, W)
  else:
    taps = params["conv"][None, None]
  near = loop(inputs, taps, causal, np.asarray(PACKED)) @ params["out"]["kernel"]
  np.testing.assert_allclose(y, np.concatenate([far, near], -1), atol=1e-5)
  assert cache is None


def test_decoding_equals_the_parallel_form(key):
  module = LSRA(N, W, dynamic=True)
  params = jax.jit(module.init)(key, X)
  apply = jax.jit(module.apply)
  whole, _ = apply(params, X)
  cache = module.init_cache(D, B, T + 3)
  # A prompt padded on the right: the rows go on from 4 and from 6.
  there = jnp.arange(6)[None] < jnp.array([[4], [6]])
  prompt = jnp.where(there[..., None], X[:, :6], jnp.nan)
  _, cache = apply(params, prompt, Context(segment_ids=jnp.where(there, 0, -1)), cache)
  assert not cache.inputs[0, 4:].any()
  for step in range(3):
    positions = jnp.array([[4], [6]]) + step
    x = jnp.take_along_axis(X, positions[..., None], axis=1)
    y, cache = apply(params, x, Context(positions=positions), cache)
    wanted = jnp.take_along_axis(whole, positions[..., None], axis=1)
    np.testing.assert_allclose(y, wanted, atol=1e-6)


def test_projections_may_be_weights_of_any_representation(key):
  module = LSRA(N, 3, dynamic=True)
  changed = lambda params: lora.add(quantize(params), key, rank=2, targets="taps/kernel$")
  params = jax.jit(lambda: changed(module.init(key, X)["params"]))()
  plain = jax.jit(lambda params: dequantize(lora.merge(params)))(params)
  value = jax.jit(lambda params: module.apply({"params": params}, X)[0])
  np.testing.assert_allclose(value(params), value(plain), atol=1e-5)


def test_flops_count_both_halves():
  attention = Attention(N).flops(D, 20)
  assert LSRA(N, W).flops(2 * D, 20) == attention + 2 * D * (3 * D + W)
  decoding = Attention(N).flops(D, 20, 1)
  assert LSRA(N, W).flops(2 * D, 20, 1) == decoding + 2 * D * (3 * D + W)
  assert LSRA(N, W, dynamic=True).flops(2 * D, 20) == attention + 2 * D * (3 * D + W + N * W)


def test_impossible_modules_are_refused(key):
  with pytest.raises(ValueError, match="heads=3; allowed: divisors of half the width, 8/2"):
    LSRA(3).init(key, X)
  with pytest.raises(ValueError, match="kernel=4 with causal=False; allowed: odd"):
    LSRA(N, 4, causal=False).init(key, X)
  with pytest.raises(ValueError, match="kernel=0 with causal=True; allowed: from 1"):
    LSRA(N, 0).init(key, X)
  with pytest.raises(ValueError, match="3 heads; allowed: divisors of 8 channels"):
    convolve(X, jnp.zeros((1, 1, 3, 1)), causal=True)
  with pytest.raises(ValueError, match="a cache with causal=False"):
    LSRA(N, 3, causal=False).init_cache(8, 1, 4)
