import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import numerics
from tests.modules import normal


def test_weighted_mean_counts_only_what_has_weight():
  values = jnp.array([1.0, 2.0, 6.0])
  assert float(numerics.weighted_mean(values, None)) == 3.0
  assert float(numerics.weighted_mean(values, jnp.array([1.0, 1.0, 0.0]))) == 1.5
  assert float(numerics.weighted_mean(values, jnp.zeros(3))) == 0.0


def test_softcap_is_bounded_and_keeps_small_values():
  x = jnp.array([-1e4, 0.01, 1e4])
  np.testing.assert_allclose(numerics.softcap(x, 5.0), [-5.0, 0.01, 5.0], rtol=1e-4)
  assert numerics.softcap(x, None) is x


def test_expand_prepends_axes():
  assert numerics.expand(jnp.ones((2, 3)), 4).shape == (1, 1, 2, 3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_contracts_the_last_axis_in_the_type_of_x(dtype):
  x, w = jnp.asarray(np.asarray(normal(2, 3, 4)), dtype), normal(4, 5, seed=1)
  y = numerics.matmul(x, w)
  assert y.dtype == dtype
  expected = np.einsum("btd,df->btf", np.asarray(x, np.float64), np.asarray(w, np.float64))
  np.testing.assert_allclose(
    np.asarray(y, np.float64), expected, atol=1e-5 if dtype == jnp.float32 else 0.1
  )


def test_a_nan_that_is_put_in_survives_what_is_fused_with_it():
  kept = jnp.array([True, False])
  functions = (jnp.exp, jax.nn.softmax, jax.nn.logsumexp, jax.nn.sigmoid)
  for function in functions:
    found = jax.jit(lambda x, m, f=function: jax.vmap(f)(numerics.nan_unless(m, x)))(
      normal(2, 3), kept
    )
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
  grad = jax.grad(lambda x: numerics.zero_unless(kept, numerics.nan_unless(kept, x)).sum())
  np.testing.assert_array_equal(grad(normal(2, 3)), [[1] * 3, [0] * 3])


def test_half_precision_values_are_averaged_in_float32():
  values = jnp.full(64, 6e4, jnp.float16)
  for weights in (None, jnp.ones(64, jnp.float16)):
    assert float(numerics.weighted_mean(values, weights)) == pytest.approx(6e4, rel=1e-3)
