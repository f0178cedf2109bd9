"""Numerical building blocks shared by every room."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.known import check_ids, is_id, known
from effjax.core.typing import Array, Bool, Dim, DTypeLike, Float, Int, Integer, PyTree, Shaped

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def expand(x: AnyArray, ndim: int) -> AnyArray:
  """`x` with leading axes of size one until it has `ndim` axes."""
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def wide(dtype: DTypeLike) -> np.dtype:
  """The type that numbers of `dtype` are scaled and summed in: float64 for itself, else float32.

  Example:
    >>> [wide(dtype).name for dtype in (jnp.float16, jnp.int8, jnp.float64)]
    ['float32', 'float32', 'float64']
  """
  return np.dtype(np.float64 if jnp.dtype(dtype) == np.float64 else np.float32)


def zero_unless(mask: Array | None, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
  """`x`, with zeros where `mask`, over its leading axes, is False; None keeps all.

  Example:
    >>> zero_unless(jnp.array([True, False]), jnp.array([[1.0], [jnp.nan]])).tolist()
    [[1.0], [0.0]]
  """
  return x if mask is None else jnp.where(_over(mask, x), x, jnp.zeros((), x.dtype))


def nan_unless(mask: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
  """`x`, with NaN where `mask`, over its leading axes, is False.

  The NaN is computed and no constant: of exp of a constant one XLA makes any number on a CPU.

  Example:
    >>> nan_unless(jnp.array([True, False]), jnp.ones((2, 1))).tolist()
    [[1.0], [nan]]
  """
  zero = jax.lax.stop_gradient(x - x)
  return jnp.where(_over(mask, x), x, zero / zero)


def _over(mask: Array, x: Array) -> Array:
  return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def matmul(x: Float[Array, "... D"], w: Array) -> Array:
  """x @ w in the type of `x`.

  The product is one of matrices: were `x` left as it is, the gradient of `w` would sum over several
  axes, for which XLA on CPU copies both operands into another order, activations recomputed on the
  way; a training step takes a quarter longer.
  """
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  y = jax.lax.dot_general(rows, w.astype(x.dtype), (((1,), (0,)), ((), ())))
  return y.reshape(x.shape[:-1] + w.shape[1:])


def rounded(
  x: Float[Array, "... D"], top: Float[Array, "... 1"] | None = None
) -> tuple[Int[Array, "... D"], Float[Array, "... 1"]]:
  """q = round(127 · x / a), a = max |x| of each row (absmax) unless it is given; (q, a / 127).

  A row of zeros gives zeros, with a scale of 0. One that holds NaN or infinity has the scale NaN.

  Example:
    >>> q, scale = rounded(jnp.array([[1.0, -2.0], [0.0, 0.0]]))
    >>> q.tolist(), (127 * scale).tolist()
    ([[64, -127], [0, 0]], [[2.0], [0.0]])
  """
  x = x.astype(wide(x.dtype))
  top = jnp.abs(x).max(-1, keepdims=True, initial=0) if top is None else top.astype(x.dtype)
  usual = jnp.isfinite(top) & (top >= 127 * jnp.finfo(x.dtype).tiny)
  q = jnp.round(x * (127 / jnp.where(usual, top, jnp.inf)))
  scale = jnp.where(usual, top / 127, jnp.where(jnp.isfinite(top), 0, jnp.nan))
  return q.astype(jnp.int8), scale


def softcap(x: Array, cap: float | Array | None) -> Array:
  """cap · tanh(x / cap), or `x` when `cap` is None (Gemma 2, arXiv 2408.00118)."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def weighted_mean(
  values: Float[Array, "..."], weights: Shaped[Array | np.ndarray, "..."] | None
) -> Float[Array, ""]:
  """Σ w·v / Σ w in float32; the plain mean when `weights` is None; 0 of nothing, or of weights 0.

  What a value of weight 0 is has no influence, NaN and inf included. The sums may be of any size.

  Args:
    values: [...].
    weights: [...], numbers or booleans, from 0; a traced one that is negative gives NaN.

  Raises:
    ValueError: for weights of another shape, and for known ones that are negative or not finite.

  Example:
    >>> float(weighted_mean(jnp.array([2.0, 4.0, jnp.nan]), jnp.array([1e-30, 1e-30, 0.0])))
    3.0
  """
  values = values.astype(jnp.float32)
  if weights is None:
    return values.sum() / jnp.maximum(values.size, 1.0)
  check_weights(weights, values.shape)
  weights = jnp.asarray(weights, jnp.float32)
  most = jax.lax.stop_gradient(weights.max(initial=0))
  shares = nan_unless(weights >= 0, weights) / jnp.where(most > 0, most, 1)
  total = shares.sum()
  return (shares * zero_unless(weights != 0, values)).sum() / jnp.where(total == 0, 1, total)


def check_weights(weights: Shaped[Array | np.ndarray, "..."], shape: tuple[Dim, ...]) -> None:
  """Refuses what are no weights of positions [...], one of each, finite and from 0.

  Raises:
    ValueError: for another shape, and where they are known for one that is negative or not finite.
  """
  if tuple(weights.shape) != tuple(shape):
    raise ValueError(f"weights: shape {tuple(weights.shape)}; allowed: {tuple(shape)}")
  values = known(weights)
  wrong: Any = () if values is None else values[~((values >= 0) & (values < np.inf))]
  if len(wrong):
    raise ValueError(f"weights: one is {wrong[0]}; allowed: finite, from 0")


def cross_entropy(
  logits: Float[Array, "... V"],
  targets: Integer[Array | np.ndarray, "..."],
  weights: Shaped[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, "..."]:
  """−log softmax(logits)[target] of each position, in nats and float32.

  A position of weight 0 is not read: it gives 0 whatever its logits and target are. Elsewhere a
  traced target that is none of the V gives NaN.

  Args:
    logits: [..., V].
    targets: [...], ids.
    weights: [...], of which it matters where they are 0; None reads every position.

  Raises:
    ValueError: for shapes that do not fit, and for targets, where they are known and read, out of
      0 … V − 1.

  Example:
    >>> logits, targets = jnp.zeros((2, 4)), jnp.array([3, -100])
    >>> cross_entropy(logits, targets, jnp.array([1.0, 0.0])).round(3).tolist()
    [1.386..., 0.0]
  """
  if targets.shape != logits.shape[:-1]:
    raise ValueError(f"targets: shape {targets.shape}; allowed: {logits.shape[:-1]}")
  if weights is not None:
    check_weights(weights, targets.shape)
  read = None if weights is None else weights != 0
  check_ids("targets", targets, logits.shape[-1], read)
  read, right = None if read is None else jnp.asarray(read), is_id(targets, logits.shape[-1])
  nll = optax.softmax_cross_entropy_with_integer_labels(
    zero_unless(read, logits.astype(jnp.float32)), jnp.where(right, targets, 0)
  )
  return zero_unless(read, nan_unless(right, nll))


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
