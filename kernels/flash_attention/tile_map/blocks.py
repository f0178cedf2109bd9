"""The tile map of a mask as lists that kernels read: which tiles, the full ones first.

Lists by rows say for each tile of queries which tiles of keys to visit (forward, and the gradient
of the queries); lists by columns say it for each tile of keys (the gradients of keys and values).
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.kernels.flash_attention.tile_map.sight import Sight, Where
from effjax.kernels.flash_attention.tile_map.spans import Spans

Index = Any  # np.ndarray or jax.Array of int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileList:
  """Tiles to visit for each tile of one axis, in compressed rows.

  Row i visits `index[offset[i] : partial[i]]`, where every pair is seen and no predicate is needed,
  then `index[partial[i] : offset[i + 1]]`. Behind the last row `index` may go on with any tiles.
  Kernels take lists with two leading axes, [b, h, …], each 1 or the whole batch or all query heads,
  and one tile at least behind the last row, so that they can read ahead.
  """

  offset: Index
  partial: Index
  index: Index

  @property
  def visited(self) -> int:
    """Number of tiles that are not empty."""
    return int(self.offset[-1])

  @property
  def kinds(self) -> tuple[bool, bool]:
    """Whether there are full tiles, and partial ones; True where only the data will tell."""
    if not isinstance(self.offset, np.ndarray):
      return True, True
    full = (self.partial - self.offset[..., :-1]).sum()
    return bool(full), bool(self.offset[..., -1].sum() - full)

  @property
  def row(self) -> np.ndarray:
    """The row of each entry of `index`."""
    return np.repeat(np.arange(len(self.partial)), np.diff(self.offset))

  @property
  def full(self) -> np.ndarray:
    """Whether each entry of `index` needs no predicate."""
    return np.arange(self.visited) < self.partial[self.row]


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
    status[self.rows.row, self.rows.index] = 1 + self.rows.full
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
  sight = Sight.of(Where(mask, None, None), T, S, block_q, block_k)
  tiles = _Tiles.of(sight, 0, head)
  rows, columns = -(-T // block_q), -(-S // block_k)
  return Blocks(**sizes, rows=tiles.listed(rows), columns=tiles.turned.listed(columns))


def tile_lists(sight: Sight, rows: int, columns: int, *, by_columns: bool = False) -> TileList:
  """Lists [b, h, …] of `rows` × `columns` tiles; computed while tracing if the mask is known then.

  Time and memory follow the visited tiles for a mask known while tracing, all tiles for another.
  """
  some, every = sight.some, sight.every
  if not isinstance(some.start, np.ndarray) or not isinstance(every.start, np.ndarray):
    return _traced(sight, rows, columns, by_columns)
  b, h = (max(n) for n in zip(some.start.shape[:2], every.start.shape[:2], strict=True))
  sight = dataclasses.replace(sight, some=_of_rows(some, rows), every=_of_rows(every, rows))
  lists = []
  for i, n in itertools.product(range(b), range(h)):
    tiles = _Tiles.of(sight, i, n)
    if sight.ragged:
      tiles = dataclasses.replace(tiles, full=tiles.full & (tiles.column < columns - 1))
    lists.append(tiles.turned.listed(columns) if by_columns else tiles.listed(rows))
  most = max(len(each.index) for each in lists)
  pad = lambda x: np.pad(x.index, (0, most + 1 - len(x.index)))
  lists = [dataclasses.replace(each, index=pad(each)) for each in lists]
  return jax.tree.map(lambda *x: np.stack(x).reshape(b, h, -1), *lists)


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """The visited tiles of a batch row and head, in the order of rows; `full` is of booleans."""

  row: np.ndarray
  column: np.ndarray
  full: np.ndarray

  @classmethod
  def of(cls, sight: Sight, batch: int, head: int) -> "_Tiles":
    some, every = (_of_head(spans, batch, head) for spans in (sight.some, sight.every))
    row, column = _expand(some)
    full_row, full_column = _expand(every & some)
    width = int(column.max(initial=0)) + 1
    full = np.zeros(len(row), bool)
    full[np.searchsorted(row * width + column, full_row * width + full_column)] = True
    return cls(row, column, full)

  @property
  def turned(self) -> "_Tiles":
    """Rows for columns."""
    order = np.argsort(self.column, kind="stable")
    return _Tiles(self.column[order], self.row[order], self.full[order])

  def listed(self, rows: int) -> TileList:
    order = np.argsort(2 * self.row + ~self.full, kind="stable")
    offset = np.concatenate([[0], np.cumsum(np.bincount(self.row, minlength=rows))])
    partial = offset[:-1] + np.bincount(self.row[self.full], minlength=rows)
    return TileList(*(x.astype(np.int32) for x in (offset, partial, self.column[order])))


def _of_rows(spans: Spans, rows: int) -> Spans:
  """Of each of the rows, where one stands for all."""
  each = lambda x: np.broadcast_to(x, (*x.shape[:2], rows, x.shape[3]))
  return Spans(each(spans.start), each(spans.stop))


def _of_head(spans: Spans, batch: int, head: int) -> Spans:
  """[rows, n] of one batch row and head."""
  pick = lambda x: np.asarray(x)[batch % x.shape[0], head % x.shape[1]]
  return Spans(pick(spans.start), pick(spans.stop))


def _expand(spans: Spans) -> tuple[np.ndarray, np.ndarray]:
  """Row and tile of each tile in ascending intervals."""
  size = np.maximum(spans.stop - spans.start, 0)
  row, which = np.nonzero(size)
  start, size = spans.start[row, which].astype(np.int64), size[row, which]
  within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
  return np.repeat(row, size), np.repeat(start, size) + within


def _traced(sight: Sight, rows: int, columns: int, by_columns: bool) -> TileList:
  some, every = (_cover(spans, columns) for spans in (sight.some, sight.every))
  if sight.ragged:
    every = every & (np.arange(columns) < columns - 1)[None, None, None]
  shape = np.broadcast_shapes(some.shape, every.shape, (1, 1, rows, columns))
  full, some = (jnp.broadcast_to(x, shape) for x in (some & every, some))
  if by_columns:
    full, some = jnp.swapaxes(full, 2, 3), jnp.swapaxes(some, 2, 3)
  partial = some & ~full
  end = jnp.cumsum(some.sum(-1), -1)
  offset = jnp.pad(end, ((0, 0), (0, 0), (1, 0)))
  middle = offset[..., :-1] + full.sum(-1)
  place = jnp.where(
    full, offset[..., :-1, None] + jnp.cumsum(full, -1), middle[..., None] + jnp.cumsum(partial, -1)
  )
  slots = rows * columns + 1
  place = jnp.where(some, place - 1, slots).reshape(*shape[:2], -1)
  tile = jnp.broadcast_to(jnp.arange(full.shape[-1]), full.shape).reshape(*shape[:2], -1)
  put = jax.vmap(jax.vmap(lambda at, x: jnp.zeros(slots, x.dtype).at[at].set(x, mode="drop")))
  return TileList(*(x.astype(jnp.int32) for x in (offset, middle, put(place, tile))))


def _cover(spans: Spans, tiles: int) -> Any:
  """[b, h, rows, tiles], which tiles the spans hold."""
  tile = np.arange(tiles).reshape(1, 1, 1, -1, 1)
  start, stop = (jnp.asarray(x)[..., None, :] for x in (spans.start, spans.stop))
  return ((tile >= start) & (tile < stop)).any(-1)
