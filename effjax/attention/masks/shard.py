"""A mask seen from one device's part of the queries and another's part of the keys."""

import dataclasses
import functools

import jax

from effjax.attention.masks.base import Index, Mask, namespace
from effjax.core.known import indices


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["mask", "query", "key"], meta_fields=["length"]
)
@dataclasses.dataclass(frozen=True)
class Shard(Mask):
  """A rectangle of the matrix of `mask`, from position `query` down and from `key` to the right.

  Args:
    mask: of a whole sequence, at its absolute positions.
    query: position in the sequence of what is query 0 here, known when tracing or not.
    key: position of key 0, likewise.
    length: of the whole sequence.

  Example:
    >>> from effjax.attention.masks import SlidingWindow
    >>> Shard(SlidingWindow(2, 0), 2, 0, 6).dense(2)[0, 0].astype(int).tolist()
    [[1, 1], [0, 1]]
  """

  mask: Mask
  query: Index
  key: Index
  length: int

  @property
  def heads(self) -> int:
    return self.mask.heads

  @property
  def causal(self) -> bool:
    return self.mask.causal

  @property
  def exact(self) -> bool:
    return self.mask.exact

  def features(self, q_positions, length):
    rows = q_positions + self.query
    q_features, k_features = self.mask.features(rows, self.length)
    at = self.key + indices(0, length)
    take = lambda x, at: namespace(x, at).asarray(x)[..., at]
    # What is known of positions is of these; what is given of each query is of the whole sequence.
    own = lambda x: x if x.shape[2] in (1, rows.shape[1]) else take(x, rows[0])
    return jax.tree.map(own, q_features), jax.tree.map(lambda x: take(x, at), k_features)

  def predicate(self, q, k, q_features, k_features):
    return self.mask.predicate(q + self.query, k + self.key, q_features, k_features)

  def spans(self, grid, q_features, k_features):
    index, start = grid.index + self.query, grid.start + self.key
    return self.mask.spans(
      dataclasses.replace(grid, index=index, start=start), q_features, k_features
    )

  def check(self, batch, T, S, positions=False):
    self.mask.check(batch, self.length, self.length, positions)
