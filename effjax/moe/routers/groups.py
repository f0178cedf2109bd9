"""Group-limited choice: a token's experts lie in a few groups, which are devices, say.

DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), and DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, Float, Size


@dataclasses.dataclass(frozen=True)
class GroupLimit:
  """A token chooses from the `kept` groups of the largest scores, of groups of E / G neighbours.

  Attributes:
    groups: number of groups G, a divisor of E.
    kept: groups that a token may choose from.
    best: how many of a group's best scores are its score, added: 1 in DeepSeek-V2, 2 in V3.

  Raises:
    ValueError: for numbers that are none of these.

  Example:
    >>> scores = jnp.array([[0.5, 0.1, 0.4, 0.3]])
    >>> GroupLimit(2, 1).within(scores, 1).tolist()
    [[0.5, 0.1..., -inf, -inf]]
    >>> GroupLimit(2, 1, best=2).within(scores, 1).tolist()
    [[-inf, -inf, 0.4..., 0.3...]]
  """

  groups: Size
  kept: Size
  best: Size = 1

  def __post_init__(self):
    for name in ("groups", "kept", "best"):
      value = number(name, getattr(self, name), of="GroupLimit", integer=True, least=1)
      object.__setattr__(self, name, value)
    if self.kept > self.groups:
      raise ValueError(f"GroupLimit: kept={self.kept}; allowed: 1 … groups, {self.groups}")

  def within(
    self, scores: Float[Array, "... E"], k: int, *, add: Callable[..., Array] = jnp.sum
  ) -> Float[Array, "... E"]:
    """`scores`, and −∞ in the groups that are not kept.

    Args:
      scores: of each expert.
      k: experts that will be chosen.
      add: (scores, axis=) → the score of several.

    Raises:
      ValueError: when the groups do not divide the experts, or hold too few.
    """
    experts = scores.shape[-1]
    size, rest = divmod(experts, self.groups)
    if rest or self.best > size or k > self.kept * size:
      given = f"{self}, k={k}"
      allowed = (
        f"groups that divide {experts} experts into groups of `best` or more, kept ones of k"
      )
      raise ValueError(f"GroupLimit: {given}; allowed: {allowed} or more")
    each = scores.reshape(*scores.shape[:-1], self.groups, size)
    totals = add(jax.lax.top_k(each, self.best)[0], axis=-1)
    _, kept = jax.lax.top_k(totals, self.kept)
    keep = jax.nn.one_hot(kept, self.groups, dtype=bool).any(axis=-2)
    return jnp.where(keep[..., None], each, -jnp.inf).reshape(scores.shape)
