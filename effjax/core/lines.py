"""Text in lines, and JSON in lines.

A line ends at LF or CR LF and nowhere else. `str.splitlines` also cuts at U+2028, U+0085, form
feeds and five more, which are characters like any other in JSON, in vocabularies and in prose.
"""

import json
import os
from collections.abc import Iterator
from typing import Any


def lines(text: str) -> list[str]:
  """The lines of a text, without their ends; a last one that is empty is none.

  Example:
    >>> lines("a\\u2028b\\r\\nc\\n")
    ['a\\u2028b', 'c']
  """
  parts = [part.removesuffix("\r") for part in text.split("\n")]
  return parts if parts[-1] else parts[:-1]


def json_lines(text: str, path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
  """(number, value) of each line that is not blank, numbered from 1.

  Raises:
    ValueError: for a line that is not JSON, naming `path`, where the text is from, and the number.

  Example:
    >>> list(json_lines('{"a": 1}\\n\\n[2]', "x.jsonl"))
    [(1, {'a': 1}), (3, [2])]
  """
  for number, line in enumerate(lines(text.removeprefix("\ufeff")), start=1):
    if line.strip():
      try:
        yield number, json.loads(line)
      except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
