"""One linear map per group of rows (the experts of MegaBlocks, Gale et al., arXiv 2211.15841)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core import numerics, spmd, trees
from effjax.core.known import is_size
from effjax.core.typing import Array, Float, Int, PyTree, Size
from effjax.core.weights import Weight, offset, product, within
from effjax.kernels.grouped_matmul import reference, tiles
from effjax.kernels.grouped_matmul.groups import Groups, group_of_row

IMPLEMENTATIONS = (None, "tiles", "ragged", "reference")


def grouped_linear(
  x: Float[Array, "M D"],
  w,
  group_sizes: Int[Array | np.ndarray, "E"] | Int[Array | np.ndarray, "P E"] | Groups,
  bias: Float[Array, "E F"] | None = None,
  *,
  implementation: str | None = None,
) -> Float[Array, "M F"]:
  """out[m] = x[m] w[e] + bias[e], where e is the group that row m lies in.

  Rows are sorted by group: group 0 holds the first group_sizes[0] rows, and so on. Rows past the
  last group give zero, and zero gradient, whatever is in them; so does a group without rows. The
  work is that of a dense product of the same M, whatever E. Computed in the type of `x`;
  derivatives are those of reverse mode.

  Args:
    x: [M, D], sorted by group.
    w: an array [E, D, F], or a `Weight` of that shape; gradients reach its floating-point leaves.
    group_sizes: [E], non-negative, of sum at most M, which traced ones have to keep to; or [P, E],
      when x is P parts of M / P rows laid end to end, each sorted by itself; or `Groups`, which may
      lie otherwise. In `spmd.rows_split` each device multiplies its own.
    bias: [E, F], or None.
    implementation: "tiles" loops over tiles of rows and uses any `Weight` as it is; "ragged" is
      `jax.lax.ragged_dot` on arrays, those of a `Weight` as its `product` says, and costs E times
      as much on a CPU; of groups with a capacity it is one batched product; "reference" is the
      dense definition. None compiles tiles for CPU, ragged elsewhere.

  Raises:
    ValueError: when shapes do not fit, for sizes that are no integers or, where they are known,
      negative or of more rows than there are, or for another implementation.

  Example:
    >>> w = jnp.array([[[1.0]], [[10.0]]])
    >>> grouped_linear(jnp.ones((4, 1)), w, jnp.array([1, 2])).tolist()
    [[1.0], [10.0], [10.0], [0.0]]
  """
  groups = Groups.of(group_sizes)
  _check(x, w, groups, bias, implementation)

  def parts(w, x, sizes, bias):
    on_parts = functools.partial(_on_parts, implementation, groups)
    return spmd.map_rows(on_parts, (x, sizes), (w, bias), groups.specs(w, bias))

  return within(w, parts, x, groups.sizes, bias)


def _on_parts(
  implementation: str | None, groups: Groups, rows: tuple[Array, Array], params: PyTree
) -> Array:
  """The product of parts laid end to end: nearly always one."""
  x, sizes = rows
  if x.shape[0] == 0:
    return jnp.zeros((0, params[0].shape[2]), x.dtype)
  sizes = groups.own(sizes)
  on_part = lambda x, sizes: _on_part(implementation, groups.capacity, x, sizes, params)
  if sizes.shape[0] == 1:
    return on_part(x, sizes[0])
  parts = jax.vmap(on_part)(x.reshape(sizes.shape[0], -1, x.shape[1]), sizes)
  return parts.reshape(x.shape[0], -1)


def _on_part(
  implementation: str | None, capacity: Size | None, x: Array, sizes: Array, params: PyTree
) -> Array:
  if implementation == "reference":
    return _dense(reference.grouped_matmul, capacity, x, params, sizes)
  if isinstance(params[0], Weight) and params[0].by_parts:
    multiply = lambda x, w, sizes, capacity: _on_part(implementation, capacity, x, sizes, (w, None))
    return _dense(multiply, capacity, x, params, sizes)
  rows = x.shape[0]
  if not is_size(rows):  # so that it is known that there are as many as a tile has
    x = jnp.pad(x, ((0, tiles.HIGHEST), (0, 0)))
  operands = (x, _floats(params), _others(params), sizes)
  return _grouped(implementation, capacity, *numerics.vary_alike(operands, operands))[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(
  implementation: str | None, capacity: Size | None, x: Array, floats, others, group_sizes: Array
) -> Array:
  by = _tiles(capacity), _ragged(capacity)
  return _choose(implementation, *by, x, floats, others, group_sizes)


def _forward(implementation, capacity, *operands):
  return _grouped(implementation, capacity, *operands), operands


def _backward(implementation, capacity, operands, dy):
  *_, others, group_sizes = operands
  by = _tiles_backward(capacity), _ragged_backward(capacity)
  dx, d_floats = _choose(implementation, *by, *operands, dy)
  return dx, d_floats, jax.tree.map(_float0, others), _float0(group_sizes)


_grouped.defvjp(_forward, _backward)


def _choose(implementation: str | None, by_tiles, by_ragged, *operands):
  if implementation is None:
    return lax.platform_dependent(*operands, cpu=by_tiles, default=by_ragged)
  return (by_tiles if implementation == "tiles" else by_ragged)(*operands)


# Under vmap a batch goes through in turn: loops of traced length would run as long as the longest
# and copy every array in each turn, and `jax.lax.ragged_dot` has no rule for what is asked here.
def _in_turn(function):
  @functools.cache
  def of(capacity: Size | None):
    return jax.custom_batching.sequential_vmap(functools.partial(function, capacity))

  return of


_tiles, _tiles_backward = _in_turn(tiles.forward), _in_turn(tiles.backward)


@_in_turn
def _ragged(capacity, x, floats, others, group_sizes):
  multiply = _ragged_dot if capacity is None else _batched
  return _dense(multiply, capacity, x, trees.merge(floats, others), group_sizes)


@_in_turn
def _ragged_backward(capacity, x, floats, others, group_sizes, dy):
  apply = lambda x, floats: _ragged(capacity).fun(x, floats, others, group_sizes)
  return jax.vjp(apply, x, floats)[1](dy)


def _ragged_dot(x: Array, w: Array, group_sizes: Array, capacity: None) -> Array:
  return jax.lax.ragged_dot(x, w, group_sizes)


def _batched(x: Array, w: Array, group_sizes: Array, capacity: Size) -> Array:
  """One product for each group; some of the groups may share the room of one."""
  if x.shape[0] != w.shape[0] * capacity:
    return reference.grouped_matmul(x, w, group_sizes, capacity)
  return jnp.matmul(x.reshape(w.shape[0], capacity, -1), w).reshape(x.shape[0], -1)


def _dense(multiply, capacity, x, params, group_sizes):
  """`multiply` on the arrays of the weight, the bias of each row, and zero where no group is."""
  w, bias = params
  group = group_of_row(group_sizes, x.shape[0], capacity)
  inside = (group < group_sizes.shape[0])[:, None]
  sizes = group_sizes.astype(jnp.int32)
  by_group = lambda x, w: multiply(x, w.astype(x.dtype), sizes, capacity)
  y = product(jnp.where(inside, x, jnp.zeros_like(x)), w, by_group)
  if bias is not None:
    y = y + jnp.take(offset(w, bias).astype(y.dtype), group, axis=0, mode="clip")
  return jnp.where(inside, y, jnp.zeros_like(y))


def _floats(params: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: leaf if _is_float(leaf) else None, params)


def _others(params: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: None if _is_float(leaf) else leaf, params)


def _is_float(leaf: Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def _float0(leaf: Array) -> np.ndarray:
  return np.zeros(leaf.shape, jax.dtypes.float0)


def _check(x, w, groups: Groups, bias, implementation) -> None:
  if len(w.shape) != 3 or x.ndim != 2 or x.shape[1] != w.shape[1]:
    given = f"x {x.shape}, w {tuple(w.shape)}"
    raise ValueError(f"grouped_linear: {given}; allowed: x [M, D], w [E, D, F]")
  experts, _, width = w.shape
  if groups.sizes.shape[-1] != experts or x.shape[0] % groups.sizes.shape[0]:
    allowed = f"({experts},), or (P, {experts}) with a P that divides {x.shape[0]} rows"
    given = groups.sizes.shape[groups.sizes.shape[0] == 1 :]
    raise ValueError(f"grouped_linear: group_sizes {given}; allowed: {allowed}")
  groups.check(x.shape[0], "grouped_linear")
  if bias is not None and bias.shape != (experts, width):
    raise ValueError(f"grouped_linear: bias {bias.shape}; allowed: ({experts}, {width})")
  if implementation not in IMPLEMENTATIONS:
    allowed = f"one of {IMPLEMENTATIONS}"
    raise ValueError(f"grouped_linear: implementation={implementation!r}; allowed: {allowed}")
