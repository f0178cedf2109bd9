"""One linear map per group of rows (the experts of MegaBlocks, Gale et al., arXiv 2211.15841)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core import numerics, trees
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.core.weights import materialize
from effjax.kernels.grouped_matmul import reference, tiles

IMPLEMENTATIONS = (None, "tiles", "ragged", "reference")


def grouped_linear(
  x: Float[Array, "M D"],
  w,
  group_sizes: Int[Array, "E"],
  bias: Float[Array, "E F"] | None = None,
  *,
  implementation: str | None = None,
) -> Float[Array, "M F"]:
  """out[m] = x[m] w[e] + bias[e], where e is the group that row m lies in.

  Rows are sorted by group: group 0 holds the first group_sizes[0] rows, and so on. Rows past the
  last group give zero, and zero gradient; so does a group without rows. The work is that of a
  dense product of the same M, whatever E. Computed in the type of `x`.

  Args:
    x: [M, D], sorted by group.
    w: an array [E, D, F], or a `Weight` of that shape; gradients reach its floating-point leaves.
    group_sizes: [E], non-negative, of sum at most M.
    bias: [E, F], or None.
    implementation: "tiles" loops over tiles of rows and uses any `Weight` as it is; "ragged" is
      `jax.lax.ragged_dot` on the materialised array, which costs E times as much on a CPU;
      "reference" is the dense definition. None compiles tiles for CPU, ragged elsewhere.

  Raises:
    ValueError: when shapes do not fit, or for another implementation.

  Example:
    >>> w = jnp.array([[[1.0]], [[10.0]]])
    >>> grouped_linear(jnp.ones((4, 1)), w, jnp.array([1, 2])).tolist()
    [[1.0], [10.0], [10.0], [0.0]]
  """
  _check(x, w, group_sizes, bias, implementation)
  if x.shape[0] == 0:
    return jnp.zeros((0, w.shape[2]), x.dtype)
  if implementation == "reference":
    return _dense(reference.grouped_matmul, x, (w, bias), group_sizes)
  floats, others = _floats((w, bias)), _others((w, bias))
  operands = (x, floats, others, group_sizes)
  return _grouped(implementation, *numerics.vary_alike(operands, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(implementation: str | None, x: Array, floats, others, group_sizes: Array) -> Array:
  return _choose(implementation, tiles.forward, _ragged, x, floats, others, group_sizes)


def _forward(implementation, *operands):
  return _grouped(implementation, *operands), operands


def _backward(implementation, operands, dy):
  *_, others, group_sizes = operands
  dx, d_floats = _choose(implementation, tiles.backward, _ragged_backward, *operands, dy)
  return dx, d_floats, jax.tree.map(_float0, others), _float0(group_sizes)


_grouped.defvjp(_forward, _backward)


def _choose(implementation: str | None, by_tiles, by_ragged, *operands):
  if implementation is None:
    return lax.platform_dependent(*operands, cpu=by_tiles, default=by_ragged)
  return (by_tiles if implementation == "tiles" else by_ragged)(*operands)


# `jax.lax.ragged_dot` has no batching rule for what vmap asks of it here.
@jax.custom_batching.sequential_vmap
def _ragged(x, floats, others, group_sizes):
  return _dense(jax.lax.ragged_dot, x, trees.merge(floats, others), group_sizes)


@jax.custom_batching.sequential_vmap
def _ragged_backward(x, floats, others, group_sizes, dy):
  apply = lambda x, floats: _ragged.fun(x, floats, others, group_sizes)
  return jax.vjp(apply, x, floats)[1](dy)


def _dense(product, x, params, group_sizes):
  """`product` on the materialised weight, the bias of each row, and zero past the last group."""
  w, bias = params
  w = jax.vmap(materialize)(w).astype(x.dtype)
  group = reference.group_of_row(group_sizes, x.shape[0])
  y = product(x, w, group_sizes.astype(jnp.int32))
  if bias is not None:
    y = y + jnp.take(bias.astype(y.dtype), group, axis=0, mode="clip")
  return jnp.where((group < w.shape[0])[:, None], y, jnp.zeros_like(y))


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
  if group_sizes.shape != (experts,):
    raise ValueError(f"grouped_linear: group_sizes {group_sizes.shape}; allowed: ({experts},)")
  if bias is not None and bias.shape != (experts, width):
    raise ValueError(f"grouped_linear: bias {bias.shape}; allowed: ({experts}, {width})")
  if implementation not in IMPLEMENTATIONS:
    allowed = f"one of {IMPLEMENTATIONS}"
    raise ValueError(f"grouped_linear: implementation={implementation!r}; allowed: {allowed}")
