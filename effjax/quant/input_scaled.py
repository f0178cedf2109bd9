"""A matrix whose inputs are scaled: what moves the difficulty of quantising between x and W."""

from effjax.core import numerics, weights
from effjax.core.register import register
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.core.weights import Over


@register(kind="quantised")
class InputScaled(Over):
  """W = diag(scale) B: x W = (x · scale) B.

  With B a quantised form of diag(scale)⁻¹ W it stands for W, each input having a share of its own
  in the errors: of the weights (AWQ) or of the activations too (SmoothQuant).

  Invariants:
    base: B, an array [..., D, F] or a `Weight`.
    scale: [..., D, 1].
  """

  scale: PyTree

  def check(self) -> None:
    super().check()
    allowed = (*self.base.shape[:-1], 1)
    if tuple(self.scale.shape) != allowed:
      raise ValueError(
        f"InputScaled: scale has shape {tuple(self.scale.shape)}; allowed: {allowed}"
      )

  @property
  def flops(self) -> float:
    return super().flops + self.shape[-2]

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
