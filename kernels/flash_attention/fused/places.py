"""Where the blocks of a kernel's operands lie, by the kind of each axis.

Kinds: b batch, n query heads, m key-value heads, q queries, k keys; an axis of another kind is
taken whole.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class Place:
  """A grid, and for kinds of axes the size of a block (None drops the axis) and its index.

  An index is a function of what an index map of the platform is given.
  """

  grid: tuple[Any, ...]
  axes: Mapping[str, tuple[int | None, Callable[..., Any]]]

  def spec(self, shape: tuple[int, ...], kinds: str) -> pl.BlockSpec:
    """For an array; batch and heads of size one stay so."""
    whole = lambda *ids: 0
    parts = []
    for size, kind in zip(shape, kinds, strict=True):
      block, index = self.axes.get(kind, (size, whole))
      if size == 1 and kind in "bn":
        block, index = block and 1, whole
      parts.append((block, index))
    blocks, indices = zip(*parts, strict=True)
    return pl.BlockSpec(blocks, lambda *ids: tuple(index(*ids) for index in indices))
