"""Who attends to whom, as values: `Causal() & (SlidingWindow(256, 0) | Full())`.

A mask answers two questions. `predicate(q, k)`: does query q see key k, evaluated on blocks of
indices inside the kernels. `spans(grid)`: which tiles of the score matrix have something to compute
and which need no predicate, worked out from intervals (`effjax.kernels.flash_attention.spans`).

Conventions:
  * indices are absolute positions; with T < S the queries are the last T of the S positions;
  * masks known when tracing are frozen, hashable and compare by value; masks that hold arrays are
    pytrees, unhashable, and every array in them has the batch (B or 1) as its first axis;
  * a new kind of mask is one class: `predicate`, and `spans` and `transpose` to skip tiles.

The tile map follows FlexAttention (arXiv 2412.05496, section 4) with its map in closed form.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import numerics
from effjax.core.typing import Array, Bool
from effjax.kernels.flash_attention import blocks
from effjax.kernels.flash_attention.spans import Grid, Spans, equal_ids

_FAR = 2**30
Index = Any  # integers, an array of them on numpy or jax, broadcast one against the other


class Mask:
  """A set of (query, key) pairs. `a & b`, `a | b` and `~a` combine masks.

  Example:
    >>> (Causal() & SlidingWindow(1, 1)).dense(3).astype(int)
    Array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]], dtype=int32)
  """

  def predicate(self, q_index: Index, k_index: Index) -> Any:
    """Whether query `q_index` sees key `k_index`.

    The indices broadcast against each other, with queries and keys on the last two axes. The answer
    is their broadcast, with axes [B, 1] before it where the mask depends on data.
    """
    raise NotImplementedError(f"{type(self).__name__} has no predicate")

  def spans(self, grid: Grid) -> tuple[Spans, Spans]:
    """Tiles in which some pair, and in which every pair, is in the mask.

    The first may hold too much and the second too little, never the reverse; a mask that says
    nothing better visits all tiles and evaluates the predicate in each.
    """
    none = grid.touching(grid.last, grid.last - 1)
    return none.complement(grid.tiles), none

  def transpose(self) -> "Mask":
    """The mask with queries and keys exchanged."""
    raise NotImplementedError(f"{type(self).__name__} cannot exchange queries and keys")

  def check(self, batch: int, T: int, S: int, positions: bool = False) -> None:
    """Raises ValueError if the mask cannot apply to these sizes (or to given query positions)."""

  def dense(self, T: int, S: int | None = None) -> Bool[Array, "*B T S"]:
    """The mask as a matrix [T, S], or [B, 1, T, S] if it depends on data. S defaults to T."""
    S = T if S is None else S
    seen = self.predicate(np.arange(S - T, S)[:, None], np.arange(S)[None, :])
    return jnp.broadcast_to(seen, (*seen.shape[:-2], T, S))

  def blocks(self, T: int, S: int, block_q: int, block_k: int) -> blocks.Blocks:
    """The tiles to visit, by rows (forward) and by columns (backward), with no T × S array.

    Example:
      >>> Causal().blocks(4, 4, 2, 2).dense().tolist()  # 0 empty, 1 partial, 2 full
      [[1, 0], [2, 1]]
    """
    return blocks.block_map(self, T, S, block_q, block_k)

  def mean_keys(self, length: int) -> float:
    """Number of keys a query sees, on average over the `length` queries of self-attention.

    Example:
      >>> Causal().mean_keys(8), SlidingWindow(1, 0).mean_keys(8)
      (4.5, 1.875)
    """
    if jax.tree.leaves(self):
      return float(self.dense(length).mean()) * length
    return float(self.spans(Grid.of(length, length, 1, 1))[0].count().mean())

  def __and__(self, other: "Mask") -> "And":
    return And(self, other)

  def __or__(self, other: "Mask") -> "Or":
    return Or(self, other)

  def __invert__(self) -> "Not":
    return Not(self)


class _Band(Mask):
  """Query q sees keys q − left … q + right; None is no bound."""

  left: int | None
  right: int | None

  def predicate(self, q_index, k_index):
    if self.left is None and self.right is None:
      xp = np if isinstance(q_index, np.ndarray) else jnp
      return xp.ones(np.broadcast_shapes(np.shape(q_index), np.shape(k_index)), bool)
    low = None if self.left is None else k_index >= q_index - self.left
    high = None if self.right is None else k_index <= q_index + self.right
    return high if low is None else low if high is None else low & high

  def spans(self, grid):
    left = _FAR if self.left is None else self.left
    right = _FAR if self.right is None else self.right
    some = grid.touching(grid.first - left, grid.last + right)
    return some, grid.inside(grid.last - left, grid.first + right)

  def transpose(self):
    return SlidingWindow(self.right, self.left)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Full(_Band):
  """Every query sees every key."""

  left = right = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Causal(_Band):
  """Query q sees keys 0 … q."""

  left, right = None, 0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SlidingWindow(_Band):
  """Query q sees keys q − left … q + right; None on a side is no bound there.

  Raises:
    ValueError: a negative width.

  Reference: Longformer (arXiv 2004.05150), section 3.1.
  """

  left: int | None
  right: int | None

  def __post_init__(self):
    for side in ("left", "right"):
      width = getattr(self, side)
      if width is not None and width < 0:
        raise ValueError(f"SlidingWindow: {side}={width} must be 0 or more, or None for no bound")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["segment_ids"], meta_fields=["exchanged"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Mask):
  """Tokens of equal segment id see one another; a negative id is padding: it sees nothing.

  Args:
    segment_ids: [B, S] for queries and keys of one sequence (T < S queries are its last), or a pair
      ([B, T] of the queries, [B, S] of the keys).
    exchanged: True where `transpose` has made the pair (keys, queries).

  Example:
    >>> Documents(jnp.array([[0, 0, 1, -1]])).dense(4)[0, 0].astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  """

  segment_ids: Any  # not checked here: jax rebuilds trees with leaves of other types
  exchanged: bool = False
  __hash__ = None

  @property
  def pair(self) -> tuple[Index, Index]:
    """Ids of the queries and of the keys."""
    ids = self.segment_ids
    return ids if isinstance(ids, tuple) else (ids, ids)

  def predicate(self, q_index, k_index):
    q_ids, k_ids = self.pair
    end = (q_ids if self.exchanged else k_ids).shape[1]
    q = _lookup(q_ids, numerics.expand(q_index, 4), end)
    k = _lookup(k_ids, numerics.expand(k_index, 4), end)
    return (q == k) & (q >= 0)

  def spans(self, grid):
    q_ids, k_ids = self.pair
    end = (q_ids if self.exchanged else k_ids).shape[1]
    return equal_ids(_lookup(q_ids, grid.index, end), _lookup(k_ids, grid.key_tiles()[None], end))

  def transpose(self):
    return Documents(self.pair[::-1], not self.exchanged)

  def check(self, batch, T, S, positions=False):
    if positions and isinstance(self.segment_ids, tuple):
      raise ValueError(
        "mask: Documents of a pair cannot be combined with query_positions; give segment_ids="
      )
    expected = (S, S) if not isinstance(self.segment_ids, tuple) else (T, S)
    for name, ids, length in zip(("queries", "keys"), self.pair, expected, strict=True):
      if ids.ndim != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
        raise ValueError(
          f"mask: Documents has ids of shape {ids.shape} for the {name}, expected {(batch, length)}"
        )


def _lookup(ids: Index, index: Index, end: int) -> Index:
  """ids [B, X] at positions `index` [b, ...], where they are those of the last X of `end`."""
  index = (index - (end - ids.shape[1])).clip(0, ids.shape[1] - 1)
  batch = np.arange(ids.shape[0]).reshape(-1, *(1,) * (index.ndim - 1))
  return ids[batch, index]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(Mask):
  """Pairs in both masks."""

  first: Mask
  second: Mask

  def predicate(self, q_index, k_index):
    return _combine(operator.and_, self.first, self.second, q_index, k_index)

  def spans(self, grid):
    (some, every), (some2, every2) = self.first.spans(grid), self.second.spans(grid)
    return some & some2, every & every2

  def transpose(self):
    return And(self.first.transpose(), self.second.transpose())

  def check(self, *sizes):
    self.first.check(*sizes)
    self.second.check(*sizes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(Mask):
  """Pairs in either mask."""

  first: Mask
  second: Mask

  def predicate(self, q_index, k_index):
    return _combine(operator.or_, self.first, self.second, q_index, k_index)

  def spans(self, grid):
    (some, every), (some2, every2) = self.first.spans(grid), self.second.spans(grid)
    return some | some2, every | every2

  def transpose(self):
    return Or(self.first.transpose(), self.second.transpose())

  def check(self, *sizes):
    self.first.check(*sizes)
    self.second.check(*sizes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Not(Mask):
  """Pairs not in the mask; the negation of Documents thus has padding see everything."""

  mask: Mask

  def predicate(self, q_index, k_index):
    return ~self.mask.predicate(q_index, k_index)

  def spans(self, grid):
    some, every = self.mask.spans(grid)
    return every.complement(grid.tiles), some.complement(grid.tiles)

  def transpose(self):
    return Not(self.mask.transpose())

  def check(self, *sizes):
    self.mask.check(*sizes)


def _combine(op: Any, first: Mask, second: Mask, q_index: Index, k_index: Index) -> Any:
  a, b = first.predicate(q_index, k_index), second.predicate(q_index, k_index)
  rank = max(a.ndim, b.ndim)
  return op(numerics.expand(a, rank), numerics.expand(b, rank))
