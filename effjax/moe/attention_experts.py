"""Attention heads as experts: a mixture over query and output projections.

Mixture of Attention heads (MoA), Zhang et al., arXiv 2210.05144, section 3.2: all experts share one
key head and one value head, an expert is one query head and one output head, and the gate weighs
what comes out of the latter. JetMoE (Shen et al., arXiv 2404.07413, section 2.2) has the same with
several heads of each.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.numerics import wide
from effjax.core.typing import Array, DTypeLike, Float, PyTree
from effjax.core.weights import along
from effjax.layers import Context, Linear, Router, Routing, weight, without_padding
from effjax.layers.axes import lead, under
from effjax.layers.meshes import on_any_mesh
from effjax.layers.peeking import is_causal
from effjax.layers.spec import ask
from effjax.moe.bank import bank
from effjax.moe.dispatch import mix
from effjax.moe.layer import route, sow_dropped


class MoA(nn.Module):
  """y = Σ_e gate_e(x) · Concat_n softmax(scale · q_en k_nᵀ) v_n · W_out,e, over the chosen e.

  Queries and the output are those of the experts that the router chooses for each token; keys and
  values are the same for all. So a token's attention is `attention` with k times its query heads,
  whose cache, masks, segments and positions are its own. With one expert and renormalised gates it
  is `attention`. It has derivatives in reverse mode.

  Parameters: "router", the router's; "query" [E, D, N·H] and "out" [E, N·H, D], each expert's,
  drawn by itself; "out_bias" [D], one for all; "shared", the rest of `attention`: "key", "value".

  Attributes:
    router: a `layers.Router` that chooses as many experts for each token, such as `TopK(8, 2)`.
    attention: an `Attention` of the N heads of one expert, which share its K key-value heads: one
      of both in MoA, as many of both in JetMoE. A width H that its `head_width` leaves open is D/N.

  Raises:
    ValueError: when called, for attention with sinks, one of another kind, or a router whose
      experts choose the tokens.
  """

  router: Router
  attention: nn.Module

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context(), cache: PyTree = None
  ) -> tuple[Float[Array, "B T D"], PyTree]:
    rows, routing, mask = route(self.router, x, context)
    if not isinstance(routing, Routing):
      given = f"MoA: router={type(self.router).__name__}, whose experts choose tokens"
      raise ValueError(f"{given}; allowed: routers that choose experts for each token")
    choices, heads = routing.experts.shape[-1], self._heads
    kv_heads, width = self._kv_shape(x.shape[-1])
    groups = (kv_heads, heads // kv_heads, width)
    copies = jnp.broadcast_to(rows[:, None], (rows.shape[0], choices, rows.shape[1]))
    whole = dataclasses.replace(routing, gates=jnp.ones_like(routing.gates))
    query = self._each("query", copies, heads * width, self.attention.use_bias, whole, mask)
    # Heads that share keys are neighbours: [M, k, K, N/K, H] → [M, K, k, N/K, H].
    query = query.reshape(-1, choices, *groups).swapaxes(1, 2)
    query = query.reshape(*x.shape[:2], choices * heads, width)
    attention = self._of_heads(choices * heads, x.shape[-1], name="shared")
    seen, cache = attention(x, context, cache, query)
    seen = seen.reshape(-1, kv_heads, choices, *groups[1:]).swapaxes(1, 2)
    seen = seen.reshape(-1, choices, heads * width)
    y = self._each("out", seen, x.shape[-1], False, routing, mask)
    y = y.sum(1, dtype=wide(x.dtype)).astype(x.dtype).reshape(x.shape)
    if self.attention.out_bias:
      bias = weight(self, "out_bias", nn.initializers.zeros, y.shape[-1:])
      y = y + along(bias, y).astype(y.dtype)
    return y, cache

  def _each(self, name, rows, features, use_bias, routing, mask) -> Float[Array, "M k F"]:
    """Each choice's rows [M, k, _] by its expert's linear map, times its gate; zero for none."""
    flat = lambda a: a.reshape(-1, 1)
    each = dataclasses.replace(routing, experts=flat(routing.experts), gates=flat(routing.gates))
    mask = None if mask is None else jnp.repeat(mask, rows.shape[1])
    count, rows = self.router.experts, rows.reshape(-1, rows.shape[-1])
    sow_dropped(self, each, count, mask)
    y = mix(bank(self, name, count, Linear(features, use_bias)), rows, each, count=count, mask=mask)
    return y.reshape(*routing.experts.shape, features)

  @property
  def _heads(self) -> int:
    """Query heads N of an expert."""
    if getattr(self.attention, "sinks", False):
      raise ValueError("MoA: attention with sinks=True; allowed: False")
    return ask(self.attention, "heads", "MoA: attention")

  def _kv_shape(self, width: int) -> tuple[int, int]:
    return ask(self.attention, "kv_shape", "MoA: attention")(width)

  def _of_heads(self, heads: int, width: int, **options) -> nn.Module:
    """The attention of so many query heads over the same keys and values."""
    kv_heads, head_width = self._kv_shape(width)
    return self.attention.copy(heads=heads, kv_heads=kv_heads, head_width=head_width, **options)

  @property
  def causal(self) -> bool:
    """Whether no token sees what comes after it."""
    return is_causal(self.attention)

  @property
  def rewinds(self) -> bool:
    """Whether its cache forgets the newest tokens by going on from an earlier position."""
    return self.attention.rewinds

  def init_cache(
    self, width: int, batch: int, length: int, dtype: DTypeLike = jnp.float32
  ) -> PyTree:
    """The cache of `attention`: that of one expert's key-value heads."""
    return self.attention.init_cache(width, batch, length, dtype)

  @property
  def reads(self) -> set[str]:
    """The fields of `Context` that its parts read."""
    return {name for part in (self.router, self.attention) for name in getattr(part, "reads", ())}

  @property
  def attributes(self) -> int:
    """From how many modules the attributes of a row choose."""
    return getattr(self.attention, "attributes", 0)

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: the router, and attention of k times the heads."""
    sizes = (width, length, queries)
    one, two = (self._of_heads(i * self._heads, width, parent=None).flops(*sizes) for i in (1, 2))
    return self.router.flops(*sizes) + one + (self.router.used - 1) * (two - one)

  def share(self, path: str) -> float:
    """The share of the parameter at `path` that one token uses: k / E of queries and outputs."""
    routed = path.startswith(("query/", "out/"))
    return self.router.used / self.router.experts if routed else 1.0

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    stated = lambda name: ask(getattr(self, name), "axes", f"MoA: {name}")
    whole = stated("attention")
    routed = {path: roles for path, roles in whole.items() if path.startswith(("query/", "out/"))}
    rest = {path: roles for path, roles in whole.items() if path not in routed}
    bias = {"out_bias": routed.pop("out/bias")} if "out/bias" in routed else {}
    return (
      under("router", stated("router")) | lead("experts", routed) | bias | under("shared", rest)
    )

  @property
  def units(self) -> dict[str, int]:
    """How many heads the axes hold, see `effjax.layers.axes`."""
    return self.attention.units
