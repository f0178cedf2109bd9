"""Which experts each token visits: what routers give, and what layers with experts ask of one."""

from typing import Protocol, runtime_checkable

from flax import struct

from effjax.core.typing import Array, Bool, Float, Int
from effjax.layers.context import Context


@struct.dataclass
class Routing:
  """A decision for each token; leading axes are those of the tokens.

  Attributes:
    experts: [..., k], the chosen experts, best first; E or more means none.
    gates: [..., k], float32, what each chosen expert's output is multiplied by.
    probs: [..., E], float32, the softmax over all experts; None where a router has no scores.
    logits: [..., E], float32, what `probs` is the softmax of, or None.
  """

  experts: Int[Array, "... k"]
  gates: Float[Array, "... k"]
  probs: Float[Array, "... E"] | None = None
  logits: Float[Array, "... E"] | None = None


@runtime_checkable
class Router(Protocol):
  """A Flax module that says which experts each row visits, and sows its own losses.

  Rows are tokens [B, T] laid end to end, in the order of `context.tokens.reshape(-1)`. Rows where
  `mask` is False are padding: what they hold and the cotangents that come back to them have no
  influence, NaN included, they count in no loss, and what the router says of them is not read.
  """

  @property
  def experts(self) -> int:
    """Number of experts E."""

  @property
  def used(self) -> float:
    """Experts that a token visits, on average."""

  def __call__(
    self, rows: Float[Array, "M D"], context: Context, mask: Bool[Array, "M"] | None
  ) -> Routing:
    """The decision for each row."""

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward."""
