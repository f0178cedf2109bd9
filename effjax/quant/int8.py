"""Weights as 8-bit integers with one scale an output channel."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import numerics, weights
from effjax.core.trees import is_table
from effjax.core.typing import Array, DTypeLike, Float, Int, Num, PyTree
from effjax.core.weights import Weight, register
from effjax.kernels.quantized_matmul import Integers, Lying, integer_product
from effjax.quant import basics


@register(static=("dtype", "turned"), kind="quantised")
class Int8(Weight):
  """W[d, f] = q[d, f] · scale, scale = max|W[:, f]| / 127 (symmetric absmax).

  A quarter of float32's bytes, an error of at most scale/2 an entry. The integers are exact in
  every float type of at least 8 significant bits, so x @ W = (x @ q) · scale needs no
  dequantised copy; backward keeps the integers and nothing wider.

  Invariants:
    q: int8 [..., D, F] in −127 … 127.
    scale: [..., 1, F], one an output channel; or [..., D, 1], one a row, as an embedding table has
      whose rows are the output channels of the tied head.
    dtype: type of the matrix that it stands for; None is that of the scale.
    turned: whether q lies in memory as its transpose, which decides how products go through it.
  """

  q: PyTree
  scale: PyTree
  dtype: Any = dataclasses.field(default=None, kw_only=True)
  turned: bool = dataclasses.field(default=False, kw_only=True)

  @classmethod
  def quantize(
    cls,
    w: Num[Array | np.ndarray, "... D F"],
    *,
    granularity: str = "channel",
    scale_dtype: DTypeLike = jnp.float32,
  ) -> "Int8":
    """The nearest `Int8` of `w`.

    Args:
      w: matrices [..., D, F].
      granularity: "channel" or "row", what has a scale.
      scale_dtype: type of the scales, 16-bit ones at the cost that `basics.symmetric` says.

    Raises:
      ValueError: for another granularity; when `w` is not a floating-point matrix, or holds NaN or
        infinity, or magnitudes that `scale_dtype` has no scale for, where values are known.

    Example:
      >>> w = Int8.quantize(jnp.array([[1.0, 10.0], [-2.0, 0.0]]))
      >>> w.q.tolist(), w.matmul(jnp.array([0.0, 1.0])).tolist()
      ([[64, 127], [-127, 0]], [-2.0, 0.0])
    """
    if granularity not in ("channel", "row"):
      raise ValueError(f"granularity {granularity!r}; allowed: channel, row")
    q, scale = basics.symmetric(w, granularity=granularity, scale_dtype=scale_dtype)
    basics.check_scales(scale)
    return cls(q, scale, dtype=jax.typeof(w).dtype)

  @classmethod
  def represent(cls, path: str, w: Num[Array | np.ndarray, "... D F"], **options: Any) -> "Int8":
    """`quantize` of the parameter at `path`: a table named "embedding" has one scale a row."""
    return cls.quantize(w, **{"granularity": "row" if is_table(path) else "channel", **options})

  def __post_init__(self):
    if self.dtype is None and hasattr(self.scale, "dtype"):
      object.__setattr__(self, "dtype", jnp.dtype(self.scale.dtype))
    super().__post_init__()

  def check(self) -> None:
    *batch, D, F = self.q.shape
    given = tuple(self.scale.shape)
    if given not in ((*batch, 1, F), (*batch, D, 1)):
      allowed = f"{(*batch, 1, F)} or {(*batch, D, 1)}"
      raise ValueError(f"Int8: scale has shape {given}; allowed: {allowed}")

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.q.shape)

  def materialize(self) -> Array:
    return basics.restore(self.q, self.scale, dtype=self.dtype)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    computed = numerics.wide(x.dtype)  # in 16 bits what is not scaled yet may overflow
    scale = self.scale.astype(computed)
    if scale.shape[-2] > 1:
      y = integer_product(_scaled(x.astype(computed), scale[:, 0]), self.q, turned=self.turned)
    else:
      y = integer_product(x, self.q, turned=self.turned)
      y = _scaled(y, jnp.broadcast_to(scale[0], (self.shape[-1],)))
    return y.astype(x.dtype)

  def product(self, x: Array, multiply: Callable[[Array, Any], Array]) -> Array:
    both = x.dtype, self.dtype
    common = x.dtype if x.dtype == self.dtype else np.promote_types(*map(numerics.wide, both))
    return multiply(x, dataclasses.replace(self, dtype=common))

  @property
  def lying(self) -> Lying:
    """How stacked ones lie in memory."""
    if not self.turned:
      return Lying(Integers(1), self.q, (self.scale,), table=True)
    q, scale = jnp.matrix_transpose(self.q), jnp.matrix_transpose(self.scale)
    return Lying(Integers(1), q, (scale,))

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    rows = weights.lookup(self.q, indices)
    if self.scale.shape[-2] > 1:
      scale = weights.lookup(self.scale, indices)
    else:
      scale = numerics.expand(self.scale[0], rows.ndim)
    computed = numerics.wide(self.scale.dtype)
    return (rows.astype(computed) * scale.astype(computed)).astype(self.dtype)

  @property
  def T(self) -> "Int8":
    q, scale = jnp.matrix_transpose(self.q), jnp.matrix_transpose(self.scale)
    return dataclasses.replace(self, q=q, scale=scale, turned=not self.turned)


def _scaled(x: Float[Array, "... F"], v: Float[Array, "F"]) -> Array:
  return x * numerics.expand(v, x.ndim)
