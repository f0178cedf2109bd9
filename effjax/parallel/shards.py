"""Where the parts of an array lie when it is split over one axis of a mesh."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Shards:
  """Shardings over the N devices along one axis of a mesh.

  Attributes:
    mesh: the devices.
    axis: the name of the axis.
  """

  mesh: Mesh
  axis: str

  @property
  def replicated(self) -> NamedSharding:
    """Everything on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def rows(self) -> NamedSharding:
    """The first axis, which N divides."""
    return NamedSharding(self.mesh, PartitionSpec(self.axis))

  def split(self, x: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> NamedSharding:
    """The longest axis that N divides, the last of equals; replicated when N divides none.

    The first of three or more counts layers or experts and is the last resort: a scan reads it
    one by one.

    Example:
      >>> from effjax.parallel import make_mesh
      >>> tuple(Shards(make_mesh(data=1), "data").split(np.zeros((2, 8))).spec)
      (None, 'data')
    """
    n = self.mesh.shape[self.axis]
    inner = lambda i: i > 0 or len(x.shape) < 3
    fitting = [(inner(i), size, i) for i, size in enumerate(x.shape) if size and size % n == 0]
    if not fitting:
      return self.replicated
    _, _, longest = max(fitting)
    return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, self.axis))
