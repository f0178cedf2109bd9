"""Expert choice: each expert takes the tokens that suit it best (Zhou et al., arXiv 2202.09368)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.known import is_id
from effjax.core.numerics import weighted_mean, zero_unless
from effjax.core.typing import Array, Bool, Dim, Float
from effjax.layers import ExpertRouting
from effjax.moe.routers.capacity import Capacity, checked
from effjax.moe.routers.health import sow_health
from effjax.moe.routers.scored import Scored


@spmd.on_any_mesh
def expert_choice_routing(
  logits: Float[Array, "... M E"],
  *,
  capacity: Dim,
  mask: Bool[Array, "..."] | None = None,
) -> ExpertRouting:
  """Each expert takes the C tokens of the largest p, which is the softmax over the experts.

  The gates are these p (section 3.2). Experts choose by log p, which keeps its order where p is too
  small for float32; of equal ones the earlier token wins. A token may be taken by any number of
  experts, by none too, and which take it depends on later tokens: it is for encoders.

  Args:
    logits: the router's output; leading axes are groups.
    capacity: tokens C that each expert takes, from 1; with fewer tokens it takes all.
    mask: False for padding, which no expert takes.

  Raises:
    ValueError: for a capacity below 1, and a mask that is not one of each token.

  Example:
    >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]))
    >>> routing = expert_choice_routing(logits, capacity=2)
    >>> routing.rows.tolist(), routing.gates.round(3).tolist()
    ([[0, 1], [2, 1]], [[0.9..., 0.8...], [0.7..., 0.2...]])
  """
  capacity = checked("expert_choice_routing", capacity)
  if mask is not None and mask.shape != logits.shape[:-1]:
    given = f"expert_choice_routing: mask {mask.shape}"
    raise ValueError(f"{given}; allowed: {logits.shape[:-1]}, one of each token")
  logits = zero_unless(mask, logits.astype(jnp.float32))
  tokens = logits.shape[-2]
  shares = jax.nn.log_softmax(logits, axis=-1)
  there = jnp.ones(logits.shape[:-1], bool) if mask is None else mask
  wish = jnp.where(there[..., None], shares, -jnp.inf).swapaxes(-1, -2)
  _, rows = jax.lax.top_k(wish, jax.core.min_dim(capacity, tokens))
  taken = jnp.take_along_axis(there[..., None, :], rows, axis=-1)
  gates = jnp.take_along_axis(jnp.exp(shares).swapaxes(-1, -2), rows, axis=-1)
  return ExpertRouting(
    jnp.where(taken, rows, tokens), zero_unless(taken, gates), jnp.exp(shares), logits
  )


class ExpertChoice(Scored):
  """A router of which each expert chooses its tokens, by `expert_choice_routing`.

  The load is even by itself. Parameters, losses and metrics are those of `Scored`, where
  "dropped_share" is the share of tokens that no expert takes. It is refused in causal models, see
  `layers.peeking`.

  Attributes:
    capacity: what an expert takes; its factor is how many experts a token has on average, its
      evaluation the same where it is None.
  """

  peeks = encoder_only = True

  _: dataclasses.KW_ONLY
  capacity: Capacity = Capacity(2.0)

  def _decide(self, rows, logits, mask, key) -> ExpertRouting:
    limit = self.capacity.of(
      rows.shape[0],
      experts=self.experts,
      training=key is not None or self.capacity.evaluation is None,
    )
    routing: Any = expert_choice_routing(logits, capacity=limit, mask=mask)
    self._sow_scores(routing.probs, logits, mask)
    taken = is_id(routing.rows, rows.shape[0])
    sizes = taken.sum(axis=-1, dtype=jnp.float32)
    times = jnp.zeros(rows.shape[0]).at[routing.rows].add(1.0, mode="drop")
    total = jnp.maximum(sizes.sum(), 1)
    sow_health(self, sizes / total, weighted_mean((times == 0).astype(jnp.float32), mask))
    return routing

  @property
  def used(self) -> float:
    """Experts that a token visits, on average."""
    return float(min(self.capacity.factor, self.experts))
