"""Ways to split by what hidden units matter to each of several groups of texts.

LLaMA-MoE (Zhu et al., arXiv 2406.16554, section 3.1). Units are of one expert each, or several
experts have the same ("sharing-inner"); those that most want may be set aside as a residual that
every token visits ("sharing-inter").
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effjax.core.known import number
from effjax.core.typing import Float, Int, Key, Size
from effjax.moe.splitting.assignment import equal_assignment
from effjax.moe.splitting.ways import Parts, Way, check_divides
from effjax.moe.units import Site

Groups = Sequence[Mapping[str, Any]]  # of each group what `importance` gives


@dataclasses.dataclass(frozen=True, eq=False)
class Important:
  """A way to split: every unit in one expert, all of one size, with the most importance in all.

  Expert e has units that matter to group e: Σ_u v[expert of u, u] is the greatest there is, where
  the authors' code takes the largest that is left again and again.

  Attributes:
    groups: of each expert what `importance` gives for its texts.
  """

  groups: Groups

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    check_divides("experts", experts, len(among))
    importance = of_groups(self, site, experts)[:, among]
    return Parts.of_labels(among, equal_assignment(-importance.T))


@dataclasses.dataclass(frozen=True, eq=False)
class SharingInner:
  """A way to split: each expert has the units that matter most to its group, whoever else has them.

  Some units are in several experts and some in none: all experts together are not the dense MLP.

  Attributes:
    groups: of each expert what `importance` gives for its texts.
    width: units of an expert; None is one E-th of all.
  """

  groups: Groups
  width: Size | None = None

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    bounds: Any = {"integer": True, "least": 1, "most": len(among)}
    if self.width is None:
      check_divides("experts", experts, len(among))
    width = self.width or len(among) // experts
    width = number("width", width, of="SharingInner", **bounds)
    return Parts(among[_best(of_groups(self, site, experts)[:, among], width)])


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
  """A way to split: some units are every token's, and the others are split in another way.

  Where that one gives each unit to one expert, the shared units and all experts together are the
  dense MLP.

  Attributes:
    by: the other way.
    groups: of some groups of texts what `importance` gives for them.
    shared: number of units that are every token's: those that are among the best, as many as an
      expert would have, of the most groups, and of these the most important.
  """

  by: Way
  groups: Groups
  shared: Size

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    bounds: Any = {"integer": True, "least": 1, "most": len(among) - 1}
    shared = number("shared", self.shared, of="Residual", **bounds)
    importance = of_groups(self, site, None)[:, among]
    width = max(1, (len(among) - shared) // experts)
    wanted = most_wanted(importance, shared, width=width)
    left = np.setdiff1d(np.arange(len(among)), wanted)
    return self.by(site, among[left], experts, key)._replace(shared=among[wanted])


def most_wanted(
  importance: Float[np.ndarray, "G F"], count: Size, *, width: Size
) -> Int[np.ndarray, "count"]:
  """Units that the most groups have among their best: again and again all of the most wanted.

  Args:
    importance: of each unit to each group.
    count: how many units.
    width: how many of those left count as a group's best.

  Example:
    >>> most_wanted(np.array([[5.0, 4.0, 3.0, 0.0], [0.0, 4.0, 3.0, 5.0]]), 2, width=2).tolist()
    [1, 2]
  """
  left, found = np.ones(importance.shape[1], bool), np.zeros(0, np.int64)
  while len(found) < count:
    best = _best(np.where(left, importance, -np.inf), min(width, int(left.sum())))
    times = np.bincount(best.reshape(-1), minlength=len(left))
    most = np.flatnonzero(times == times.max())
    order = np.argsort(-importance[:, most].sum(axis=0), kind="stable")
    new = most[order][: count - len(found)]
    found, left[new] = np.concatenate([found, new]), False
  return found


def of_groups(way: Any, site: Site, count: Size | None) -> Float[np.ndarray, "G F"]:
  """The importance of each unit of a layer to each group.

  Raises:
    ValueError: for another number of groups than `count`, and where there is nothing of the layer.
  """
  name = type(way).__name__
  if len(way.groups) != (count or len(way.groups)) or not way.groups:
    allowed = f"{count}, one for each expert" if count else "one or more"
    raise ValueError(f"{name}: {len(way.groups)} groups; allowed: {allowed}")
  found = [site.statistic(f"{name}: groups", group) for group in way.groups]
  for each in found:
    if each.shape != (site.mlp.width,):
      allowed = f"{(site.mlp.width,)}, as importance gives it"
      raise ValueError(f"{name}: groups of shape {each.shape} at {site.path}; allowed: {allowed}")
  return np.stack(found)


def _best(importance: Float[np.ndarray, "G F"], width: int) -> Int[np.ndarray, "G width"]:
  return np.argsort(-importance, axis=1, kind="stable")[:, :width]
