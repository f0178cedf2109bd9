"""Safetensors as Hugging Face writes them, in one file or in shards, tensor by tensor.

A file is the length of a header, the header as JSON (type, shape and span of each tensor), and
the tensors. It is read and written here because the safetensors package hands out whole tensors
that it has copied, or writes from a dictionary that holds them all.
"""

import dataclasses
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from effjax.models.folders import Folder, parse
from effjax.models.sources import MappedFile, check_apart, missing_tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ALIGNMENT = 8
MOST_HEADER_BYTES = 100_000_000  # as the format has it
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
WRITTEN = {DTYPES[name]: name for name in ("F32", "F16", "BF16")}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Where a tensor lies, its shape and type."""

  file: MappedFile
  shape: tuple[int, ...]
  dtype: np.dtype
  start: int


class SafetensorsFolder:
  """A `TensorSource` over a folder's model.safetensors, or its shards and their index.

  Args:
    single: the name of the file where it is one; shards are those of a model.

  Raises:
    FileNotFoundError: when the folder has neither, or lacks a shard that its index names.
    ValueError: when a file is truncated or damaged, or lacks a tensor that the index puts there.
  """

  def __init__(self, folder: str | Path, single: str = SINGLE):
    self.path, self._folder = Path(folder), Folder(folder)
    self._tensors: dict[str, TensorInfo] = {}
    if self._folder.has(single):
      self._tensors = read_header(self._folder.file(single))
    elif single == SINGLE and self._folder.has(INDEX):
      self._read_shards()
    else:
      raise FileNotFoundError(f"{self.path}: neither {single} nor {INDEX} is there")

  def names(self) -> list[str]:
    return list(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._info(name).shape

  def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """The tensor in the type of the file, or in `out`; copied a few megabytes at a time.

    Raises:
      ValueError: for an unknown name, for values that are not finite, and for integers where `out`
        is given, which are no parameters.
    """
    info = self._info(name)
    if out is not None and info.dtype.kind in "iub":
      raise ValueError(f"{info.file.path}: tensor {name!r} is {info.dtype}; allowed: real numbers")
    out = np.empty(info.shape, info.dtype) if out is None else out
    if out.size:
      rows = out.reshape(1) if out.ndim == 0 else out
      row_bytes = info.dtype.itemsize * math.prod(rows.shape[1:])
      info.file.decode(name, info.start, row_bytes, rows, lambda raw: raw.view(info.dtype))
    return out

  def divide(self, ending: str, parts: Sequence[str]) -> None:
    """Gives the parts of tensors [E, R, …], whose names have this ending, names of their own.

    Args:
      ending: of the names.
      parts: the endings of as many equal parts of the R rows, with "{e}" for each of the E.

    Raises:
      ValueError: when there is such a name already.
    """
    for name in [name for name in self._tensors if name.endswith(ending)]:
      info, start = self._tensors[name], name.removesuffix(ending)
      if len(info.shape) < 2 or info.shape[1] % len(parts) or not math.prod(info.shape):
        continue
      shape = (info.shape[1] // len(parts), *info.shape[2:])
      size = math.prod(shape) * info.dtype.itemsize
      del self._tensors[name]
      for i, (e, part) in enumerate(itertools.product(range(info.shape[0]), parts)):
        own = start + part.format(e=e)
        if own in self._tensors:
          raise ValueError(f"{self.path}: tensors {name!r} and {own!r} are one; allowed: either")
        self._tensors[own] = dataclasses.replace(info, shape=shape, start=info.start + i * size)

  def _info(self, name: str) -> TensorInfo:
    if name not in self._tensors:
      raise missing_tensor(self.path, name, self._tensors)
    return self._tensors[name]

  def _read_shards(self) -> None:
    home = self._folder.json(INDEX).get("weight_map")
    if not isinstance(home, dict) or not all(isinstance(shard, str) for shard in home.values()):
      raise ValueError(f"{self.path / INDEX}: damaged: weight_map; allowed: tensor → file")
    files = {shard: self._folder.file(shard) for shard in sorted(set(home.values()))}
    absent = [shard for shard, path in files.items() if not path.is_file()]
    if absent:
      raise FileNotFoundError(f"{self.path}: {INDEX} names shards that are missing: {absent}")
    held = {shard: read_header(path) for shard, path in files.items()}
    for name, shard in home.items():
      if name not in held[shard]:
        raise ValueError(
          f"{self.path}: tensor {name!r} is missing in {shard}, where {INDEX} has it"
        )
    for shard, tensors in held.items():
      twice = sorted(tensors.keys() & self._tensors.keys())
      if twice:
        raise ValueError(f"{self.path}: tensor {twice[0]!r} is in {shard} and in another shard")
      self._tensors |= tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
  """The tensors of one safetensors file.

  Raises:
    ValueError: when the file is truncated or damaged, or holds a type that is not supported.
  """
  file = MappedFile(path)
  length = struct.unpack("<Q", file[:8])[0] if file.size >= 8 else file.size
  base = 8 + length
  if base > file.size or length > MOST_HEADER_BYTES:
    raise ValueError(f"{path}: truncated, damaged, or no safetensors file: no room for its header")
  header = parse(file[8:base], f"{path}: header")
  header.pop("__metadata__", None)
  tensors = {name: _info(file, base, name, entry) for name, entry in header.items()}
  check_apart(path, {k: (info.start, info.start + _bytes(info)) for k, info in tensors.items()})
  end = max((info.start + _bytes(info) for info in tensors.values()), default=base)
  if end < file.size:
    raise ValueError(f"{path}: damaged: {file.size - end} bytes after the last tensor")
  between = file.size - base - sum(map(_bytes, tensors.values()))
  if between:
    raise ValueError(f"{path}: damaged: {between} bytes between tensors")
  return tensors


def _info(file: MappedFile, base: int, name: str, entry: Any) -> TensorInfo:
  if not _is_entry(entry):
    raise ValueError(f"{file.path}: damaged: its header describes tensor {name!r} as {entry}")
  dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
  if dtype not in DTYPES:
    raise ValueError(f"{file.path}: tensor {name!r} is {dtype}; allowed: {', '.join(DTYPES)}")
  info = TensorInfo(file, tuple(shape), DTYPES[dtype], base + begin)
  if end - begin != _bytes(info) or begin % info.dtype.itemsize:
    what = f"tensor {name!r} is {dtype}{shape} in bytes {begin} to {end}"
    raise ValueError(f"{file.path}: damaged: {what}")
  if base + end > file.size:
    raise ValueError(
      f"{file.path}: truncated: tensor {name!r} ends at byte {base + end}, "
      f"and the file has {file.size}"
    )
  return info


def _is_entry(entry: Any) -> bool:
  counts = lambda x: isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)
  return (
    isinstance(entry, dict)
    and isinstance(entry.get("dtype"), str)
    and counts(entry.get("shape"))
    and counts(entry.get("data_offsets"))
    and len(entry["data_offsets"]) == 2
  )


def _bytes(info: TensorInfo) -> int:
  return info.dtype.itemsize * math.prod(info.shape)


Stored = tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def write(path: Path, tensors: dict[str, Stored]) -> None:
  """Writes tensors one after the other, so that one at a time is in memory.

  Args:
    path: the file to write, and to flush to disk.
    tensors: name → (shape, type, function that gives the array).

  Raises:
    ValueError: for a type that is not float32, float16 or bfloat16.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  at = 0
  for name, (shape, dtype, _) in tensors.items():
    if dtype not in WRITTEN:
      allowed = ", ".join(str(kind) for kind in WRITTEN)
      raise ValueError(f"tensor {name!r} is {dtype}; allowed: {allowed}")
    size = math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": WRITTEN[dtype], "shape": shape, "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % ALIGNMENT)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for _, dtype, make in tensors.values():
      file.write(np.ascontiguousarray(make(), dtype).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
