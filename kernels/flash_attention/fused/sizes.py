"""Sizes of a fused kernel's tiles: a small table, and what fits a call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Size:
  """Queries and keys of a tile; on GPUs the warps of a block and the stages of its pipeline."""

  queries: int
  keys: int
  warps: int = 4
  stages: int = 3

  def within(self, T: int, S: int, unit: int) -> "Size":
    """No larger than the power of two, from `unit`, that holds T or S."""
    least = lambda length: max(unit, 1 << (length - 1).bit_length())
    queries, keys = min(self.queries, least(T)), min(self.keys, least(S))
    return dataclasses.replace(self, queries=queries, keys=keys)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Those of the forward kernel and of the gradients of queries, of keys and values, of a bias.

  The bias's are those of the queries where they are not given.
  """

  forward: Size
  queries: Size
  keys: Size
  bias: Size | None = None


_SM90 = "NVIDIA H"  # 100, 200, …
_LARGEST = Size(128, 128, 8)
# The first row that matches: part of the device's name, bytes of an element, widest head.
# GPU rows compile for sm_90 without spilling registers, by jax 0.10.2 and as far as was compiled:
# for Hopper the fastest that do on an H200, causal at 8192 keys (not timed: the bias's, and the
# keys' at 64; over documents not compiled: the bias's at 128), for others the largest of two bytes.
_TABLE = {
  "gpu": [
    (_SM90, 2, 64, Sizes(Size(64, 128, 4), Size(64, 64, 4), Size(128, 64, 8), Size(128, 64, 8))),
    (_SM90, 2, 128, Sizes(Size(128, 128, 8), Size(64, 64, 4), Size(64, 128, 8), Size(128, 64, 8))),
    (_SM90, 2, 256, Sizes(Size(128, 64, 8), Size(128, 32, 8), Size(32, 64, 8), Size(64, 32, 8))),
    ("", 2, 64, Sizes(_LARGEST, _LARGEST, _LARGEST, Size(128, 64, 8))),
    ("", 2, 128, Sizes(Size(128, 64, 8), Size(128, 64, 8), Size(64, 128, 8))),
    ("", 2, 256, Sizes(Size(64, 64, 8), Size(64, 32, 8), Size(32, 64, 8))),
    ("", 4, 64, Sizes(Size(32, 64, 8), Size(32, 32, 4), Size(32, 32, 4, 2))),
    ("", 4, 128, Sizes(Size(32, 16, 4, 1), Size(32, 32, 8), Size(32, 32, 8))),
    ("", 4, 256, Sizes(Size(32, 16, 4, 1), Size(16, 16, 8), Size(16, 16, 4, 1))),
  ],
  "tpu": [
    ("", 2, 128, Sizes(Size(512, 1024), Size(512, 512), Size(512, 512))),
    ("", 4, 256, Sizes(Size(256, 256), Size(256, 256), Size(256, 256))),
  ],
}
_UNIT = {"gpu": 16, "tpu": 128}


def choose(
  platform: str, dtype: Any, width: int, T: int, S: int, device: str | None = None
) -> Sizes:
  """The table's sizes for a device, no larger than T queries and S keys need.

  Args:
    platform: "gpu" or "tpu".
    width: the wider of the heads of queries and values, up to 256.
    device: its name; the default device's when None.
  """
  device, itemsize = device or jax.devices()[0].device_kind, jnp.dtype(dtype).itemsize
  sizes = next(
    sizes
    for name, most_bytes, most_width, sizes in _TABLE[platform]
    if name in device and itemsize <= most_bytes and width <= most_width
  )
  fit = lambda size: size.within(T, S, _UNIT[platform])
  bias = sizes.bias and fit(sizes.bias)
  return Sizes(fit(sizes.forward), fit(sizes.queries), fit(sizes.keys), bias)
