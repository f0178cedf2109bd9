"""The folder for fetched text and token files, and writes that are whole or absent."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_dir() -> Path:
  """`$EFFJAX_CACHE`, else `$XDG_CACHE_HOME/effjax`, else `~/.cache/effjax`; may not exist."""
  if chosen := os.environ.get("EFFJAX_CACHE"):
    return Path(chosen)
  base = os.environ.get("XDG_CACHE_HOME")
  return (Path(base) if base else Path.home() / ".cache") / "effjax"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
  """Lets `write` fill a temporary file beside `path`, then renames it there.

  Readers, other processes and an interruption never see half a file.
  Raises OSError where the folder cannot be written.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
  try:
    with os.fdopen(handle, "wb") as file:
      write(file)
    os.replace(temporary, path)
  except BaseException:
    Path(temporary).unlink(missing_ok=True)
    raise
