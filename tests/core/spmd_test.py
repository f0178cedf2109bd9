import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from effjax.core import spmd
from effjax.parallel import make_mesh

X, W = jnp.arange(48.0).reshape(16, 3), jnp.linspace(-1, 1, 6).reshape(3, 2)


def count_rows(rows, whole):
  """How many rows a call sees, beside each row."""
  return jnp.full((rows.shape[0], 1), float(rows.shape[0])) + 0 * rows[:, :1]


def seen(x=X):
  return sorted(set(np.asarray(spmd.map_rows(count_rows, x, ())).ravel().tolist()))


def product(x, w):
  return spmd.map_rows(lambda x, w: jnp.sort(x @ w, axis=0), x, w)


def test_each_device_sees_its_rows_where_a_split_is_in_force():
  with spmd.rows_split(make_mesh(data=8), ["data"]):
    assert seen() == [2.0]
    assert seen(X[:12]) == [12.0]  # 8 devices do not divide 12 rows
  with spmd.rows_split(make_mesh(data=4, tensor=2), ["data"]):
    assert seen() == [4.0]
  with spmd.rows_split(make_mesh(data=4, replica=2), ["data", "replica"]):
    assert seen() == [2.0]
  assert seen() == [16.0]


def test_a_jitted_function_is_traced_anew_in_another_split():
  jitted = jax.jit(lambda x: spmd.map_rows(count_rows, x, ()))
  assert float(jitted(X)[0, 0]) == 16
  with spmd.rows_split(make_mesh(data=8), ["data"]):
    assert float(jitted(X)[0, 0]) == 2
  assert float(jitted(X)[0, 0]) == 16


def test_gradients_of_what_is_whole_are_summed():
  loss = lambda x, w: jnp.sin(spmd.map_rows(jnp.matmul, x, w)).sum()
  plain = jax.jit(jax.grad(loss, (0, 1)))(X, W)
  with spmd.rows_split(make_mesh(data=4, tensor=2), ["data"]):
    split = jax.jit(jax.grad(loss, (0, 1)))(X, W)
  for ours, theirs in zip(split, plain, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("x_spec", "w_spec", "rows"), [("data", None, 8.0), ("data", "data", 8.0), (None, None, 16.0)]
)
def test_types_of_an_explicit_mesh_say_how_rows_are_split(x_spec, w_spec, rows):
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
  place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
  with jax.set_mesh(mesh):
    x, w = place(X, x_spec), place(W, None, w_spec)
    assert seen(x) == [rows]
    y = jax.jit(product)(x, w)
  parts = lambda x, w: [product(part, w) for part in jnp.split(x, int(16 // rows))]
  np.testing.assert_allclose(y, np.concatenate(jax.jit(parts)(X, W)), rtol=1e-6)


def test_a_region_that_is_one_devices_own_is_not_split_again():
  mesh = make_mesh(data=8)
  spec = PartitionSpec("data")
  with spmd.rows_split(mesh, ["data"]):
    inner = lambda x: spmd.map_rows(count_rows, jnp.tile(x, (8, 1)), ())
    y = jax.shard_map(inner, mesh=mesh, in_specs=spec, out_specs=spec)(X)
  assert set(np.asarray(y).ravel().tolist()) == {16.0}


def test_a_region_of_another_axis_is_split_further():
  mesh = make_mesh(data=4, tensor=2)
  columns = PartitionSpec(None, "tensor")
  own = lambda w: spmd.map_rows(lambda x, w: count_rows(x, ()) + x @ w, X, w)
  apply = jax.shard_map(own, mesh=mesh, in_specs=columns, out_specs=columns, axis_names={"tensor"})
  with spmd.rows_split(mesh, ["data"]):
    y = jax.jit(apply)(W)
  np.testing.assert_allclose(y, 4 + X @ W, rtol=1e-5)


def test_an_axis_that_the_mesh_lacks_is_named():
  with pytest.raises(ValueError, match=r"rows_split: axes \('model',\); allowed: of \('data',\)"):
    spmd.rows_split(make_mesh(data=8), ["model"])
