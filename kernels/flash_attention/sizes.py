"""Sizes of a fused kernel's tiles: a small table for each device."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
  """Queries and keys of a tile; on GPUs the warps of a block and the stages of its pipeline."""

  queries: int
  keys: int
  warps: int = 4
  stages: int = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Those of the forward kernel, of the queries' gradient, and of the keys' and values'."""

  forward: Size
  queries: Size
  keys: Size


def choose(dtype, width: int) -> Sizes:
  """Sizes for the default device."""
  return Sizes(Size(64, 64), Size(64, 64), Size(64, 64))
