"""What a directory held when it was written: a record with the SHA-256 of each of its files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from effjax.train import workdir

RECORD = "record.json"


class Damaged(ValueError):
  """A directory does not hold what was written to it."""


def write(path: Path, record: dict[str, Any]) -> None:
  """Adds to `path` a record of what is in it.

  The record is a line of JSON, `record` and "files", and a line with its own SHA-256.
  """
  files = sorted(each for each in path.rglob("*") if each.is_file())
  digests = {each.relative_to(path).as_posix(): _digest(each.read_bytes()) for each in files}
  line = json.dumps({**record, "files": digests})
  workdir.write_text(path / RECORD, f"{line}\n{_digest(line.encode())}\n")


def read(path: Path) -> dict[str, Any]:
  """The record of a directory whose files are all as they were written.

  Raises:
    Damaged: naming the first file that is not.

  Example:
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp())
    >>> _ = (path / "a").write_text("one")
    >>> write(path, {"step": 1})
    >>> read(path)["step"]
    1
    >>> _ = (path / "a").write_text("two")
    >>> read(path)
    Traceback (most recent call last):
    ...
    effjax.train.records.Damaged: a is changed
  """
  lines = _bytes(path, RECORD).split(b"\n")
  if len(lines) != 3 or lines[2] or _digest(lines[0]) != lines[1].decode(errors="replace"):
    raise Damaged(f"{RECORD} is changed")
  record = json.loads(lines[0])
  for name, digest in record["files"].items():
    if _digest(_bytes(path, name)) != digest:
      raise Damaged(f"{name} is changed")
  return record


def _bytes(path: Path, name: str) -> bytes:
  try:
    return (path / name).read_bytes()
  except OSError as error:
    raise Damaged(f"{name} cannot be read ({error.strerror})") from None


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()
