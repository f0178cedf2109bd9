"""LLM.int8(): integer products, but for the few input features that have outliers.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv
2208.07339, section 3. A feature, a column of x, is an outlier where any token of the call has
|x| ≥ threshold in it; it is multiplied in the type of x. The rest is `Int8Dynamic`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core import numerics, weights
from effjax.core.known import number
from effjax.core.register import register
from effjax.core.typing import Array, Bool, Float, Num, Number, PyTree, Size
from effjax.layers.reductions import Reduction
from effjax.quant.dynamic import rounded_product, straight
from effjax.quant.int8 import Int8

THRESHOLD = 6.0


@register(static=("threshold", "capacity"), kind="quantised")
class LLMInt8(Int8):
  """x W = x[:, O] W[O] + Q(x[:, not O]) q · s_x · scale for the outlier features O of x.

  W[O] are the integers times their scale, as bitsandbytes has it; `LLMInt8Exact` keeps W. What is
  left of a row after its outliers, all |x| < threshold, has its absmax taken before the other
  outlier features leave, as there. The derivative is that of x W.

  Under jit the outlier product is of `capacity` features; where there are more, it is of all
  features: slower, and the same numbers. `outliers` reports how many there are.

  Attributes:
    threshold: from which |x| a feature is an outlier; 0 means that none is.
    capacity: features that the outlier product has room for.
  """

  threshold: Number = dataclasses.field(default=THRESHOLD, kw_only=True)
  capacity: int = dataclasses.field(default=64, kw_only=True)

  @classmethod
  def quantize(  # type: ignore[override]
    cls,
    w: Num[Array | np.ndarray, "... D F"],
    *,
    threshold: Number = THRESHOLD,
    capacity: Size = 64,
    exact: bool = False,
    **options: Any,
  ) -> "LLMInt8":
    """The nearest one of `w`, an `LLMInt8Exact` where `exact`.

    Args:
      w: matrices [..., D, F].
      threshold: from which |x| a feature is an outlier; 0 means that none is.
      capacity: features that the outlier product has room for, 1 or more.
      exact: whether W itself is kept for the rows of outliers, besides the integers.
      options: as in `Int8.quantize`.

    Raises:
      ValueError: for a threshold below 0 or a capacity below 1, and as `Int8.quantize`.

    Example:
      >>> w = LLMInt8.quantize(jnp.eye(3), threshold=6.0)
      >>> w.matmul(jnp.array([[1.0, 0.5, 100.0]])).round(2).tolist()
      [[1.0, 0.5..., 100.0]]
    """
    found = Int8.quantize(w, **options)
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    fields["threshold"] = number("threshold", threshold, least=0)
    fields["capacity"] = number("capacity", capacity, integer=True, least=1)
    if exact or issubclass(cls, LLMInt8Exact):
      return LLMInt8Exact(**fields, whole=jnp.asarray(w))
    return LLMInt8(**fields)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    if self.scale.shape[-2] > 1:
      return super().matmul(x)
    return straight(_decomposed if self.threshold else rounded_product, x, self)

  def rows(self, indices: Array) -> Float[Array, "K F"]:
    """The rows of W that outliers are multiplied with."""
    return weights.lookup(Int8(self.q, self.scale, dtype=np.dtype(np.float32)), indices)


@register(kind="quantised")
class LLMInt8Exact(LLMInt8):
  """`LLMInt8` that keeps W for its outliers: exact where it matters, at the bytes of both.

  Invariants: as `LLMInt8`, and
    whole: W [..., D, F].
  """

  whole: PyTree

  def rows(self, indices: Array) -> Float[Array, "K F"]:
    return weights.lookup(self.whole, indices)

  @property
  def T(self) -> "LLMInt8Exact":
    names = ("q", "scale", "whole")
    turned: Any = {name: jnp.matrix_transpose(getattr(self, name)) for name in names}
    return dataclasses.replace(self, **turned, turned=not self.turned)


def has_outliers(x: Float[Array, "... D"], threshold: Number) -> Bool[Array, "D"]:
  """Which features of x have an outlier: any |x| ≥ threshold over its tokens; none for 0.

  Example:
    >>> has_outliers(jnp.array([[1.0, -6.0], [2.0, 0.0]]), 6.0).tolist()
    [False, True]
  """
  if not number("threshold", threshold, least=0):
    return jnp.zeros(x.shape[-1], bool)
  return (jnp.abs(x) >= threshold).reshape(-1, x.shape[-1]).any(0)


def outliers(threshold: Number = THRESHOLD) -> Reduction:
  """The share of features that are outliers, for `taps.capture`: a mean over calls.

  Example:
    >>> share = outliers(6.0)
    >>> float(share.finish(share.measure(jnp.array([[1.0, -6.0], [2.0, 0.0]]), None)))
    0.5
  """

  def measure(x: Array, mask: Array | None) -> Float[Array, "2"]:
    found = has_outliers(numerics.zero_unless(mask, x), threshold).mean()
    return jnp.stack([found, jnp.ones_like(found)])

  return Reduction(measure, jnp.add, lambda sums: sums[..., 0] / sums[..., 1])


def _decomposed(x: Float[Array, "... D"], w: LLMInt8) -> Float[Array, "... F"]:
  outlier = has_outliers(x, w.threshold)
  along = outlier.reshape((1,) * (x.ndim - 1) + (-1,))
  usual = jnp.where(jnp.abs(x) >= w.threshold, jnp.zeros((), x.dtype), x)
  # Each row has its absmax before the outlier features leave, but without its own outliers.
  top = jnp.abs(usual).max(-1, keepdims=True, initial=0)
  y = rounded_product(jnp.where(along, jnp.zeros((), x.dtype), usual), w, top)
  return y + _outlier_product(jnp.where(along, x, jnp.zeros((), x.dtype)), outlier, w)


def _outlier_product(x: Float[Array, "... D"], outlier: Array, w: LLMInt8):
  """x W for x that is zero but in its outlier features."""
  D = x.shape[-1]
  capacity = min(w.capacity, D)
  indices = jnp.nonzero(outlier, size=capacity, fill_value=D)[0]

  def few(x):
    columns = jnp.take(x, indices, axis=-1, mode="fill", fill_value=0)
    return numerics.matmul(columns, w.rows(jnp.minimum(indices, D - 1)))

  def many(x):
    return numerics.matmul(x, w.rows(jnp.arange(D)))

  return lax.cond(outlier.sum() <= capacity, few, many, x)
