"""Softmax top-k gating: each token goes to the experts that suit it best.

Shazeer et al., arXiv 1701.06538, section 2.1, without the noise; with the gates renormalised over
the chosen experts it is that of Mixtral (arXiv 2401.04088, section 2.1).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.known import number
from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Bool, Float, Number, Size
from effjax.core.weights import linear
from effjax.layers import Context, Routing, weight
from effjax.layers.linear import KERNEL_INIT
from effjax.moe.losses import expert_shares, load_balance_loss, z_loss


def top_k_routing(
  logits: Float[Array, "... E"], *, k: Size, renormalize: bool = True, scale: Number = 1.0
) -> Routing:
  """Each token to its k most probable experts.

  p = softmax(logits) in float32; the gates are the k largest p, divided by their sum when
  `renormalize`, times `scale`. Of equal probabilities the lower expert wins.

  Args:
    logits: the router's output.
    k: experts a token visits, 1 … E.
    renormalize: whether a token's gates sum to one. Note that with k = 1 they are then constant,
      and the router learns from the balance losses alone.
    scale: what the gates are multiplied by.

  Raises:
    ValueError: when k is out of range.

  Example:
    >>> routing = top_k_routing(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), k=2)
    >>> routing.experts.tolist(), [round(float(g), 3) for g in routing.gates[0]]
    ([[1, 2]], [0.667, 0.333])
  """
  k = number("k", k, of="top_k_routing", integer=True, least=1, most=logits.shape[-1])
  logits = logits.astype(jnp.float32)
  probs = jax.nn.softmax(logits, axis=-1)
  gates, experts = jax.lax.top_k(probs, k)
  if renormalize:
    gates = gates / gates.sum(axis=-1, keepdims=True)
  return Routing(experts, gates * number("scale", scale, of="top_k_routing"), probs, logits)


class TopK(nn.Module):
  """A router: each token to the k experts of the largest logits x W, by `top_k_routing`.

  The product is in float32, whatever the type of `x`. Parameter: "kernel" [D, E], an array or a
  `Weight`.

  Sown, one scalar a call: under "losses" each loss times its coefficient, ready to be added to the
  objective ("load_balance", "router_z", absent when the coefficient is 0); under "metrics" the
  same without ("load_balance_raw", "router_z_raw"), and "max_load", the busiest expert's rows over
  the mean expert's (1 is balanced, E / k the worst).

  Attributes:
    experts: number of experts E.
    top_k: experts a token visits, k.
    renormalize: whether the gates of a token sum to one; with top_k = 1 that leaves the router's
      training to the losses below.
    load_balance: coefficient of the balance loss.
    normalization: of the balance loss, see `load_balance_loss`.
    z: coefficient of the router's z-loss.
    scale: what the gates are multiplied by, renormalised or not.

  Raises:
    ValueError: when called, for more choices than experts, or none.
  """

  experts: Size
  top_k: Size
  renormalize: bool = True
  load_balance: Number = 0.01
  normalization: str = "deepseek"
  z: Number = 0.001
  scale: Number = 1.0

  @nn.compact
  def __call__(
    self,
    rows: Float[Array, "M D"],
    context: Context = Context(),
    mask: Bool[Array, "M"] | None = None,
  ) -> Routing:
    experts = number("experts", self.experts, of="TopK", integer=True, least=1)
    if not 1 <= number("top_k", self.top_k, of="TopK", integer=True) <= experts:
      given = f"top_k={self.top_k}, experts={self.experts}"
      raise ValueError(f"TopK: {given}; allowed: 1 ≤ top_k ≤ experts")
    kernel = weight(self, "kernel", KERNEL_INIT, (rows.shape[-1], self.experts))
    logits = linear(zero_unless(mask, rows).astype(jnp.float32), kernel)
    choose = functools.partial(
      top_k_routing, k=self.top_k, renormalize=self.renormalize, scale=self.scale
    )
    routing = spmd.map_rows(lambda logits, _: choose(logits), zero_unless(mask, logits), ())
    self._sow(routing, mask)
    return routing

  @property
  def used(self) -> float:
    """Experts that a token visits."""
    return float(self.top_k)

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward."""
    return 2.0 * width * self.experts

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return {"kernel": ("embed", "experts")}

  def _sow(self, routing: Routing, mask: Array | None) -> None:
    probs, logits = routing.probs, routing.logits
    assert probs is not None and logits is not None  # `top_k_routing` gives both
    balance = load_balance_loss(probs, routing.experts, mask=mask, normalization=self.normalization)
    z = z_loss(logits, mask=mask)
    for name, value, coefficient in (
      ("load_balance", balance, self.load_balance),
      ("router_z", z, self.z),
    ):
      if coefficient:
        self.sow("losses", name, coefficient * value)
      self.sow("metrics", f"{name}_raw", value)
    shares = expert_shares(routing.experts, self.experts, mask=mask)
    self.sow("metrics", "max_load", self.experts * shares.max())
