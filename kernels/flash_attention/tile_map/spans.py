"""Which tiles a mask visits, by arithmetic on intervals.

The rows of the score matrix are cut into tiles of queries, the columns into tiles of keys. For each
tile of queries the tiles of keys that matter are a few intervals [start, stop). Sets of intervals
are closed under intersection, union and complement, so the map of `a & ~b` follows from those of
`a` and `b` and no N × N array appears. Everything here runs on numpy arrays for masks known when
tracing, and on traced arrays for masks that depend on data.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Index = Any  # np.ndarray or jax.Array of integers


def _namespace(*arrays: Index) -> Any:
  return np if all(isinstance(a, np.ndarray | int | np.integer) for a in arrays) else jnp


@dataclasses.dataclass(frozen=True)
class Spans:
  """Disjoint intervals [start, stop) of tiles, some of them empty, for each row of tiles.

  Both arrays are [b, h, rows, n], ascending along n with the empty intervals last; b is 1 or B, and
  h is 1 or the number of query heads.
  """

  start: Index
  stop: Index

  def __and__(self, other: "Spans") -> "Spans":
    xp = _namespace(self.start, other.start)
    start = xp.maximum(self.start[..., :, None], other.start[..., None, :])
    stop = xp.minimum(self.stop[..., :, None], other.stop[..., None, :])
    return _tidy(_flat(start), _flat(stop), self.start.shape[-1] + other.start.shape[-1])

  def __or__(self, other: "Spans") -> "Spans":
    return union(_joined(self.start, other.start), _joined(self.stop, other.stop))

  def complement(self, limit: int) -> "Spans":
    """The tiles of [0, limit) that are in no interval."""
    xp = _namespace(self.start)
    edge = xp.zeros_like(self.start[..., :1])
    empty = self.start >= self.stop
    start = xp.concatenate([edge, xp.where(empty, limit, self.stop)], axis=-1)
    stop = xp.concatenate([xp.where(empty, limit, self.start), edge + limit], axis=-1)
    return _tidy(start, stop, start.shape[-1])

  def count(self) -> Index:
    """Number of tiles in each row, [b, h, rows]."""
    return _namespace(self.start).maximum(self.stop - self.start, 0).sum(-1)


def union(start: Index, stop: Index) -> Spans:
  """The union of intervals [start, stop) that may overlap, given along the last axis."""
  xp = _namespace(start, stop)
  last = np.iinfo(np.int32).max
  start = xp.where(start < stop, start, last)
  order = xp.argsort(start, axis=-1)
  start, stop = (xp.take_along_axis(x, order, -1) for x in (start, stop))
  stop = xp.where(start < last, stop, 0)
  # What an earlier interval has reached already is cut off.
  reached = (np.maximum.accumulate if xp is np else jax.lax.cummax)(stop, axis=stop.ndim - 1)
  before = xp.concatenate([xp.zeros_like(stop[..., :1]), reached[..., :-1]], axis=-1)
  return _tidy(xp.maximum(start, before), stop, start.shape[-1])


def stack(spans: tuple[Spans, ...], index: tuple[int, ...]) -> Spans:
  """The spans of heads, of which head n has those of `spans[index[n]]`."""
  xp = _namespace(*(x for each in spans for x in (each.start, each.stop)))
  n = max(each.start.shape[-1] for each in spans)
  lead = np.broadcast_shapes(*(each.start.shape[:-1] for each in spans))

  def join(arrays: list[Index]) -> Index:
    last = np.iinfo(np.int32).max
    arrays = [
      xp.pad(x, [(0, 0)] * 3 + [(0, n - x.shape[-1])], constant_values=last) for x in arrays
    ]
    arrays = [xp.broadcast_to(x, (*lead, n)) for x in arrays]
    return xp.concatenate(arrays, axis=1)[:, np.array(index)]

  return Spans(join([each.start for each in spans]), join([each.stop for each in spans]))


def _flat(x: Index) -> Index:
  return x.reshape(*x.shape[:-2], -1)


def _joined(a: Index, b: Index) -> Index:
  xp = _namespace(a, b)
  lead = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
  parts = [xp.broadcast_to(x, (*lead, x.shape[-1])) for x in (a, b)]
  return xp.concatenate(parts, axis=-1)


def _tidy(start: Index, stop: Index, bound: int) -> Spans:
  """Sorted, the empty ones last and as few of them as the arrays' kind allows."""
  xp = _namespace(start, stop)
  last = np.iinfo(np.int32).max
  empty = start >= stop
  start, stop = xp.where(empty, last, start), xp.where(empty, last, stop)
  if start.shape[-1] > 1:
    start, stop = xp.sort(start, axis=-1), xp.sort(stop, axis=-1)
  if xp is np:
    bound = int((start < last).sum(-1).max(initial=0))
  bound = max(min(bound, start.shape[-1]), 1)
  return Spans(start[..., :bound], stop[..., :bound])


@dataclasses.dataclass(frozen=True)
class Grid:
  """A row of query tiles against the tiles of the other axis.

  Attributes:
    index: [b, rows, queries] position of each query of a tile; a short last tile repeats its last.
    length: number of keys.
    block: keys in a tile; the last tile may be short.
    contiguous: whether the queries of a tile are neighbours, in order.
    start: position of the first key.
  """

  index: Index
  length: int
  block: int
  contiguous: bool = False
  start: Index = 0

  @classmethod
  def of(cls, T: int, S: int, block_q: int, block_k: int) -> "Grid":
    """Queries are the last T of S positions."""
    return cls(tiled(np.arange(S - T, S, dtype=np.int32)[None], block_q), S, block_k, True)

  @property
  def tiles(self) -> int:
    return math.ceil(self.length / self.block)

  def split(self, q: Index) -> Index:
    """A feature of the queries [b, h, T] (or [b, h, 1]), tile by tile: [b, h, rows, queries]."""
    return q[..., None] if q.shape[-1] == 1 else tiled(q, self.index.shape[-1])

  def split_keys(self, k: Index) -> Index:
    """A feature of the keys [b, h, S], tile by tile: [b, h, tiles, block]."""
    return tiled(k, self.block)

  @property
  def first(self) -> Index:
    """Least position of each tile's queries, [b, 1, rows]."""
    return self.index.min(-1)[:, None]

  @property
  def last(self) -> Index:
    """Greatest position of each tile's queries, [b, 1, rows]."""
    return self.index.max(-1)[:, None]

  def touching(self, low: Index, high: Index) -> Spans:
    """Tiles that hold some key of low … high (inclusive), given [b, h, rows]."""
    start, stop = self.covering(low, high)
    return _tidy(start[..., None], stop[..., None], 1)

  def covering(self, low: Index, high: Index) -> tuple[Index, Index]:
    """The interval [start, stop) of the tiles that hold some key of low … high, elementwise."""
    low, high = low - self.start, high - self.start
    xp = _namespace(low, high)
    start = xp.clip(low // self.block, 0, self.tiles)
    stop = xp.clip(high // self.block + 1, 0, self.tiles)
    return start, xp.where(high < low, 0, stop)

  def inside(self, low: Index, high: Index) -> Spans:
    """Tiles all of whose keys are in low … high (inclusive)."""
    low, high = low - self.start, high - self.start
    xp = _namespace(low, high)
    start = xp.clip(-(-low // self.block), 0, self.tiles)
    stop = xp.clip((high + 1) // self.block, 0, self.tiles)
    stop = xp.where(high >= self.length - 1, self.tiles, stop)
    return _tidy(start[..., None], stop[..., None], 1)

  def everywhere(self, rows: Index) -> Spans:
    """All tiles where the booleans `rows` [b, h, rows] are true, none elsewhere."""
    stop = _namespace(rows).where(rows, self.tiles, 0)[..., None]
    return _tidy(stop * 0, stop, 1)


def tiled(x: Index, block: int) -> Index:
  """[..., T] cut into [..., tiles, block]; a short last tile repeats its last element."""
  xp = _namespace(x)
  short = -x.shape[-1] % block
  if short:
    x = xp.concatenate([x, xp.repeat(x[..., -1:], short, axis=-1)], axis=-1)
  return x.reshape(*x.shape[:-1], -1, block)


def equal_ids(q_ids: Index, k_ids: Index) -> tuple[Spans, Spans]:
  """Tiles where some, and where every, query and key have the same id ≥ 0.

  Args:
    q_ids: [b, h, rows, queries] segment of each query.
    k_ids: [b, h, tiles, block] segment of each key.
  Returns:
    One interval a row for each of the two. It holds every tile that matters; when segments are
    runs of ascending ids, as packing makes them, it holds no other.
  """
  q_low, q_high = _range(q_ids)
  k_low, k_high = _range(k_ids)
  rows, columns = np.s_[..., :, None], np.s_[..., None, :]
  some = (q_low[rows] <= k_high[columns]) & (k_low[columns] <= q_high[rows])
  xp = _namespace(q_ids, k_ids)
  whole = ((q_ids >= 0).all(-1) & (q_low == q_high))[rows]
  whole = whole & ((k_ids >= 0).all(-1) & (k_low == k_high))[columns]
  return _hull(xp, some), _first_run(xp, whole & (q_low[rows] == k_low[columns]))


def _range(ids: Index) -> tuple[Index, Index]:
  """Smallest and largest id ≥ 0 of each tile; (large, −1) where there is none."""
  xp = _namespace(ids)
  return xp.where(ids >= 0, ids, np.iinfo(np.int32).max).min(-1), xp.maximum(ids, -1).max(-1)


def _hull(xp: Any, visited: Index) -> Spans:
  n = visited.shape[-1]
  start = visited.argmax(-1)
  stop = xp.where(visited.any(-1), n - visited[..., ::-1].argmax(-1), 0)
  return _tidy(start[..., None], stop[..., None], 1)


def _first_run(xp: Any, visited: Index) -> Spans:
  n = visited.shape[-1]
  start = visited.argmax(-1)
  tile = xp.arange(n).reshape((1,) * start.ndim + (n,))
  after = (tile > start[..., None]) & ~visited
  stop = xp.where(after.any(-1), after.argmax(-1), n)
  stop = xp.where(visited.any(-1), stop, 0)
  return _tidy(start[..., None], stop[..., None], 1)
