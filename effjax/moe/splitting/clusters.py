"""Experts of hidden units that are alike, by k-means with clusters of equal size.

LLaMA-MoE (Zhu et al., arXiv 2406.16554, section 3.1) clusters the rows of a projection, each
divided by its length. That clusters have equal sizes is a constraint of each assignment, which is
solved exactly (Malinen and Fränti, "Balanced K-Means for Clustering", 2014).
"""

import dataclasses

import numpy as np

from effjax.core import weights
from effjax.core.typing import Float, Int, Key, Size
from effjax.moe.splitting.assignment import equal_assignment
from effjax.moe.splitting.ways import Parts, check_divides, seed_of
from effjax.moe.units import Site, of_known

STEPS = 100


def equal_clusters(
  affinity: Float[np.ndarray, "F F"], count: Size, *, seed: int = 0
) -> Int[np.ndarray, "F"]:
  """The cluster of each of F points: of equal sizes, with much affinity within them.

  For affinity = X Xᵀ it is k-means, with clusters C of equal size |C|: what Σ_x |x − mean of its
  cluster|² lacks to Σ_x |x|² is Σ_C Σ_{i,j ∈ C} affinity_ij / |C|. Where no eigenvalue is negative
  each step makes that greater, until none changes a cluster; there are a hundred at most. The first
  centres are points, each drawn in proportion to its squared distance to those before (k-means++).

  Args:
    affinity: symmetric.
    count: clusters E, which divides F.
    seed: of the first centres.

  Raises:
    ValueError: when E does not divide F.

  Example:
    >>> points = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]])
    >>> clusters = equal_clusters(points @ points.T, 2)
    >>> bool(clusters[0] == clusters[2] != clusters[1] == clusters[3])
    True
  """
  affinity = np.asarray(affinity)
  check_divides("equal_clusters: count", count, len(affinity))
  first = _spread(affinity, count, np.random.default_rng(seed))
  label = equal_assignment(np.diag(affinity)[first][None] - 2 * affinity[:, first])
  for _ in range(STEPS):
    mean = np.eye(count, dtype=affinity.dtype)[label] * (count / len(affinity))
    to_mean = affinity @ mean
    lengths = np.einsum("fe,fe->e", mean, to_mean)
    new = equal_assignment(lengths[None] - 2 * to_mean)
    if (new == label).all():
      break
    label = new
  return label


def _spread(affinity: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
  """Points that lie apart."""
  own = np.diag(affinity).astype(np.float64)
  chosen, distance = [int(rng.integers(len(own)))], np.full(len(own), np.inf)
  while len(chosen) < count:
    last = chosen[-1]
    distance = np.minimum(distance, np.maximum(own + own[last] - 2 * affinity[last], 0))
    distance[chosen] = 0
    share = distance if distance.any() else np.isin(np.arange(len(own)), chosen, invert=True)
    chosen.append(int(rng.choice(len(own), p=share / share.sum())))
  return chosen


@dataclasses.dataclass(frozen=True)
class Clusters:
  """A way to split: hidden units whose rows of a projection point alike are in one expert.

  The values of the parameters have to be known.

  Attributes:
    of: which projection's rows, "gate" or "up"; None is the gate's where there is one.
  """

  of: str | None = None

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    name = self.of or ("gate" if site.mlp.gated else "up")
    allowed = ("up", "gate") if site.mlp.gated else ("up",)
    if name not in allowed:
      raise ValueError(f"Clusters: of={name!r}; allowed: {', '.join(allowed)}")
    kernel = of_known(f"{name}/kernel", weights.materialize(site.params[name]["kernel"]))
    rows = kernel.T[among].astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return Parts.of_labels(among, equal_clusters(rows @ rows.T, experts, seed=seed_of(key)))
