"""Training over many devices: meshes, and where the arrays of a state lie on them."""

from effjax.parallel.experts import Experts
from effjax.parallel.mesh import make_mesh, simulate_devices
from effjax.parallel.placement import Anywhere, Placement
from effjax.parallel.zero import Zero, place

__all__ = ["Anywhere", "Experts", "Placement", "Zero", "make_mesh", "place", "simulate_devices"]
