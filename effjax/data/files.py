"""Text of one's own, `path:FILE_OR_FOLDER`: how its files are read and what is held out."""

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path

from effjax.core.lines import json_lines
from effjax.data import cleaning
from effjax.data.corpus import VALIDATION, Corpus, Document
from effjax.data.splits import divide

PART_CHARACTERS = 8192
SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".htm", ".jsonl")
OPTION = "?validation="


def read(source: str) -> Corpus:
  """The corpus of a source "path:FILE_OR_FOLDER", or with "?validation=" after it.

  Raises:
    FileNotFoundError: for a path that does not exist.
    ValueError: for a folder without text, a file that cannot be read as its name says, with the
      line where it has lines, and a share of validation text out of range.
  """
  location = source.removeprefix("path:")
  held_out: str | float = VALIDATION
  if OPTION in location and not Path(location).expanduser().exists():
    location, _, option = location.partition(OPTION)
    held_out = _share(option)
  if isinstance(held_out, float):
    return divide(Corpus(source, tuple(_documents(location))), held_out)
  apart = Path(held_out).expanduser().resolve()
  split = lambda name, documents: [dataclasses.replace(d, split=name) for d in documents]
  kept = _documents(location, without=apart)
  parts = split("train", kept), split("validation", _documents(held_out))
  return Corpus(source, tuple(document for part in parts for document in part))


def _share(option: str) -> str | float:
  """A share, or the path of what is held out."""
  try:
    share = float(option)
  except ValueError:
    return option
  if not 0 <= share < 1:
    raise ValueError(f"validation={option}; allowed: from 0, below 1, or a file or folder")
  return share


def _documents(location: str, without: Path | None = None) -> Iterator[Document]:
  """Those of a file or folder, but not of what lies in `without`."""
  root = Path(location).expanduser()
  if not root.exists():
    raise FileNotFoundError(f"text source 'path:{location}': there is no such file or folder")
  domain = _name(root.resolve().name)
  if root.is_file():
    for document in _file(root, domain, _name(root.name)):
      yield from _in_parts(document)
    return
  paths = sorted(path for path in root.rglob("*") if _suffix(path) in SUFFIXES and path.is_file())
  if without is not None:
    paths = [path for path in paths if not path.resolve().is_relative_to(without)]
  if not paths:
    raise ValueError(f"text source 'path:{location}': no file ends in {', '.join(SUFFIXES)}")
  for path in paths:
    yield from _file(path, domain, _name(path.relative_to(root).as_posix()))


def _file(path: Path, domain: str, title: str) -> Iterator[Document]:
  if _suffix(path) == ".jsonl":
    for number, record in json_lines(_decode(path), path):
      yield Document(domain, f"{title}:{number}", _record(record, f"{path}, line {number}"))
  elif _suffix(path) in (".html", ".htm"):
    yield Document(domain, title, cleaning.html_to_text(_decode(path)))
  else:
    yield Document(domain, title, cleaning.normalise(_decode(path)))


def _record(record: object, where: str) -> str:
  text = record.get("text") if isinstance(record, dict) else None
  if not isinstance(text, str):
    raise ValueError(f'{where}: it must be {{"text": "…"}}')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"{where}: its text has half of a surrogate pair: {error}") from error
  return cleaning.normalise(text)


def _decode(path: Path) -> str:
  """The text of a file, a byte-order mark left out."""
  try:
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from error


def _suffix(path: Path) -> str:
  return path.suffix.lower()


def _name(name: str) -> str:
  """A name that can be encoded, whatever bytes a disk has for it."""
  return os.fsencode(name).decode(errors="replace")


def _in_parts(document: Document) -> Iterator[Document]:
  """A long text cut at line ends, so that one file gives both splits something."""
  part: list[str] = []
  size = number = 0
  for line in io.StringIO(document.text):
    if part and size + len(line) > PART_CHARACTERS:
      yield Document(document.domain, f"{document.title}#{number:05d}", "".join(part))
      part, size, number = [], 0, number + 1
    part.append(line)
    size += len(line)
  yield Document(document.domain, f"{document.title}#{number:05d}", "".join(part))
