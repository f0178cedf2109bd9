"""Assigning points to parts of equal size at the least cost."""

import itertools

import numpy as np

from effjax.core.typing import Float, Int


def equal_assignment(cost: Float[np.ndarray, "F E"]) -> Int[np.ndarray, "F"]:
  """The part of each of F points: Σ cost[point, part] is least among those of F / E points a part.

  A flow of least cost, by shortest augmenting paths: every point goes to its cheapest part, and
  while a part has too many, one is moved on along the path from part to part that costs least, to a
  part that has too few.

  Args:
    cost: finite.

  Raises:
    ValueError: when E does not divide F, or a cost is not finite.

  Example:
    >>> equal_assignment(np.array([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0], [0.0, 9.0]])).tolist()
    [0, 1, 1, 0]
  """
  points, parts = cost.shape
  if points % parts or not np.isfinite(cost).all():
    raise ValueError(f"cost {cost.shape}; allowed: finite numbers, of E parts that divide F points")
  cost = cost.astype(np.float64)
  label = cost.argmin(axis=1)
  surplus = np.bincount(label, minlength=parts) - points // parts
  moved = np.empty((parts, parts), np.int64)  # from part to part, the point that is moved for least
  price = np.full((parts, parts), np.inf)
  stale = list(range(parts))
  while (surplus > 0).any():
    for part in stale:
      inside = np.flatnonzero(label == part)
      if len(inside):
        dearer = cost[inside] - cost[inside, part][:, None]
        first = dearer.argmin(axis=0)
        moved[part], price[part] = inside[first], dearer[first, np.arange(parts)]
      else:
        price[part] = np.inf
    stale = _cheapest(price, surplus)
    for start, end in itertools.pairwise(stale):
      label[moved[start, end]] = end
    surplus[stale[0]] -= 1
    surplus[stale[-1]] += 1
  return label


def _cheapest(price: Float[np.ndarray, "E E"], surplus: Int[np.ndarray, "E"]) -> list[int]:
  """The cheapest path from some part with a surplus to some part that lacks points."""
  distance, before = np.where(surplus > 0, 0.0, np.inf), np.full(len(price), -1)
  slack = 1e-12 * np.abs(price[np.isfinite(price)]).max(initial=0)  # rounding makes no cycles
  for _ in range(len(price)):
    through = distance[:, None] + price
    best = through.argmin(axis=0)
    shorter = through[best, np.arange(len(price))] < distance - slack
    if not shorter.any():
      break
    distance = np.where(shorter, through.min(axis=0), distance)
    before = np.where(shorter, best, before)
  path = [int(np.where(surplus < 0, distance, np.inf).argmin())]
  while before[path[-1]] >= 0:
    path.append(int(before[path[-1]]))
  return path[::-1]
