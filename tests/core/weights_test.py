import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core import Weight, linear, weights
from effjax.core.typing import PyTree
from effjax.layers import Linear
from effjax.parallel.mesh import make_mesh
from effjax.peft import lora
from effjax.quant import Int8
from tests.modules import normal


@weights.register(static=("power",))
class Scaled(Weight):
  """matrix · factor^power, with the defaults of `Weight` for everything it can default."""

  matrix: PyTree
  factor: PyTree
  power: int = 1

  @property
  def shape(self):
    return self.matrix.shape

  @property
  def dtype(self):
    return self.matrix.dtype

  def materialize(self):
    return self.matrix * self.factor**self.power


def scaled(shape, seed=0):
  factor = np.full((*shape[:-2], 1, 1), 2, np.float32)
  return Scaled(normal(*shape, seed=seed), jnp.asarray(factor), power=2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_linear_is_the_product_in_the_type_of_x(lead, dtype):
  x = jnp.asarray(np.asarray(normal(*lead, 4, seed=1)), dtype)
  w, bias = np.linspace(-1, 1, 20).reshape(4, 5), np.arange(5.0)
  y = linear(x, jnp.asarray(w, jnp.float32), jnp.asarray(bias, jnp.float32))
  assert y.dtype == dtype
  tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
  np.testing.assert_allclose(
    np.asarray(y, np.float64), np.asarray(x, np.float64) @ w + bias, atol=tolerance
  )


def test_a_weight_stands_where_its_matrix_stood():
  w = scaled((4, 5))
  x = normal(2, 3, 4, seed=2)
  matrix = 4 * np.asarray(w.matrix)
  np.testing.assert_allclose(linear(x, w), np.asarray(x) @ matrix, rtol=1e-5, atol=1e-5)
  ids = jnp.array([[3, 0]])
  np.testing.assert_allclose(weights.take(w, ids), matrix[np.asarray(ids)], rtol=1e-6)
  np.testing.assert_allclose(weights.transpose(w), matrix.T, rtol=1e-6)
  np.testing.assert_allclose(weights.materialize(w), matrix, rtol=1e-6)
  assert (w.ndim, w.parameters) == (2, 20)


def test_arrays_pass_through_the_same_functions():
  w = jnp.arange(6.0).reshape(3, 2)
  chex.assert_trees_all_equal(weights.transpose(w), w.T)
  chex.assert_trees_all_equal(weights.take(w, jnp.array([2])), w[2:])
  assert weights.materialize(w) is w


@pytest.mark.parametrize(
  ("x", "w", "bias", "message"),
  [
    ((2, 3), (4, 5), None, r"x \(2, 3\) does not fit w \(4, 5\)"),
    ((2, 3), (2, 3, 5), None, "allowed"),
    ((2, 3), (3, 5), (3,), r"bias \(3,\) does not fit"),
  ],
)
def test_shapes_that_do_not_fit_are_refused(x, w, bias, message):
  with pytest.raises(ValueError, match=message):
    linear(jnp.ones(x), jnp.ones(w), None if bias is None else jnp.ones(bias))


def test_static_fields_are_part_of_the_structure():
  w = scaled((2, 2))
  assert len(jax.tree.leaves(w)) == 2
  assert jax.tree.structure(w) != jax.tree.structure(Scaled(w.matrix, w.factor, power=1))
  with pytest.raises(AttributeError):
    w.power = 3


def test_tree_maps_may_put_anything_in_the_fields():
  w = scaled((2, 2))
  assert jax.tree.map(lambda x: None, w).matrix is None
  assert jax.eval_shape(lambda w: w, w).shape == (2, 2)


class Cell(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return jnp.tanh(Linear(x.shape[-1], name="map")(x)), None


class Stack(nn.Module):
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    cell = nn.remat(Cell, prevent_cse=False) if self.remat else Cell
    scan = nn.scan(cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return scan(name="cells")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_take_a_weight_in_value_and_gradient(remat):
  module, x = Stack(remat), normal(2, 4, seed=1)
  w = scaled((3, 4, 4))
  apply = lambda w: module.apply({"params": {"cells": {"map": {"kernel": w}}}}, x)
  run = jax.jit(lambda w: (apply(w), jax.grad(lambda w: apply(w).sum())(w)))
  (found, grads), (plain, expected) = run(w), run(jnp.asarray(np.asarray(w)))
  np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(grads.matrix, 4 * np.asarray(expected), rtol=1e-4, atol=1e-6)
  assert isinstance(grads, Scaled)


def test_a_sharded_weight_computes_the_same():
  mesh = make_mesh(data=8)
  w, x = scaled((8, 16)), normal(4, 8, seed=1)
  place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
  sharded = jax.device_put(w, Scaled(place(("data", None)), place(()), power=2))
  assert sharded.matrix.addressable_shards[0].data.shape == (1, 16)
  np.testing.assert_allclose(jax.jit(linear)(x, sharded), linear(x, w), rtol=1e-5, atol=1e-5)


def test_a_transpose_multiplies_without_the_matrix():
  w = scaled((4, 5))
  x, matrix = normal(2, 3, 5, seed=2), np.asarray(w)
  assert isinstance(w.T, weights.Transposed)
  assert w.T.T is w
  np.testing.assert_allclose(linear(x, w.T), np.asarray(x) @ matrix.T, rtol=1e-5, atol=1e-5)
  grad = jax.jit(jax.grad(lambda w: (linear(x, w.T) * x[..., :4]).sum()))(w)
  rows = np.asarray(x).reshape(-1, 5)
  np.testing.assert_allclose(grad.matrix, 4 * rows[:, :4].T @ rows, rtol=1e-4, atol=1e-5)


def test_at_works_from_both_sides():
  w, matrix = scaled((4, 5)), np.asarray(scaled((4, 5)))
  for x in (np.ones((3, 4), np.float32), jnp.arange(8.0).reshape(2, 4)):
    np.testing.assert_allclose(x @ w, np.asarray(x) @ matrix, rtol=1e-5, atol=1e-5)
  for x in (np.ones(5, np.float32), jnp.arange(10.0).reshape(5, 2)):
    np.testing.assert_allclose(w @ x, matrix @ np.asarray(x), rtol=1e-5, atol=1e-5)


def test_fields_are_checked_by_the_constructor_and_not_by_tree_maps():
  with pytest.raises(ValueError, match=r"factor has shape \(1, 1\); allowed: leading axes \(3,\)"):
    Scaled(jnp.ones((3, 4, 5)), jnp.ones((1, 1)))
  sums = jax.tree.map(jnp.sum, scaled((3, 4, 5)))
  assert sums.matrix.shape == ()
  assert jax.tree.map(lambda x: None, sums).matrix is None


def test_a_repr_is_one_short_line():
  assert repr(scaled((4, 5))) == "Scaled[4, 5] float32"
  assert repr(scaled((4, 5)).T) == "Transposed[5, 4] float32 over Scaled"
  assert repr(jax.tree.map(lambda x: None, scaled((4, 5)))) == "Scaled(…)"


def test_a_registration_names_fields_that_there_are():
  with pytest.raises(ValueError, match="no field"):
    weights.register(trains=("matrices",))(type("Wrong", (Scaled,), {}))
  with pytest.raises(ValueError, match="kind='int8'"):
    weights.register(kind="int8")


def test_fields_are_split_as_the_matrix_is():
  specs = scaled((3, 4, 5)).specs((None, "x", "y"))
  assert specs.matrix == PartitionSpec(None, "x", "y")
  assert specs.factor == PartitionSpec(None, None, None)


def test_at_promotes_as_arrays_do():
  w = Int8.quantize(jnp.array([[0.3, 0.4], [0.5, 0.25]]))
  for x in (np.array([[0, 1]]), jnp.array([[True, False]]), jnp.ones((1, 2), jnp.bfloat16)):
    for weight in (w, w.T, lora.init(w, jax.random.key(0), rank=1, scale=1.0)):
      y = x @ weight
      assert y.dtype == jnp.float32
      np.testing.assert_allclose(y, np.asarray(x, np.float32) @ np.asarray(weight), rtol=1e-5)
  with pytest.raises(ValueError, match="allowed: vectors"):
    w @ jnp.ones((2, 2, 2))


def test_square_weights_are_split_along_the_right_axis():
  w = Int8.quantize(jnp.ones((8, 8)))
  assert w.T.specs((None, "t")).q == PartitionSpec(None, "t")
  assert weights.Transposed(w).specs((None, "t")).base.q == PartitionSpec("t", None)
  factors = lora.init(jnp.ones((8, 16)), jax.random.key(0), rank=8, scale=1.0).specs(("t", None))
  assert factors.a == PartitionSpec("t", None) and factors.b == PartitionSpec(None, None)


def test_numbers_and_names_that_are_taken_are_refused():
  base, a, b = jnp.ones((4, 4)), jnp.ones((4, 2)), jnp.ones((2, 4))
  with pytest.raises(ValueError, match=r"scale=2\.0; allowed: arrays"):
    lora.LoRA(base, a, b, 2.0)
  with pytest.raises(ValueError, match="a representation called Int8"):
    weights.register()(type("Int8", (Scaled,), {}))
  with pytest.raises(ValueError, match="which are static"):
    weights.register(static=("power",), trains=("power",))(type("Other", (Scaled,), {}))
