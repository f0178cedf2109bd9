"""A mask of your own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from effjax.attention.masks.bands import Full
from effjax.attention.masks.base import Mask
from effjax.attention.masks.named import ByValue, Named, rebuilt
from effjax.core.known import indices, known

PROBED = 64  # positions by which the direction of a function is known


@rebuilt("arrays", "function", "visited")
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Predicate(ByValue, Mask):
  """A mask of your own: `function(q, k, **arrays)` gives booleans.

  Positions and arrays broadcast; the function sees of each array what belongs to its pairs.

  Args:
    function: of jax.numpy operations alone, elementwise, hashable, since it is part of the compiled
      program, and reading no other arrays than these.
    visited: a mask that holds every pair of this one; its tiles are visited.
    queries: arrays by name, [B or 1, N or 1, T or 1], of each query.
    keys: [B or 1, N or 1, S], of each key.
    heads, batch: N and B where the function shall be given `head` and `batch` too, their indices.

  Example:
    >>> from effjax.attention.masks import Causal
    >>> Predicate(lambda q, k: (q + k) % 2 == 0, visited=Causal()).dense(3).astype(int).tolist()
    [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    >>> Predicate(lambda q, k, head: k <= head, heads=2).dense(3)[0, :, 0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0]]
  """

  function: Callable[..., Any]
  visited: Mask
  arrays: Named

  def __init__(
    self,
    function: Callable[..., Any],
    visited: Mask = Full(),
    queries: Mapping[str, Any] | None = None,
    keys: Mapping[str, Any] | None = None,
    heads: int | None = None,
    batch: int | None = None,
  ):
    if jax.tree.leaves(visited) or visited.heads > 1:
      raise ValueError("Predicate: visited must be a mask without arrays that is one for all heads")
    arrays = Named.of("Predicate", heads, batch, queries=queries, keys=keys)
    for name, value in (("function", function), ("visited", visited), ("arrays", arrays)):
      object.__setattr__(self, name, value)

  @property
  def heads(self) -> int:
    return self.arrays.most_heads

  @property
  def causal(self) -> bool:
    """As of every mask, as far as the first positions tell; traced arrays tell nothing."""
    if self.visited.causal:
      return True
    features = self.arrays.features()
    if any(known(x) is None for x in jax.tree.leaves(features)):
      return False
    lengths = [x.shape[-1] for x in jax.tree.leaves(features) if x.shape[-1] > 1]
    first = indices(0, min([PROBED, *lengths]))
    queries, keys = jax.tree.map(lambda x: np.asarray(x)[..., : len(first)], features)
    rows, columns = first[None, None, :, None], first[None, None, None]
    with jax.ensure_compile_time_eval():
      seen = self.function(
        rows,
        columns,
        **{name: x[..., :, None] for name, x in queries.items()},
        **{name: x[..., None, :] for name, x in keys.items()},
      )
      seen = np.asarray(seen) & np.asarray(self.visited.dense(len(first)))
    return not (seen & (columns > rows)).any()

  def features(self, q_positions, length):
    parts = self.arrays.features(), self.visited.features(q_positions, length)
    return tuple(zip(*parts, strict=True))

  def predicate(self, q, k, q_features, k_features):
    (q_own, q_visited), (k_own, k_visited) = q_features, k_features
    return self.function(q, k, **q_own, **k_own) & self.visited.predicate(
      q, k, q_visited, k_visited
    )

  def spans(self, grid, q_features, k_features):
    some, _ = self.visited.spans(grid, q_features[1], k_features[1])
    return some, Mask.spans(self, grid, (), ())[1]

  def check(self, batch, T, S, positions=False):
    self.visited.check(batch, T, S, positions)
    self.arrays.check("mask: Predicate", batch, T, S)
    self.arrays.check_function("mask: Predicate", self.function, boolean=True)
