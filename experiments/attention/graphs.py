"""Attention as a graph: an edge from each token to every token that it sees."""

import dataclasses

import jax
import numpy as np

from effjax.attention import masks


@dataclasses.dataclass(frozen=True)
class Graph:
  """A graph as lists: node i has edges to `heads[offset[i] : offset[i + 1]]`.

  Example:
    >>> graph = Graph.of(masks.SlidingWindow(1, 0), 4)
    >>> graph.heads.tolist(), graph.distances(2).tolist()
    ([0, 0, 1, 1, 2, 2, 3], [2, 1, 0, -1])
  """

  offset: np.ndarray
  heads: np.ndarray

  @classmethod
  def of(cls, mask: masks.Mask, length: int) -> "Graph":
    """Edges from each token to those it sees, found among the tiles of one pair that are visited.

    No array of all pairs is made.
    """
    found = mask.blocks(length, length, 1, 1).rows
    queries = np.repeat(np.arange(length), np.diff(found.offset))
    features = mask.features(np.arange(length, dtype=np.int32)[None], length)
    at = lambda x, places: np.asarray(x)[0, 0, places if x.shape[-1] > 1 else 0]
    q_features = jax.tree.map(lambda x: at(x, queries), features[0])
    k_features = jax.tree.map(lambda x: at(x, found.index), features[1])
    seen = np.asarray(mask.predicate(queries, found.index, q_features, k_features))
    count = np.bincount(queries[seen], minlength=length)
    return cls(np.concatenate([[0], np.cumsum(count)]), found.index[seen])

  def distances(self, start: int) -> np.ndarray:
    """Steps from a node to each, by breadth-first search; −1 where there is no path."""
    steps = np.full(len(self.offset) - 1, -1)
    front, step = np.array([start]), 0
    while len(front):
      steps[front] = step
      front, step = np.unique(self._after(front)), step + 1
      front = front[steps[front] < 0]
    return steps

  def spectral_gap(self) -> float:
    """1 − λ₂ of the random walk on the graph without directions, whose matrix is D^−½·A·D^−½."""
    length = len(self.offset) - 1
    seen = np.zeros((length, length), bool)
    seen[np.repeat(np.arange(length), np.diff(self.offset)), self.heads] = True
    seen |= seen.T
    scale = seen.sum(axis=1) ** -0.5
    return float(1 - np.linalg.eigvalsh(seen * scale[:, None] * scale)[-2])

  def _after(self, nodes: np.ndarray) -> np.ndarray:
    """The ends of all edges from `nodes`."""
    first, count = self.offset[nodes], self.offset[nodes + 1] - self.offset[nodes]
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return self.heads[np.repeat(first, count) + within]
