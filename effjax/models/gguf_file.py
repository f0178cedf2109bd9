"""GGUF files, memory-mapped: metadata, and tensors dequantised one at a time.

Layout (the GGUF specification of the ggml project): magic, version, counts; key-value metadata;
name, shape, type and offset of each tensor; padding; data. The header is read here, since the
`gguf` package takes 15 s for a vocabulary of 262144; dequantisation is `gguf.quants`.
"""

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from effjax.kernels.quantized_matmul.gguf_blocks import SIZES
from effjax.models.sources import MappedFile, check_apart, missing_tensor, not_finite

SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MOST_NESTED = 4
BLOCK = 1 << 20  # bytes of a list of texts that are read at once


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Shape (slowest axis first), type, and first and last byte of a tensor in the file."""

  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  start: int
  stop: int


class GGUFFile:
  """A `TensorSource` over one GGUF file, with its `metadata`.

  Raises:
    FileNotFoundError: when there is no such file.
    ValueError: when it is no GGUF file, is truncated or damaged, naming what is wrong.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    self._file = MappedFile(self.path)
    header = _Header(self._file)
    self.metadata: dict[str, Any] = header.metadata
    self._tensors: dict[str, TensorInfo] = header.tensors

  def names(self) -> list[str]:
    return list(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._info(name).shape

  def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """The tensor as float32, or in `out`; dequantised a few megabytes at a time.

    Raises:
      ValueError: for an unknown name, and for values that are not finite.
    """
    info = self._info(name)
    out = np.empty(info.shape, np.float32) if out is None else out
    values = lambda raw: gguf.quants.dequantize(_typed(raw, info.kind), info.kind)
    row_bytes = (info.stop - info.start) // info.shape[0]
    try:
      self._file.decode(name, info.start, row_bytes, out, values)
    except NotImplementedError as error:
      allowed = "types that the gguf package dequantises"
      raise ValueError(
        f"{self.path}: tensor {name!r} is {info.kind.name}; allowed: {allowed}"
      ) from error
    return out

  def block_type(self, name: str) -> str | None:
    """The type of the blocks of a matrix, where `quant.GGUF` has it; else None."""
    info = self._info(name)
    return info.kind.name if len(info.shape) == 2 and info.kind.name in SIZES else None

  def read_blocks(self, name: str, out: np.ndarray) -> None:
    """Fills `out`, uint8 [rows, bytes of a row], with the blocks of a matrix as they are.

    Raises:
      ValueError: for an unknown name, and for blocks of values that are not finite.
    """
    info = self._info(name)

    def kept(raw: np.ndarray) -> np.ndarray:
      if not np.isfinite(gguf.quants.dequantize(raw, info.kind)).all():
        raise not_finite(self.path, name)
      return raw

    self._file.decode(name, info.start, out.shape[-1], out, kept)

  def _info(self, name: str) -> TensorInfo:
    if name not in self._tensors:
      raise missing_tensor(self.path, name, self._tensors)
    return self._tensors[name]


def _typed(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
  plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
  return raw.view(plain[kind]) if kind in plain else raw


def _texts(block: bytes, most: int) -> tuple[list[str], int]:
  """The texts that a block of bytes begins with, as far as it holds them, and their size."""
  texts: list[str] = []
  at = 0
  while len(texts) < most and at + 8 <= len(block):
    end = at + 8 + int.from_bytes(block[at : at + 8], "little")
    if end > len(block):
      break
    try:
      texts.append(block[at + 8 : end].decode())
    except UnicodeDecodeError:
      break
    at = end
  return texts, at


class _Header:
  """Reads the header front to back; every read checks that the file is long enough."""

  def __init__(self, data: MappedFile):
    path = self.path = data.path
    self.data, self.at = data, 0
    magic, version = self._take(4), self._number("I")
    if magic != b"GGUF":
      raise ValueError(f"{path}: begins with {magic!r}, not b'GGUF': no GGUF file, or damaged")
    if version not in VERSIONS:
      raise ValueError(f"{path}: GGUF version {version}; allowed: {VERSIONS}, little-endian")
    tensor_count, pair_count = self._number("Q"), self._number("Q")
    self.metadata = self._once(pair_count, lambda: self._value(self._number("I")))
    infos = self._once(tensor_count, self._tensor)
    alignment = self.metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
      raise ValueError(f"{path}: damaged: general.alignment={alignment!r}; allowed: from 1")
    base = -(-self.at // alignment) * alignment
    for name, (_, _, offset) in infos.items():
      if offset % alignment:
        raise ValueError(f"{path}: damaged: tensor {name!r} begins at {offset}, not aligned")
    self.tensors = {name: self._located(name, base, *info) for name, info in infos.items()}
    check_apart(path, {name: (info.start, info.stop) for name, info in self.tensors.items()})

  def _once(self, count: int, value: Callable[[], Any]) -> dict[str, Any]:
    """So many names, each followed by a value."""
    found: dict[str, Any] = {}
    for _ in range(count):
      name = self._string()
      if name in found:
        raise ValueError(f"{self.path}: damaged: {name!r} stands twice")
      found[name] = value()
    return found

  def _take(self, size: int) -> bytes:
    if self.at + size > self.data.size:
      raise ValueError(
        f"{self.path}: truncated or damaged: its header asks for {size} bytes at {self.at}, "
        f"and the file has {self.data.size}"
      )
    self.at += size
    return self.data[self.at - size : self.at]

  def _number(self, code: str):
    return struct.unpack("<" + code, self._take(struct.calcsize(code)))[0]

  def _string(self) -> str:
    start = self.at
    try:
      return self._take(self._number("Q")).decode()
    except UnicodeDecodeError as error:
      raise ValueError(f"{self.path}: damaged: the text at byte {start} is not UTF-8") from error

  def _value(self, kind: int, depth: int = 0):
    if kind == STRING:
      return self._string()
    if kind == ARRAY:
      return self._array(depth + 1)
    return self._number(self._code(kind))

  def _array(self, depth: int) -> list:
    if depth > MOST_NESTED:
      raise ValueError(f"{self.path}: damaged: arrays nested too deeply at byte {self.at}")
    kind, count = self._number("I"), self._number("Q")
    if kind == STRING:
      return self._strings(count)
    if kind == ARRAY:
      return [self._array(depth + 1) for _ in range(count)]
    code = self._code(kind)
    return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))

  def _strings(self, count: int) -> list[str]:
    """So many texts, such as a vocabulary's, by blocks, and one by itself where a block ends."""
    found: list[str] = []
    while len(found) < count:
      texts, size = _texts(self.data[self.at : self.at + BLOCK], count - len(found))
      self.at += size
      found += texts if len(found) + len(texts) == count else [*texts, self._string()]
    return found

  def _code(self, kind: int) -> str:
    if kind not in SCALARS:
      raise ValueError(f"{self.path}: damaged: metadata of type {kind} before byte {self.at}")
    return SCALARS[kind]

  def _tensor(self) -> tuple:
    axes = self._number("I")
    if not 1 <= axes <= 8:
      raise ValueError(f"{self.path}: damaged: a tensor of {axes} axes before byte {self.at}")
    shape = tuple(self._number("Q") for _ in range(axes))[::-1]
    return shape, self._number("I"), self._number("Q")

  def _located(self, name: str, base: int, shape: tuple, kind: int, offset: int) -> TensorInfo:
    try:
      quantisation = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
      raise ValueError(f"{self.path}: tensor {name!r} is of unknown type {kind}") from error
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    if not all(shape) or shape[-1] % block:
      raise ValueError(f"{self.path}: damaged: tensor {name!r} has shape {shape}")
    start = base + offset
    size = block_bytes
    for length in (*shape[:-1], shape[-1] // block):
      size *= length
    if start + size > self.data.size:
      raise ValueError(
        f"{self.path}: truncated: tensor {name!r} ends at byte {start + size}, "
        f"and the file has {self.data.size}"
      )
    return TensorInfo(shape, quantisation, start, start + size)
