"""Graphs of masks against dense matrices: edges, shortest paths, eigenvalues of known graphs."""

import functools

import jax
import numpy as np
import pytest

from effjax.attention import masks
from experiments.attention.graphs import Graph

MASKS = {
  "window": masks.SlidingWindow(2, 1),
  "dilated": masks.Dilated(2, 3),
  "causal with global": masks.longformer(1, 2, causal=True),
  "positions": masks.SlidingWindow(1, 0) | masks.Global((3, 17)),
  "documents": masks.Documents(np.repeat([[0, 1, -1]], [7, 9, 8], axis=1)),
  "bigbird": masks.bigbird(jax.random.key(0), 24, block=1, number=2),
  "bigbird in blocks": masks.bigbird(jax.random.key(1), 24, block=3, number=1),
}


def dense(graph: Graph) -> np.ndarray:
  seen = np.zeros((len(graph.offset) - 1,) * 2, bool)
  for i in range(len(seen)):
    seen[i, graph.heads[graph.offset[i] : graph.offset[i + 1]]] = True
  return seen


@pytest.mark.parametrize("name", MASKS)
def test_edges_are_the_pairs_of_the_mask(name):
  seen = np.asarray(MASKS[name].dense(24)).reshape(24, 24)
  graph = Graph.of(MASKS[name], 24)
  np.testing.assert_array_equal(dense(graph), seen)
  assert len(graph.heads) == seen.sum()


@pytest.mark.parametrize("name", MASKS)
def test_paths_are_the_least_powers_that_reach(name):
  seen = np.asarray(MASKS[name].dense(24)).reshape(24, 24)
  graph = Graph.of(MASKS[name], 24)
  reached = [np.eye(24, dtype=bool)]
  for _ in range(24):
    reached.append((reached[-1].astype(int) @ (seen | reached[0])) > 0)
  expected = functools.reduce(
    lambda steps, n: np.where(reached[n], n, steps), range(24, -1, -1), np.full((24, 24), -1)
  )
  np.testing.assert_array_equal(np.stack([graph.distances(i) for i in range(24)]), expected)


@pytest.mark.parametrize("length", [5, 16])
def test_the_gap_of_known_graphs(length):
  assert Graph.of(masks.Full(), length).spectral_gap() == pytest.approx(1)
  assert Graph.of(masks.SlidingWindow(0, 0), length).spectral_gap() == pytest.approx(0)
  seen = np.asarray(masks.SlidingWindow(1, 1).dense(length)).astype(float)
  walk = np.linalg.eigvals(seen / seen.sum(1, keepdims=True))
  second = np.sort(walk.real)[-2]
  assert Graph.of(masks.SlidingWindow(1, 1), length).spectral_gap() == pytest.approx(1 - second)


def test_directions_do_not_matter_to_the_walk():
  one_way, both = masks.SlidingWindow(1, 0), masks.SlidingWindow(1, 1)
  gaps = [Graph.of(mask, 12).spectral_gap() for mask in (one_way, both)]
  assert gaps[0] == pytest.approx(gaps[1])
