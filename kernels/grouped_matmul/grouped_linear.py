"""One linear map per group of rows (the experts of MegaBlocks, Gale et al., arXiv 2211.15841)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core import numerics, spmd, trees
from effjax.core.known import is_size, known
from effjax.core.typing import Array, Dim, Float, Int, PyTree
from effjax.core.weights import Weight, offset, product, within
from effjax.kernels.grouped_matmul import reference, tiles

IMPLEMENTATIONS = (None, "tiles", "ragged", "reference")


def grouped_linear(
  x: Float[Array, "M D"],
  w,
  group_sizes: Int[Array | np.ndarray, "E"] | Int[Array | np.ndarray, "P E"],
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
      when x is P parts of M / P rows laid end to end, each sorted by itself. In `spmd.rows_split`
      each device multiplies its own.
    bias: [E, F], or None.
    implementation: "tiles" loops over tiles of rows and uses any `Weight` as it is; "ragged" is
      `jax.lax.ragged_dot` on arrays, those of a `Weight` as its `product` says, and costs E times
      as much on a CPU; "reference" is the dense definition. None compiles tiles for CPU, ragged
      elsewhere.

  Raises:
    ValueError: when shapes do not fit, for sizes that are no integers or, where they are known,
      negative or of more rows than there are, or for another implementation.

  Example:
    >>> w = jnp.array([[[1.0]], [[10.0]]])
    >>> grouped_linear(jnp.ones((4, 1)), w, jnp.array([1, 2])).tolist()
    [[1.0], [10.0], [10.0], [0.0]]
  """
  _check(x, w, group_sizes, bias, implementation)
  sizes = jnp.asarray(group_sizes).reshape(-1, group_sizes.shape[-1])

  def parts(w, x, sizes, bias):
    on_part = functools.partial(_on_parts, implementation)
    return spmd.map_rows(on_part, (x, sizes), (w, bias))

  return within(w, parts, x, sizes, bias)


def _on_parts(implementation: str | None, rows: tuple[Array, Array], params: PyTree) -> Array:
  """The product of parts laid end to end: nearly always one."""
  x, sizes = rows
  if x.shape[0] == 0:
    return jnp.zeros((0, params[0].shape[2]), x.dtype)
  on_part = lambda x, sizes: _on_part(implementation, x, sizes, params)
  if sizes.shape[0] == 1:
    return on_part(x, sizes[0])
  parts = jax.vmap(on_part)(x.reshape(sizes.shape[0], -1, x.shape[1]), sizes)
  return parts.reshape(x.shape[0], -1)


def _on_part(implementation: str | None, x: Array, sizes: Array, params: PyTree) -> Array:
  if implementation == "reference":
    return _dense(reference.grouped_matmul, x, params, sizes)
  if isinstance(params[0], Weight) and params[0].by_parts:
    multiply = lambda x, w, sizes: _on_part(implementation, x, sizes, (w, None))
    return _dense(multiply, x, params, sizes)
  rows = x.shape[0]
  if not is_size(rows):  # so that it is known that there are as many as a tile has
    x = jnp.pad(x, ((0, tiles.HIGHEST), (0, 0)))
  operands = (x, _floats(params), _others(params), sizes)
  return _grouped(implementation, *numerics.vary_alike(operands, operands))[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(implementation: str | None, x: Array, floats, others, group_sizes: Array) -> Array:
  return _choose(implementation, _tiles, _ragged, x, floats, others, group_sizes)


def _forward(implementation, *operands):
  return _grouped(implementation, *operands), operands


def _backward(implementation, operands, dy):
  *_, others, group_sizes = operands
  dx, d_floats = _choose(implementation, _tiles_backward, _ragged_backward, *operands, dy)
  return dx, d_floats, jax.tree.map(_float0, others), _float0(group_sizes)


_grouped.defvjp(_forward, _backward)


def _choose(implementation: str | None, by_tiles, by_ragged, *operands):
  if implementation is None:
    return lax.platform_dependent(*operands, cpu=by_tiles, default=by_ragged)
  return (by_tiles if implementation == "tiles" else by_ragged)(*operands)


# Under vmap a batch goes through in turn: loops of traced length would run as long as the longest
# and copy every array in each turn, and `jax.lax.ragged_dot` has no rule for what is asked here.
_tiles = jax.custom_batching.sequential_vmap(tiles.forward)
_tiles_backward = jax.custom_batching.sequential_vmap(tiles.backward)


@jax.custom_batching.sequential_vmap
def _ragged(x, floats, others, group_sizes):
  return _dense(jax.lax.ragged_dot, x, trees.merge(floats, others), group_sizes)


@jax.custom_batching.sequential_vmap
def _ragged_backward(x, floats, others, group_sizes, dy):
  apply = lambda x, floats: _ragged.fun(x, floats, others, group_sizes)
  return jax.vjp(apply, x, floats)[1](dy)


def _dense(multiply, x, params, group_sizes):
  """`multiply` on the arrays of the weight, the bias of each row, and zero past the last group."""
  w, bias = params
  group = reference.group_of_row(group_sizes, x.shape[0])
  inside = (group < w.shape[0])[:, None]
  sizes = group_sizes.astype(jnp.int32)
  by_group = lambda x, w: multiply(x, w.astype(x.dtype), sizes)
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


def _check(x, w, group_sizes, bias, implementation) -> None:
  if len(w.shape) != 3 or x.ndim != 2 or x.shape[1] != w.shape[1]:
    given = f"x {x.shape}, w {tuple(w.shape)}"
    raise ValueError(f"grouped_linear: {given}; allowed: x [M, D], w [E, D, F]")
  experts, _, width = w.shape
  parts = group_sizes.shape[0] if group_sizes.ndim == 2 else 1
  if group_sizes.shape not in ((experts,), (parts, experts)) or x.shape[0] % parts:
    allowed = f"({experts},), or (P, {experts}) with a P that divides {x.shape[0]} rows"
    raise ValueError(f"grouped_linear: group_sizes {group_sizes.shape}; allowed: {allowed}")
  _check_sizes(group_sizes, x.shape[0] // parts)
  if bias is not None and bias.shape != (experts, width):
    raise ValueError(f"grouped_linear: bias {bias.shape}; allowed: ({experts}, {width})")
  if implementation not in IMPLEMENTATIONS:
    allowed = f"one of {IMPLEMENTATIONS}"
    raise ValueError(f"grouped_linear: implementation={implementation!r}; allowed: {allowed}")


def _check_sizes(group_sizes, rows: Dim) -> None:
  if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise ValueError(f"grouped_linear: group_sizes of {group_sizes.dtype}; allowed: integers")
  sizes = known(group_sizes)
  if sizes is None:
    return
  if sizes.min(initial=0) < 0 or sizes.sum(axis=-1).max(initial=0) > rows:
    allowed = f"from 0, together up to {rows} rows"
    raise ValueError(f"grouped_linear: group_sizes {sizes.tolist()}; allowed: {allowed}")
