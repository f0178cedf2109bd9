import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.cost.compiled import compiled
from effjax.kernels.quantized_matmul import integer_product


def operands(rows, columns, batch=1):
  random = np.random.default_rng(0)
  q = random.integers(-127, 128, (rows, columns)).astype(np.int8)
  return random.normal(size=(batch, 1, rows)).astype(np.float32), q


SHAPES = [(8, 6), (1, 7), (7, 1), (576, 1536), (577, 100), (64, 16_384), (1009, 1021)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_equals_numpy(rows, columns, turned, batch):
  x, q = operands(rows, columns, batch)
  lying = jnp.asarray(q.T if turned else q)
  run = jax.jit(lambda x, q: integer_product(x, q.T if turned else q, turned=turned))
  found = run(x, lying)
  expected = x.astype(np.float64) @ q.astype(np.float64)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_operands_give_zeros(shape):
  batch, rows, columns = shape
  y = integer_product(jnp.ones((batch, rows)), jnp.ones((rows, columns), jnp.int8))
  np.testing.assert_array_equal(y, np.zeros((batch, columns)))


def test_nan_and_infinity_stay_in_their_row():
  x, q = operands(40, 30, 4)
  x = x[:, 0]
  x[1, 0], x[2, 0], x[3, 39] = np.nan, np.inf, -np.inf
  y, expected = integer_product(jnp.asarray(x), jnp.asarray(q)), x @ q.astype(np.float32)
  np.testing.assert_allclose(y, expected, rtol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(576, 1536), (64, 16_384)])
def test_gradient_of_x(rows, columns):
  x, q = operands(rows, columns)
  slope = jax.jit(jax.grad(lambda x, q: integer_product(x, q)[..., :3].sum()))(x, q)
  np.testing.assert_allclose(np.asarray(slope)[0, 0], q[:, :3].sum(1, dtype=np.float32), rtol=1e-5)


def test_more_derivatives_and_maps():
  x, q = operands(12, 5, 3)
  x, q = jnp.asarray(x[:, 0]), jnp.asarray(q)
  f = lambda product: lambda x: jnp.sin(product(x, q) / 100).sum()
  ours, plain = f(integer_product), f(lambda x, q: x @ q.astype(x.dtype))
  for change in (
    lambda f: jax.hessian(lambda x: f(x[None]))(x[0]),
    lambda f: jax.vmap(jax.grad(lambda x: f(x[None])))(x),
    lambda f: jax.jvp(jax.grad(f), (x,), (x,))[1],
  ):
    np.testing.assert_allclose(change(ours), change(plain), rtol=1e-4, atol=1e-4)
  many = jnp.stack([q, 2 * (q // 2)])
  y = jax.vmap(integer_product, (None, 0))(x, many)
  np.testing.assert_allclose(y, x @ np.asarray(many, np.float32), rtol=1e-4, atol=1e-3)


def test_a_map_of_gradients_keeps_one_matrix():
  x, q = jnp.ones((64, 32)), jnp.ones((32, 16), jnp.int8)
  gradients = jax.vmap(jax.grad(lambda x: jnp.sin(integer_product(x, q)).sum()))
  sizes = [
    v.aval.size for eqn in equations(jax.make_jaxpr(gradients)(x).jaxpr) for v in eqn.outvars
  ]
  assert max(sizes) == x.size


def equations(jaxpr):
  """Those of a program and of all that it calls."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values())):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        yield from equations(getattr(inner, "jaxpr", inner))


def test_float64_and_strict_promotion():
  x, q = operands(40, 30, 2)
  with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
    y = jax.jit(integer_product)(x.astype(np.float64), jnp.asarray(q))
    np.testing.assert_allclose(y, x.astype(np.float64) @ q, rtol=1e-13)
    half = jnp.asarray(x, jnp.bfloat16)
    assert integer_product(half, jnp.asarray(q)).dtype == jnp.float32


MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("turned", [False, True])
def test_rows_on_several_devices(kind, turned):
  x, q = operands(40, 30, 16)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(MESHES[kind],))
  with jax.set_mesh(mesh):
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    rows, q_there = place(x, P("data")), place(q.T if turned else q, P())
    run = lambda x, q: integer_product(x, q.T if turned else q, turned=turned)
    y, pull = jax.jit(lambda x, q: jax.vjp(lambda x: run(x, q), x))(rows, q_there)
    np.testing.assert_allclose(y, x @ q.astype(np.float32), rtol=1e-4, atol=1e-2)
    (dx,) = jax.jit(pull)(y)
    np.testing.assert_allclose(dx, np.asarray(y) @ q.T.astype(np.float32), rtol=1e-4, atol=1)
    apart = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(apart)(rows, q_there), y, rtol=1e-4, atol=1e-2)


def chain(x, matrices):
  for q in matrices:
    x = jnp.tanh(integer_product(x, q))
  return x


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_unrolled_layers_do_not_hold_widened_matrices(optimized, rows):
  x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32)
  matrices = [jax.ShapeDtypeStruct((1024, 1024), jnp.int8)] * 10
  ints = 10 * 1024 * 1024
  backward = jax.grad(lambda x, matrices: chain(x, matrices).sum())
  for function in (chain, backward):
    held = 4 * 1024 * rows * (10 if function is backward else 2)
    assert compiled(function, x, matrices).temporaries < ints / 8 + held


@pytest.mark.parametrize("entries", [50_257, 50_272, 50_021])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_heads_of_any_table_keep_the_integers(optimized, entries, rows):
  x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
  q = jax.ShapeDtypeStruct((entries, 64), jnp.int8)
  logits = lambda x, q: integer_product(x, q.T, turned=True).argmax(-1)
  held = 2 * 4 * rows * entries  # the logits themselves
  assert compiled(logits, x, q).temporaries < entries * 64 / 8 + held
