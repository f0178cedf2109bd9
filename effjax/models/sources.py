"""Where tensors come from: files that give one tensor at a time."""

import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

CHUNK_BYTES = 8 * 2**20


@runtime_checkable
class TensorSource(Protocol):
  """Named tensors in files, read one by one so that memory holds no second copy of a model.

  Attributes:
    path: the file or folder.
  """

  path: Path

  def names(self) -> list[str]:
    """The names of all tensors."""

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it."""

  def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """A tensor, written to `out` (any strides, converted to its type) where that is given."""


@runtime_checkable
class PackedSource(TensorSource, Protocol):
  """A source of which some matrices can stay in the blocks that the file holds them in."""

  def block_type(self, name: str) -> str | None:
    """The type of the blocks of a matrix, as `quant.GGUF` has it, or None for another tensor."""

  def read_blocks(self, name: str, out: np.ndarray) -> None:
    """Fills `out`, uint8 [rows, bytes of a row], with the blocks of a matrix."""


class MappedFile:
  """A memory-mapped file whose pages are given back once they have been read.

  Raises:
    FileNotFoundError: when there is no such file.
    ValueError: when it is empty.
  """

  def __init__(self, path: Path):
    if not path.is_file():
      raise FileNotFoundError(f"{path}: no such file")
    self.path, self.size = path, path.stat().st_size
    if not self.size:
      raise ValueError(f"{path}: is empty")
    with path.open("rb") as file:
      self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def __getitem__(self, span: slice) -> bytes:
    return self._bytes[span]

  def decode(
    self,
    name: str,
    start: int,
    row_bytes: int,
    out: np.ndarray,
    values: Callable[[np.ndarray], np.ndarray],
  ) -> None:
    """Fills the rows of `out`, tensor `name`, a few megabytes at a time.

    Args:
      name: what errors call the tensor.
      start: its first byte.
      row_bytes: how many bytes one row takes.
      out: the tensor [rows, …].
      values: bytes [n, row_bytes] → values of n rows.

    Raises:
      ValueError: for values that are not finite.
    """
    step = max(1, CHUNK_BYTES // row_bytes)
    for first in range(0, len(out), step):
      rows = out[first : first + step]
      begin, count = start + first * row_bytes, len(rows) * row_bytes
      raw = np.frombuffer(self._bytes, np.uint8, count, begin).reshape(len(rows), row_bytes)
      decoded = values(raw)
      if not np.isfinite(decoded).all():
        raise not_finite(self.path, name)
      rows[...] = decoded.reshape(rows.shape)
      self._release(begin, count)

  def _release(self, begin: int, count: int) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
      page = begin - begin % mmap.PAGESIZE
      self._bytes.madvise(mmap.MADV_DONTNEED, page, begin + count - page)


def check_apart(path: Path, spans: Mapping[str, tuple[int, int]]) -> None:
  """Raises ValueError where tensors (name → first byte, one past the last) share bytes."""
  end, before = 0, ""
  for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
    if start < end and stop > start:
      raise ValueError(f"{path}: damaged: tensor {name!r} overlaps tensor {before!r}")
    end, before = max(end, stop), name


def not_finite(path: Path, name: str) -> ValueError:
  """The error for a tensor of NaN or infinity."""
  return ValueError(f"{path}: tensor {name!r} holds values that are not finite: damaged")


def missing_tensor(path: Path, name: str, names: Iterable[str]) -> ValueError:
  """The error for a tensor that a file should hold."""
  near = [other for other in names if other.split(".")[-2:] == name.split(".")[-2:]][:3]
  hint = f"; it has, for example, {', '.join(near)}" if near else ""
  return ValueError(f"{path}: tensor {name!r} is missing{hint}")
