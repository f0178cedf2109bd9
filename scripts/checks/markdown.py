"""Tables."""

from typing import Any

from scripts.checks.processes import Row


def table(rows: list[Row]) -> str:
  """Markdown of rows; a column for each name that one of them has.

  Example:
    >>> print(table([{"case": "full", "ms": 1.23456}, {"case": "causal"}]))
    | case | ms |
    | --- | --- |
    | full | 1.23 |
    | causal | – |
  """
  names = list(dict.fromkeys(name for row in rows for name in row))
  cells = [[cell(row.get(name)) for name in names] for row in rows]
  lines = [names, ["---"] * len(names), *cells]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(x: Any) -> str:
  """A figure in three digits; a dash for none."""
  return "–" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)
