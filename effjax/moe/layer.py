"""The mixture-of-experts feed-forward layer (Shazeer et al., arXiv 1701.06538; dropless)."""

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.typing import Array, Float, Int
from effjax.core.weights import linear
from effjax.kernels.grouped_matmul import grouped_linear
from effjax.layers import MLP, Context, hidden_units, weight
from effjax.layers.axes import lead, linear_axes, renamed, under
from effjax.layers.linear import KERNEL_INIT
from effjax.moe.dispatch import mix_experts
from effjax.moe.losses import expert_shares, load_balance_loss, z_loss
from effjax.moe.routing import Routing, top_k_routing

EXPERT_INIT = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
)


class MoE(nn.Module):
  """y = Σ_{e in top k} gate_e(x) · expert_e(x) + shared(x), each expert an `MLP` of its own.

  The router is a matrix in float32; every token reaches all its experts (dropless). Padding, where
  `context.segment_ids` is negative, gives zero and counts in no loss. Each expert has the form of
  `MLP(width, activation, gated, use_bias)`; with one expert and renormalised gates this is that
  MLP.

  Parameters: "router/kernel" [D, E]; "up/kernel", "gate/kernel" [E, D, F] and "down/kernel"
  [E, F, D], with biases [E, F] and [E, D]; "shared", an `MLP` of width F · shared_experts. Any
  kernel may be a `Weight`.

  Sown, one scalar a call: under "losses" each loss times its coefficient, ready to be added to the
  objective ("load_balance", "router_z", absent when the coefficient is 0); under "metrics" the
  same without ("load_balance_raw", "router_z_raw"), and "max_load", the busiest expert's rows over
  the mean expert's (1 is balanced, E / k the worst).

  Attributes:
    experts: number of experts E.
    top_k: experts a token visits, k.
    width: hidden width F of an expert.
    activation, gated, use_bias: as in `MLP`.
    renormalize: whether the gates of a token sum to one; with top_k = 1 that leaves the router's
      training to the losses below.
    load_balance: coefficient of the balance loss.
    normalization: of the balance loss, see `load_balance_loss`.
    z: coefficient of the router's z-loss.
    shared_experts: experts that every token visits besides, ungated (arXiv 2401.06066, section
      3.2).
  """

  experts: int
  top_k: int
  width: int
  activation: str = "gelu"
  gated: bool = False
  use_bias: bool = False
  renormalize: bool = True
  load_balance: float = 0.01
  normalization: str = "deepseek"
  z: float = 0.001
  shared_experts: int = 0

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context()
  ) -> Float[Array, "B T D"]:
    _check(self)
    rows = x.reshape(-1, x.shape[-1])
    mask = context.is_token(x)
    mask = None if mask is None else mask.reshape(-1)
    routing = self._route(rows)
    self._sow(routing, mask)
    y = mix_experts(
      self._experts(x.shape[-1]),
      rows,
      routing.experts,
      routing.gates,
      count=self.experts,
      mask=mask,
    ).reshape(x.shape)
    if not self.shared_experts:
      return y
    width = self.width * self.shared_experts
    shared = MLP(width, self.activation, self.gated, self.use_bias, name="shared")(x, context)
    if mask is not None:
      shared = jnp.where(mask.reshape(*x.shape[:2], 1), shared, jnp.zeros_like(shared))
    return y + shared

  def _route(self, rows: Float[Array, "M D"]) -> Routing:
    router = Router(self.experts, name="router")
    return top_k_routing(router(rows), k=self.top_k, renormalize=self.renormalize)

  def _experts(self, width: int):
    up = ExpertLinear(self.experts, self.width, self.use_bias, name="up")
    down = ExpertLinear(self.experts, width, self.use_bias, name="down")
    gate = None
    if self.gated:
      gate = ExpertLinear(self.experts, self.width, self.use_bias, name="gate")

    def apply(rows, sizes):
      gates = None if gate is None else gate(rows, sizes)
      return down(hidden_units(self.activation, up(rows, sizes), gates), sizes)

    return apply

  def _sow(self, routing: Routing, mask: Array | None) -> None:
    balance = load_balance_loss(
      routing.probs, routing.experts, mask=mask, normalization=self.normalization
    )
    z = z_loss(routing.logits, mask=mask)
    for name, value, coefficient in (
      ("load_balance", balance, self.load_balance),
      ("router_z", z, self.z),
    ):
      if coefficient:
        self.sow("losses", name, coefficient * value)
      self.sow("metrics", f"{name}_raw", value)
    shares = expert_shares(routing.experts, self.experts, mask=mask)
    self.sow("metrics", "max_load", self.experts * shares.max())

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: router, k experts, shared experts."""
    expert = self._expert.flops(width, length, queries)
    return 2.0 * width * self.experts + expert * (self.top_k + self.shared_experts)

  def share(self, path: str) -> float:
    """Of the parameter at `path`, how much one token uses: k / E of what the experts have."""
    return self.top_k / self.experts if path in self._expert.axes else 1.0

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    found = linear_axes("router", "embed", "experts") | lead("experts", self._expert.axes)
    if not self.shared_experts:
      return found
    return found | under("shared", renamed(self._expert.axes, hidden="shared_hidden"))

  @property
  def _expert(self) -> MLP:
    return MLP(self.width, self.activation, self.gated, self.use_bias, parent=None)


class Router(nn.Module):
  """Logits [..., experts] in float32, whatever the type of `x`."""

  experts: int

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    kernel = weight(self, "kernel", KERNEL_INIT, (x.shape[-1], self.experts))
    return linear(x.astype(jnp.float32), kernel)


class ExpertLinear(nn.Module):
  """`grouped_linear` with "kernel" [E, D, features] and, with `use_bias`, "bias" [E, features]."""

  experts: int
  features: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, rows: Float[Array, "M D"], sizes: Int[Array, "E"]) -> Float[Array, "M F"]:
    shape = (self.experts, rows.shape[-1], self.features)
    kernel = weight(self, "kernel", EXPERT_INIT, shape)
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.experts, self.features))
    return grouped_linear(rows, kernel, sizes, bias)


def _check(module: MoE) -> None:
  if not 1 <= module.top_k <= module.experts:
    given = f"top_k={module.top_k}, experts={module.experts}"
    raise ValueError(f"MoE: {given}; allowed: 1 ≤ top_k ≤ experts")
