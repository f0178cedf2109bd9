"""What a mask is: three functions, and everything that follows from them.

  * `features(q_positions, length)`: what the mask has to know of each query and of each key, as
    arrays [B or 1, N or 1, T] and [B or 1, N or 1, S] beside them (segment ids, say);
  * `predicate(q, k, q_features, k_features)`: does query q see key k, evaluated on blocks inside
    the kernels, for which the features are cut into the same blocks;
  * `spans(grid, q_features, k_features)`: which tiles of the score matrix have something to compute
    and which need no predicate, worked out from intervals (`tile_map.spans` of the kernels).

The tile map follows FlexAttention (arXiv 2412.05496, section 4) with its map in closed form.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import numerics
from effjax.core.known import check_fits, indices
from effjax.core.typing import Array, Bool, Dim
from effjax.kernels.flash_attention.tile_map import blocks
from effjax.kernels.flash_attention.tile_map.spans import Grid, Spans

FAR = 2**30  # beyond any position
Index = Any  # integers, an array of them on numpy or jax, broadcast one against the other
Features = Any  # a pytree of arrays


class Mask:
  """A set of (query, key) pairs. `a & b`, `a | b` and `~a` combine masks.

  Example:
    >>> from effjax.attention.masks import Causal, SlidingWindow
    >>> (Causal() & SlidingWindow(1, 1)).dense(3).astype(int)
    Array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]], dtype=int32)
  """

  @property
  def heads(self) -> int:
    """How many heads the mask tells apart."""
    return 1

  @property
  def band(self) -> tuple[int | None, int | None] | None:
    """(left, right) of a `SlidingWindow` that it equals; None where there is none."""
    return None

  @property
  def sees_all_before(self) -> bool:
    """Whether every query is known to see all keys before it."""
    return self.band is not None and self.band[0] is None

  @property
  def causal(self) -> bool:
    """Whether it is known that no query sees what comes after it, but for a prefix seen by all."""
    return False

  @property
  def exact(self) -> bool:
    """Whether the spans of single queries and keys hold all pairs and no other."""
    return False

  @property
  def relative(self) -> bool:
    """Whether it is known to tell pairs apart by their distance q − k alone."""
    return False

  def features(self, q_positions: Index, length: Dim) -> tuple[Features, Features]:
    """What the mask has to know of the queries and of the keys.

    Args:
      q_positions: [B or 1, T] absolute positions of the queries.
      length: number of keys S.
    Returns:
      Two pytrees of arrays, [B or 1, N or 1, T or 1] and [B or 1, N or 1, S].
    """
    return (), ()

  def predicate(self, q: Index, k: Index, q_features: Features, k_features: Features) -> Any:
    """Whether query `q` sees key `k`.

    Indices and features of queries broadcast against those of keys; the last two axes are those of
    queries and keys.
    """
    raise NotImplementedError(f"{type(self).__name__} has no predicate")

  def spans(self, grid: Grid, q_features: Features, k_features: Features) -> tuple[Spans, Spans]:
    """Tiles in which some pair, and in which every pair, is in the mask.

    The first may hold too much and the second too little, never the reverse; a mask that says
    nothing better visits all tiles and evaluates the predicate in each.
    """
    none = grid.touching(grid.last, grid.last - 1)
    return none.complement(grid.tiles), none

  def check(self, batch: Dim, T: Dim, S: Dim, positions: bool = False) -> None:
    """Raises ValueError if the mask cannot apply to these sizes (or to given query positions)."""

  def dense(
    self, T: Dim, S: Dim | None = None, q_positions: Index | None = None
  ) -> Bool[Array, "*BN T S"]:
    """The mask as a matrix: [T, S], or [B or 1, N or 1, T, S] if it holds arrays or tells heads
    apart. S defaults to T, the positions [B or 1, T] of the queries to the last T of S."""
    S = T if S is None else S
    plain = q_positions is None and not jax.tree.leaves(self) and self.heads == 1
    if q_positions is None:
      q_positions = indices(S - T, S)[None]
    q_features, k_features = self.features(q_positions, S)
    q_features = jax.tree.map(lambda x: x[..., :, None], q_features)
    k_features = jax.tree.map(lambda x: x[..., None, :], k_features)
    q = q_positions[:, None, :, None]
    seen = self.predicate(q, indices(0, S)[None, None, None], q_features, k_features)
    seen = namespace(seen).broadcast_to(seen, (*seen.shape[:-2], T, S))
    return jnp.asarray(seen[0, 0] if plain else seen, bool)

  def blocks(self, T: int, S: int, block_q: int, block_k: int, *, head: int = 0) -> blocks.Blocks:
    """The tiles to visit, by rows (forward) and by columns (backward), with no T × S array.

    Example:
      >>> from effjax.attention.masks import Causal
      >>> Causal().blocks(4, 4, 2, 2).dense().tolist()  # 0 empty, 1 partial, 2 full
      [[1, 0], [2, 1]]
    """
    return blocks.block_map(self, T, S, block_q, block_k, head)

  def mean_keys(self, length: int, queries: int | None = None) -> float:
    """Number of `length` keys a query sees, on average over heads and the last `queries` positions.

    Args:
      length: number of keys S.
      queries: how many of the last positions ask; None means all S.

    Example:
      >>> from effjax.attention.masks import Causal, SlidingWindow
      >>> Causal().mean_keys(8), SlidingWindow(1, 0).mean_keys(8), Causal().mean_keys(8, 1)
      (4.5, 1.875, 8.0)

    Raises:
      ValueError: unless 1 ≤ queries ≤ length.
    """
    queries = length if queries is None else queries
    if not 1 <= queries <= length:
      raise ValueError(f"mean_keys: queries={queries}; allowed: 1 … length, {length}")
    if self.exact and not jax.tree.leaves(self):
      one_by_one = Grid.of(queries, length, 1, 1)
      positions = np.arange(length - queries, length, dtype=np.int32)[None]
      some, _ = self.spans(one_by_one, *self.features(positions, length))
      return float(some.count().mean())
    known = jax.tree.map(np.asarray, self)
    return float(np.asarray(known.dense(queries, length)).sum(-1).mean())

  def plot(
    self, T: int, S: int | None = None, *, block_q: int = 1, block_k: int = 1, head: int = 0
  ):
    """A figure of the pairs of one head and the tiles visited: outlined, shaded where full."""
    import matplotlib.pyplot as plt

    S = T if S is None else S
    seen = numerics.expand(np.asarray(self.dense(T, S)), 4)[0]
    status = self.blocks(T, S, block_q, block_k, head=head).dense()
    figure, axes = plt.subplots(layout="constrained")
    axes.imshow(seen[min(head, len(seen) - 1)], cmap="Greys", vmax=2, extent=(0, S, T, 0))
    for i, j in zip(*np.nonzero(status), strict=True):
      shade = (0.1, 0.4, 0.8, 0.4 if status[i, j] == 2 else 0.0)
      place = (
        (j * block_k, i * block_q),
        min(block_k, S - j * block_k),
        min(block_q, T - i * block_q),
      )
      axes.add_patch(plt.Rectangle(*place, edgecolor=shade[:3], facecolor=shade))
    axes.set(xlabel="key", ylabel="query", title=f"{(status > 0).mean():.0%} of the tiles visited")
    return figure

  def __and__(self, other: "Mask") -> "Mask":
    return And(self, other) if isinstance(other, Mask) else NotImplemented

  def __or__(self, other: "Mask") -> "Mask":
    return Or(self, other) if isinstance(other, Mask) else NotImplemented

  def __bool__(self) -> bool:
    name = type(self).__name__
    raise TypeError(f"{name}: a mask is neither true nor false; masks are combined by &, | and ~")

  def __invert__(self) -> "Mask":
    return Not(self)


def common_heads(what: str, first: int, second: int) -> int:
  """How many heads two values tell apart together, of which each tells apart 1 or all.

  Raises:
    ValueError: where they tell different numbers apart.
  """
  if 1 not in (first, second) and first != second:
    raise ValueError(f"{what} of {first} and of {second} heads are combined")
  return max(first, second)


class _Pair(Mask):
  first: Mask
  second: Mask

  @property
  def heads(self) -> int:
    return common_heads("mask: masks", self.first.heads, self.second.heads)

  @property
  def exact(self) -> bool:
    return self.first.exact and self.second.exact

  @property
  def relative(self) -> bool:
    return self.first.relative and self.second.relative

  def features(self, q_positions, length):
    parts = (mask.features(q_positions, length) for mask in (self.first, self.second))
    return tuple(zip(*parts, strict=True))

  def check(self, *sizes):
    self.first.check(*sizes)
    self.second.check(*sizes)

  def predicate(self, q, k, q_features, k_features):
    parts = zip((self.first, self.second), q_features, k_features, strict=True)
    return self._join(*(mask.predicate(q, k, *part) for mask, *part in parts))

  def spans(self, grid, q_features, k_features):
    parts = zip((self.first, self.second), q_features, k_features, strict=True)
    found = (mask.spans(grid, *part) for mask, *part in parts)
    some, every = zip(*found, strict=True)
    return self._join(*some), self._join(*every)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(_Pair):
  """Pairs in both masks."""

  first: Mask
  second: Mask
  _join = staticmethod(operator.and_)

  @property
  def causal(self):
    return self.first.causal or self.second.causal

  @property
  def band(self):
    bands = self.first.band, self.second.band
    if None in bands:
      return None
    least = lambda *widths: min((x for x in widths if x is not None), default=None)
    return tuple(map(least, *bands))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(_Pair):
  """Pairs in either mask."""

  first: Mask
  second: Mask
  _join = staticmethod(operator.or_)

  @property
  def causal(self):
    return self.first.causal and self.second.causal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Not(Mask):
  """Pairs not in the mask; the negation of Documents thus has padding see everything."""

  mask: Mask

  @property
  def heads(self) -> int:
    return self.mask.heads

  @property
  def exact(self) -> bool:
    return self.mask.exact

  @property
  def relative(self) -> bool:
    return self.mask.relative

  def features(self, q_positions, length):
    return self.mask.features(q_positions, length)

  def predicate(self, *arguments):
    return ~self.mask.predicate(*arguments)

  def spans(self, grid, q_features, k_features):
    some, every = self.mask.spans(grid, q_features, k_features)
    return every.complement(grid.tiles), some.complement(grid.tiles)

  def check(self, *sizes):
    self.mask.check(*sizes)


def namespace(*arrays: Index) -> Any:
  """numpy where all is known when tracing, else jax.numpy."""
  return np if all(isinstance(x, np.ndarray | int) for x in arrays) else jnp


def of_positions(q_positions: Index, length: Dim, function: Any) -> tuple[Index, Index]:
  """Features of queries and of keys: a function of their positions that kernels need not compute.

  Divisions by what is no power of two take many instructions, and TPUs have none.
  """
  return function(q_positions[:, None]), function(indices(0, length)[None, None])


def of_queries(values: Index, positions: Index, none: Any) -> Index:
  """values [b, S] at the positions [B or 1, T] of queries; `none` at one that is no index."""
  length = values.shape[1]
  xp = namespace(values, positions)
  row = indices(0, values.shape[0])[:, None]
  inside = (positions >= 0) & (positions < length)
  return xp.where(inside, xp.asarray(values)[row, positions.clip(0, length - 1)], none)


def at_least(name: str, value: Any, least: int, more: str = "") -> None:
  """Raises ValueError unless `value` is an integer from `least`."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
    raise ValueError(f"{name}={value} must be {least} or more{',' + more if more else ''}")


def check_integers(name: str, x: Any, rank: int, allowed: str) -> None:
  """Raises ValueError unless `x` is an array of that rank of integers that JAX can hold."""
  if getattr(x, "ndim", None) != rank or not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name}={x!r:.80}; allowed: {allowed}")
  check_fits(name, x)
