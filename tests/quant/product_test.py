import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.quant.product import integer_product


def operands(rows, columns, batch=1):
  random = np.random.default_rng(0)
  q = random.integers(-127, 128, (rows, columns)).astype(np.int8)
  return random.normal(size=(batch, 1, rows)).astype(np.float32), q


# One block; blocks of rows; blocks of columns; no divisor, hence whole; more rows than few.
@pytest.mark.parametrize(
  ("rows", "columns", "batch"),
  [(8, 6, 1), (576, 1536, 2), (64, 16_384, 4), (1009, 1021, 1), (576, 1536, 5)],
)
def test_equals_numpy(rows, columns, batch):
  x, q = operands(rows, columns, batch)
  found = jax.jit(integer_product)(x, jnp.asarray(q))
  expected = x.astype(np.float64) @ q.astype(np.float64)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("rows", "columns"), [(576, 1536), (64, 16_384)])
def test_gradient_of_x(rows, columns):
  x, q = operands(rows, columns)
  slope = jax.jit(jax.grad(lambda x, q: integer_product(x, q)[..., :3].sum()))(x, q)
  np.testing.assert_allclose(np.asarray(slope)[0, 0], q[:, :3].sum(1, dtype=np.float32), rtol=1e-5)


def test_unrolled_layers_do_not_hold_widened_matrices(optimized):
  def chain(x, matrices):
    for q in matrices:
      x = jnp.tanh(integer_product(x, q))
    return x

  x = jax.ShapeDtypeStruct((1, 1024), jnp.float32)
  matrices = [jax.ShapeDtypeStruct((1024, 1024), jnp.int8)] * 6
  memory = jax.jit(chain).lower(x, matrices).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2 * 1024 * 1024 * 4  # of six times that, widened
