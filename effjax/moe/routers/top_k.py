"""Softmax top-k gating: each token goes to the experts that suit it best.

Shazeer et al., arXiv 1701.06538, section 2.1, without the noise; with the gates renormalised over
the chosen experts it is that of Mixtral (arXiv 2401.04088, section 2.1).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import spmd
from effjax.core.known import number
from effjax.core.typing import Array, Float, Number, Size
from effjax.layers import Routing
from effjax.moe.routers.groups import GroupLimit
from effjax.moe.routers.scored import TokenChoice


def top_k_routing(
  logits: Float[Array, "... E"],
  *,
  k: Size,
  renormalize: bool = True,
  limit: GroupLimit | None = None,
) -> Routing:
  """Each token to its k most probable experts.

  p = softmax(logits) in float32. The gates are the k largest p, or, with `renormalize`, these
  divided by their sum, which is the softmax over the chosen logits. Experts are chosen by the
  logits, so that they keep their order where p is too small for float32; of equal ones the lower
  expert wins.

  Args:
    logits: the router's output.
    k: experts a token visits, 1 … E.
    renormalize: whether a token's gates sum to one. Note that with k = 1 they are then constant,
      and the router learns from the balance losses alone.
    limit: groups of experts, of which a token may choose from a few; a group counts by the sum of
      its best p (DeepSeek-V2, arXiv 2405.04434, section 2.2.2). None is no limit.

  Raises:
    ValueError: when k is out of range, or more than the groups hold.

  Example:
    >>> routing = top_k_routing(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), k=2)
    >>> routing.experts.tolist(), [round(float(g), 3) for g in routing.gates[0]]
    ([[1, 2]], [0.667, 0.333])
  """
  k = number("k", k, of="top_k_routing", integer=True, least=1, most=logits.shape[-1])
  logits = logits.astype(jnp.float32)
  allowed = logits if limit is None else limit.within(logits, k, add=jax.nn.logsumexp)
  _, experts = jax.lax.top_k(allowed, k)
  probs = jax.nn.softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(logits if renormalize else probs, experts, axis=-1)
  return Routing(experts, jax.nn.softmax(chosen) if renormalize else chosen, probs, logits)


class TopK(TokenChoice):
  """A router: each token to the k experts of the largest logits x W, by `top_k_routing`.

  Parameters, losses and metrics are those of `Scored`.

  Attributes:
    top_k: experts a token visits, k.
    renormalize: whether the gates of a token sum to one: True, before any choice is dropped,
      "after", those of what it keeps (DeepSpeed), or False. With top_k = 1 and True that leaves the
      router's training to the losses.
    scale: factor of the gates, last.
    limit: groups of experts of which a token may choose from a few, or None.

  Raises:
    ValueError: when called, for more choices than experts or than the groups hold, or none.
  """

  top_k: Size
  renormalize: bool | str = True
  scale: Number = 1.0
  limit: GroupLimit | None = None
  _: dataclasses.KW_ONLY
  load_balance: Number = 0.01
  z: Number = 0.001

  def _choose(self, rows, logits, mask, key) -> Routing:
    return self._best(logits)

  def _best(self, logits: Float[Array, "M E"]) -> Routing:
    choose = functools.partial(
      top_k_routing, k=self.top_k, renormalize=bool(self.renormalize), limit=self.limit
    )
    return spmd.map_rows(lambda logits, _: choose(logits), logits, ())

  def _limited(self, sent: Routing, mask: Array | None, *, training: bool) -> Routing:
    routing = super()._limited(sent, mask, training=training)
    scale = number("scale", self.scale, of=type(self).__name__)
    return dataclasses.replace(routing, gates=scale * routing.gates)

  @property
  def _renormalizes_after(self) -> bool:
    return self.renormalize == "after"

  def _check(self) -> None:
    super()._check()
    name = type(self).__name__
    if not 1 <= number("top_k", self.top_k, of=name, integer=True) <= self.experts:
      given = f"top_k={self.top_k}, experts={self.experts}"
      raise ValueError(f"{name}: {given}; allowed: 1 ≤ top_k ≤ experts")
    check_renormalize(name, self.renormalize)

  @property
  def used(self) -> float:
    """Experts that a token visits."""
    return float(self.top_k)


def check_renormalize(name: str, value: bool | str) -> None:
  """Raises ValueError unless it says when gates are renormalised."""
  if not isinstance(value, bool | np.bool_) and value != "after":
    raise ValueError(f"{name}: renormalize={value!r}; allowed: True, False or 'after'")
