"""Weights as 8-bit integers with one scale an output channel."""

from collections.abc import Callable

import jax.numpy as jnp

from effjax.core import weights
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.core.weights import Weight, register
from effjax.quant import basics
from effjax.quant.product import integer_product


@register(kind="quantised")
class Int8(Weight):
  """W[d, f] = q[d, f] · scale, scale = max|W[:, f]| / 127 (symmetric absmax).

  A quarter of float32's bytes, an error of at most scale/2 an entry. The integers are exact in
  every float type of at least 8 significant bits, so x @ W = (x @ q) · scale needs no
  dequantised copy; backward keeps the integers and nothing wider.

  Invariants:
    q: int8 [..., D, F] in −127 … 127.
    scale: [..., 1, F], one an output channel; or [..., D, 1], one a row, as an embedding table has
      whose rows are the output channels of the tied head. Its type is that of the matrix.
  """

  q: PyTree
  scale: PyTree

  @classmethod
  def quantize(cls, w: Float[Array, "... D F"], *, granularity: str = "channel") -> "Int8":
    """The nearest `Int8` of `w`; granularity "channel" or "row".

    Raises:
      ValueError: for another granularity, or when `w` is not a floating-point matrix.

    Example:
      >>> w = Int8.quantize(jnp.array([[1.0, 10.0], [-2.0, 0.0]]))
      >>> w.q.tolist(), w.matmul(jnp.array([0.0, 1.0])).tolist()
      ([[64, 127], [-127, 0]], [-2.0, 0.0])
    """
    if granularity not in ("channel", "row"):
      raise ValueError(f"granularity {granularity!r}; allowed: channel, row")
    if not jnp.issubdtype(w.dtype, jnp.floating):
      raise ValueError(f"w has type {w.dtype}; allowed: floating point")
    return cls(*basics.symmetric(w, granularity=granularity))

  @classmethod
  def represent(cls, path: str, w: Float[Array, "... D F"]) -> "Int8":
    """The `Int8` of the parameter at `path`: a table named "embedding" has one scale a row."""
    table = path.rsplit("/", 1)[-1] == "embedding"
    return cls.quantize(w, granularity="row" if table else "channel")

  def check(self) -> None:
    *batch, D, F = self.q.shape
    given = tuple(self.scale.shape)
    if given not in ((*batch, 1, F), (*batch, D, 1)):
      allowed = f"{(*batch, 1, F)} or {(*batch, D, 1)}"
      raise ValueError(f"Int8: scale has shape {given}; allowed: {allowed}")

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.q.shape)

  @property
  def dtype(self) -> jnp.dtype:
    return self.scale.dtype

  def materialize(self) -> Array:
    return basics.restore(self.q, self.scale)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    rows = self.scale.shape[-2]
    if rows > 1:
      x = (x * _along_last(self.scale[:, 0], x.ndim)).astype(x.dtype)
    y = integer_product(x, self.q)
    if rows == 1:
      y = y * _along_last(jnp.broadcast_to(self.scale[0], (self.shape[-1],)), y.ndim)
    return y.astype(x.dtype)

  def product(self, x: Array, multiply: Callable[[Array, Array], Array]) -> Array:
    wide = jnp.promote_types(x.dtype, self.dtype)
    return multiply(x, basics.restore(self.q, self.scale.astype(wide)))

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    rows = weights.lookup(self.q, indices)
    per_row = self.scale.shape[-2] > 1
    scale = weights.lookup(self.scale, indices) if per_row else self.scale[0]
    scale = scale if per_row else _along_last(scale, rows.ndim)
    return (rows.astype(jnp.float32) * scale.astype(jnp.float32)).astype(self.dtype)

  @property
  def T(self) -> "Int8":
    return Int8(jnp.matrix_transpose(self.q), jnp.matrix_transpose(self.scale))


def _along_last(v: Float[Array, "F"], ndim: int) -> Array:
  return v.astype(jnp.float32).reshape((1,) * (ndim - 1) + v.shape)
