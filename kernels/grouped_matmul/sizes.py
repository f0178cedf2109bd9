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


# The first row that matches: part of the device's name, bytes of an element.
_TABLE = {
  "gpu": [
    ("NVIDIA H", 2, Sizes(Size(128, 128, 64), Size(128, 128, 64))),
    ("", 2, Sizes(Size(128, 128, 32), Size(128, 128, 32))),
    ("", 4, Sizes(Size(64, 64, 32), Size(64, 64, 32))),
  ],
  "tpu": [("", 4, Sizes(Size(512, 512, 128), Size(512, 512, 512)))],
}


def choose(platform: str, dtype: DTypeLike, rows: int, groups: int, device: str | None = None):
  """The table's sizes for a device, with rows of a tile no more than a group's usual ones need.

  Args:
    platform: "gpu" or "tpu".
    rows, groups: of the product.
    device: its name; the default device's when None.
  """
  device, itemsize = device or jax.devices()[0].device_kind, jnp.dtype(dtype).itemsize
  table = ((name in device and itemsize <= most, sizes) for name, most, sizes in _TABLE[platform])
  sizes = next(sizes for fits, sizes in table if fits)
  usual = max(16, 1 << (-(-rows // groups) - 1).bit_length())
  return dataclasses.replace(
    sizes, products=dataclasses.replace(sizes.products, rows=min(sizes.products.rows, usual))
  )
