"""Lists of tiles of rows that are sorted by group: which tile is worked on for which group."""

from typing import NamedTuple

import jax.numpy as jnp

from effjax.core.typing import Array, Int
from effjax.kernels.grouped_matmul.groups import spans


class Visits(NamedTuple):
  """Of a tile by a group; those that are left over at the end have no rows.

  Attributes:
    group: its number; that of groups is for rows past the last group.
    tile: the tile's number, where tiles are aligned; else its first row.
    begin, end: the rows that are both in the tile, or beyond it, and of the group.
    visited: [1], how many visits there are.
  """

  group: Int[Array, "V"]
  tile: Int[Array, "V"]
  begin: Int[Array, "V"]
  end: Int[Array, "V"]
  visited: Int[Array, "1"]

  def padded(self, length: int) -> "Visits":
    """As many visits, those that are added without rows."""
    more = lambda x: jnp.pad(x, (0, length - len(x)))
    return Visits(more(self.group), more(self.tile), more(self.begin), more(self.end), self.visited)


def of_rows(group_sizes: Int[Array, "E"], rows: int, height: int, aligned: bool) -> Visits:
  """Visits that cover each of the rows once, those past the last group as a group's too.

  Args:
    height: rows of a tile.
    aligned: whether a tile begins at a multiple of its height, and is visited by every group that
      has rows in it; else where a group begins, or another tile of it ends.

  Example:
    >>> found = of_rows(jnp.array([3, 0, 2]), 6, 4, False)
    >>> [x.tolist() for x in (found.group[:3], found.begin[:3], found.end[:3], found.visited)]
    [[0, 2, 3], [0, 3, 5], [3, 5, 6], [3]]
  """
  begins, ends = spans(group_sizes.astype(jnp.int32), rows)
  begins = jnp.concatenate([begins, ends[-1:]])
  ends = jnp.concatenate([ends, jnp.full_like(ends[:1], rows)])
  return _listed(begins, ends, ends > begins, rows, height, aligned)


def of_groups(group_sizes: Int[Array, "E"], rows: int, height: int) -> Visits:
  """Visits of aligned tiles that cover the rows of each group; one of a group without rows."""
  begins, ends = spans(group_sizes.astype(jnp.int32), rows)
  return _listed(begins, ends, ends >= begins, rows, height, True)


def _listed(begins, ends, there, rows, height, aligned) -> Visits:
  first = begins // height * height if aligned else begins
  counts = jnp.where(there, jnp.maximum(-(-(ends - first) // height), 1), 0)
  past = jnp.cumsum(counts)
  number = jnp.arange(rows // height + len(ends))
  group = jnp.sum(number[:, None] >= past[None], axis=1, dtype=jnp.int32)
  of_group = jnp.minimum(group, len(ends) - 1)
  used = number < past[-1]
  tile = first[of_group] + (number - (past - counts)[of_group]) * height
  begin = begins[of_group] if aligned else tile
  end = ends[of_group] if aligned else jnp.minimum(ends[of_group], tile + height)
  none = lambda x: jnp.where(used, x, rows).astype(jnp.int32)
  if aligned:  # a group without rows may be past all tiles
    tile = jnp.minimum(tile // height, (rows - 1) // height)
  tile = jnp.where(used, tile, 0).astype(jnp.int32)
  return Visits(of_group, tile, none(begin), none(end), past[-1:].astype(jnp.int32))
