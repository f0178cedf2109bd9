"""The two files of a folder of peft: read whole or refused, written whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effjax.core import trees
from effjax.models import safetensors_files
from effjax.models.folders import Folder

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "effjax.json"
PREFIX = "base_model.model."  # before the name of each module


Block = list  # our path of a parameter, and numbers: what it has of a module's adapter
Parts = Mapping[str, list[Block]]  # by the module's name


class Written(NamedTuple):
  """What a folder holds: the fields of its configuration and its tensors.

  Attributes:
    parts: which parameters of a module have adapters, where peft cannot say it.
  """

  fields: Mapping[str, Any]
  tensors: Mapping[str, np.ndarray]
  parts: Parts = {}


NOTHING = Written({}, {})


class Archive:
  """The tensors of a folder, each of which has to be taken.

  Attributes:
    path: of the file, for messages.

  Raises:
    FileNotFoundError: when there is none.
    ValueError: when it is damaged, or not safetensors.
  """

  def __init__(self, folder: Folder):
    self.path = folder.file(TENSORS)
    if not folder.has(TENSORS):
      pickled = folder.path / "adapter_model.bin"
      there = f"{pickled.name} is a pickle; " if pickled.is_file() else ""
      raise FileNotFoundError(f"{self.path}: no such file; {there}allowed: safetensors")
    self._source = safetensors_files.SafetensorsFolder(folder.path, TENSORS)
    self._left = set(self._source.names())

  def names(self) -> list[str]:
    """The names of all tensors."""
    return self._source.names()

  def take(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """A tensor in float32; `shape` has None where any length is allowed.

    Raises:
      ValueError: when it is not there or of another shape.
    """
    found = self._source.shape(name)
    fits = len(found) == len(shape) and all(
      b in (None, a) for a, b in zip(found, shape, strict=True)
    )
    if not fits:
      allowed = ", ".join("any" if n is None else str(n) for n in shape)
      raise ValueError(
        f"{self.path}: tensor {name!r} has shape {found}; allowed for this model: ({allowed})"
      )
    self._left.discard(name)
    return self._source.read(name).astype(np.float32)

  def skip(self, name: str) -> None:
    """Passes over a tensor that no computation of the model needs."""
    self._left.discard(name)

  def finish(self) -> None:
    """Raises ValueError where a tensor has not been taken."""
    if self._left:
      raise ValueError(
        f"{self.path}: tensors that {CONFIG} says nothing of: {trees.some(sorted(self._left))}"
      )


def endings(archive: Archive, known: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
  """(tensor, module, what of it) of each tensor that ends in something known.

  Raises:
    ValueError: for a name that does not begin as those of peft.
  """
  for tensor in archive.names():
    ending = next((ending for ending in known if tensor.endswith(f".{ending}")), None)
    if not tensor.startswith(PREFIX) or ending is None:
      allowed = ", ".join(f"{PREFIX}….{ending}" for ending in known)
      raise ValueError(f"{archive.path}: tensor {tensor!r}; allowed: {allowed}")
    yield tensor, tensor.removeprefix(PREFIX).removesuffix(f".{ending}"), ending


def read_ours(folder: Folder) -> tuple[dict[str, str], Parts]:
  """(path → digest of the base, parts) that `write` wrote; empty where it was another.

  Raises:
    ValueError: where it is damaged.
  """
  values = folder.json(OURS) if folder.has(OURS) else {"base": {}, "parts": {}}
  strings = lambda x: isinstance(x, dict) and all(isinstance(text, str) for text in x.values())
  block = lambda x: isinstance(x, list) and [*map(type, x)] in ([str], [str, int, float])
  blocks = lambda x: isinstance(x, list) and all(map(block, x))
  lists = lambda x: isinstance(x, dict) and all(map(blocks, x.values()))
  base: Any = values.get("base")
  parts: Any = values.get("parts")
  if len(values) != 2 or not strings(base) or not lists(parts):
    raise ValueError(f"{folder.file(OURS)}: damaged: {values}; allowed: what peft.save wrote")
  return base, parts


def write(folder: Path, written: Written, base: Mapping[str, str]) -> Path:
  """Writes the files of a folder, each under another name until all are whole; gives the tensors'.

  Args:
    base: path → digest of each parameter of the model that is adapted.

  Raises:
    OSError: when they cannot be written.
  """
  stored = {name: _stored(x) for name, x in written.tensors.items()}
  config = json.dumps(written.fields, indent=2, sort_keys=True)
  writers = {
    OURS: lambda path: path.write_text(ours(base, written.parts)),
    CONFIG: lambda path: path.write_text(config),
    TENSORS: lambda path: safetensors_files.write(path, stored),
  }
  folder.mkdir(parents=True, exist_ok=True)
  new = {name: folder / f".{name}.new" for name in writers}
  try:
    for name, writer in writers.items():
      writer(new[name])
    for name, path in new.items():
      os.replace(path, folder / name)
  finally:
    for path in new.values():
      path.unlink(missing_ok=True)
  return folder / TENSORS


def ours(base: Mapping[str, str], parts: Parts) -> str:
  """The text of the file that peft does not have."""
  return json.dumps({"base": base, "parts": parts}, indent=2)


def _stored(x: np.ndarray) -> safetensors_files.Stored:
  return x.shape, x.dtype, lambda: x
