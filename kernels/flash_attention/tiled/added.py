"""What a score adds to tiles, and the gradients of its arrays and of a soft cap that is data.

Each array is read, and its gradient added to, where a tile lies in it, so that a tile costs the
same for any T and S. With the score's term t on a tile, dS the gradient of the scores, c the cap:
  dx = Σ dS ∂t/∂x for its arrays;  dc = Σ dS (tanh u − u (1 − tanh² u)), u = scale·QKᵀ/c.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core.typing import Array
from effjax.kernels.flash_attention.tile_map.terms import Terms, diagonals, entries
from effjax.kernels.flash_attention.tiled import layout, steps
from effjax.kernels.flash_attention.tiled.layout import Plan
from effjax.kernels.flash_attention.tiled.visits import GroupedSight

Pull = Callable[[Array], Any] | None


class TermTiles:
  """Terms addressed by tiles; with None there is nothing to add, and no array to train."""

  def __init__(self, plan: Plan, sight: GroupedSight, terms: Terms | None, dtype: Any):
    self.plan, self.sight, self.dtype, self.given = plan, sight, dtype, terms
    self.scored = terms is not None and terms.structure is not None
    self.cap = plan.softcap if terms is None or terms.softcap is None else terms.softcap
    self.trained = [] if terms is None else self.pad(terms.trained)
    if terms is not None:
      terms = self._padded(terms)
      parts = {"queries": terms.queries, "keys": terms.keys, "line": terms.line}
      self.kinds = [kind for kind, x in parts.items() for _ in jax.tree.leaves(x)]
      self.leaves, self.tree = jax.tree.flatten(tuple(parts.values()))

  def pad(self, trained: list[Array]) -> list[Array]:
    """Arrays like the `trained` of the terms, up to whole tiles."""
    return self._padded(self.given.with_trained(trained)).trained

  def unpad(self, totals: list[Array]) -> list[Array]:
    """Gradients of what `pad` gave, as those of what it took."""
    return [] if self.given is None else jax.vjp(self.pad, self.given.trained)[1](totals)[0]

  def value(self, *place: Array) -> Array | None:
    """What is added to the tile at `place`, a group, a query tile and a key tile."""
    return self._value(self._read(self.trained, place), place) if self.scored else None

  def pulled(self, *place: Array) -> tuple[Array | None, Pull]:
    """`value`, and a function from the gradient of the scores to those of the arrays' parts."""
    if not self.scored:
      return None, None
    return jax.vjp(lambda parts: self._value(parts, place), self._read(self.trained, place))

  def moved(self, moves: list[Array], *place: Array) -> tuple[Array | None, Array | None]:
    """`value`, and its tangent where the padded `trained` move so."""
    if not self.scored:
      return None, None
    parts = [(self._read(x, place),) for x in (self.trained, moves)]
    return jax.jvp(lambda parts: self._value(parts, place), *parts)

  def slope(self, products: Array, capped: Array) -> Array:
    """Derivative of the capped scores by the cap."""
    part = capped / self.cap
    return part - products / self.cap * (1 - jnp.square(part))

  def collect(
    self, totals: list[Array], pull: Pull, d_scores: Array, capped: Any, *place: Array
  ) -> list[Array]:
    """The gradients of the padded `trained`, with what the scores of a tile give added.

    Args:
      capped: products of the tile and what the cap made of them.
    """
    found = list(totals)
    if pull is not None:
      for n, (kind, part) in enumerate(zip(self._trained_kinds, pull(d_scores)[0], strict=True)):
        start, sizes = self._part(kind, found[n].shape, *place)
        sums = lax.dynamic_slice(found[n], start, sizes) + part
        found[n] = lax.dynamic_update_slice(found[n], sums, start)
    if self.given is not None and self.given.softcap is not None:
      found[-1] = found[-1] + jnp.sum(d_scores * self.slope(*capped))
    return found

  def zeros(self, like: Array) -> list[Array]:
    return [steps.zeros(x.shape, x.dtype, like) for x in self.trained]

  def _padded(self, terms: Terms) -> Terms:
    t = self.plan.tiles
    return terms.padded(self.plan.q_tiles * t.queries, self.plan.k_tiles * t.keys)

  @property
  def _trained_kinds(self) -> list[str]:
    return [kind for kind, trains in zip(self.kinds, self.given.trains, strict=True) if trains]

  def _read(self, trained: list[Array], place: Any) -> list[Array]:
    """The parts of these that belong to a tile, without the cap."""
    cut = lambda kind, x: lax.dynamic_slice(x, *self._part(kind, x.shape, *place))
    return [cut(*each) for each in zip(self._trained_kinds, trained, strict=False)]

  def _part(self, kind: str, shape: tuple[int, ...], c: Array, i: Array, j: Array) -> Any:
    """Starts and sizes of what belongs to a tile."""
    plan, t = self.plan, self.plan.tiles
    at = {"queries": (i * t.queries, t.queries), "keys": (j * t.keys, t.keys)}
    line = i * t.queries + (plan.k_tiles - 1 - j) * t.keys, t.queries + t.keys - 1
    at["line"] = line if self.given.diagonal else (0, shape[2])
    return layout.part(plan, shape, c, *at[kind])

  def _value(self, parts: list[Array], place: Any) -> Array:
    t, rest = self.plan.tiles, iter(parts)
    cut = [
      next(rest) if trains else lax.dynamic_slice(x, *self._part(kind, x.shape, *place))
      for kind, x, trains in zip(self.kinds, self.leaves, self.given.trains, strict=True)
    ]
    grouped = [layout.by_group(self.plan, x) for x in cut]
    queries, keys, line = jax.tree.unflatten(self.tree, grouped)
    q, k = self.sight.positions(*place)
    if self.given.diagonal:
      pairs = lambda x: diagonals(x, t.queries, t.keys)
    else:
      pairs = lambda x: entries(x, q, k, self.plan.S)
    added = self.given.value(
      jax.tree.map(lambda x: x[..., :, None], queries),
      jax.tree.map(lambda x: x[..., None, :], keys),
      jax.tree.map(pairs, line),
      q,
      k,
    )
    return jnp.broadcast_to(jnp.asarray(added).astype(self.dtype), self.plan.tile)
