"""Every weight representation, in every place of a model where a matrix stands."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding

from effjax.core import linear, trees, weights
from effjax.core.register import REPRESENTATIONS
from effjax.core.weights import Weight
from effjax.parallel import make_mesh
from effjax.train import Checkpoints
from tests.contract import weights as table
from tests.contract.weights import ROWS, D, E, F, V, WeightRow, X

SHAPES = ((D, F), (E, D, F), (V, D))
# Whose rows, and whose columns besides, stand alone.
PICKED = (
  {"array", "Int8", "Int8 by row", "LLMInt8Exact", "LoRA over array", "InputScaled over array",
   "IA3 over array", "IA3 of inputs over array", "Tuned over array"},
  {"NF4", "Int4Affine", "Palette", "GGUF", "Ternary", "DoRA over array"},
)  # fmt: skip
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def three(row: WeightRow) -> tuple:
  return tuple(row.of(*shape) for shape in SHAPES)


def assert_close(got, expected, tolerance=1e-4):
  expected = np.asarray(expected, np.float32)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=tolerance * scale)


@rows
def test_in_every_place_it_computes_what_its_matrix_does(row):
  given = three(row)
  found, expected = table.everywhere(*given), table.everywhere(*table.plain(given))
  for place in found:
    assert_close(found[place], expected[place], 1e-4 + row.rounding)


def test_units_are_picked_or_refused_by_name():
  units, picked, whole = np.array([4, 21, 4, 0]), {}, {}
  for row in [row for row in ROWS if " over " not in row.name or row.name.endswith("over array")]:
    whole[row.name] = w = row.of(D, F)
    for axis in (-2, -1):
      try:
        picked[row.name, axis] = weights.pick(w, units, axis)
      except ValueError as error:
        assert type(w).__name__ in str(error)
  assert PICKED[0] <= {name for name, axis in picked if axis == -2}
  assert PICKED[0] | PICKED[1] <= {name for name, axis in picked if axis == -1}
  found, whole = table.plain((list(picked.values()), whole))
  for (name, axis), matrix in zip(picked, found, strict=True):
    assert_close(matrix, np.take(np.asarray(whole[name]), units, axis), 1e-6)


@rows
def test_it_says_what_it_is(row):
  for w, shape in zip(three(row), SHAPES, strict=True):
    assert tuple(w.shape) == shape and w.dtype == jnp.float32
    if isinstance(w, Weight):
      assert type(w) is REPRESENTATIONS[type(w).__name__]
      assert w.ndim == len(shape) and w.flops >= 2 * shape[-2] * shape[-1]
      assert w.parameters >= np.prod(shape)
      assert "\n" not in repr(w) and len(repr(w)) < 80


@rows
def test_leading_axes_are_axes_of_every_field(row):
  stacked = row.of(E, D, F)
  whole = np.asarray(table.plain(stacked))
  for i in range(E):
    one = jax.tree.map(lambda x, i=i: np.asarray(x)[i], stacked)
    assert tuple(one.shape) == (D, F)
    assert_close(table.plain(one), whole[i], 1e-6)
  assert all(x.shape[0] == E for x in jax.tree.leaves(stacked))


@rows
def test_what_trains_has_gradients_and_nothing_else_has(row):
  w = row.of(D, F)
  paths = trees.trained({"w": w})
  if not paths:
    assert w.kind == "quantised"
    return
  chosen, rest = trees.partition({"w": w}, lambda path, x: path in paths)

  @jax.jit
  def grad(chosen):
    def loss(chosen):
      w = trees.merge(chosen, rest)["w"]
      more = jnp.arange(w.shape[0], weights.entries(w))  # what a table alone gives, by an index
      return jnp.square(linear(X, w)).sum() + jnp.square(weights.take(w, more)).sum()

    return jax.grad(loss)(chosen)

  grads = grad(chosen)
  chex.assert_tree_all_finite(grads)
  assert all(bool(g.any()) for g in jax.tree.leaves(grads))


@rows
def test_types_and_modes(row):
  w = row.of(D, F)
  y = linear(X, w)

  @jax.jit
  def modes(w, stacked):
    half = linear(X.astype(jnp.bfloat16), w)
    mapped = jax.vmap(linear, (None, 0))(X, stacked)
    return linear(X, w), half, mapped, table.in_a_scan(None, stacked, None)

  jitted, half, mapped, scanned = modes(w, row.of(E, D, F))
  assert_close(jitted, y, 1e-5 + row.rounding)
  assert half.dtype == jnp.bfloat16
  assert_close(half, y, 0.03)
  assert_close(mapped, scanned)


@rows
def test_it_can_be_split_over_a_mesh(row):
  w, mesh = row.of(D, F), make_mesh(data=2, tensor=4)
  if not isinstance(w, Weight):
    return
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  placed = jax.tree.map(put, w, w.specs(("data", "tensor")))
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
  assert_close(
    jax.jit(linear)(jax.device_put(X, NamedSharding(mesh, jax.P())), placed), linear(X, w)
  )


@pytest.mark.parametrize("wrapper", table.CROSSED)
def test_it_stands_over_every_other_base(wrapper):
  pairs = table.CROSSED[wrapper]
  stacked = {row.name: row.of(E, D, F) for row in pairs}
  paths = trees.trained(stacked)
  chosen, rest = trees.partition(stacked, lambda path, x: path in paths)

  @jax.jit
  def scanned(chosen):
    """The output of each layer, rematerialised, and the gradients of what trains."""

    def loss(chosen):
      more = lambda w: weights.take(w, jnp.arange(D, weights.entries(w)))
      turn = jax.checkpoint(lambda _, w: (None, (linear(X, w), more(w))))
      given = trees.merge(chosen, rest)
      found = {name: lax.scan(turn, None, w)[1] for name, w in given.items()}
      return sum(jnp.square(x).sum() for x in jax.tree.leaves(found)), found

    return jax.grad(loss, has_aux=True)(chosen)

  grads, found = scanned(chosen)
  expected = {name: X[None] @ w[:, None] for name, w in table.plain(stacked).items()}
  for row in pairs:
    assert_close(found[row.name][0], expected[row.name], 1e-4 + row.rounding)
  assert len(jax.tree.leaves(grads)) >= len(pairs)
  chex.assert_tree_all_finite(grads)
  assert all(bool(g.any()) for g in jax.tree.leaves(grads))


def test_all_survive_a_checkpoint(tmp_path):
  saved = {row.name: three(row) for row in ROWS}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, saved)
    restored = checkpoints.restore(jax.eval_shape(lambda: saved)).state
  chex.assert_trees_all_equal(restored, saved)
  chex.assert_trees_all_equal_structs(restored, saved)
