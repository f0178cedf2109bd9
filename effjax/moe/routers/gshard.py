"""GShard: the second expert at random, where there is room (Lepikhin et al., arXiv 2006.16668)."""

import dataclasses

import jax
import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.known import number
from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Bool, Dim, Float, Key, Number, Scalar
from effjax.layers import Routing
from effjax.moe.routers.capacity import Capacity, drop_overflow
from effjax.moe.routers.scored import TokenChoice
from effjax.moe.routers.top_k import check_renormalize, top_k_routing


def gshard_routing(
  logits: Float[Array, "... M E"],
  key: Key | None,
  *,
  capacity: Dim,
  threshold: Scalar = 0.5,
  renormalize: bool | str = True,
  mask: Bool[Array, "..."] | None = None,
) -> Routing:
  """Each token to its best expert, and to its second with probability min(1, g₂ / threshold).

  g are the two probabilities over their sum. All first choices take their places before any second
  one (algorithm 1); what finds its expert full, or is not sent, is none.

  Args:
    logits: the router's output, of two experts or more; leading axes are groups.
    key: of the random choice; None sends every second one.
    capacity: rows C that an expert takes at most.
    threshold: above 0; 0.5 in the paper, 0.2 in Mesh TensorFlow.
    renormalize: whether gates are g: True, from the two best; "after", over the sum of what the
      token keeps; False leaves them the probabilities over all experts.
    mask: False for padding, which takes no room.

  Raises:
    ValueError: for a capacity below 1, another `renormalize`, a threshold of 0 or less, and for one
      expert.

  Example:
    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]]))
    >>> routing = gshard_routing(logits, None, capacity=1)
    >>> routing.experts.tolist(), routing.gates.round(3).tolist()
    ([[0, 1], [3, 3]], [[0.625, 0.375...], [0.0, 0.0]])
  """
  check_renormalize("gshard_routing", renormalize)
  wanted = top_k_routing(logits, k=2, renormalize=bool(renormalize))
  return drop_overflow(
    second_at_random(wanted, key, threshold=threshold),
    capacity,
    count=logits.shape[-1],
    mask=mask,
    renormalize=renormalize == "after",
  )


def second_at_random(routing: Routing, key: Key | None, *, threshold: Scalar = 0.5) -> Routing:
  """The decision without some second choices, each kept with probability min(1, g₂ / threshold).

  Args:
    routing: of two choices and logits.
    key: of the draw; None keeps all.
    threshold: as in `gshard_routing`.
  """
  threshold = number("threshold", threshold, of="gshard_routing", above=0)
  assert routing.logits is not None  # `top_k_routing` gives them
  if key is None:
    return routing
  best = jnp.take_along_axis(routing.logits, routing.experts, axis=-1)
  second = jax.nn.softmax(best)[..., 1]
  sent = jax.random.uniform(key, second.shape) * threshold < second
  sent = jnp.stack([jnp.ones_like(sent), sent], axis=-1)
  none = routing.logits.shape[-1]
  experts = jnp.where(sent, routing.experts, none)
  return dataclasses.replace(routing, experts=experts, gates=zero_unless(sent, routing.gates))


class GShard(TokenChoice):
  """A router: each token to two experts at most, by `gshard_routing`, at random in training.

  Parameters, losses and metrics are those of `Scored`; "dropped_share" is of what was sent.

  Attributes:
    threshold, renormalize: as in `gshard_routing`.
  """

  threshold: Number = 0.5
  renormalize: bool | str = True
  _: dataclasses.KW_ONLY
  capacity: Capacity | None = Capacity(2.0, evaluation=2.0, per_choice=False)
  load_balance: Number = 0.01
  normalization: str = "gshard"

  def _choose(self, rows, logits, mask, key) -> Routing:
    choose = lambda logits, _: top_k_routing(logits, k=2, renormalize=bool(self.renormalize))
    return spmd.map_rows(choose, logits, ())

  def _dispatched(self, wanted: Routing, key: Key | None) -> Routing:
    return second_at_random(wanted, key, threshold=self.threshold)

  @property
  def _renormalizes_after(self) -> bool:
    return self.renormalize == "after"

  def _check(self) -> None:
    super()._check()
    number("experts", self.experts, of="GShard", integer=True, least=2)
    check_renormalize("GShard", self.renormalize)

  @property
  def used(self) -> float:
    """Experts that a token visits, at most."""
    return 2.0
