"""The tile map of a mask as lists a kernel can prefetch: which tiles, in what order, which full."""

import dataclasses
from typing import Any

import jax
import numpy as np

from effjax.kernels.flash_attention.spans import Grid, Spans


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


def block_map(mask: Any, T: int, S: int, block_q: int, block_k: int, head: int = 0) -> Blocks:
  """The tile map of one head of a mask whose arrays, if it has any, are concrete and of batch one.

  Raises:
    ValueError: sizes below one, a head the mask does not have, or a mask that differs across the
      batch.
  """
  sizes = {"T": T, "S": S, "block_q": block_q, "block_k": block_k}
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"blocks: {name}={size} must be at least 1")
  if not 0 <= head < mask.heads:
    raise ValueError(f"blocks: head={head}; allowed: 0 … {mask.heads - 1}")
  mask = jax.tree.map(np.asarray, mask)
  mask.check(1, T, S)
  positions = np.arange(S - T, S, dtype=np.int32)[None]
  some, every = mask.spans(Grid.of(T, S, block_q, block_k), *mask.features(positions, S))
  row, index, full = _listed(*(_of_head(spans, head) for spans in (some, every)))
  by_column = np.argsort(index, kind="stable")
  return Blocks(
    **sizes,
    rows=_compressed(row, index, full, -(-T // block_q)),
    columns=_compressed(index[by_column], row[by_column], full[by_column], -(-S // block_k)),
  )


def _of_head(spans: Spans, head: int) -> Spans:
  """[rows, n] of one head."""
  pick = lambda x: np.asarray(x)[0, head if x.shape[1] > 1 else 0]
  return Spans(pick(spans.start), pick(spans.stop))


def _listed(some: Spans, every: Spans) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Row, tile and fullness of each visited tile, in the order of rows and tiles."""
  row, index = _expand(some)
  width = int(index.max(initial=0)) + 1
  full_row, full_index = _expand(every & some)
  full = np.zeros(len(row), bool)
  full[np.searchsorted(row * width + index, full_row * width + full_index)] = True
  return row, index, full


def _compressed(row: np.ndarray, index: np.ndarray, full: np.ndarray, rows: int) -> TileList:
  offset = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
  return TileList(offset.astype(np.int32), index.astype(np.int32), full)


def _expand(spans: Spans) -> tuple[np.ndarray, np.ndarray]:
  """Row and tile of each tile in ascending intervals."""
  size = np.maximum(spans.stop - spans.start, 0)
  row, which = np.nonzero(size)
  start, size = spans.start[row, which].astype(np.int64), size[row, which]
  within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
  return np.repeat(row, size), np.repeat(start, size) + within
