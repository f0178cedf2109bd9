"""Where tensors come from: files that give one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

CHUNK_BYTES = 16 * 2**20


@runtime_checkable
class TensorSource(Protocol):
  """Named tensors in files, read one by one so that memory holds no second copy of a model."""

  def names(self) -> list[str]:
    """The names of all tensors."""

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it."""

  def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """A tensor, written to `out` (any strides, converted to its type) where that is given."""


def row_chunks(shape: tuple[int, ...], itemsize: int = 4) -> Iterator[slice]:
  """Slices of the first axis, each holding about `CHUNK_BYTES` of a tensor of `shape`.

  Example:
    >>> list(row_chunks((3, 2 * 2**20)))
    [slice(0, 2, None), slice(2, 3, None)]
  """
  row = itemsize * int(np.prod(shape[1:]))
  step = max(1, CHUNK_BYTES // max(row, 1))
  for start in range(0, shape[0], step):
    yield slice(start, min(start + step, shape[0]))


def missing_tensor(path: Path, name: str, names: Any) -> ValueError:
  """The error for a tensor that a file should hold."""
  near = [other for other in names if other.split(".")[-2:] == name.split(".")[-2:]][:3]
  hint = f"; it has, for example, {', '.join(near)}" if near else ""
  return ValueError(f"{path}: tensor {name!r} is missing{hint}")
