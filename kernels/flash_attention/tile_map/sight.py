"""Who sees whom, in the form kernels read: arrays to cut into tiles, and a predicate on tiles."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from effjax.core.typing import Array
from effjax.kernels.flash_attention.tile_map.spans import Grid, Spans, equal_ids, tiled


class Where(NamedTuple):
  """What decides who sees whom."""

  mask: Any
  segment_ids: Any
  query_positions: Any


@dataclasses.dataclass(frozen=True)
class Sight:
  """A mask, segments and positions over query tiles and key tiles.

  Attributes:
    mask: its `predicate` is called on tiles.
    length: number of keys S.
    ragged: whether the last tile of keys is padded.
    some, every: tiles in which some pair, and in which every pair, sees each other.
    queries: pytree of [b, h, T or 1], what is known of each query: position, segment, features.
    keys: pytree of [b, h, S], what is known of each key beside its position.
  """

  mask: Any
  length: int
  ragged: bool
  some: Spans
  every: Spans
  queries: Any
  keys: Any

  @classmethod
  def of(cls, where: Where, T: int, S: int, block_q: int, block_k: int) -> "Sight":
    """For T queries and S keys in tiles of block_q × block_k."""
    positions = where.query_positions
    if positions is None:
      positions = np.arange(S - T, S, dtype=np.int32)[None]
      grid = Grid.of(T, S, block_q, block_k)
    else:
      grid = Grid(tiled(positions, block_q), S, block_k)
    features = where.mask.features(positions, S)
    some, every = where.mask.spans(grid, *features)
    ids = () if where.segment_ids is None else tuple(x[:, None] for x in where.segment_ids)
    if ids:
      same, all_same = equal_ids(grid.split(ids[0]), grid.split_keys(ids[1]))
      some, every = some & same, every & all_same
    queries = (positions[:, None], ids[:1], features[0])
    return cls(where.mask, S, S % block_k > 0, some, every, queries, (ids[1:], features[1]))

  def seen(self, queries: Any, keys: Any, k: Array) -> Array:
    """Booleans of a tile, from its part of `queries` and `keys` and the positions k of its keys.

    The parts broadcast against each other; keys from `length` on are padding.
    """
    q, q_ids, q_features = queries
    k_ids, k_features = keys
    seen = self.mask.predicate(q, k, q_features, k_features)
    for a, b in zip(q_ids, k_ids, strict=True):
      seen = seen & (a == b) & (a >= 0)
    return seen & (k < self.length) if self.ragged else seen
