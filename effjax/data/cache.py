"""The folder for fetched text and token files; files in it are whole or absent."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
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
  Raises OSError where the file cannot be written, naming it.
  """
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    with os.fdopen(handle, "wb") as file:
      write(file)
    os.replace(temporary, path)
  except OSError as error:
    raise OSError(error.errno, f"cannot write ({error.strerror})", str(path)) from error
  finally:
    if temporary is not None:
      Path(temporary).unlink(missing_ok=True)


def fetch(folder: Path, pattern: str, command: Sequence[str], advice: str) -> Path:
  """Runs a command that downloads a file to where it runs, and moves the file into `folder`.

  Raises FileNotFoundError, with what the command said and with `advice`, where it fails or no file
  that fits `pattern` came.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as fresh:
    result = subprocess.run(command, cwd=fresh, capture_output=True, text=True, timeout=900)
    files = sorted(Path(fresh).glob(pattern))
    if result.returncode or not files:
      raise FileNotFoundError(
        f"`{' '.join(command)}` failed: {result.stderr.strip() or 'no file came'}\n{advice}"
      )
    return files[0].rename(folder / files[0].name)
