"""Where a device's tokens are computed: by itself, or by the devices that have their experts.

Expert parallelism (GShard, Lepikhin et al., arXiv 2006.16668, section 3.3): S devices have E / S
experts each. A token goes once to every device that has some of its experts, is mixed there as if
there were no other experts, and what comes back is summed. So a device sends tokens to devices as
a mixture sends them to experts, by the same plan of slots, and one all-to-all carries them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.known import is_size
from effjax.core.numerics import nan_unless
from effjax.core.typing import Array, Dim, Float, Int, PyTree, Size
from effjax.kernels.grouped_matmul import Groups
from effjax.moe.plan import Plan, combine, end_to_end, in_slots, send

MOST_SLOTS = 2  # for each choice; where there were more, rows are sorted
Sent = tuple[Float[Array, "R D"], Int[Array, "1 E"], PyTree]


@dataclasses.dataclass(frozen=True)
class Alone:
  """A device that computes its tokens itself.

  Attributes:
    count: experts.
    capacity: slots of each, or None, where rows are sorted.
  """

  count: Size
  capacity: Size | None

  def send(self, x: Array, experts: Array, gates: Array) -> Sent:
    """The experts' rows, how many each has, and what `combine` needs."""
    if self.capacity is None:
      plan = end_to_end(experts, self.count)
    else:
      plan = in_slots(experts, self.count, self.capacity)
    return send(plan, x), plan.sizes, (plan, experts, gates)

  def combine(self, outputs: Float[Array, "R F"], kept: PyTree) -> Float[Array, "M F"]:
    """Tokens from the rows' outputs; NaN for one that should have had a row and has none."""
    plan, experts, gates = kept
    y = combine(plan, outputs, gates)
    if self.capacity is None:
      return y
    return nan_unless((plan.lies | (experts >= self.count)).all(axis=1), y)

  def groups(self, sizes: Int[Array, "P E"]) -> Groups:
    """Where the rows of all devices lie."""
    return Groups(sizes, self.capacity)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """A device that sends its tokens to those that have their experts.

  Attributes:
    axis: the mesh axis.
    devices: how many there are along it, S.
    room: how many tokens it sends to another at most.
    drops: whether it may have more, which are dropped.
    there: what a device does with its experts and the tokens that it is sent.
  """

  axis: str
  devices: Size
  room: Size
  drops: bool
  there: Alone

  def send(self, x: Array, experts: Array, gates: Array) -> Sent:
    """As `Alone.send`, of the tokens that other devices sent."""
    plan = self.plan(experts)
    sent = plan.choice // experts.shape[1]
    device = jnp.repeat(jnp.arange(self.devices), self.room)[:, None]
    theirs = experts.at[sent].get(mode="fill", fill_value=self.devices * self.there.count)
    theirs = jnp.where(self._device(theirs) == device, theirs % self.there.count, self.there.count)
    first = jnp.argsort(theirs == self.there.count, axis=1, stable=True)
    first = first[:, : min(experts.shape[1], self.there.count)]
    own = (jnp.take_along_axis(a, first, axis=1) for a in (theirs, send(plan, gates)))
    rows, sizes, kept = self.there.send(*(self._swap(a) for a in (send(plan, x), *own)))
    return rows, sizes, (plan, kept)

  def combine(self, outputs: Float[Array, "R F"], kept: PyTree) -> Float[Array, "M F"]:
    plan, there = kept
    y = self._swap(self.there.combine(outputs, there).astype(outputs.dtype))
    return combine(plan, y, jnp.ones_like(plan.row, jnp.float32))

  def groups(self, sizes: Int[Array, "P G"]) -> Groups:
    return Groups.dealt(sizes, self.devices, self.there.capacity, self.axis)

  def plan(self, experts: Int[Array, "M k"]) -> Plan:
    """The slots in which tokens go to devices, each once to a device."""
    device = self._device(experts)
    again = jnp.tril(device[:, :, None] == device[:, None], -1).any(axis=2)
    return in_slots(jnp.where(again, self.devices, device), self.devices, self.room)

  def dropped(self, experts: Int[Array, "M k"]) -> Int[Array, "M"]:
    """How many choices of each token find no room."""
    plan, device = self.plan(experts), self._device(experts)
    goes = ((device[:, :, None] == device[:, None]) & plan.lies[:, None]).any(axis=2)
    return ((device < self.devices) & ~goes).sum(axis=1)

  def _device(self, experts: Array) -> Array:
    return jnp.minimum(experts // self.there.count, self.devices)

  def _swap(self, x: Any) -> Any:
    """Block s goes to device s, and block s is what comes from it."""
    return jax.lax.all_to_all(x, self.axis, 0, 0, tiled=True)


def way(
  rows: PyTree, experts: Int[Array, "M k"], count: Size, capacity: Dim | None
) -> Alone | Exchange:
  """What each device does with its tokens, under the split that is in force.

  Args:
    rows: what devices have their own part of.
    experts: the experts of each token, among the rows.
    count: experts E.
    capacity: the most tokens that an expert has, or None.

  Raises:
    ValueError: for experts that the devices do not divide.
  """
  parts, dealt = spmd.devices(rows), spmd.experts_dealt(rows)
  shape = experts.shape[0] // parts, experts.shape[1]
  if dealt is None:
    return Alone(count, _slots(capacity, count, shape))
  split, devices = dealt[0], check_dealt(count, dealt)
  own = count // devices
  enough = room = shape[0] if capacity is None else min(shape[0], own * capacity)
  if split.room is not None:
    mean = shape[0] * min(shape[1], devices) / devices
    room = max(1, min(room, math.ceil(split.room * mean)))
  sent = devices * room, min(shape[1], own)
  there = Alone(own, _slots(capacity, own, sent))
  return Exchange(split.axis, devices, room, room < enough, there)


def check_dealt(count: Size, dealt: tuple[spmd.Dealt, int] | None) -> int:
  """Over how many devices E experts are dealt; ValueError where they do not divide E."""
  if dealt is None:
    return 1
  split, devices = dealt
  if count % devices:
    allowed = f"multiples of the mesh's {split.axis}={devices}"
    raise ValueError(f"mixture of {count} experts; allowed: {allowed}")
  return devices


def _slots(capacity: Dim | None, count: Size, shape: tuple[Dim, Dim]) -> Size | None:
  """Slots of each expert; None where there would be many more than there can be rows."""
  if capacity is None or not is_size(capacity, *shape):
    return None
  most = min(capacity, shape[0])
  return most if 0 < count * most <= MOST_SLOTS * shape[0] * shape[1] else None
