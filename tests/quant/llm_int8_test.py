"""LLM.int8() and products of integers, by their formula and beside bitsandbytes' quantisers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import linear
from effjax.layers import Embed, Linear, taps
from effjax.quant import Int8, Int8Dynamic, LLMInt8, LLMInt8Exact, outliers, quantize
from effjax.quant.dynamic import rounded

D, F = 64, 24


def activations():
  """Float16 numbers with two outlier features, of which one has a single outlier of −6."""
  x = np.random.default_rng(0).normal(size=(7, D)).astype(np.float16).clip(-5, 5)
  x[:, 5] *= 12
  x[2, 5], x[2, 9] = 0.5, -6
  return x


W = np.random.default_rng(1).normal(size=(D, F)).astype(np.float32)


def formula(x, q, scale, whole, threshold=6.0):
  """bitsandbytes' steps in float64: outliers to zero, absmax, their columns to zero, products."""
  x, q = np.asarray(x, np.float64), np.asarray(q, np.float64)
  outlier = (np.abs(x) >= threshold) & (threshold > 0)
  usual = np.where(outlier, 0, x)
  top = np.abs(usual).max(-1, keepdims=True)
  columns = outlier.any(0)
  rounded = np.round(usual * (127 / top)) * ~columns
  return rounded @ q * (top / 127) * scale + x[:, columns] @ whole[columns]


@pytest.mark.parametrize("cls", [LLMInt8, LLMInt8Exact])
@pytest.mark.parametrize("capacity", [1, 2, 64])
def test_product_is_that_of_the_formula_whatever_the_capacity(cls, capacity):
  w, x = cls.quantize(W, capacity=capacity), activations().astype(np.float32)
  whole = W if cls is LLMInt8Exact else np.asarray(w)
  expected = formula(x, w.q, np.asarray(w.scale), whole)
  found = jax.jit(linear)(x, w)
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
  half = linear(jnp.asarray(x, jnp.bfloat16), w)
  assert half.dtype == jnp.bfloat16


def test_thresholds_from_none_to_all():
  x = jnp.asarray(activations(), jnp.float32)
  found = {t: np.asarray(linear(x, LLMInt8.quantize(W, threshold=t))) for t in (0, 1e9, 1e-9)}
  dynamic = linear(x, Int8Dynamic.quantize(W))
  np.testing.assert_allclose(found[0], dynamic, rtol=1e-6)
  np.testing.assert_allclose(found[1e9], dynamic, rtol=1e-6)
  same_weights = linear(x, Int8.quantize(W))
  np.testing.assert_allclose(found[1e-9], same_weights, rtol=1e-4, atol=1e-3)
  off = lambda y: np.abs(y - same_weights).mean()  # by rounding activations
  assert off(linear(x, LLMInt8.quantize(W))) < off(dynamic) / 2


def test_quantisers_are_those_of_bitsandbytes():
  reason = "peer comparisons run on Python 3.11, which has torch"
  torch = pytest.importorskip("torch", reason=reason)
  bnb = pytest.importorskip("bitsandbytes", reason=reason).functional
  x = activations()
  theirs = [t.numpy() for t in bnb.int8_vectorwise_quant(torch.from_numpy(x.copy()), 6.0)]
  x = jnp.asarray(x)
  assert float(outliers(6.0).measure(x, None)[0]) == len(theirs[2]) / D
  q, scale = rounded(jnp.where(jnp.abs(x) >= 6, 0, x))
  np.testing.assert_array_equal(np.delete(q, theirs[2], 1), np.delete(theirs[0], theirs[2], 1))
  np.testing.assert_allclose(scale[:, 0] * 127, theirs[1], rtol=1e-6)
  codes, absmax, _ = bnb.int8_vectorwise_quant(torch.from_numpy(W.T.copy()).half())
  ours = Int8.quantize(W.astype(np.float16))
  assert (np.asarray(ours.q) == codes.numpy().T).mean() > 0.999
  np.testing.assert_allclose(ours.scale[0] * 127, absmax.numpy(), rtol=1e-6)


def test_integers_are_summed_exactly():
  x = np.random.default_rng(2).integers(-127, 128, (3, 4096)).astype(np.float32)
  x[:, 0] = 127
  q = np.random.default_rng(3).integers(-127, 128, (4096, 5)).astype(np.int8)
  w = Int8Dynamic(jnp.asarray(q), jnp.ones((1, 5)))
  expected = x.astype(np.int64) @ q.astype(np.int64)
  np.testing.assert_array_equal(linear(jnp.asarray(x), w), expected.astype(np.float32))


@pytest.mark.parametrize("cls", [Int8Dynamic, LLMInt8, LLMInt8Exact])
def test_gradient_is_that_of_the_matrix(cls):
  w, x = cls.quantize(W), jnp.asarray(activations(), jnp.float32)
  y, pull = jax.vjp(lambda x: linear(x, w), x)
  np.testing.assert_allclose(pull(y)[0], y @ np.asarray(w).T, rtol=1e-4, atol=1e-2)
  turned = jax.jit(linear)(y, w.T)
  assert type(w.T) is cls
  expected = np.asarray(y) @ np.asarray(w).T
  np.testing.assert_allclose(turned, expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("cls", [Int8Dynamic, LLMInt8])
def test_rows_of_zeros_and_of_nan_stay_among_themselves(cls):
  x = activations().astype(np.float32)
  whole = np.asarray(linear(jnp.asarray(x), cls.quantize(W)))
  x[3], x[4, 7] = 0, np.nan
  y = np.asarray(linear(jnp.asarray(x), cls.quantize(W)))
  assert (y[3] == 0).all() and np.isnan(y[4]).all()
  np.testing.assert_allclose(y[[0, 1, 2, 5, 6]], whole[[0, 1, 2, 5, 6]], rtol=1e-6)


def test_the_share_of_outliers_is_reported_through_taps():
  table = jnp.array([[1.0, -6.0, 0, 0], [9.0, 0, 0, 0]])
  module = nn.Sequential((Embed(2, 4), Linear(2)))
  params = {"layers_0": {"embedding": table}, "layers_1": {"kernel": jnp.ones((4, 2))}}
  batches = [{"tokens": jnp.array([ids])} for ids in ([0, 0], [0, 1])]
  found = taps.capture(module, params, batches, reduce=outliers(6.0))
  assert {path: float(x) for path, x in found.items()} == {"layers_1": (0.25 + 0.5) / 2}
  padded = outliers(6.0).measure(table[None], jnp.array([[True, False]]))
  assert padded.tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"threshold": -1.0}, "threshold"),
    ({"threshold": np.nan}, "threshold"),
    ({"capacity": 0}, "capacity"),
    ({"granularity": "group"}, "granularity 'group'"),
  ],
)
def test_bad_arguments_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    quantize({"up": {"kernel": jnp.ones((4, 4))}}, "llmint8", **options)
