"""Files of a folder that somebody else made: read inside it only, and named when damaged."""

import collections
import json
from pathlib import Path
from typing import Any


class Folder:
  """A folder, and files in it by name.

  A link that leads out of the folder is refused, as is a name that does; but a snapshot in the
  cache of Hugging Face's hub may link to the blobs beside it.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    self._root = self.path.resolve()

  def file(self, name: str) -> Path:
    """Where the file `name` is, or would be.

    Raises:
      ValueError: when that is not inside the folder.
    """
    try:
      target = (self._root / name).resolve()
      allowed = target.is_relative_to(self._root) or target.parent == self._blobs()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with byte 0
      allowed = False
    if not allowed:
      raise ValueError(f"{self.path}: file {name!r}; allowed: files inside the folder")
    return self.path / name

  def has(self, name: str) -> bool:
    """Whether there is a file `name`."""
    return self.file(name).is_file()

  def text(self, name: str) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: when it is not UTF-8, or not inside the folder.
    """
    path = self.file(name)
    try:
      return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
      raise ValueError(f"{path}: damaged: {error}") from error

  def json(self, name: str) -> dict[str, Any]:
    """The object in a file; as `text`, and ValueError where there is no object in it."""
    return parse(self.text(name), str(self.file(name)))

  def _blobs(self) -> Path | None:
    return self._root.parents[1] / "blobs" if self._root.parent.name == "snapshots" else None


def parse(text: str | bytes, where: str) -> dict[str, Any]:
  """The JSON object that a text is.

  Raises:
    ValueError: for anything else, and for a field that stands twice; begins with `where`.
  """
  try:
    value = json.loads(text, object_pairs_hook=_once)
  except RecursionError as error:
    raise ValueError(f"{where}: damaged: nested too deeply") from error
  except ValueError as error:
    raise ValueError(f"{where}: damaged: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{where}: damaged: {type(value).__name__}; allowed: an object")
  return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    raise ValueError(f"field {counts.most_common(1)[0][0]!r} stands twice")
  return found
