"""Switch Transformers: one expert a token, with limited room (Fedus et al., arXiv 2101.03961)."""

import dataclasses

import jax

from effjax.core import spmd
from effjax.core.known import number
from effjax.core.typing import Array, Bool, Dim, Float, Key, Number
from effjax.layers import Routing
from effjax.moe.routers.capacity import Capacity, drop_overflow
from effjax.moe.routers.scored import TokenChoice
from effjax.moe.routers.top_k import top_k_routing


def switch_routing(
  logits: Float[Array, "... M E"],
  *,
  capacity: Dim,
  mask: Bool[Array, "..."] | None = None,
) -> Routing:
  """Each token to its most probable expert, in the order of tokens, while that has room.

  The gate is p = softmax(logits) of the expert (section 2.1), so that the router learns from what
  the layer gives. A token that finds its expert full goes to none, and only its residual is left.

  Args:
    logits: the router's output; leading axes are groups, each with its own capacity.
    capacity: rows C that an expert takes at most, such as `Capacity(1.25).of(M, experts=E)`.
    mask: False for padding, which takes no room.

  Raises:
    ValueError: for a capacity below 1.

  Example:
    >>> logits = jax.numpy.log(jax.numpy.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]))
    >>> routing = switch_routing(logits, capacity=1)
    >>> routing.experts[:, 0].tolist(), routing.gates[:, 0].round(3).tolist()
    ([0, 2, 1], [0.9..., 0.0, 0.7...])
  """
  routing = top_k_routing(logits, k=1, renormalize=False)
  return drop_overflow(routing, capacity, count=logits.shape[-1], mask=mask)


class Switch(TokenChoice):
  """A router: each token to one expert, by `switch_routing`.

  In training what the router sees is x · u with u ~ U(1 − ε, 1 + ε) for each of its numbers; the
  expert sees x. Parameters, losses and metrics are those of `Scored`.

  Attributes:
    jitter: ε, from 0 to below 1.
    capacity: Switch-C trains with a factor of 1.0, Switch-XXL evaluates with 4.
  """

  _: dataclasses.KW_ONLY
  jitter: Number = 1e-2
  capacity: Capacity | None = Capacity(1.25, evaluation=2.0)
  load_balance: Number = 0.01

  def _seen(self, rows: Float[Array, "M D"], key: Key | None) -> Float[Array, "M D"]:
    jitter = number("jitter", self.jitter, of="Switch", least=0, below=1)
    if key is None or (not isinstance(jitter, jax.Array) and jitter == 0):
      return rows
    return rows * jax.random.uniform(key, rows.shape, rows.dtype, 1 - jitter, 1 + jitter)

  def _choose(self, rows, logits, mask, key) -> Routing:
    choose = lambda logits, _: top_k_routing(logits, k=1, renormalize=False)
    return spmd.map_rows(choose, logits, ())
