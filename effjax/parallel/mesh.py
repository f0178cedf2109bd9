"""Meshes of devices by named axes."""

import contextlib
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from effjax.core.known import number
from effjax.core.typing import Size

THREADS_PER_DEVICE = 8


def make_mesh(*, devices: Sequence[jax.Device] | None = None, **axes: Size) -> Mesh:
  """A mesh with the given axes, the last one varying fastest over `devices`.

  One size may be −1: what is left. Sizes that multiply to less than the number of devices, and
  divide it, take the first ones.

  Args:
    devices: the devices; None means all.
    **axes: name = size, such as data=4, tensor=2.

  Raises:
    ValueError: for no axes, a size below 1, or sizes that do not divide the number of devices.

  Example:
    >>> dict(make_mesh(data=1).shape)
    {'data': 1}
  """
  devices = jax.devices() if devices is None else list(devices)
  axes = {name: number(name, size, of="make_mesh", integer=True) for name, size in axes.items()}
  open_axes = [name for name, size in axes.items() if size == -1]
  if not axes or len(open_axes) > 1 or any(size < 1 and size != -1 for size in axes.values()):
    raise ValueError(f"make_mesh: axes {axes}; allowed: sizes from 1, at most one of them -1")
  fixed = math.prod(size for size in axes.values() if size != -1)
  if len(devices) % fixed:
    raise ValueError(
      f"make_mesh: axes {axes} need a multiple of {fixed} devices, and there are {len(devices)}"
    )
  sizes = {name: len(devices) // fixed if size == -1 else size for name, size in axes.items()}
  chosen = np.array(devices[: math.prod(sizes.values())]).reshape(tuple(sizes.values()))
  return Mesh(chosen, tuple(sizes))


def simulate_devices(count: int) -> list[jax.Device]:
  """`count` CPU devices; a process that has begun to compute keeps the number it has.

  XLA's CPU backend gives a thread to each collective that waits. With no more threads than devices,
  two collectives of one program can hold them all and wait for one another for ever, so the pool is
  made larger too.

  Raises:
    ValueError: when the process has begun with fewer.

  Example:
    >>> len(simulate_devices(1))
    1
  """
  os.environ.setdefault("PJRT_NPROC", str(THREADS_PER_DEVICE * count))
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise ValueError(f"{count} CPU devices are asked for and the process began with {len(devices)}")
  return devices[:count]
