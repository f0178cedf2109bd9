"""The grouped product against float64 NumPy, for arrays and for weight representations."""

import contextlib

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from effjax.core import spmd
from effjax.kernels.grouped_matmul import Groups, grouped_linear, tiles
from effjax.peft.lora import LoRA
from effjax.quant.int8 import Int8
from tests.modules import normal

IMPLEMENTATIONS = (None, "tiles", "ragged", "reference")
SIZES = (0, 130, 1, 290, 7)  # empty, one large tile and others, a single row


def operands(sizes=SIZES, spare=5, D=6, F=4, dtype=np.float32):
  """x, w, sizes, bias and a cotangent; `spare` rows belong to no group."""
  rng = np.random.default_rng(0)
  M, E = sum(sizes) + spare, len(sizes)
  shapes = ((M, D), (E, D, F), (E, F), (M, F))
  x, w, bias, dy = (jax.device_put(rng.normal(size=shape).astype(dtype)) for shape in shapes)
  return x, w, jax.device_put(np.asarray(sizes, np.int32)), bias, dy


def dense(x, w, sizes, bias, dy):
  """Values and gradients by a Python loop in float64."""
  x, w, bias, dy = (np.asarray(a, np.float64) for a in (x, w, bias, dy))
  y, dx = np.zeros(dy.shape), np.zeros(x.shape)
  dw, db = np.zeros(w.shape), np.zeros(bias.shape)
  start = 0
  for e, size in enumerate(np.asarray(sizes)):
    rows = slice(start, start + size)
    y[rows], dx[rows] = x[rows] @ w[e] + bias[e], dy[rows] @ w[e].T
    dw[e], db[e] = x[rows].T @ dy[rows], dy[rows].sum(0)
    start += size
  return y, dx, dw, db


def value_and_grads(x, w, sizes, bias, dy, implementation=None):
  function = lambda x, w, bias: grouped_linear(x, w, sizes, bias, implementation=implementation)
  y, pull = jax.vjp(function, x, w, bias)
  return y, *pull(dy)


jitted = jax.jit(value_and_grads, static_argnames="implementation")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients_equal_float64(implementation):
  args = operands()
  got = jitted(*args, implementation)
  chex.assert_trees_all_close(got, dense(*args), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_groups_and_spare_rows_have_exactly_zero_gradient(implementation):
  y, dx, dw, db = jitted(*operands(), implementation)
  for part in (y[-5:], dx[-5:], dw[0], db[0]):
    assert not np.asarray(part).any()
  assert np.asarray(dw[1]).all()


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  sizes=st.lists(st.integers(0, 20), min_size=4, max_size=4), seed=st.integers(0, 9)
)
def test_any_group_sizes(sizes, seed):
  rng = np.random.default_rng(seed)
  x = jax.device_put(rng.integers(-4, 5, (80, 3)).astype(jnp.float32))
  w = jax.device_put(rng.integers(-4, 5, (4, 3, 2)).astype(jnp.float32))
  got = jax.jit(grouped_linear)(x, w, jax.device_put(np.asarray(sizes, np.int32)))
  group = np.repeat(np.arange(4), sizes)
  expected = np.zeros((80, 2), np.float32)
  expected[: len(group)] = np.einsum("md,mdf->mf", x[: len(group)], np.asarray(w)[group])
  chex.assert_trees_all_equal(got, expected)  # products of small integers are exact


def weight_of(kind, w):
  if kind == "array":
    return w
  base = Int8.quantize(w) if "int8" in kind else w
  if "lora" not in kind:
    return base
  rng = np.random.default_rng(1)
  E, D, F = w.shape
  a, b = (
    jax.device_put(rng.normal(size=shape).astype(jnp.float32)) for shape in ((E, D, 2), (E, 2, F))
  )
  return LoRA(base, a, b, jnp.full((E, 1, 1), 0.5))


@pytest.mark.parametrize("kind", ["array", "int8", "lora", "lora over int8"])
def test_representations_equal_the_reference_with_gradients(kind):
  x, w, sizes, _, dy = operands()
  w = weight_of(kind, w)

  def loss(x, w, implementation):
    y = grouped_linear(x, w, sizes, implementation=implementation)
    return (y * dy).sum(), y

  run = jax.jit(jax.grad(loss, (0, 1), has_aux=True, allow_int=True), static_argnums=2)
  results = {}
  for implementation in IMPLEMENTATIONS:
    grads, y = run(x, w, implementation)
    floats = [g for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]
    results[implementation] = y, floats
  expected = results.pop("reference")
  for got in results.values():
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-2)
  assert len(expected[1]) == {"array": 2, "int8": 2, "lora": 5, "lora over int8": 5}[kind]


def wide(w):
  """The matrices of a weight in float64, whatever its parts are made of."""
  if isinstance(w, LoRA):
    a, b, scale = (np.asarray(part, np.float64) for part in (w.a, w.b, w.scale))
    return wide(w.base) + a @ b * scale
  if isinstance(w, Int8):
    return np.asarray(w.q, np.float64) * np.asarray(w.scale, np.float64)
  return np.asarray(w, np.float64)


@pytest.mark.parametrize("kind", ["array", "lora", "int8", "lora over int8"])
@pytest.mark.parametrize("x_type", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("w_type", [jnp.float32, jnp.bfloat16])
def test_no_part_of_a_weight_is_rounded_to_the_type_of_another(kind, x_type, w_type):
  x, w, sizes, _, _ = operands(sizes=(3, 0, 9), spare=2, D=16, dtype=x_type)
  w = weight_of(kind, w.astype(w_type))
  if isinstance(w, LoRA):  # far below what bfloat16 can tell from the base alone
    w = LoRA(w.base, w.a, 1e-3 * w.b, w.scale)
  group = np.repeat(np.arange(3), [3, 0, 9])
  expected = np.einsum("md,mdf->mf", np.asarray(x[:12], np.float64), wide(w)[group])
  tolerance = (1e-5 if x_type == jnp.float32 else 0.03) * np.abs(expected).max()
  run = jax.jit(lambda *x: [grouped_linear(*x, implementation=name) for name in IMPLEMENTATIONS])
  for y in run(x, w, sizes):
    assert y.dtype == x_type
    np.testing.assert_allclose(np.asarray(y[:12], np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["array", "lora"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_in_rows_past_the_last_group_has_no_influence(implementation, kind):
  x, w, _, bias, dy = operands(sizes=(3, 0, 9), spare=2)
  w = weight_of(kind, w)

  @jax.jit
  def run(x, w, sizes, bias, dy):
    product = lambda *args: grouped_linear(*args, implementation=implementation)
    y, pull = jax.vjp(lambda x, w, bias: product(x, w, sizes, bias), x, w, bias)
    return y, pull(dy)

  for sizes in np.int32([[3, 0, 9], [0, 0, 0], [1, 0, 0]]):
    at = np.arange(14)[:, None] >= sizes.sum()
    clean = run(x, w, sizes, bias, dy)
    for fill in np.float32([np.nan, -np.inf, 1e30]):
      spoil = lambda a, at=at, fill=fill: np.where(at, fill, a)
      chex.assert_trees_all_equal(run(spoil(x), w, sizes, bias, spoil(dy)), clean)
    y, (dx, *grads) = jax.tree.map(np.asarray, clean)
    assert not np.where(at, y, 0).any() and not np.where(at, dx, 0).any()
    assert sizes.any() == any(g.any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_in_a_group_reaches_its_own_gradient_alone(implementation):
  x, w, sizes, bias, dy = operands(sizes=(3, 2, 7), spare=2)
  clean = jitted(x, w, sizes, bias, dy, implementation)
  spoil = lambda a: a.at[3:5].set(jnp.nan)
  y, dx, dw, db = jitted(spoil(x), w, sizes, bias, spoil(dy), implementation)
  others, groups = np.r_[0:3, 5:14], np.array([0, 2])
  at = (others, others, groups, groups)
  for got, wanted, i in zip((y, dx, dw, db), clean, at, strict=True):
    np.testing.assert_array_equal(np.asarray(got)[i], np.asarray(wanted)[i])
  assert np.isnan(y[3:5]).all() and np.isnan(dw[1]).all()


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (np.array([3, -1, 4]), r"group_sizes \[3, -1, 4\]; allowed: from 0, together up to 14 rows"),
    (jnp.array([3, 8, 4]), r"group_sizes \[3, 8, 4\]; allowed: from 0, together up to 14 rows"),
    (np.array([[3, 0, 4], [3, 0, 5]]), "together up to 7 rows"),
  ],
)
def test_sizes_that_no_rows_can_have_are_refused(sizes, message):
  x, w, *_ = operands(sizes=(3, 0, 9), spare=2)
  with pytest.raises(ValueError, match=message):
    grouped_linear(x, w, sizes)


@pytest.mark.parametrize("split", [False, True])
def test_parts_laid_end_to_end_are_sorted_each_by_itself(split):
  x, w, sizes, bias, dy = operands(sizes=(1, 0, 4), spare=3)
  parts = jnp.stack([sizes, sizes[::-1]] * 4)
  x, dy = jnp.tile(x, (8, 1)), jnp.tile(dy, (8, 1))
  alone = [jitted(x[:8], w, each, bias, dy[:8]) for each in parts[:2]]
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with spmd.rows_split(mesh, ["data"]) if split else contextlib.nullcontext():
    y, dx, dw, db = jax.jit(lambda *args: value_and_grads(*args))(x, w, parts, bias, dy)
  for got, (first, second) in zip((y, dx), list(zip(*alone, strict=True))[:2], strict=True):
    chex.assert_trees_all_close(got, jnp.tile(jnp.concatenate([first, second]), (4, 1)), atol=1e-5)
  for got, (first, second) in zip((dw, db), list(zip(*alone, strict=True))[2:], strict=True):
    chex.assert_trees_all_close(got, 4 * (first + second), atol=1e-4)


def test_bfloat16_keeps_its_type_and_sums_weight_gradients_wide():
  args = operands(sizes=(0, 2048, 3), spare=0, dtype=jnp.bfloat16)
  got = jitted(*args)
  assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
  got = [np.asarray(a, np.float64) for a in got]
  chex.assert_trees_all_close(tuple(got), dense(*args), rtol=0.02, atol=0.02 * 2048**0.5)


def test_jit_equals_eager_and_vmap_equals_a_loop():
  x, w, sizes, _, _ = operands(sizes=(3, 0, 9))
  eager = grouped_linear(x, w, sizes)
  chex.assert_trees_all_close(jax.jit(grouped_linear)(x, w, sizes), eager, atol=1e-6)
  others = jnp.stack([sizes, sizes[::-1]])
  batched = jax.vmap(grouped_linear, in_axes=(0, None, 0))(jnp.stack([x, -x]), w, others)
  loop = jnp.stack([eager, grouped_linear(-x, w, others[1])])
  chex.assert_trees_all_close(batched, loop, atol=1e-5)


def test_program_does_not_grow_with_experts():
  def length(E):
    x, w, sizes, _, dy = operands(sizes=(1024 // E,) * E, spare=0)
    return len(jitted.lower(x, w, sizes, jnp.zeros((E, 4)), dy).as_text())

  assert length(64) < 1.1 * length(8)


@pytest.mark.usefixtures("optimized")
def test_gradient_that_nobody_asks_for_is_not_computed():
  x, w, sizes, _, dy = operands(sizes=(16,) * 8, spare=0, D=128, F=128)
  loss = lambda x, w: (grouped_linear(x, w, sizes) * dy).sum()
  temporaries = lambda argnums: (
    jax.jit(jax.grad(loss, argnums)).lower(x, w).compile().memory_analysis().temp_size_in_bytes
  )
  assert temporaries(0) < w.nbytes


@pytest.mark.parametrize("varying_weight", [False, True])
def test_inside_shard_map(varying_weight):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows, everywhere = PartitionSpec("data"), PartitionSpec()
  w_spec = rows if varying_weight else everywhere
  x, w, sizes, _, dy = operands(sizes=(4, 0, 4), spare=0)
  w = jnp.tile(w, (8, 1, 1)) if varying_weight else w
  x, dy = jnp.tile(x, (8, 1)), jnp.tile(dy, (8, 1))

  def local(x, w, dy):
    loss = lambda x, w: (grouped_linear(x, w, sizes) * dy).sum()
    return jax.grad(loss, argnums=(0, 1))(x, w)

  sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, w_spec, rows), out_specs=(rows, w_spec))
  dx, dw = jax.jit(sharded)(x, w, dy)
  one_dx, one_dw = jax.jit(local)(x[:8], w[:3], dy[:8])
  chex.assert_trees_all_close(dx, jnp.tile(one_dx, (8, 1)), rtol=1e-5, atol=1e-5)
  expected = jnp.tile(one_dw, (8, 1, 1)) if varying_weight else 8 * one_dw
  chex.assert_trees_all_close(dw, expected, rtol=1e-5, atol=1e-4)


def test_sharded_operands_under_jit():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  x, w, sizes, bias, dy = operands(sizes=(10, 0, 22), spare=0, D=8, F=8)
  expected = jitted(x, w, sizes, bias, dy)
  place = lambda a, *spec: jax.device_put(a, jax.NamedSharding(mesh, PartitionSpec(*spec)))
  got = jitted(place(x, "data"), place(w, None, "data"), sizes, bias, dy)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_rows():
  y = grouped_linear(jnp.zeros((0, 3)), jnp.ones((2, 3, 4)), jnp.zeros(2, jnp.int32))
  assert y.shape == (0, 4)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 300, 5000])
@pytest.mark.parametrize("groups", [1, 8, 64])
def test_tiles_descend_and_fit(rows, groups):
  heights = tiles.tile_rows(rows, groups)
  assert list(heights) == sorted(heights, reverse=True)
  assert 1 <= heights[-1] <= heights[0] <= rows


def test_bad_arguments():
  x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 2])
  with pytest.raises(ValueError, match=r"x \(4, 3\), w \(2, 4, 5\)"):
    grouped_linear(x, jnp.ones((2, 4, 5)), sizes)
  with pytest.raises(ValueError, match=r"w \(3, 5\); allowed: x \[M, D\], w \[E, D, F\]"):
    grouped_linear(x, jnp.ones((3, 5)), sizes)
  with pytest.raises(ValueError, match=r"group_sizes \(3,\); allowed: \(2,\)"):
    grouped_linear(x, w, jnp.array([1, 1, 2]))
  with pytest.raises(ValueError, match=r"bias \(2, 4\); allowed: \(2, 5\)"):
    grouped_linear(x, w, sizes, jnp.ones((2, 4)))
  with pytest.raises(ValueError, match="implementation='megablocks'"):
    grouped_linear(x, w, sizes, implementation="megablocks")


@pytest.mark.parametrize("implementation", ["tiles", "ragged"])
def test_a_symbol_for_the_rows(implementation):
  """Fewer rows than a tile has, and more; with gradients."""
  w = normal(4, 6, 5)
  run = lambda x, sizes: grouped_linear(x, w, sizes, implementation=implementation)
  both = jax.jit(jax.value_and_grad(lambda *x: (run(*x) ** 2).sum()))
  (rows,) = jax.export.symbolic_shape("m")
  shapes = jax.ShapeDtypeStruct((rows, 6), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
  call = jax.export.export(both)(*shapes).call
  for count in (1, 300):
    given = normal(count, 6, seed=1), jnp.array([count // 3, 0, count // 2, 0], jnp.int32)
    chex.assert_trees_all_close(call(*given), both(*given), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_with_a_capacity(implementation):
  sizes, capacity = np.array([0, 5, 1, 3]), 5
  x, w, _, bias, dy = operands(sizes=(capacity,) * 4, spare=0)
  full = (np.arange(capacity) < sizes[:, None]).reshape(-1)
  spoil = lambda a: jnp.where(full[:, None], a, jnp.nan)
  groups = Groups(jnp.asarray(sizes[None]), capacity)
  got = jitted(spoil(x), w, groups, bias, spoil(dy), implementation)
  y, dx, dw, db = dense(x[full], w, sizes, bias, dy[full])
  expected = [np.zeros(a.shape) for a in (dy, x)]
  for rows, found in zip(expected, (y, dx), strict=True):
    rows[full] = found
  chex.assert_trees_all_close(got, (*expected, dw, db), rtol=1e-5, atol=1e-4)


def test_groups_that_do_not_fit_are_refused():
  x, w, *_ = operands(sizes=(3, 0, 9), spare=0)
  with pytest.raises(ValueError, match=r"12 rows; allowed: .* 5 rows a group"):
    grouped_linear(x, w, Groups(jnp.array([[3, 0, 4]]), 5))
  with pytest.raises(ValueError, match=r"\[3, 0, 5\]; allowed: .* 12 rows, 4 a group"):
    grouped_linear(x, w, Groups(jnp.array([[3, 0, 5]]), 4))
