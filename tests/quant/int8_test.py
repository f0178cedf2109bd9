import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import linear
from effjax.quant import Int8


def normal(shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(params=["channel", "row"])
def weight(request):
  return Int8.quantize(normal((12, 5)), granularity=request.param)


def test_product_is_that_of_the_materialized_matrix(weight):
  x = normal((2, 3, 12), 1)
  expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
  np.testing.assert_allclose(linear(x, weight), expected, rtol=1e-5, atol=1e-5)
  half = linear(x.astype(jnp.bfloat16), weight)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(half, np.float64), expected, atol=0.06)


def test_product_in_float16_does_not_overflow():
  w = Int8.quantize(jnp.full((2048, 1), 0.01))
  y = w.matmul(jnp.ones((1, 2048), jnp.float16))
  np.testing.assert_allclose(np.asarray(y, np.float32), 20.48, rtol=2e-3)


def test_gradient_of_the_input_is_that_of_the_matrix(weight):
  x, cotangent = normal((3, 12), 1), normal((3, 5), 2)
  pull = jax.jit(lambda weight, x, cotangent: jax.vjp(weight.matmul, x)[1](cotangent))
  (got,) = pull(weight, x, cotangent)
  wanted = np.asarray(cotangent) @ np.asarray(weight).T
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_backward_stores_the_integers_and_nothing_wider():
  stacked = Int8.quantize(normal((4, 8, 8)))
  step = lambda x, w: (jnp.tanh(w.matmul(x)), None)
  _, backward = jax.vjp(lambda x: jax.lax.scan(step, x, stacked)[0], normal((2, 8)))
  kept = [x for x in jax.tree.leaves(backward) if x.size >= 4 * 8 * 8]
  assert [x.dtype for x in kept] == [jnp.int8]


def test_transpose_keeps_the_integers(weight):
  assert isinstance(weight.T, Int8)
  matrix = np.asarray(weight)
  chex.assert_trees_all_equal(np.asarray(weight.T), matrix.T)
  x = normal((2, 5), 1)
  np.testing.assert_allclose(linear(x, weight.T), np.asarray(x) @ matrix.T, rtol=1e-5, atol=1e-5)


def test_rows_are_those_of_the_matrix(weight):
  ids = jnp.array([[0, 11], [3, 3]])
  chex.assert_trees_all_equal(np.asarray(weight.take(ids)), np.asarray(weight)[np.asarray(ids)])


def test_leading_axes_are_a_batch():
  w = normal((2, 3, 8, 4))
  quantised = Int8.quantize(w)
  assert quantised.shape == w.shape
  alone = Int8.quantize(jnp.asarray(np.asarray(w)[1, 2]))
  chex.assert_trees_all_equal(jax.tree.map(lambda x: np.asarray(x)[1, 2], quantised), alone)
  x = normal((2, 3, 5, 8), 1)
  y = jax.jit(jax.vmap(jax.vmap(linear)))(x, quantised)
  np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(quantised), rtol=1e-4, atol=1e-5)


def test_representable_weights_are_exact():
  q = np.random.default_rng(0).integers(-127, 128, (16, 4))
  q[0] = 127
  w = jnp.asarray(q * [0.5, 1.0, 2.0, 0.25], jnp.float32)
  chex.assert_trees_all_equal(Int8.quantize(w).materialize(), w)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_type_is_that_of_the_matrix(dtype):
  w = Int8.quantize(normal((8, 4), dtype=dtype))
  assert w.dtype == w.materialize().dtype == w.take(jnp.array([1])).dtype == dtype
  assert np.abs(np.asarray(w, np.float32) - normal((8, 4))).max() < 0.02


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("granularity", ["channel", "row"])
def test_small_channels_of_16_bit_matrices_keep_the_bound(dtype, granularity):
  w = (normal((64, 3)) * jnp.array([[1e-6, 1e-4, 1.0]])).astype(dtype)
  w = w.T if granularity == "row" else w
  found = Int8.quantize(w, granularity=granularity)
  assert found.scale.dtype == jnp.float32 and found.dtype == dtype
  exact = np.asarray(found.q, np.float64) * np.asarray(found.scale)
  assert (np.abs(exact - np.asarray(w, np.float64)) <= np.asarray(found.scale) * 0.5001).all()
  x = normal((2, w.shape[0]), 1).astype(dtype)
  expected = np.asarray(x, np.float64) @ exact
  y = np.asarray(linear(x, found), np.float64)
  np.testing.assert_allclose(y, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())
  dx = jax.grad(lambda x: (linear(x, found).astype(jnp.float32) * 300).sum())(x)
  np.testing.assert_allclose(
    np.asarray(dx, np.float64)[0], 300 * exact.sum(1), rtol=2e-2, atol=2 * np.abs(exact).max()
  )


def test_a_gradient_in_float16_does_not_overflow_before_it_is_scaled():
  table = Int8.quantize(jnp.full((4, 2048), 0.01), granularity="row")
  x = jnp.ones((1, 4), jnp.float16)
  dx = jax.grad(lambda x: linear(x, table).astype(jnp.float32).sum())(x)
  np.testing.assert_allclose(np.asarray(dx, np.float32), 20.48, rtol=2e-3)


def test_scales_of_16_bits_are_asked_for_and_loaded():
  w = normal((8, 4))
  narrow = Int8.quantize(w, scale_dtype=jnp.bfloat16)
  assert narrow.scale.dtype == jnp.bfloat16 and narrow.materialize().dtype == w.dtype
  assert np.abs(np.asarray(narrow) - np.asarray(w)).max() < 0.015
  as_before = Int8(narrow.q, narrow.scale.astype(jnp.float16))  # what was saved without a type
  assert as_before.dtype == as_before.take(jnp.array([1])).dtype == jnp.float16
  y = linear(normal((2, 8), 1), as_before)
  np.testing.assert_allclose(y, np.asarray(normal((2, 8), 1)) @ np.asarray(narrow), atol=1e-4)


def test_the_type_stays_with_the_weight():
  w = Int8.quantize(normal((2, 8, 4), dtype=jnp.bfloat16))
  parts = w.T, jax.tree.map(lambda x: x[0], w), jax.jit(lambda w: w)(w), w.specs((None, None, "t"))
  assert all(part.dtype == jnp.bfloat16 for part in parts)
  assert w.T.T.turned is False and w.T.turned
  assert Int8.quantize(np.eye(3)).dtype == jnp.float32


@pytest.mark.parametrize(
  ("w", "options", "message"),
  [
    (jnp.ones((2, 2)), {"granularity": "tensor"}, "granularity 'tensor'; allowed: channel, row"),
    (jnp.ones((2, 2), int), {}, "w has type int32; allowed: floating point"),
    (jnp.array([[1.0, jnp.nan]]), {}, "w has NaN"),
    (jnp.array([[-jnp.inf, 1.0]]), {"granularity": "row"}, "w has NaN, infinity"),
    (jnp.full((2, 2), 1e-9), {"scale_dtype": jnp.float16}, "no scale in float16"),
    (jnp.full((2, 2), 1e8), {"scale_dtype": jnp.float16}, "no scale in float16"),
  ],
)
def test_bad_arguments_are_named(w, options, message):
  with pytest.raises(ValueError, match=message):
    Int8.quantize(w, **options)
