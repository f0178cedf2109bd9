"""Just enough of R's serialisation format to read character vectors out of an R package.

An installed package keeps its data in a pair of files: the index (`.rdx`, a compressed serialised
list of name → (offset, length)) and the values (`.rdb`, each compressed by itself). The format is
described in "R Internals", section 1.8, "Serialization Formats".
"""

import gzip
import struct
import zlib
from pathlib import Path

_NIL, _SYMBOL, _PAIRLIST, _CHAR, _LOGICAL, _INTEGER, _REAL, _STRING, _LIST = (
  254, 1, 2, 9, 10, 13, 14, 16, 19,
)  # fmt: skip
_REFERENCE, _ALTERNATIVE = 255, 238


class _Stream:
  """Reads one serialised object; symbols are numbered for later references to them."""

  def __init__(self, data: bytes):
    if data[:2] != b"X\n":
      raise ValueError("not R's binary serialisation format: it must start with 'X'")
    self.data, self.at = data, 2
    self.symbols: list[str] = []
    version = self.integer()
    self.at += 8
    if version == 3:
      self.take(self.integer())

  def take(self, count: int) -> bytes:
    if self.at + count > len(self.data):
      raise ValueError("R data ends early: the file is truncated")
    self.at += count
    return self.data[self.at - count : self.at]

  def integer(self) -> int:
    return struct.unpack(">i", self.take(4))[0]

  def numbers(self, code: str, size: int) -> list:
    count = self.integer()
    return list(struct.unpack(f">{count}{code}", self.take(size * count)))

  def characters(self) -> str | None:
    length = self.integer()
    return None if length < 0 else self.take(length).decode()

  def item(self):
    flags = self.integer()
    kind, has_attributes, has_tag = flags & 255, flags & 512, flags & 1024
    if kind == _NIL:
      return None
    if kind == _SYMBOL:
      self.symbols.append(self.item())
      return self.symbols[-1]
    if kind == _REFERENCE:
      return self.symbols[(flags >> 8) - 1]
    if kind == _PAIRLIST:
      return self.pairs(has_attributes, has_tag)
    if kind == _CHAR:
      return self.characters()
    value = self.vector(kind)
    attributes = self.item() if has_attributes else {}
    if kind == _LIST and "names" in attributes:
      return dict(zip(attributes["names"], value, strict=True))
    return value

  def pairs(self, has_attributes: int, has_tag: int) -> dict:
    if has_attributes:
      self.item()
    tag = self.item() if has_tag else None
    value = self.item()
    return {tag: value, **(self.item() or {})}

  def vector(self, kind: int) -> list:
    if kind in (_LOGICAL, _INTEGER):
      return self.numbers("i", 4)
    if kind == _REAL:
      return self.numbers("d", 8)
    if kind in (_STRING, _LIST):
      return [self.item() for _ in range(self.integer())]
    raise ValueError(f"R object of type {kind} is not supported: only lists and plain vectors are")


def _decompress(data: bytes) -> bytes:
  """A value of an `.rdb` file: its length, then zlib (bzip2 and xz start with a letter)."""
  if data[4:5] in (b"2", b"Z"):
    raise ValueError("R data compressed with bzip2 or xz is not supported; zlib is")
  return zlib.decompress(data[4:])


def read_package_data(index: Path) -> dict[str, list]:
  """The vectors stored in an R package's data file, by name; `index` is the `.rdx` file.

  Raises ValueError where the file is truncated or holds anything but lists and plain vectors.
  """
  data = index.read_bytes()
  data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else zlib.decompress(data)
  values = index.with_suffix(".rdb").read_bytes()
  entries = _Stream(data).item()["variables"]
  return {
    name: _Stream(_decompress(values[offset : offset + length])).item()
    for name, (offset, length) in sorted(entries.items())
  }
