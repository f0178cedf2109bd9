"""Sizes of a fused kernel's tiles: a small table, and what fits a call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Size:
  """Queries and keys of a tile, and what a platform needs to know besides.

  Attributes:
    warps, stages: on GPUs of a block and of its pipeline.
    part: on TPUs, how many of the queries (forward) or keys (gradients) of a tile are worked on at
      once, which divides them; all if None.
  """

  queries: int
  keys: int
  warps: int = 4
  stages: int = 3
  part: int | None = None

  def within(self, T: int, S: int, unit: int) -> "Size":
    """No larger than the power of two, from `unit`, that holds T or S."""
    least = lambda length: max(unit, 1 << (length - 1).bit_length())
    queries, keys = min(self.queries, least(T)), min(self.keys, least(S))
    part = self.part and min(self.part, queries, keys)
    return dataclasses.replace(self, queries=queries, keys=keys, part=part)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Those of the forward kernel and of the gradients of queries, of keys and values, of a bias.

  The bias's are those of the queries where they are not given. A TPU's kernel of keys and values
  gives the gradient of the queries too.
  """

  forward: Size
  queries: Size
  keys: Size
  bias: Size | None = None


_SM90 = "NVIDIA H"  # 100, 200, …
_V6E = "TPU v6"
_FEW, _ANY = 4, 1 << 30
# Of a bias: all four operands of a tile lie in shared memory as often as there are stages.
_BIAS, _TWO, _WIDE = Size(128, 64, 8), Size(128, 64, 8, 2), Size(64, 32, 8, 2)
_SMALL, _SMALL_WIDE = Size(64, 64, 4, 2), Size(32, 32, 4, 2)
_LEAST = Size(16, 16, 8, 1)
# The first row that matches: part of the device's name, bytes of an element, widest head, most
# arrays that the mask's predicate reads, which take registers of a GPU.
# On GPUs of two bytes the largest found that compile for sm_90 and sm_80 by jax 0.10.2 without
# spilling registers in a loop, on Hopper the fastest of them where tiles were timed on an H200.
_TABLE = {
  "gpu": [
    (_SM90, 2, 64, _ANY, Sizes(Size(64, 128, 4), Size(64, 64, 4), Size(64, 64, 4), _BIAS)),
    (_SM90, 2, 128, _FEW, Sizes(Size(128, 128, 8), Size(64, 64, 4), Size(64, 128, 8), _TWO)),
    (_SM90, 2, 128, _ANY, Sizes(Size(128, 64, 8), Size(64, 64, 4), Size(32, 128, 8), _TWO)),
    (_SM90, 2, 256, _ANY, Sizes(Size(128, 64, 8, 2), Size(128, 32, 8), Size(32, 64, 8), _WIDE)),
    ("", 2, 64, _ANY, Sizes(Size(64, 64, 4), Size(64, 64, 4), Size(64, 64, 8), _BIAS)),
    ("", 2, 128, _ANY, Sizes(Size(128, 64, 8), Size(64, 64, 8), Size(32, 64, 4), _SMALL)),
    ("", 2, 256, _ANY, Sizes(Size(64, 32, 8), Size(64, 16, 8), Size(32, 32, 8), _SMALL_WIDE)),
    ("", 4, 64, _ANY, Sizes(Size(32, 64, 8), Size(32, 32, 4, 2), Size(32, 32, 4, 2))),
    ("", 4, 128, _ANY, Sizes(Size(32, 16, 4, 1), Size(16, 16, 4, 2), Size(16, 32, 8, 2), _LEAST)),
    ("", 4, 256, _ANY, Sizes(Size(32, 16, 4, 1), Size(16, 16, 8, 2), _LEAST)),
  ],
  # For TPUs those of the fewest bundles to a pair of positions of which every mask and score fits
  # in what a program gets of VMEM, 16 MiB and on v6e 32, as libtpu of jax 0.10.2 compiles them.
  "tpu": [
    (_V6E, 2, 128, _ANY, Sizes(Size(512, 2048, part=128), Size(512, 512), Size(512, 1024))),
    (_V6E, 2, 256, _ANY, Sizes(Size(512, 1024, part=256), Size(512, 512), Size(512, 512))),
    ("", 2, 128, _ANY, Sizes(Size(512, 1024, part=128), Size(512, 512), Size(512, 1024, part=512))),
    ("", 2, 256, _ANY, Sizes(Size(512, 1024, part=128), Size(512, 512), Size(512, 512, part=256))),
    ("", 4, 256, _ANY, Sizes(Size(256, 256), Size(256, 256), Size(256, 256))),
  ],
}
_UNIT = {"gpu": 16, "tpu": 128}


def choose(
  platform: str,
  dtype: Any,
  width: int,
  T: int,
  S: int,
  device: str | None = None,
  mask: Any = None,
) -> Sizes:
  """The table's sizes for a device, no larger than T queries and S keys need.

  Args:
    platform: "gpu" or "tpu".
    width: the wider of the heads of queries and values, up to 256.
    device: its name; the default device's when None.
    mask: for what its predicate reads; one that reads nothing when None.
  """
  device, itemsize = device or jax.devices()[0].device_kind, jnp.dtype(dtype).itemsize
  features = () if mask is None else jax.eval_shape(lambda: _features(mask, T, S))
  arrays = len(jax.tree.leaves(features))
  sizes = next(
    sizes
    for name, most_bytes, most_width, most_arrays, sizes in _TABLE[platform]
    if name in device and itemsize <= most_bytes and width <= most_width and arrays <= most_arrays
  )
  fit = lambda size: size.within(T, S, _UNIT[platform])
  bias = sizes.bias and fit(sizes.bias)
  return Sizes(fit(sizes.forward), fit(sizes.queries), fit(sizes.keys), bias)


def _features(mask: Any, T: int, S: int) -> Any:
  return mask.features(jnp.zeros((1, T), jnp.int32), S)
