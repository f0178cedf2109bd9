"""Which experts each token visits: what routers give, and what layers with experts ask of one."""

from typing import Protocol, runtime_checkable

from flax import struct

from effjax.core.typing import Array, Bool, Dim, Float, Int
from effjax.layers.context import Context


@struct.dataclass
class Routing:
  """A decision for each token; leading axes are those of the tokens.

  Attributes:
    experts: [..., k], the chosen experts, best first; E or more means none.
    gates: [..., k], float32, what each chosen expert's output is multiplied by; 0 for none.
    probs: [..., E], float32, shares of each token that sum to one, the softmax over all experts
      where there are scores; None where a router has none.
    logits: [..., E], float32, the scores, or None.
    capacity: a promise of whoever made it that no expert has more rows than this; None promises
      nothing. What would have been too much is none.
  """

  experts: Int[Array, "... k"]
  gates: Float[Array, "... k"]
  probs: Float[Array, "... E"] | None = None
  logits: Float[Array, "... E"] | None = None
  capacity: Dim | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class ExpertRouting:
  """A decision for each expert, of which rows it takes.

  Attributes:
    rows: [..., E, C], the rows that each expert takes, all different, best first; M or more, the
      number of rows, means none.
    gates: [..., E, C], float32, what its output for them is multiplied by; 0 for none.
    probs: [..., M, E], float32, as in `Routing`.
    logits: [..., M, E], float32, as in `Routing`.
  """

  rows: Int[Array, "... E C"]
  gates: Float[Array, "... E C"]
  probs: Float[Array, "... M E"] | None = None
  logits: Float[Array, "... M E"] | None = None


@runtime_checkable
class Router(Protocol):
  """A Flax module that says which experts each row visits, and sows its own losses.

  Rows are tokens [B, T] laid end to end, in the order of `context.tokens.reshape(-1)`. Rows where
  `mask` is False are padding: what they hold and the cotangents that come back to them have no
  influence, NaN included, they count in no loss, and what the router says of them is not read.

  It is in training where it has the random stream "router", in evaluation elsewhere. One by which a
  token's experts depend on later tokens says `peeks = True`, and one that must not stand in a
  causal model `encoder_only = True`, see `layers.peeking`.
  """

  @property
  def experts(self) -> int:
    """Number of experts E."""

  @property
  def used(self) -> float:
    """Experts that a token visits, on average."""

  def __call__(
    self, rows: Float[Array, "M D"], context: Context, mask: Bool[Array, "M"] | None
  ) -> Routing | ExpertRouting:
    """The decision for each row, or for each expert."""

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward."""
