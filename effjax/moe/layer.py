"""The mixture-of-experts feed-forward layer (Shazeer et al., arXiv 1701.06538)."""

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.typing import Array, Bool, Float, Size
from effjax.layers import Context, ExpertRouting, Router, Routing, taps, without_padding
from effjax.layers.axes import lead, renamed, under
from effjax.layers.meshes import on_any_mesh
from effjax.layers.spec import ask, share
from effjax.moe.bank import bank
from effjax.moe.dispatch import dropped_share, mix


class MoE(nn.Module):
  """y = Σ_e gate_e(x) · expert_e(x) + shared(x), over the experts e that the router gives x to.

  An expert is any feed-forward module that treats each token by itself and fetches its parameters
  by `layers.weight`. It is called once, on the rows of all experts, with parameters that are
  another array for each row (`Grouped`). Every token reaches all experts that the router gives it
  to; where the router promises a capacity, their rows are slots (`dispatch`). Padding, where
  `context.segment_ids` is negative, gives zero, whatever was in it, and counts in no loss. With one
  expert and renormalised gates this is that expert. It has derivatives in reverse mode.

  Parameters: "router", the router's; "experts", the expert's, each with a leading axis E, drawn for
  each expert by itself; "shared". What an expert sows or draws at random, it does once for all
  rows. Where experts are split over devices with room for some tokens only, "exchange_dropped" is
  sown under "metrics", the share of choices that found none.

  Attributes:
    router: a `layers.Router`, such as `TopK(experts=8, top_k=2)`.
    expert: a feed-forward module; it is given no facts of the batch.
    shared: a feed-forward module that every token visits besides, such as an `MLP` of twice the
      width for two shared experts (arXiv 2401.06066, section 3.2), or that `Gated`; or None.

  Raises:
    ValueError: when called, for an expert that fetches parameters in another way.
  """

  router: Router
  expert: nn.Module
  shared: nn.Module | None = None

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context()
  ) -> Float[Array, "B T D"]:
    rows, routing, mask = route(self.router, x, context)
    count = self.router.experts
    sow_dropped(self, routing, count, mask)
    experts = bank(self, "experts", count, self.expert, Context())
    y = mix(experts, rows, routing, count=count, mask=mask).reshape(x.shape)
    return y if self.shared is None else y + self.shared(x, context)

  @property
  def reads(self) -> set[str]:
    """The fields of `Context` that its parts read."""
    return {name for part in (self.router, self.shared) for name in getattr(part, "reads", ())}

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: router, the experts it uses, the shared one."""
    sizes = (width, length, queries)
    shared = 0.0 if self.shared is None else self.shared.flops(*sizes)
    return self.router.flops(*sizes) + self.router.used * self.expert.flops(*sizes) + shared

  def share(self, path: str) -> float:
    """The share of the parameter at `path` that one token uses: k / E of the experts."""
    if path.startswith("experts/"):
      return self.router.used / self.router.experts
    return share({} if self.shared is None else {"shared": self.shared}, path)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    stated = lambda name: under(name, ask(getattr(self, name), "axes", f"MoE: {name}"))
    experts = under("experts", ask(self.expert, "axes", "MoE: expert"))
    found = stated("router") | lead("experts", experts)
    return (
      found if self.shared is None else found | renamed(stated("shared"), hidden="shared_hidden")
    )


def route(
  router: Router, x: Float[Array, "B T D"], context: Context
) -> tuple[Float[Array, "M D"], Routing | ExpertRouting, Bool[Array, "M"] | None]:
  """The tokens of `x` as rows, what the router says of them, and which are none (False) if any."""
  mask = context.is_token(x)
  rows, mask = x.reshape(-1, x.shape[-1]), None if mask is None else mask.reshape(-1)
  with taps.tokens(None if mask is None else mask.astype(jnp.int32) - 1):
    return rows, router(rows, context, mask), mask


def sow_dropped(
  module: nn.Module,
  routing: Routing | ExpertRouting,
  count: Size,
  mask: Bool[Array, "M"] | None,
) -> None:
  """Sows `dispatch.dropped_share` as the metric "exchange_dropped", where there is one."""
  share = dropped_share(routing, count=count, mask=mask)
  if share is not None:
    module.sow("metrics", "exchange_dropped", share)
