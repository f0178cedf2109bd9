"""Where the parts of an array lie when it is split over one axis of a mesh."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core import weights
from effjax.core.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Shards:
  """Shardings over the N devices along some axes of a mesh.

  Attributes:
    mesh: the devices.
    axis: the name of an axis, or of several.
    kept: over which axes of the mesh the last axes of a matrix are split besides, wherever it is
      used, as ("expert", None, None).
  """

  mesh: Mesh
  axis: str | tuple[str, ...]
  kept: tuple[str | None, ...] = ()

  @property
  def count(self) -> int:
    """How many devices, N."""
    axes = (self.axis,) if isinstance(self.axis, str) else self.axis
    return math.prod(self.mesh.shape[axis] for axis in axes)

  @property
  def replicated(self) -> NamedSharding:
    """Everything on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def rows(self) -> NamedSharding:
    """The first axis, which N divides."""
    return NamedSharding(self.mesh, PartitionSpec(self.axis))

  def whole(self, w: PyTree) -> PyTree:
    """Each array of an array or a `Weight` on every device, but for what is kept split."""
    if not self.kept:
      return jax.tree.map(lambda x: self.replicated, w)
    specs = weights.specs(w, (*[None] * (len(w.shape) - len(self.kept)), *self.kept))
    put = lambda spec: NamedSharding(self.mesh, spec)
    return jax.tree.map(put, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))

  def split(
    self,
    x: jax.Array | np.ndarray | jax.ShapeDtypeStruct,
    kept: PartitionSpec = PartitionSpec(),
  ) -> NamedSharding:
    """The longest axis that N divides, the last of equals; none when N divides none.

    The first of three or more counts layers or experts and is the last resort: a scan reads it
    one by one. Axes that are split as `kept` stay so.

    Example:
      >>> from effjax.parallel import make_mesh
      >>> tuple(Shards(make_mesh(data=1), "data").split(np.zeros((2, 8))).spec)
      (None, 'data')
    """
    n, spec = self.count, [*kept, *[None] * (len(x.shape) - len(kept))]
    inner = lambda i: i > 0 or len(x.shape) < 3
    free = [(i, size) for i, size in enumerate(x.shape) if size and spec[i] is None]
    fitting = [(inner(i), size, i) for i, size in free if size % n == 0]
    if fitting and self.axis:
      spec[max(fitting)[2]] = self.axis
    return NamedSharding(self.mesh, PartitionSpec(*_trimmed(spec)))


def _trimmed(spec: list) -> list:
  """Without what is None at the end."""
  return spec[: max((i + 1 for i, entry in enumerate(spec) if entry is not None), default=0)]
