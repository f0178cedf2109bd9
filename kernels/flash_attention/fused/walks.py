"""Tile lists as one sequence of steps, for a grid that goes through the rows in order."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array
from effjax.kernels.flash_attention.tile_map.blocks import Index, TileList

EMPTY, FULL, PARTIAL, FIRST, LAST = 0, 1, 2, 4, 8  # flags of a step


@dataclasses.dataclass(frozen=True)
class Walk:
  """The tiles of all rows one after the other, for each of the batch rows and heads of the lists.

  The arrays are int32 [b · h · steps]: the row, the tile of the other axis, and flags. A row with
  an empty list has one step, which does nothing but begin and end it.

  Attributes:
    steps: steps kept for a batch row and head.
    used: how many of them the longest walk takes, traced where the mask is.
    batch, heads: of the lists, each 1 or all.
  """

  steps: int
  used: Any
  batch: int
  heads: int
  arrays: tuple[Index, ...]

  @classmethod
  def of(cls, lists: TileList, columns: int) -> "Walk":
    batch, heads, rows = lists.partial.shape
    known = isinstance(lists.offset, np.ndarray)
    xp = np if known else jnp
    lengths = xp.maximum(xp.diff(lists.offset, axis=-1), 1).sum(-1)
    used = lengths.max()
    flat = jax.tree.map(lambda x: x.reshape(batch * heads, -1), lists)
    if known:
      used = most = int(used)
      each = map(TileList, flat.offset, flat.partial, flat.index)
      walks = (_walk(one, most, np) for one in each)
      arrays = jax.tree.map(lambda *x: np.concatenate(x), *walks)
    else:
      most = rows * columns
      arrays = jax.tree.map(jnp.ravel, jax.vmap(lambda one: _walk(one, most, jnp))(flat))
    return cls(most, used, batch, heads, arrays)

  def entry(self, b: Array, n: Array, s: Array) -> Array:
    """Where step s of batch row b and query head n is in the arrays."""
    batch, head = (i if count > 1 else 0 for i, count in ((b, self.batch), (n, self.heads)))
    return (batch * self.heads + head) * self.steps + s


def _walk(lists: TileList, most: int, xp: Any) -> tuple[Index, ...]:
  """The arrays of a walk through one list, by `xp`: numpy where the list is known."""
  counts = xp.diff(lists.offset)
  lengths = xp.maximum(counts, 1)
  end = xp.cumsum(lengths)
  s = xp.arange(most)
  row = xp.minimum(xp.searchsorted(end, s, side="right"), len(counts) - 1)
  n = s - (end - lengths)[row]
  inside = s < end[-1]
  at = lists.offset[row] + xp.clip(n, 0, xp.maximum(counts[row] - 1, 0))
  kind = xp.where(at < lists.partial[row], FULL, PARTIAL)
  kind = xp.where(inside & (n < counts[row]), kind, EMPTY)
  kind = kind + xp.where(inside & (n == 0), FIRST, 0)
  kind = kind + xp.where(inside & (n == lengths[row] - 1), LAST, 0)
  tile = lists.index[at]
  return row.astype(xp.int32), tile.astype(xp.int32), kind.astype(xp.int32)
