"""Which tiles attention in XLA visits, and the mask on each, for a group of heads at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core.typing import Array
from effjax.kernels.flash_attention.tile_map.sight import Sight, Where
from effjax.kernels.flash_attention.tile_map.spans import Spans, union
from effjax.kernels.flash_attention.tiled import layout
from effjax.kernels.flash_attention.tiled.layout import Plan


class GroupedSight:
  """The mask of every tile: which tiles to visit, and the predicate on one."""

  def __init__(self, plan: Plan, where: Where):
    self.plan, t = plan, plan.tiles
    self.sight = sight = Sight.of(where, plan.T, plan.S, t.queries, t.keys)
    heads = t.heads * plan.G
    some = merge(sight.some, t.batch, heads)
    rest = merge(sight.every.complement(plan.k_tiles), t.batch, heads)
    every = rest.complement(plan.k_tiles)
    self.partial, self.full = partition(some, every, plan.S // t.keys, plan.k_tiles)
    self.looks_up = bool(jax.tree.leaves((sight.queries[1:], sight.keys)))  # more than positions
    queries = sight.queries
    if where.query_positions is None:  # counted rather than looked up
      queries = (lax.iota(jnp.int32, plan.T)[None, None] + (plan.S - plan.T), *queries[1:])
    self.queries = _continued(queries, plan.q_tiles * t.queries)
    self.keys = _continued(sight.keys, plan.k_tiles * t.keys)

  def visit(self, c: Array, i: Array, body: Any, carry: Any, wanted: Any = True) -> Any:
    """Folds `body(tile, seen, carry)` over the key tiles of query tile i of group c.

    Over none of them where the boolean `wanted`, which may be known at run time alone, is false.
    """
    for visits, masked in ((self.full, False), (self.partial, True)):
      if visits.none:
        continue
      batch, head = self.plan.split(c)
      count, tile = visits.row(batch, head, i)

      def step(n, carry, masked=masked, tile=tile):
        j = tile(n)
        return body(j, self.seen(c, i, j) if masked else None, carry)

      carry = lax.fori_loop(0, jnp.where(wanted, count, 0), step, carry)
    return carry

  def seen(self, c: Array, i: Array, j: Array) -> Array:
    """[stacked, rows, keys] of booleans."""
    t = self.plan.tiles
    queries = self._tile(self.queries, c, i, t.queries, np.s_[..., :, None])
    keys = self._tile(self.keys, c, j, t.keys, np.s_[..., None, :])
    seen = self.sight.seen(queries, keys, self._index(j))
    if self.looks_up and seen.shape[:3] != self.plan.tile[:3]:
      # XLA repeats what is cheap in each head and each use; a square root it works out once.
      seen = jnp.sqrt(seen.astype(jnp.float32)) > 0
    return jnp.broadcast_to(seen, self.plan.tile).reshape(self.plan.stacked, self.plan.rows, t.keys)

  def positions(self, c: Array, i: Array, j: Array) -> tuple[Array, Array]:
    """Of a tile's queries and keys, shaped to broadcast to a tile of scores."""
    q = self._tile(self.queries[0], c, i, self.plan.tiles.queries, np.s_[..., :, None])
    return q, self._index(j)

  def _index(self, j: Array) -> Array:
    keys = self.plan.tiles.keys
    return j * keys + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, keys), 4)

  def _tile(self, features: Any, c: Array, i: Array, size: int, place: Any) -> Any:
    """Tile i of features [b, h, length], for group c, with an axis for the other side's tile."""

    def cut(x: Any) -> Array:
      part = lax.dynamic_slice(jnp.asarray(x), *layout.part(self.plan, x.shape, c, i * size, size))
      return layout.by_group(self.plan, part)[place]

    return jax.tree.map(cut, features)


def _continued(tree: Any, length: int) -> Any:
  """Arrays [b, h, X] up to `length` with their last element; a single one stands for all."""

  def edge(x: Any) -> Any:
    short = length - x.shape[2]
    return x if x.shape[2] == 1 else jnp.pad(x, ((0, 0), (0, 0), (0, short)), mode="edge")

  return jax.tree.map(edge, tree)


@dataclasses.dataclass(frozen=True)
class Visits:
  """For each group of batch rows and heads and each query tile, intervals of key tiles to visit."""

  spans: Spans

  @property
  def none(self) -> bool:
    """True where it is known while tracing that there is nothing to visit."""
    return isinstance(self.spans.start, np.ndarray) and not self.spans.count().any()

  def row(self, batch: Any, head: Any, i: Any) -> tuple[Array, Any]:
    """Number of key tiles for query tile i, and a function from 0 … number − 1 to the tile."""
    start, stop = (_at(x, batch, head, i) for x in (self.spans.start, self.spans.stop))
    size = jnp.maximum(stop - start, 0)
    after = jnp.cumsum(size)

    def tile(n: Any) -> Array:
      if start.shape[0] == 1:
        return start[0] + n
      which = jnp.sum(after <= n)
      return start[which] + n - (after[which] - size[which])

    return after[-1], tile


def _at(x: Any, batch: Any, head: Any, i: Any) -> Array:
  x = jnp.asarray(x, jnp.int32)
  return x[batch if x.shape[0] != 1 else 0, head if x.shape[1] != 1 else 0, i]


def partition(some: Spans, every: Spans, whole: int, tiles: int) -> tuple[Visits, Visits]:
  """Tiles that need the mask evaluated and tiles that do not.

  Args:
    whole: key tiles without padding; a padded one is never free of the mask.
    tiles: all key tiles.
  """
  ragged = Spans(np.full((1, 1, 1, 1), whole), np.full((1, 1, 1, 1), tiles))
  every = every & ragged.complement(tiles)
  return Visits(some & every.complement(tiles)), Visits(every)


def merge(spans: Spans, batch: int, heads: int) -> Spans:
  """What is in the spans of any of `batch` rows and `heads` heads that are worked on together."""
  groups = [(x, batch, heads) for x in (spans.start, spans.stop)]
  return union(*(_grouped(*group) for group in groups)) if batch * heads > 1 else spans


def _grouped(x: Any, batch: int, heads: int) -> Any:
  """[b, h, rows, n] as [b / batch, h / heads, rows, batch · heads · n]; axes of one stay."""
  b, h, rows, n = x.shape
  batch, heads = (1 if size == 1 else most for size, most in ((b, batch), (h, heads)))
  x = x.reshape(b // batch, batch, h // heads, heads, rows, n).transpose(0, 2, 4, 1, 3, 5)
  return x.reshape(b // batch, h // heads, rows, -1)
