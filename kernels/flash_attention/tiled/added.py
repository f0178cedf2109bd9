"""What a bias and a score add to tiles, and the gradients of these and of a cap that is data.

Each array is read, and its gradient added to, where a tile lies in it, so that a tile costs the
same for any T and S. With the score's term t on a tile, dS the gradient of the scores, c the cap:
  dx = Σ dS ∂t/∂x for its arrays;  dc = Σ dS (tanh u − u (1 − tanh² u)), u = scale·QKᵀ/c.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core import numerics
from effjax.core.typing import Array, Dim
from effjax.kernels.flash_attention.tile_map.terms import Terms, diagonals, entries
from effjax.kernels.flash_attention.tiled import layout, steps
from effjax.kernels.flash_attention.tiled.layout import Plan
from effjax.kernels.flash_attention.tiled.visits import GroupedSight

Pull = Callable[[Array], Any] | None


class Added:
  """A bias and terms addressed by tiles. Where one is None, there is nothing of it to add."""

  def __init__(self, plan: Plan, sight: GroupedSight, bias: Any, terms: Any, dtype: Any):
    self.plan, self.sight, self.dtype, self.given = plan, sight, dtype, terms
    biases: Any = None if bias is None else layout.Bias(plan, bias.shape)
    self.biases, self.padded_bias = biases, None if bias is None else biases.pad(bias)
    self.bias_like = bias
    self.scored = terms is not None and terms.structure is not None
    self.cap: Any = plan.softcap if terms is None or terms.softcap is None else terms.softcap
    self.trained = [] if terms is None else self.pad(terms.trained)
    if terms is not None:
      terms = self._padded(terms)
      parts = {"queries": terms.queries, "keys": terms.keys, "line": terms.line}
      self.kinds = [kind for kind, x in parts.items() for _ in jax.tree.leaves(x)]
      self.leaves, self.tree = jax.tree.flatten(tuple(parts.values()))

  def pad(self, trained: list[Array]) -> list[Array]:
    """Arrays like the `trained` of the terms, up to whole tiles."""
    return self._padded(self.given.with_trained(trained)).trained

  def bias(self, *place: Array) -> Array | None:
    """Of the tile at `place`: a group, a query tile and a key tile."""
    return None if self.biases is None else self.biases.read(self.plan, self.padded_bias, *place)

  def value(self, *place: Array) -> Array | None:
    """What the score adds to the tile."""
    return self._value(self._read(self.trained, place), place) if self.scored else None

  def pulled(self, seen: Array | None, *place: Array) -> tuple[Array | None, Pull]:
    """`value`, and a function from the gradient of the scores to those of the arrays' parts.

    It is of the pairs that are seen, None for all: what arrays hold for others reaches neither.
    """
    if not self.scored:
      return None, None
    value = lambda parts: self._value(parts, place, seen)
    return jax.vjp(value, self._read(self.trained, place))

  def moved(self, moves: list[Array], *place: Array) -> tuple[Array | None, Array | None]:
    """`value`, and its tangent where the padded `trained` move so."""
    if not self.scored:
      return None, None
    parts, along = ((self._read(x, place),) for x in (self.trained, moves))
    return jax.jvp(lambda parts: self._value(parts, place), parts, along)

  def slope(self, products: Array, capped: Array) -> Array:
    """Derivative of the capped scores by the cap."""
    part = capped / self.cap
    return part - products / self.cap * (1 - jnp.square(part))

  def collect(self, totals: Any, pull: Pull, d_scores: Array, capped: Any, *place: Array) -> Any:
    """`totals` with the gradients that the scores of a tile give added.

    Args:
      totals: as of `zeros`; None for the bias collects nothing for it.
      pull: as `pulled` gave it.
      capped: products of the tile and what the cap made of them.
    """
    d_bias, d_terms = totals[0], list(totals[1])
    if d_bias is not None:
      d_bias = self.biases.add(self.plan, d_bias, d_scores, *place)
    if pull is not None:
      for n, (kind, part) in enumerate(zip(self._trained_kinds, pull(d_scores)[0], strict=True)):
        start, sizes = self._part(kind, d_terms[n].shape, *place)
        sums = lax.dynamic_slice(d_terms[n], start, sizes) + part
        d_terms[n] = lax.dynamic_update_slice(d_terms[n], sums, start)
    if self.cap is not self.plan.softcap:
      d_terms[-1] = d_terms[-1] + jnp.sum(d_scores * self.slope(*capped))
    return d_bias, d_terms

  def zeros(self, like: Array) -> tuple[Array | None, list[Array]]:
    """Gradients of the padded bias and of the padded `trained`, to begin with."""
    d_terms = [steps.zeros(x.shape, x.dtype, like) for x in self.trained]
    bias = None if self.biases is None else steps.zeros(self.biases.shape, self.dtype, like)
    return bias, d_terms

  def gradients(self, totals: Any) -> tuple[Array | None, list[Array]]:
    """Of the bias and of what trains in the terms."""
    d_bias, d_terms = totals
    if d_bias is not None:
      like = self.bias_like
      d_bias = d_bias[:, :, : like.shape[2], : like.shape[3]].astype(like.dtype)
    if d_terms:
      (d_terms,) = jax.vjp(self.pad, self.given.trained)[1](d_terms)
    return d_bias, d_terms

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

  def _part(self, kind: str, shape: tuple[Dim, ...], c: Array, i: Array, j: Array) -> Any:
    """Starts and sizes of what belongs to a tile."""
    plan, t = self.plan, self.plan.tiles
    line: Any = i * t.queries + (plan.k_tiles - 1 - j) * t.keys, t.queries + t.keys - 1
    at = {
      "queries": (i * t.queries, t.queries),
      "keys": (j * t.keys, t.keys),
      "line": line if self.given.diagonal else (0, shape[2]),
    }
    return layout.part(plan, shape, c, *at[kind])

  def _value(self, parts: list[Array], place: Any, seen: Array | None = None) -> Array:
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
      jax.tree.map(lambda x: numerics.zero_unless(seen, x[..., :, None]), queries),
      jax.tree.map(lambda x: numerics.zero_unless(seen, x[..., None, :]), keys),
      jax.tree.map(lambda x: numerics.zero_unless(seen, pairs(x)), line),
      q,
      k,
    )
    return jnp.broadcast_to(jnp.asarray(added).astype(self.dtype), self.plan.tile)
