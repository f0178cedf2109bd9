"""DoRA: the low-rank change turns the columns of a matrix, and their lengths train by themselves.

Liu et al., arXiv 2402.09353: section 4.1, and 4.3 for the norm that is constant to derivatives.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import numerics, weights
from effjax.core.register import register
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.core.weights import Transposed, Weight, linear, materialize
from effjax.peft.low_rank import LoRA


@register(trains=("a", "b", "magnitude"), kind="adapter")
class DoRA(LoRA):
  """W = (W0 + s·A B) · m/n, where n = ‖W0 + s·A B‖ of each output, a constant to derivatives.

  With dropout, x W = x W0 + (m/n − 1)·x' W0 + m/n·s·(x' A) B, where x' is x as dropped. An output
  of the norm 0 is not scaled.

  Invariants: as of `LoRA`, and
    magnitude: m, [..., 1, F]; n at the start, so that W is what the `LoRA` of A and B is.
    norm: n where it is computed once for several products, [..., 1, F]; absent elsewhere.
  Both are float32.
  """

  magnitude: PyTree
  norm: PyTree = dataclasses.field(default=None, kw_only=True)

  @classmethod
  def over(cls, w: LoRA) -> "DoRA":
    """The one that starts as `w`.

    Example:
      >>> w = LoRA(3 * jnp.eye(2), jnp.ones((2, 1)), jnp.zeros((1, 2)), jnp.ones((1, 1)))
      >>> DoRA.over(w).magnitude.tolist()
      [[3.0, 3.0]]
    """
    fields = {field.name: getattr(w, field.name) for field in dataclasses.fields(LoRA)}
    return cls(**fields, magnitude=norms(w))

  @property
  def parameters(self) -> int:
    return super().parameters + math.prod(self.magnitude.shape)

  @property
  def flops(self) -> float:
    return super().flops + 2.0 * self.shape[-1]

  def check(self) -> None:
    super().check()
    self._check_shape("magnitude", (*self.shape[:-2], 1, self.shape[-1]))

  def specs(self, axes: Sequence[Any]) -> "DoRA":
    *batch, _, outputs = axes
    own = [name for name in ("magnitude", "norm") if getattr(self, name) is not None]
    return super().specs(axes)._with_specs(dict.fromkeys(own, (*batch, None, outputs)))

  def pick(self, units: Int[Array | np.ndarray, "n"], axis: int) -> Weight:
    if axis == -2:
      raise ValueError(
        f"{self!r} has norms of all its rows; allowed: a LoRA, or to merge it before"
      )
    return super().pick(units, axis)

  def within(self, function: Callable, *arguments: Any) -> Any:
    return function(dataclasses.replace(self, norm=self._norm()), *arguments)

  def materialize(self) -> Array:
    base = materialize(self.base)
    matrix = base.astype(numerics.wide(base.dtype)) + self.delta()
    return (self.ratio() * matrix).astype(base.dtype)

  def beneath(self, w: Float[Array, "... D F"]) -> Array:
    ratio = self.ratio()
    turned = w.astype(numerics.wide(w.dtype)) / jnp.where(ratio == 0, 1, ratio)
    base = (turned - self.delta()).astype(w.dtype)
    return jnp.where(ratio == 0, materialize(self.base), base)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    y = linear(x, self.base)
    return y + self.added(x, y, None)

  def affine(self, x: Float[Array, "... D"], bias: Any) -> Float[Array, "... F"]:
    return Weight.affine(self, x, bias)

  def added(self, x: Float[Array, "... D"], y: Float[Array, "... F"], bias: Any) -> Array:
    seen = self.dropped(x)
    if self.key is not None:
      y = linear(seen, self.base)
    elif bias is not None:
      y = y - weights.along(bias, y).astype(y.dtype)
    ratio = numerics.expand(self.ratio()[0], y.ndim)
    return y * (ratio - 1).astype(y.dtype) + self.low_rank(seen) * ratio.astype(y.dtype)

  def product(self, x: Array, multiply: Callable[[Array, Any], Array]) -> Array:
    ratio, seen = self.ratio(), self.dropped(x)
    low_rank = multiply(multiply(seen, self.a * self.scale), self.b * ratio)
    base = materialize(self.base).astype(jnp.float32)
    if self.key is None:
      return multiply(x, base * ratio) + low_rank
    whole = weights.product(x, self.base, multiply)
    return whole + multiply(seen, base * (ratio - 1)) + low_rank

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    rows = super().lookup(indices)
    return rows * numerics.expand(self.ratio()[0], rows.ndim).astype(rows.dtype)

  @property
  def T(self) -> Any:
    return Transposed(dataclasses.replace(self, key=None))

  def ratio(self) -> Float[Array, "..."]:
    """m/n, [..., 1, F]."""
    norm = self._norm()
    return jnp.where(norm > 0, self.magnitude / jnp.where(norm > 0, norm, 1), 1)

  def _norm(self) -> Float[Array, "..."]:
    fixed = jax.lax.stop_gradient(self)
    return norms(fixed) if fixed.norm is None else fixed.norm


def norms(w: LoRA) -> Float[Array, "..."]:
  """‖W0 + s·A B‖ of each output, [..., 1, F] in float32; of stacks a matrix at a time."""
  if w.by_parts:
    w = dataclasses.replace(w, base=materialize(w.base))
  if w.ndim > 2:
    return jax.lax.map(norms, w)
  matrix = materialize(w.base).astype(jnp.float32) + w.delta()
  return jnp.linalg.norm(matrix, axis=-2, keepdims=True)
