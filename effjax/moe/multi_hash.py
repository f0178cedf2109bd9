"""MultiHash: several hashes choose the segments of one layer (Roller et al., arXiv 2106.04426)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.typing import Array, Float
from effjax.layers import Context, Linear, Routing, hidden_units, without_padding
from effjax.layers.axes import lead, linear_axes, under
from effjax.layers.meshes import on_any_mesh
from effjax.layers.spec import ask
from effjax.moe.bank import bank
from effjax.moe.dispatch import mix
from effjax.moe.layer import route, sow_dropped
from effjax.moe.routers.hash import Hash


class MultiHash(nn.Module):
  """y = [B_1k(v) … B_Nk(v)] of v = act([A_1k(x) … A_Nk(x)]), where k is the n-th hash of the token.

  Section 3.2: A_nk maps D → F/N and B_nk maps F → D/N, so that a token sees one whole feed-forward
  layer of width F, put together of N segments, for each of which its hash chooses one of E. With
  one hash it is an `MoE` of E experts, and with one expert an `MLP`. Parameters: "router", the
  router's; "up/kernel" [N·E, D, F/N] and "down/kernel" [N·E, F, D/N], where the maps of segment n
  begin at n·E.

  Attributes:
    router: a `Hash` of N hashes and E experts.
    width: hidden width F, which N divides, as it does D.
    activation: as in `MLP`.

  Raises:
    ValueError: when called, for a width that N does not divide.
  """

  router: Hash
  width: int
  activation: str = "relu"

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context()
  ) -> Float[Array, "B T D"]:
    for name, width in (("width", self.width), ("x: width", x.shape[-1])):
      if width % self.router.hashes:
        raise ValueError(f"MultiHash: {name} {width}; allowed: multiples of {self.router.hashes}")
    rows, routing, mask = route(self.router, x, context)
    hidden = hidden_units(self.activation, self._segments("up", rows, self.width, routing, mask))
    return self._segments("down", hidden, x.shape[-1], routing, mask).reshape(x.shape)

  def _segments(
    self, name: str, rows: Float[Array, "M D"], width: int, routing: Any, mask: Array | None
  ) -> Float[Array, "M F"]:
    """The concatenation of N maps of each row, each into a part of `width`."""
    hashes, count = self.router.hashes, self.router.hashes * self.router.experts
    maps = routing.experts + self.router.experts * jnp.arange(hashes)[None]
    each = Routing(maps.reshape(-1, 1), routing.gates.reshape(-1, 1))
    mask = None if mask is None else jnp.repeat(mask, hashes)
    sow_dropped(self, each, count, mask)
    apply = bank(self, name, count, Linear(width // hashes))
    copies = jnp.repeat(rows, hashes, axis=0)
    return mix(apply, copies, each, count=count, mask=mask).reshape(rows.shape[0], width)

  @property
  def reads(self) -> set[str]:
    """The fields of `Context` that its router reads."""
    return set(self.router.reads)

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: those of an `MLP` of the same width."""
    return 4.0 * width * self.width

  def share(self, path: str) -> float:
    """The share of the parameter at `path` that one token uses: 1 / E of the segments."""
    return 1.0 if path.startswith("router/") else 1 / self.router.experts

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    up, down = linear_axes("up", "embed", "segment"), linear_axes("down", "segments", "part")
    router = under("router", ask(self.router, "axes", "MultiHash: router"))
    return router | lead("choices", up | down)
