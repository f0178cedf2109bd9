"""Which rows of an array belong to which of several matrices, and where they lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from effjax.core import spmd, weights
from effjax.core.known import known
from effjax.core.typing import Array, Dim, Int, PyTree, Size


@dataclasses.dataclass(frozen=True)
class Groups:
  """The rows of E groups, in P parts of equally many rows that are laid end to end.

  In each part a group begins where the one before it ends; with a `capacity` C groups begin C rows
  apart instead, and in a part that has room for G of them group e begins at row (e mod G)·C. Rows
  that no group has are not read.

  Attributes:
    sizes: [P, E], rows of each group.
    capacity: C, at least the largest size, or None.
    axis: a mesh axis of S devices over which the matrices are split, E / S to each, or None. It
      promises that a device's part has rows of its own matrices alone.
  """

  sizes: Int[Array | np.ndarray, "P E"]
  capacity: Size | None = None
  axis: str | None = None

  @classmethod
  def of(cls, sizes: Any) -> "Groups":
    """Itself, or the groups of these sizes, [E] or [P, E]."""
    return sizes if isinstance(sizes, cls) else cls(jnp.asarray(sizes).reshape(-1, sizes.shape[-1]))

  @classmethod
  def dealt(
    cls,
    sizes: Int[Array, "P G"],
    parts: Size,
    capacity: Size | None = None,
    axis: str | None = None,
  ) -> "Groups":
    """E groups of which each of S neighbouring parts has E / S = G, the first part the first ones.

    Example:
      >>> Groups.dealt(jnp.array([[1, 2], [3, 4]]), 2).sizes.tolist()
      [[1, 2, 0, 0], [0, 0, 3, 4]]
    """
    blocks = jnp.eye(parts, dtype=sizes.dtype)[None, :, :, None]
    each = sizes.reshape(-1, parts, 1, sizes.shape[1]) * blocks
    return cls(each.reshape(sizes.shape[0], -1), capacity, axis)

  def of_row(self, rows: Dim) -> Int[Array, "M"]:
    """The group of each of M rows; E for those that no group has.

    Example:
      >>> Groups.of(jnp.array([2, 0, 1])).of_row(4).tolist()
      [0, 0, 2, 3]
      >>> Groups(jnp.array([[1, 2]]), capacity=2).of_row(4).tolist()
      [0, 2, 1, 1]
    """
    each = rows // self.sizes.shape[0]
    one = jax.vmap(lambda sizes: group_of_row(sizes, each, self.capacity))
    return spmd.map_rows(lambda sizes, _: one(sizes).reshape(-1), jnp.asarray(self.sizes), ())

  def specs(self, *params: PyTree) -> tuple[PyTree, ...] | None:
    """How arrays and weights with a leading axis E are split over devices; None if not at all."""
    if self.axis is None:
      return None
    split = lambda w: weights.specs(w, (self.axis, *[None] * (len(w.shape) - 1)))
    return tuple(PartitionSpec() if w is None else split(w) for w in params)

  def own(self, sizes: Int[Array, "P E"]) -> Int[Array, "P G"]:
    """Of `sizes`, where a device computes by itself, those of the matrices that it has."""
    if self.axis is None or self.axis not in jax.sharding.get_abstract_mesh().manual_axes:
      return sizes
    count = sizes.shape[-1] // jax.lax.axis_size(self.axis)
    first = jax.lax.axis_index(self.axis) * count
    return jax.lax.dynamic_slice_in_dim(sizes, first, count, axis=-1)

  def check(self, rows: Dim, of: str) -> None:
    """Raises ValueError, in the name of `of`, for sizes that M rows cannot have."""
    parts = self.sizes.shape[0]
    if rows % parts or (self.capacity is not None and rows // parts % self.capacity):
      room = "" if self.capacity is None else f", each some {self.capacity} rows a group"
      given = f"group_sizes {self.sizes.shape} for {rows} rows"
      raise ValueError(f"{of}: {given}; allowed: parts of equally many{room}")
    if not jnp.issubdtype(self.sizes.dtype, jnp.integer):
      raise ValueError(f"{of}: group_sizes of {self.sizes.dtype}; allowed: integers")
    sizes = known(self.sizes)
    if sizes is None:
      return
    each = rows // parts
    most = each if self.capacity is None else self.capacity
    least, largest = sizes.min(initial=0), sizes.max(initial=0)
    if least < 0 or largest > most or sizes.sum(axis=-1).max(initial=0) > each:
      own = "" if self.capacity is None else f", {most} a group"
      allowed = f"from 0, together up to {each} rows{own}"
      shown = (sizes[0] if sizes.shape[0] == 1 else sizes).tolist()
      raise ValueError(f"{of}: group_sizes {shown}; allowed: {allowed}")


jax.tree_util.register_dataclass(Groups, ["sizes"], ["capacity", "axis"])


def group_of_row(
  group_sizes: Int[Array, "E"], rows: Dim, capacity: Size | None = None
) -> Int[Array, "M"]:
  """The group of each row of one part; E for rows that no group has.

  Example:
    >>> group_of_row(jnp.array([2, 0, 1]), 4).tolist()
    [0, 0, 2, 3]
  """
  row = jnp.arange(rows)[:, None]
  starts, ends = spans(group_sizes, rows, capacity)
  if capacity is None:
    return jnp.sum(row >= ends[None], axis=1)
  count = group_sizes.shape[0]
  inside = (row >= starts[None]) & (row < ends[None])
  return jnp.where(inside, jnp.arange(count)[None], count).min(axis=1, initial=count)


def spans(
  group_sizes: Int[Array, "E"], rows: Dim, capacity: Size | None = None
) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
  """First row of each group of a part, and the row after its last.

  Example:
    >>> [a.tolist() for a in spans(jnp.array([1, 2]), 6, 3)]
    [[0, 3], [1, 5]]
  """
  if capacity is not None:
    room = rows // capacity
    starts = (jnp.arange(group_sizes.shape[0], dtype=group_sizes.dtype) % room) * capacity
    return starts, starts + jnp.minimum(group_sizes, capacity)
  ends = jnp.minimum(jnp.cumsum(group_sizes), rows)
  return jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]]), ends
