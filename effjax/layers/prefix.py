"""Trained keys and values that stand before the first token (arXiv 2101.00190, section 4)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.known import check_ids, is_id, number
from effjax.core.numerics import nan_unless, zero_unless
from effjax.core.typing import Array, Float, Int

INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class TrainedPrefix:
  """P keys and values a layer, before the tokens of each row and of each packed document.

  They are as those of a text of P tokens in a cache: a key lies at position 0 … P − 1 and is
  neither normalised nor rotated again, the token at position t stands at P + t, and masks and
  scores see that distance, so that a window slides past the prefix.

  With modules a row's prefix is P_general + Σ_a P_a over the modules that its attributes choose
  (Modular Retrieval, arXiv 2303.13419, section 3.2). A module that a row does not choose has no
  influence on it.

  Attributes:
    length: P.
    modules: A, modules beside the general prefix, chosen by `Context.attributes`: ids 0 … A − 1,
      negative for none; one that comes twice counts once.
    mean: whether the chosen modules are averaged, and not added.
    shift: whether positions that are rotated or embedded begin at P, as after a text of P tokens.

  Raises:
    ValueError: for a length below 1 or modules below 0.
  """

  length: int
  modules: int = 0
  mean: bool = False
  shift: bool = True

  def __post_init__(self):
    for name, least in (("length", 1), ("modules", 0)):
      value = number(name, getattr(self, name), of="TrainedPrefix", integer=True, least=least)
      object.__setattr__(self, name, value)

  def places(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where tokens at `positions` stand."""
    return positions + self.length if self.shift else positions

  def composed(
    self,
    general: Float[Array, "P K H"],
    modules: Float[Array, "A P K H"] | None,
    attributes: Int[Array, "B C"] | None,
  ) -> Float[Array, "#B P K H"]:
    """Each row's keys or values; NaN for a traced id from A on.

    Raises:
      ValueError: for an id, where it is known, from A on.

    Example:
      >>> general, modules = jnp.ones((1, 1, 1)), jnp.array([10.0, 20.0]).reshape(2, 1, 1, 1)
      >>> rows = jnp.array([[0, 1], [-1, 1], [-1, -1]])
      >>> TrainedPrefix(1, 2).composed(general, modules, rows).ravel().tolist()
      [31.0, 21.0, 1.0]
    """
    if modules is None or attributes is None:
      return general[None]
    check_ids("attributes", attributes, self.modules, attributes >= 0)
    chosen = is_id(attributes, self.modules) & _first(attributes)
    rows = jnp.take(modules, jnp.where(chosen, attributes, 0), axis=0, mode="clip")
    total = zero_unless(chosen, rows).sum(1)
    if self.mean:
      total = total / jnp.maximum(chosen.sum(1), 1)[:, None, None, None]
    return nan_unless((attributes < self.modules).all(1), general[None] + total)


def _first(ids: Int[Array, "B C"]) -> Array:
  """Whether an id stands in its row for the first time."""
  earlier = jnp.tri(ids.shape[1], k=-1, dtype=bool)[None]
  return ~((ids[:, :, None] == ids[:, None, :]) & earlier).any(-1)
