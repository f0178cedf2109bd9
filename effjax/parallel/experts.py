"""Expert parallelism: which axes of which parameters count experts, and are split over devices.

Lepikhin et al., "GShard", arXiv 2006.16668, section 3.3: each device along an axis of the mesh has
E / S of the experts of every mixture and computes the tokens of all devices that are given to them.
To all other parameters that axis is one more of data parallelism.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from effjax.core import spmd, trees
from effjax.core.known import number
from effjax.core.typing import Number, PyTree


@dataclasses.dataclass(frozen=True)
class Experts:
  """Experts split over an axis of the mesh.

  A parameter is one of experts where its roles are "experts" and others after it, perhaps with
  "layers" before. All that training keeps for it, such as moments, is split as it is.

  Attributes:
    roles: path of a parameter → the roles of its axes, as `layers.axes.axes(config)` says them for
      a Transformer and the property `axes` for a single layer.
    axis: the mesh axis.
    room: how many tokens a device can send to each of the S, as a multiple of what it does on
      average: min(k, S) / S of its M tokens with k choices. Choices beyond are dropped, and their
      share is in the metrics as "exchange_dropped". None is room for all, and none is dropped.

  Raises:
    ValueError: for roles without experts, and for a room that is not above 0.

  Example:
    >>> experts = Experts({"experts/up/kernel": ("experts", "embed", "hidden")})
    >>> experts.place("0/mu/experts/up/kernel"), experts.place("router/kernel")
    (0, None)
  """

  roles: Mapping[str, tuple[str, ...]] = dataclasses.field(hash=False)
  axis: str = "expert"
  room: Number | None = None

  def __post_init__(self):
    if self.room is not None:
      number("room", self.room, of="Experts", above=0)
    if not self.places:
      raise ValueError(
        f"Experts: roles of {len(self.roles)} parameters; allowed: some with experts, as "
        "layers.axes.axes(config) gives them for a config with a mixture"
      )

  @property
  def places(self) -> dict[str, int]:
    """Path → which axis counts experts, for the parameters of experts."""
    own = lambda roles: tuple(roles).index("experts") if "experts" in roles[:-1] else None
    found = {path: own(roles) for path, roles in self.roles.items()}
    return {path: place for path, place in found.items() if place is not None}

  def place(self, path: str) -> int | None:
    """Which axis counts experts in what is kept for a parameter, its path being in `path`."""
    within = lambda name: f"/{name}/" in f"/{path}/"
    return next((place for name, place in self.places.items() if within(name)), None)

  def kept(self, path: str) -> tuple[str | None, ...]:
    """How the last axes of the parameter at `path` are split wherever it is used."""
    name = next(name for name in self.places if f"/{name}/" in f"/{path}/")
    return (self.axis, *[None] * (len(self.roles[name]) - self.places[name] - 1))

  def spec(self, path: str, x: Any, mesh: Mesh) -> PartitionSpec:
    """How an array kept for the parameter at `path` is split over devices by its experts."""
    place = self.place(path)
    if place is None or len(x.shape) <= place or x.shape[place] % mesh.shape[self.axis]:
      return PartitionSpec()
    return PartitionSpec(*[None] * place, self.axis)

  def check(self, params: PyTree, mesh: Mesh) -> None:
    """Raises ValueError where the mesh does not divide experts, or `params` have none."""
    devices, found = mesh.shape[self.axis], trees.items(params)
    experts = {path: self.place(path) for path in found if self.place(path) is not None}
    if not experts:
      raise ValueError(f"Experts: roles of {trees.some(sorted(self.places))}; allowed: of params")
    for path, place in experts.items():
      if found[path].shape[place] % devices:
        given = f"{path} has {found[path].shape[place]} experts"
        raise ValueError(f"{given}; allowed: multiples of the mesh's {self.axis}={devices}")

  @property
  def dealt(self) -> spmd.Dealt:
    return spmd.Dealt(self.axis, None if self.room is None else float(self.room))
