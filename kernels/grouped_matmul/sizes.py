"""Sizes of the tiles of grouped products: a small table, and what fits a call."""

import dataclasses

import jax
import jax.numpy as jnp

from effjax.core.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Size:
  """Of a program's tile.

  Attributes:
    rows: of x in a tile; of the sums of a matrix, as many of its lines.
    columns: outputs of a tile.
    step: what is summed at once; on TPUs rows that are multiplied at once.
    warps, stages: on GPUs of a block and of its pipeline.
  """

  rows: int
  columns: int
  step: int
  warps: int = 4
  stages: int = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Those of `products` and of `sums`."""

  products: Size
  sums: Size


_ANY = 1 << 30
# The first row that matches: part of the device's name, bytes of an element, the rows that a group
# has if all have as many. On GPUs of sizes that others found fast those that compile without
# spilling registers.
_TABLE = {
  "gpu": [
    ("NVIDIA H", 2, 64, Sizes(Size(64, 128, 64, 4), Size(128, 128, 64, 4))),
    ("NVIDIA H", 2, _ANY, Sizes(Size(128, 256, 64, 8), Size(128, 256, 64, 8))),
    ("", 2, _ANY, Sizes(Size(128, 128, 32, 8), Size(128, 128, 32, 8))),
    ("", 4, _ANY, Sizes(Size(64, 64, 32, 4), Size(64, 64, 32, 4))),
  ],
  "tpu": [("", 4, _ANY, Sizes(Size(512, 512, 128), Size(512, 512, 512)))],
}


def choose(
  platform: str, dtype: DTypeLike, rows: int, groups: int, device: str | None = None
) -> Sizes:
  """The table's sizes for a device, with tiles on GPUs no higher than a usual group needs.

  Args:
    platform: "gpu" or "tpu".
    rows, groups: of the product.
    device: its name; the default device's when None.
  """
  device, itemsize = device or jax.devices()[0].device_kind, jnp.dtype(dtype).itemsize
  usual = -(-rows // groups)
  sizes = next(
    sizes
    for name, most_bytes, most_rows, sizes in _TABLE[platform]
    if name in device and itemsize <= most_bytes and usual <= most_rows
  )
  height = min(sizes.products.rows, max(16, 1 << (usual - 1).bit_length()))
  if platform == "tpu":
    return sizes
  return dataclasses.replace(sizes, products=dataclasses.replace(sizes.products, rows=height))
