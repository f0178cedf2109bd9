"""A matrix whose inputs are scaled: what moves the difficulty of quantising between x and W."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from effjax.core import numerics, weights
from effjax.core.register import register
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.core.weights import Weight


@register(kind="quantised")
class InputScaled(Weight):
  """W = diag(scale) B: x W = (x · scale) B.

  With B a quantised form of diag(scale)⁻¹ W it stands for W, each input having a share of its own
  in the errors: of the weights (AWQ) or of the activations too (SmoothQuant).

  Invariants:
    base: B, an array [..., D, F] or a `Weight`.
    scale: [..., D, 1].
  """

  base: PyTree
  scale: PyTree

  def check(self) -> None:
    super().check()
    allowed = (*self.base.shape[:-1], 1)
    if tuple(self.scale.shape) != allowed:
      raise ValueError(
        f"InputScaled: scale has shape {tuple(self.scale.shape)}; allowed: {allowed}"
      )

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.base.shape)

  @property
  def dtype(self) -> jnp.dtype:
    return self.base.dtype

  @property
  def parameters(self) -> int:
    return self.base.parameters if isinstance(self.base, Weight) else self.base.size

  @property
  def flops(self) -> float:
    D, F = self.shape[-2:]
    return D + (self.base.flops if isinstance(self.base, Weight) else 2.0 * D * F)

  def materialize(self) -> Array:
    wide = numerics.wide(self.dtype)
    base = weights.materialize(self.base).astype(wide)
    return (base * self.scale.astype(wide)).astype(self.dtype)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    scaled = x.astype(numerics.wide(x.dtype)) * numerics.expand(self.scale[:, 0], x.ndim)
    return weights.linear(scaled.astype(x.dtype), self.base)

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    rows = weights.lookup(self.base, indices)
    return (rows * weights.lookup(self.scale, indices)).astype(self.dtype)

  def specs(self, axes: Sequence[Any]) -> "InputScaled":
    return InputScaled(
      weights.specs(self.base, axes), weights.specs(self.scale, (*axes[:-1], None))
    )
