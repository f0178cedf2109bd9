"""A directory that belongs to one configuration, and the rows of results kept in it.

A run writes `config.json` first, and appends one JSON object a line to `metrics.jsonl`, each row
forced to disk before the next is computed: whatever kills the process, the rows before are whole.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from effjax.core.lines import json_lines

CONFIG = "config.json"
METRICS = "metrics.jsonl"


def claim(workdir: str | os.PathLike, config: Any, *, free: tuple[str, ...] = ()) -> Path:
  """Makes `workdir` the directory of `config`, or checks that it already is.

  Args:
    workdir: the directory; made, with its parents, when missing.
    config: a dataclass instance or mapping of JSON values.
    free: fields that may differ between runs that share the directory (a choice of rows).

  Raises:
    ValueError: when the directory belongs to another configuration; names the fields that differ.
    OSError: when it cannot be written (read-only or full disk), naming it.

  Example:
    >>> import tempfile
    >>> directory = claim(tempfile.mkdtemp(), {"seed": 0})
    >>> claim(directory, {"seed": 1})
    Traceback (most recent call last):
    ...
    ValueError: workdir ... belongs to another configuration: seed is 0 there and 1 here; ...
  """
  workdir = Path(workdir)
  mine = _plain(config)
  path = workdir / CONFIG
  if path.exists():
    _require_same(workdir, read_json(path), mine, free)
    return workdir
  make(workdir)
  write_text(path, json.dumps(mine, indent=2) + "\n")
  return workdir


def make(directory: str | os.PathLike) -> None:
  """Makes a directory with its parents; nothing when it is there.

  Raises:
    OSError: when it cannot be made, naming it.
  """
  try:
    Path(directory).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise unwritable(directory, error) from error


def read_json(path: str | os.PathLike) -> Any:
  """The content of a JSON file.

  Raises:
    ValueError: when it is not JSON, naming it.
  """
  try:
    return json.loads(Path(path).read_text("utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a JSONL file, without a last line that was cut off; [] when there is no file.

  Raises:
    ValueError: for a line that is not JSON, naming file and line.
  """
  path = Path(path)
  if not path.exists():
    return []
  whole, _, _ = path.read_text("utf-8", errors="replace").rpartition("\n")
  return [row for _, row in json_lines(whole, path)]


def append_row(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
  """Appends one JSON line and forces it to disk; first removes a last line that was cut off.

  Raises:
    OSError: when the file cannot be written, naming it.

  Example:
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / METRICS
    >>> append_row(path, {"step": 1, "loss": 2.5})
    >>> read_rows(path)
    [{'step': 1, 'loss': 2.5}]
  """
  line = (json.dumps(dict(row)) + "\n").encode()
  try:
    with open(path, "ab+") as file:
      end = _end_of_last_line(file)
      if end < file.seek(0, os.SEEK_END):
        file.truncate(end)
      file.write(line)
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise unwritable(path, error) from error


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
  """Replaces a JSONL file by `rows` at one stroke (used to forget rows past a checkpoint)."""
  write_text(path, "".join(json.dumps(dict(row)) + "\n" for row in rows))


def write_text(path: str | os.PathLike, text: str) -> None:
  """Replaces a file at one stroke: readers see the old text or the new, never half.

  Raises:
    OSError: when the file cannot be written, naming it.
  """
  path = Path(path)
  new = path.with_name(path.name + ".new")
  try:
    with open(new, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    new.replace(path)
  except OSError as error:
    raise unwritable(path, error) from error


def _plain(config: Any) -> dict[str, Any]:
  record = dataclasses.is_dataclass(config) and not isinstance(config, type)
  fields = dataclasses.asdict(config) if record else dict(config)
  return json.loads(json.dumps(fields))


def _require_same(workdir: Path, theirs: dict, mine: dict, free: tuple[str, ...]) -> None:
  names = sorted((theirs.keys() | mine.keys()) - set(free))
  different = [name for name in names if theirs.get(name) != mine.get(name)]
  if different:
    fields = ", ".join(
      f"{n} is {theirs.get(n)!r} there and {mine.get(n)!r} here" for n in different
    )
    raise ValueError(
      f"workdir {str(workdir)!r} belongs to another configuration: {fields};"
      " allowed: the same configuration (goes on where it stopped), or another --workdir"
    )


def _end_of_last_line(file, block: int = 65536) -> int:
  """Offset after the last newline of a binary file; 0 when it holds none."""
  end = file.seek(0, os.SEEK_END)
  while end > 0:
    start = max(0, end - block)
    file.seek(start)
    newline = file.read(end - start).rfind(b"\n")
    if newline >= 0:
      return start + newline + 1
    end = start
  return 0


def unwritable(path: str | os.PathLike, error: OSError) -> OSError:
  """The error of a file that cannot be written, naming it, which Python's own may not."""
  return OSError(error.errno, f"cannot write ({error.strerror})", str(path))
