"""Safetensors folders as Hugging Face writes them, single or sharded; read and written by tensor."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from effjax.models.sources import missing_tensor, row_chunks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ALIGNMENT = 8
WRITTEN = {
  np.dtype(np.float32): "F32",
  np.dtype(np.float16): "F16",
  np.dtype(ml_dtypes.bfloat16): "BF16",
}


class SafetensorsFolder:
  """A `TensorSource` over a folder's model.safetensors, or its shards and their index.

  Raises:
    FileNotFoundError: when the folder has neither, or lacks a shard that its index names.
    ValueError: when a file is truncated or damaged, or lacks a tensor that the index puts there.
  """

  def __init__(self, folder: str | Path):
    self.path = Path(folder)
    self._files = {name: _open(self.path / name) for name in self._file_names()}
    self._home = {key: name for name, file in self._files.items() for key in file.keys()}  # noqa: SIM118

  def names(self) -> list[str]:
    return list(self._home)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._slice(name).get_shape())

  def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """The tensor in the type of the file, or in `out`; copied a few megabytes at a time.

    Raises:
      ValueError: for an unknown name, and for values that are not finite.
    """
    stored, shape = self._slice(name), self.shape(name)
    if out is None or not shape:
      value = self._files[self._home[name]].get_tensor(name)
      if out is None:
        return value
      out[...] = value
      return out
    for rows in row_chunks(shape):
      values = stored[rows]
      if not np.isfinite(values).all():
        raise ValueError(f"{self.path}: tensor {name!r} holds values that are not finite: damaged")
      out[rows] = values
    return out

  def _slice(self, name: str):
    if name not in self._home:
      raise missing_tensor(self.path, name, self._home)
    return self._files[self._home[name]].get_slice(name)

  def _file_names(self) -> list[str]:
    if (self.path / SINGLE).is_file():
      return [SINGLE]
    if not (self.path / INDEX).is_file():
      raise FileNotFoundError(f"{self.path}: neither {SINGLE} nor {INDEX} is there")
    shards = sorted(set(self._index().values()))
    absent = [name for name in shards if not (self.path / name).is_file()]
    if absent:
      raise FileNotFoundError(f"{self.path}: {INDEX} names shards that are missing: {absent}")
    return shards

  def _index(self) -> dict[str, str]:
    try:
      return json.loads((self.path / INDEX).read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
      raise ValueError(f"{self.path / INDEX}: damaged: {error!r}") from error


def _open(path: Path):
  try:
    return safe_open(path, "np")
  except SafetensorError as error:
    raise ValueError(f"{path}: truncated, damaged, or no safetensors file: {error}") from error


Stored = tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def write(file: IO[bytes], tensors: dict[str, Stored]) -> None:
  """Writes tensors one after the other, so that one at a time is in memory.

  Args:
    file: open for binary writing.
    tensors: name → (shape, type, function that gives the array).

  Raises:
    ValueError: for a type that is not float32, float16 or bfloat16.
  """
  header, at = {"__metadata__": {"format": "pt"}}, 0
  for name, (shape, dtype, _) in tensors.items():
    if dtype not in WRITTEN:
      allowed = ", ".join(str(kind) for kind in WRITTEN)
      raise ValueError(f"tensor {name!r} is {dtype}; allowed: {allowed}")
    size = int(np.prod(shape)) * dtype.itemsize
    header[name] = {"dtype": WRITTEN[dtype], "shape": shape, "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % ALIGNMENT)
  file.write(struct.pack("<Q", len(text)) + text)
  for _, dtype, make in tensors.values():
    file.write(np.ascontiguousarray(make(), dtype).reshape(-1).view(np.uint8).data)
