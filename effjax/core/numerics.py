"""Numerical building blocks shared by every room."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array, Float, PyTree

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def expand(x: AnyArray, ndim: int) -> AnyArray:
  """`x` with leading axes of size one until it has `ndim` axes."""
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def zero_unless(mask: Array | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
  """`x`, with zeros where `mask`, over its leading axes, is False; None keeps all.

  Example:
    >>> zero_unless(jnp.array([True, False]), jnp.array([[1.0], [jnp.nan]])).tolist()
    [[1.0], [0.0]]
  """
  if mask is None:
    return x
  kept = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
  return jnp.where(kept, x, jnp.zeros((), x.dtype))


def matmul(x: Float[Array, "... D"], w: Array) -> Array:
  """x @ w in the type of `x`.

  The product is one of matrices: were `x` left as it is, the gradient of `w` would sum over several
  axes, for which XLA on CPU copies both operands into another order, activations recomputed on the
  way; a training step takes a quarter longer.
  """
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  y = jax.lax.dot_general(rows, w.astype(x.dtype), (((1,), (0,)), ((), ())))
  return y.reshape(x.shape[:-1] + w.shape[1:])


def softcap(x: Array, cap: float | Array | None) -> Array:
  """cap · tanh(x / cap), or `x` when `cap` is None (Gemma 2, arXiv 2408.00118)."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def weighted_mean(values: Float[Array, "..."], weights: Float[Array, "..."] | None) -> Array:
  """Σ w·v / Σ w; the plain mean when `weights` is None; 0 when all weights are 0."""
  if weights is None:
    return values.mean()
  return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-9)


def vary_alike(tree: PyTree, *others: PyTree) -> PyTree:
  """`tree` marked as varying over every mesh axis that `others` vary over, as a loop carry of a
  `shard_map` body has to be."""
  axes = frozenset().union(
    *(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(others))
  )

  def mark(leaf: Any) -> Any:
    missing = tuple(sorted(axes - jax.typeof(leaf).manual_axis_type.varying))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(mark, tree)
