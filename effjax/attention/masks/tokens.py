"""Masks that name tokens: global ones, a prefix, documents."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention.masks.base import (
  Index,
  Mask,
  at_least,
  check_integers,
  namespace,
  of_queries,
)
from effjax.attention.masks.named import ByValue
from effjax.core.known import indices, more
from effjax.core.typing import Dim
from effjax.kernels.flash_attention.tile_map.spans import Grid, Spans, equal_ids, union


class _Given(ByValue, Mask):
  """A mask of one field, part of the program when it is an int or a tuple, and else data."""

  def __post_init__(self):
    for name, value in vars(self).items():
      if isinstance(value, np.integer):
        object.__setattr__(self, name, int(value))

  def __init_subclass__(cls):
    (field,) = cls.__annotations__

    def flatten(mask):
      value = getattr(mask, field)
      return ((), value) if isinstance(value, int | tuple) else ((value,), None)

    def unflatten(static, children):
      mask = object.__new__(cls)  # unchecked: jax rebuilds trees with leaves of other types
      object.__setattr__(mask, field, children[0] if children else static)
      return mask

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


@dataclasses.dataclass(frozen=True, eq=False)
class Global(_Given):
  """Some tokens see all and are seen by all.

  Args:
    positions: an int n, the first n tokens; a tuple of positions; or an integer array [B or 1, G]
      of positions known at run time, negative for none.

  Example:
    >>> Global((1,)).dense(3).astype(int).tolist()
    [[0, 1, 0], [1, 1, 1], [0, 1, 0]]

  Reference: Longformer (arXiv 2004.05150), section 3.1.
  """

  positions: Any

  @property
  def exact(self) -> bool:
    return isinstance(self.positions, int)

  def __post_init__(self):
    super().__post_init__()
    given = self.positions
    if isinstance(given, int | tuple):
      for x in given if isinstance(given, tuple) else (given,):
        at_least("Global: positions", x, 0)
    else:
      check_integers(
        "Global: positions", given, 2, "an int, a tuple of ints, or an array [batch, number]"
      )

  def features(self, q_positions, length):
    if isinstance(self.positions, int):
      return (), ()
    flags = self._flags(length)
    return of_queries(flags, q_positions, False)[:, None], flags[:, None]

  def predicate(self, q, k, q_features, k_features):
    if isinstance(self.positions, int):
      return (q < self.positions) | (k < self.positions)
    return q_features | k_features

  def spans(self, grid, q_features, k_features):
    if isinstance(self.positions, int):
      rows = grid.index[:, None] < self.positions
    else:
      rows = grid.split(q_features)
    some, every = self._tiles(grid)
    return some | grid.everywhere(rows.any(-1)), every | grid.everywhere(rows.all(-1))

  def _flags(self, length: Dim) -> Index:
    """[b, S], which positions are global."""
    chosen, _ = self._listed
    xp = namespace(chosen, length)
    at = xp.where(chosen < 0, length, chosen)
    row = indices(0, at.shape[0])[:, None]
    flags = xp.zeros((at.shape[0], length + 1), bool)
    if xp is jnp:
      return flags.at[row, at].set(True)[:, :-1]
    flags[row, at] = True
    return flags[:, :-1]

  def _tiles(self, grid: Grid) -> tuple[Spans, Spans]:
    """Tiles of keys of which some, and of which all are global, [b, 1, 1, n]."""
    zero = grid.first[:1, :, :1] * 0
    if isinstance(self.positions, int):
      last = zero + self.positions - 1
      return grid.touching(zero, last), grid.inside(zero, last)
    chosen, _ = self._listed
    none = grid.touching(zero, zero - 1)
    if chosen.shape[1] == 0:
      return none, none
    at = chosen[:, None, None]
    return union(*grid.covering(at, at - (at < 0).astype(at.dtype))), none

  @property
  def _listed(self) -> tuple[Index, Any]:
    static = isinstance(self.positions, tuple)
    chosen = np.array([self.positions], np.int32) if static else self.positions
    return chosen, namespace(chosen)

  def check(self, batch, T, S, positions=False):
    given = self.positions
    if isinstance(given, int | tuple):
      most = given - 1 if isinstance(given, int) else max(given, default=-1)
      if more(most + 1, S):
        raise ValueError(f"mask: Global holds position {most}; allowed: 0 … {S - 1}")
    elif given.shape[0] not in (1, batch):
      raise ValueError(f"mask: Global has positions {given.shape}, expected ({batch} or 1, any)")


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(_Given):
  """All see the first `length` keys: `Causal() | Prefix(n)` is a prefix language model.

  Args:
    length: an int, or an integer array [B or 1] known at run time.

  Example:
    >>> from effjax.attention.masks import Causal
    >>> (Causal() | Prefix(2)).dense(3).astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]

  Reference: T5 (arXiv 1910.10683), section 3.2.1.
  """

  length: Any
  exact = causal = True

  def __post_init__(self):
    super().__post_init__()
    if isinstance(self.length, int):
      at_least("Prefix: length", self.length, 0)
    else:
      check_integers("Prefix: length", self.length, 1, "an int or an array [batch]")

  def features(self, q_positions, length):
    if isinstance(self.length, int):
      return (), ()
    return (), (indices(0, length)[None] < self.length[:, None])[:, None]

  def predicate(self, q, k, q_features, k_features):
    return k < self.length if isinstance(self.length, int) else k_features

  def spans(self, grid, q_features, k_features):
    length = self.length if isinstance(self.length, int) else self.length[:, None, None]
    zero = grid.first * 0
    return grid.touching(zero, zero + length - 1), grid.inside(zero, zero + length - 1)

  def check(self, batch, T, S, positions=False):
    if isinstance(self.length, int) and more(self.length, S):
      raise ValueError(f"mask: Prefix of {self.length}; allowed: 0 … {S}, the keys there are")
    if not isinstance(self.length, int) and self.length.shape[0] not in (1, batch):
      raise ValueError(f"mask: Prefix has lengths {self.length.shape}, expected ({batch} or 1,)")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["segment_ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Documents(ByValue, Mask):
  """Tokens of equal segment id see one another; a negative id is padding: it sees nothing.

  Args:
    segment_ids: [B, S] for queries and keys of one sequence (T < S queries are its last), or a pair
      ([B, T] of the queries, [B, S] of the keys).

  Example:
    >>> Documents(jnp.array([[0, 0, 1, -1]])).dense(4)[0, 0].astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  """

  segment_ids: Any  # not checked here: jax rebuilds trees with leaves of other types

  def features(self, q_positions, length):
    if isinstance(self.segment_ids, tuple):
      q_ids, k_ids = self.segment_ids
    else:
      k_ids = self.segment_ids
      q_ids = of_queries(k_ids, q_positions, -1)
    return q_ids[:, None], k_ids[:, None]

  def predicate(self, q, k, q_features, k_features):
    return (q_features == k_features) & (q_features >= 0)

  def spans(self, grid, q_features, k_features):
    return equal_ids(grid.split(q_features), grid.split_keys(k_features))

  def check(self, batch, T, S, positions=False):
    pair = self.segment_ids if isinstance(self.segment_ids, tuple) else (None, self.segment_ids)
    if positions and pair[0] is not None:
      raise ValueError(
        "mask: Documents of a pair cannot be combined with query_positions; give segment_ids="
      )
    if pair[0] is None and more(T, S):
      raise ValueError(
        f"mask: Documents of one sequence with {T} queries and {S} keys; give a pair of ids"
      )
    for name, ids, length in (("queries", pair[0], T), ("keys", pair[1], S)):
      if ids is None:
        continue
      check_integers(f"mask: Documents of the {name}", ids, 2, "an integer array [batch, length]")
      if ids.shape[0] not in (1, batch) or ids.shape[1] != length:
        raise ValueError(
          f"mask: Documents has ids of shape {ids.shape} for the {name}, expected {(batch, length)}"
        )
