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
