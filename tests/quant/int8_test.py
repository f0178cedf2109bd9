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


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="granularity 'tensor'; allowed: channel, row"):
    Int8.quantize(jnp.ones((2, 2)), granularity="tensor")
