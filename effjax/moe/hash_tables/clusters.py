"""Tables from what a trained model knows of tokens: together with their like, or apart from it."""

import numpy as np

from effjax.core.known import number
from effjax.core.typing import Array, Float, Int, Num, Size
from effjax.moe.hash_tables.balanced import generator

CHUNK = 1 << 14  # points whose distances are computed at a time


def clustered(
  embeddings: Float[Array | np.ndarray, "V D"], *, experts: Size, seed: Size = 0
) -> Int[np.ndarray, "V"]:
  """Similar ids to the same expert: clusters of a trained model's embeddings, by `kmeans`.

  Args:
    embeddings: a vector of each id.
    experts: number of experts E, at most V.
    seed: of the first centres.

  Example:
    >>> clustered(np.array([[0.0], [9.0], [0.1], [9.1]]), experts=2).tolist() in (
    ...   [0, 1, 0, 1], [1, 0, 1, 0])
    True
  """
  return kmeans(embeddings, clusters=experts, seed=seed)[0]


def dispersed(
  clusters: Num[Array | np.ndarray, "V"], *, experts: Size, seed: Size = 0
) -> Int[np.ndarray, "V"]:
  """Similar ids to different experts: each cluster is dealt to all experts in turn (section 3.1).

  Within a cluster the order is drawn, and the next goes on where the last one ended: of each
  cluster, and of all ids, no expert has two more than another.

  Args:
    clusters: the cluster of each id, as `clustered` gives them.
    experts: number of experts E.
    seed: of the order.

  Raises:
    ValueError: for clusters that are no vector of integers, or E below 1.

  Example:
    >>> table = dispersed(np.array([0, 0, 1, 1, 1, 1]), experts=2)
    >>> np.bincount(table[:2]).tolist(), np.bincount(table[2:]).tolist()
    ([1, 1], [2, 2])
  """
  experts = number("experts", experts, of="dispersed", integer=True, least=1)
  clusters = np.asarray(clusters)
  if clusters.ndim != 1 or not np.issubdtype(clusters.dtype, np.integer):
    given = f"clusters {clusters.dtype}{list(clusters.shape)}"
    raise ValueError(f"dispersed: {given}; allowed: integers [V]")
  drawn = generator(seed).permutation(clusters.size)
  order = drawn[np.argsort(clusters[drawn], kind="stable")]
  table = np.empty(clusters.size, np.int32)
  table[order] = np.arange(clusters.size) % experts
  return table


def kmeans(
  points: Float[Array | np.ndarray, "V D"], *, clusters: Size, seed: Size = 0, steps: Size = 100
) -> tuple[Int[np.ndarray, "V"], Float[np.ndarray, "K D"]]:
  """The cluster of each point and the centres, after Lloyd's algorithm from k-means++ centres.

  Minimises Σ_v |x_v − centre(v)|² until no point moves: each then has the nearest centre, and each
  centre is the mean of its points. A cluster that loses all of its points gets the one that is
  farthest from its own centre. Computed in float32, about the mean of all points.

  Args:
    points: vectors, at least as many as clusters.
    clusters: number of clusters K.
    seed: of the first centres.
    steps: rounds at most.

  Raises:
    ValueError: for points that are no finite vectors, or fewer than clusters.
  """
  found = np.asarray(points, np.float32)
  if found.ndim != 2 or not np.isfinite(found).all():
    raise ValueError(f"kmeans: points {found.shape}; allowed: finite vectors [V, D]")
  clusters = number("clusters", clusters, of="kmeans", integer=True, least=1, most=len(found))
  steps = number("steps", steps, of="kmeans", integer=True, least=1)
  middle = found.mean(axis=0)
  found = found - middle
  centres = _first_centres(found, clusters, generator(seed))
  nearest = np.full(len(found), -1)
  for _ in range(steps):
    before, (nearest, distance) = nearest, _nearest(found, centres)
    _fill(nearest, distance, clusters)
    if (nearest == before).all():
      break
    centres = np.stack([found[nearest == k].mean(axis=0) for k in range(clusters)])
  return nearest.astype(np.int32), centres + middle


def _first_centres(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  """Points drawn one after another by their squared distance to those drawn (k-means++)."""
  chosen = [int(rng.integers(len(points)))]
  distance = np.full(len(points), np.inf)
  while len(chosen) < count:
    to_last = np.square(points - points[chosen[-1]]).sum(axis=1, dtype=np.float64)
    distance = np.minimum(distance, to_last)
    distance[chosen] = 0
    total = distance.sum()
    odds = distance / total if total > 0 else np.isin(np.arange(len(points)), chosen, invert=True)
    chosen.append(int(rng.choice(len(points), p=odds / odds.sum())))
  return points[chosen]


def _nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The nearest centre of each point, of equally near ones the first, and the squared distance."""
  parts = []
  for start in range(0, len(points), CHUNK):
    x = points[start : start + CHUNK]
    squares = np.square(centres).sum(axis=1)[None] - 2 * x @ centres.T
    nearest = squares.argmin(axis=1)
    parts.append((nearest, np.square(x - centres[nearest]).sum(axis=1)))
  nearest, squares = zip(*parts, strict=True)
  return np.concatenate(nearest), np.concatenate(squares)


def _fill(nearest: np.ndarray, distance: np.ndarray, clusters: int) -> None:
  """Gives every cluster without points the one that is farthest from its centre, in place."""
  for empty in np.flatnonzero(np.bincount(nearest, minlength=clusters) == 0):
    alone = np.bincount(nearest, minlength=clusters)[nearest] == 1
    farthest = np.where(alone, -1, distance).argmax()
    nearest[farthest], distance[farthest] = empty, 0
