"""What is added to scores, as values: `ALiBi.standard(8) + RelativeBias(table)`.

A score is to a bias what a mask is to a matrix of booleans: a function of positions and of a few
small arrays, evaluated on tiles, so that nothing of size T × S exists. Three kinds of arrays may
enter it: those of queries, those of keys, and those of distances q − k. They train.

Conventions:
  * indices are absolute positions; with T < S the queries are the last T of the S positions;
  * what arrays hold for pairs that a mask or a bias hides has no influence, NaN included, on values
    and on gradients, also those of the arrays themselves;
  * scores are hashable and compare by value; those that hold arrays are pytrees, and not hashable
    where these are traced;
  * a new kind of score is one class, a pytree: what it needs of queries and keys (`features`) and
    of distances (`line`), and what it adds (`term`), which reads those alone.

After FlexAttention (arXiv 2412.05496, section 3), whose functions of a score say here what to add.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention.masks.base import Features, Index, at_least, common_heads, namespace
from effjax.attention.masks.named import ByValue, Named, rebuilt
from effjax.core.typing import Array, Dim, Float, Int
from effjax.kernels.flash_attention.tile_map import terms

__all__ = ["ALiBi", "RelativeBias", "Score", "Sum", "Term"]


class Score(ByValue):
  """What is added to the scores of (query, key) pairs; `a + b` adds both.

  Example:
    >>> (ALiBi((1.0,)) + ALiBi((0.5,))).dense(3)[0, 0].tolist()
    [[-0.0, -1.5, -3.0], [-1.5, -0.0, -1.5], [-3.0, -1.5, -0.0]]
  """

  @property
  def heads(self) -> int:
    """How many heads it tells apart."""
    return 1

  @property
  def relative(self) -> bool:
    """Whether it is known to be a function of the distance q − k alone."""
    return False

  def features(self, q_positions: Index, length: Dim) -> tuple[Features, Features]:
    """What it has to know of the queries and of the keys.

    Args:
      q_positions: [B or 1, T] absolute positions of the queries.
      length: number of keys S.
    Returns:
      Two pytrees of arrays, [B or 1, N or 1, T or 1] and [B or 1, N or 1, S].
    """
    return (), ()

  def line(self, distances: Int[Array | np.ndarray, "L"]) -> Features:
    """What it has to know of each distance q − k: a pytree of arrays [B or 1, N or 1, L]."""
    return ()

  def term(
    self, q: Index, k: Index, q_features: Features, k_features: Features, line: Features
  ) -> Any:
    """What is added to the score of query `q` and key `k`, finite or −inf, which hides.

    Everything broadcasts as in `Mask.predicate`; `line` holds the entries of the pairs' distances.
    """
    raise NotImplementedError(f"{type(self).__name__} has no term")

  def check(self, batch: Dim, T: Dim, S: Dim, heads: int) -> None:
    """Raises ValueError if it cannot apply to these sizes."""
    if self.heads not in (1, heads):
      raise ValueError(f"scores: it tells {self.heads} heads apart, and query has {heads}")

  def dense(
    self, T: Dim, S: Dim | None = None, q_positions: Index | None = None
  ) -> Float[Array, "b n T S"]:
    """The matrix that is added, [B or 1, N or 1, T, S].

    S defaults to T, the positions [B or 1, T] of the queries to the last T of S.
    """
    S = T if S is None else S
    dtype = jnp.zeros(()).dtype
    known: Any = terms.Terms.of(self, None, T, S, q_positions, dtype)
    added = known.dense(q_positions)
    return jnp.broadcast_to(added, (*added.shape[:-2], T, S))

  def __add__(self, other: "Score") -> "Score":
    return Sum(self, other) if isinstance(other, Score) else NotImplemented

  def __bool__(self) -> bool:
    raise TypeError("a score has no truth value; `a + b` adds two")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Score):
  """What both add."""

  first: Score
  second: Score

  @property
  def heads(self) -> int:
    return common_heads("scores: scores", self.first.heads, self.second.heads)

  @property
  def relative(self) -> bool:
    return self.first.relative and self.second.relative

  def features(self, q_positions, length):
    parts = (score.features(q_positions, length) for score in (self.first, self.second))
    return tuple(zip(*parts, strict=True))

  def line(self, distances):
    return self.first.line(distances), self.second.line(distances)

  def term(self, q, k, q_features, k_features, line):
    parts = zip((self.first, self.second), q_features, k_features, line, strict=True)
    first, second = (score.term(q, k, *part) for score, *part in parts)
    return first + second

  def check(self, *sizes):
    super().check(*sizes)
    self.first.check(*sizes)
    self.second.check(*sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class ALiBi(Score):
  """−slope · |q − k|, a slope for each head.

  Args:
    slopes: a tuple of N numbers, part of the compiled program, or an array [N], which trains; of
      one, for all heads.

  Example:
    >>> ALiBi((0.5,)).dense(3)[0, 0].tolist()
    [[-0.0, -0.5, -1.0], [-0.5, -0.0, -0.5], [-1.0, -0.5, -0.0]]

  Reference: ALiBi (arXiv 2108.12409).
  """

  slopes: Any
  relative = True

  def __post_init__(self):
    if isinstance(self.slopes, tuple):
      if not self.slopes or not all(math.isfinite(x) for x in self.slopes):
        raise ValueError(f"ALiBi: slopes={self.slopes}; allowed: one or more finite numbers")
      object.__setattr__(self, "slopes", tuple(map(float, self.slopes)))
    elif getattr(self.slopes, "ndim", None) != 1 or not jnp.issubdtype(
      self.slopes.dtype, jnp.floating
    ):
      raise ValueError(
        f"ALiBi: slopes={self.slopes!r:.80}; allowed: a tuple of numbers or an array [heads]"
      )

  @classmethod
  def standard(cls, heads: int) -> "ALiBi":
    """The slopes of the paper: 2^(−8/N), 2^(−16/N), … for a power of two N of heads.

    For another number those of the power of two below it, and then every other one of the power
    above it.

    Example:
      >>> ALiBi.standard(8).slopes[:3], ALiBi.standard(3).slopes
      ((0.5, 0.25, 0.125), (0.0625, 0.00390625, 0.25))
    """
    at_least("ALiBi: heads", heads, 1)
    below = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * n / below) for n in range(1, below + 1)]
    slopes += [2.0 ** (-8 * n / (2 * below)) for n in range(1, 2 * (heads - below), 2)]
    return cls(tuple(slopes))

  @property
  def heads(self) -> int:
    return len(self.slopes)

  def features(self, q_positions, length):
    slopes = self.slopes
    return (np.asarray(slopes) if isinstance(slopes, tuple) else slopes)[None, :, None], ()

  def term(self, q, k, q_features, k_features, line):
    return -q_features * abs(q - k).astype(q_features.dtype)


def _flatten(score: ALiBi) -> tuple[tuple[Any, ...], Any]:
  static = isinstance(score.slopes, tuple)
  return ((), score.slopes) if static else ((score.slopes,), None)


def _unflatten(static: Any, children: Any) -> ALiBi:
  score = object.__new__(ALiBi)  # unchecked: jax rebuilds trees with leaves of other types
  object.__setattr__(score, "slopes", children[0] if children else static)
  return score


jax.tree_util.register_pytree_node(ALiBi, _flatten, _unflatten)


@rebuilt("table", "bidirectional", "max_distance")
@dataclasses.dataclass(frozen=True, eq=False)
class RelativeBias(Score):
  """table[bucket(k − q)], the relative positions of T5.

  Half of the buckets hold one distance each, the others distances up to `max_distance` in equal
  ratios, and the last one all beyond. If bidirectional, the second half of the table is for keys
  behind the query, and else these all are at distance zero.

  Args:
    table: [buckets, N], or [buckets, 1] for all heads.
    bidirectional: whether keys behind the query are told apart.
    max_distance: from which on distances share the last bucket.

  Example:
    >>> RelativeBias(jnp.arange(4.0)[:, None], False, 8).dense(6)[0, 0, 5].tolist()
    [3.0, 3.0, 2.0, 2.0, 1.0, 0.0]

  Reference: T5 (arXiv 1910.10683), section 2.1.
  """

  table: Any
  bidirectional: bool = True
  max_distance: int = 128
  relative = True

  def __post_init__(self):
    if not hasattr(self.table, "shape"):
      raise ValueError(
        f"RelativeBias: table is {type(self.table).__name__}; allowed: an array [buckets, heads]"
      )
    at_least("RelativeBias: max_distance", self.max_distance, 1)

  @property
  def heads(self) -> int:
    return self.table.shape[-1]

  def line(self, distances):
    bucket = self._bucket(distances)
    table = namespace(self.table, bucket).asarray(self.table)
    return table.T[None][..., bucket]

  def term(self, q, k, q_features, k_features, line):
    return line

  def check(self, batch, T, S, heads):
    shape, least = self.table.shape, 4 if self.bidirectional else 2
    if len(shape) != 2 or shape[0] < least or shape[0] % (least // 2) or shape[1] not in (1, heads):
      raise ValueError(
        f"scores: RelativeBias has a table {shape}, expected (buckets, {heads} or 1) with "
        + ("an even number of buckets from 4" if self.bidirectional else "2 buckets or more")
      )
    exact = shape[0] // least
    if self.max_distance <= exact:
      raise ValueError(
        f"scores: RelativeBias has max_distance={self.max_distance}; allowed: more than {exact}, "
        f"the distances that have one of its {shape[0]} buckets each"
      )

  def _bucket(self, distances: Index) -> Index:
    """The bucket of each distance q − k."""
    buckets = self.table.shape[0] // (2 if self.bidirectional else 1)
    exact = buckets // 2
    ratio = (self.max_distance / exact) ** (np.arange(buckets - exact) / (buckets - exact))
    # The least distance of each bucket; a hair below what is whole but for rounding.
    least = np.concatenate([np.arange(exact), np.ceil(exact * ratio - 1e-9)])
    xp = namespace(distances)
    side = xp.where(distances < 0, buckets, 0) if self.bidirectional else 0
    far = xp.abs(distances) if self.bidirectional else xp.maximum(distances, 0)
    return side + xp.searchsorted(least[1:].astype(np.int32), far, side="right")


@rebuilt("arrays", "function")
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Term(Score):
  """A score of your own: what `function(q, k, **arrays)` gives is added.

  Positions and arrays broadcast; the function sees of each array what belongs to its pairs.

  Args:
    function: of jax.numpy operations alone, elementwise, hashable, since it is part of the compiled
      program, and reading no other arrays than these.
    queries: arrays by name, [B or 1, N or 1, T or 1], of each query.
    keys: [B or 1, N or 1, S], of each key.
    distances: [B or 1, N or 1, 2·R + 1], of the distances q − k from −R to R; those beyond have the
      nearest one's.
    heads, batch: N and B where the function shall be given `head` and `batch` too, their indices.

  Example:
    >>> decay = jnp.array([[[0.0, 0.0, 1.0]]])
    >>> Term(lambda q, k, w: w * k, distances={"w": decay}).dense(3)[0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
  """

  function: Callable[..., Any]
  arrays: Named

  def __init__(
    self,
    function: Callable[..., Any],
    queries: Mapping[str, Any] | None = None,
    keys: Mapping[str, Any] | None = None,
    distances: Mapping[str, Any] | None = None,
    heads: int | None = None,
    batch: int | None = None,
  ):
    arrays = Named.of("Term", heads, batch, queries=queries, keys=keys, distances=distances)
    object.__setattr__(self, "function", function)
    object.__setattr__(self, "arrays", arrays)

  @property
  def heads(self) -> int:
    return self.arrays.most_heads

  def features(self, q_positions, length):
    return self.arrays.features()

  def line(self, distances):
    def clipped(x: Any) -> Any:
      most = x.shape[2] // 2
      return x[..., distances.clip(-most, most) + most]

    return {name: clipped(x) for name, x in self.arrays.distances.items()}

  def term(self, q, k, q_features, k_features, line):
    return self.function(q, k, **q_features, **k_features, **line)

  def check(self, batch, T, S, heads):
    super().check(batch, T, S, heads)
    self.arrays.check("scores: Term", batch, T, S)
    self.arrays.check_function("scores: Term", self.function, boolean=False)
