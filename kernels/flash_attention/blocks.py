"""The tile map of a mask as lists a kernel can prefetch: which tiles, in what order, which full."""

import dataclasses
from typing import Any

import jax
import numpy as np

from effjax.kernels.flash_attention.spans import Grid, Spans, tiled


@dataclasses.dataclass(frozen=True)
class TileList:
  """Tiles to visit for each tile of one axis, in compressed rows.

  Row i visits `index[offset[i] : offset[i + 1]]`; where `full` is set no predicate is needed.
  """

  offset: np.ndarray
  index: np.ndarray
  full: np.ndarray

  @property
  def visited(self) -> int:
    """Number of tiles that are not empty."""
    return int(self.offset[-1])


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tiles of a T × S mask: `rows` lists key tiles per query tile, `columns` the reverse."""

  T: int
  S: int
  block_q: int
  block_k: int
  rows: TileList
  columns: TileList

  def dense(self) -> np.ndarray:
    """[query tiles, key tiles]: 0 empty, 1 partial, 2 full. For tests and pictures."""
    status = np.zeros((-(-self.T // self.block_q), -(-self.S // self.block_k)), np.int8)
    row = np.repeat(np.arange(len(status)), np.diff(self.rows.offset))
    status[row, self.rows.index] = 1 + self.rows.full
    return status


def block_map(mask: Any, T: int, S: int, block_q: int, block_k: int) -> Blocks:
  """The tile map of a mask whose arrays, if it has any, are concrete and of batch one.

  Raises:
    ValueError: sizes below one, or a mask that differs across the batch.
  """
  sizes = {"T": T, "S": S, "block_q": block_q, "block_k": block_k}
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"blocks: {name}={size} must be at least 1")
  mask = jax.tree.map(np.asarray, mask)
  mask.check(1, T, S)
  columns = Grid(tiled(np.arange(S, dtype=np.int32)[None], block_k), S - T, T, block_q)
  return Blocks(
    **sizes,
    rows=_listed(*mask.spans(Grid.of(T, S, block_q, block_k))),
    columns=_listed(*mask.transpose().spans(columns)),
  )


def _listed(some: Spans, every: Spans) -> TileList:
  partial = some & every.complement(np.iinfo(np.int32).max)
  row, index, full = _expand(partial, every)
  order = np.lexsort((index, row))
  counts = np.bincount(row, minlength=some.start.shape[1])
  offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
  return TileList(offset, index[order].astype(np.int32), full[order])


def _expand(partial: Spans, every: Spans) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Row, tile and fullness of each visited tile, from the intervals that hold them."""
  rows, starts, sizes, fulls = [], [], [], []
  for spans, full in ((partial, False), (every, True)):
    size = np.maximum(spans.stop - spans.start, 0)[0]
    row, which = np.nonzero(size)
    rows.append(row)
    starts.append(spans.start[0][row, which])
    sizes.append(size[row, which])
    fulls.append(np.full(len(row), full))
  row, start, size, full = map(np.concatenate, (rows, starts, sizes, fulls))
  within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
  return np.repeat(row, size), np.repeat(start, size) + within, np.repeat(full, size)
