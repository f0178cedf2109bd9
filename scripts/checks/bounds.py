"""What the compilers' reports of attention must say, in one table."""

import dataclasses
import re
from collections.abc import Iterable

from scripts.checks.markdown import table as markdown
from scripts.checks.processes import Row


@dataclasses.dataclass(frozen=True)
class Bound:
  """Of a figure in some rows.

  Attributes:
    figure: by its name in a row.
    rows: expression in "TARGET CASE KERNEL"; a row is bound by the first that it is found in.
    aim: the most that is wanted, or the least.
    now: what is allowed while that is not reached, so that it gets no worse.
    least: whether they are the least.
  """

  figure: str
  rows: str
  aim: float
  now: float | None = None
  least: bool = False

  @property
  def limit(self) -> float:
    """What is allowed."""
    return self.aim if self.now is None else self.now

  def broken(self, x: float, limit: float) -> bool:
    """Whether a figure is past a limit."""
    return x < limit if self.least else x > limit


BOUNDS = (Bound("spill", "^(h100|a100)", 0),)


def bound_of(row: Row, figure: str) -> Bound | None:
  """The first that binds a figure of a row."""
  found = (each for each in BOUNDS if each.figure == figure and re.search(each.rows, _name(row)))
  return next(found, None)


def broken(rows: Iterable[Row]) -> list[str]:
  """What is wrong with rows, a line each."""
  lines = []
  for row in rows:
    if "error" in row:
      lines.append(f"{_name(row)} does not compile: {row['error'][:2000]}")
    for figure, x in row.items():
      bound = bound_of(row, figure)
      if bound and x is not None and bound.broken(x, bound.limit):
        word = "least" if bound.least else "most"
        lines.append(f"{_name(row)}: {figure} {x}, allowed at {word} {bound.limit}")
  return lines


def table(rows: list[Row]) -> str:
  """Markdown: each bound with the worst figure and where that is, if any of the rows is bound."""
  lines = []
  for bound in BOUNDS:
    mine = [
      (row[bound.figure], _name(row))
      for row in rows
      if row.get(bound.figure) is not None and bound_of(row, bound.figure) is bound
    ]
    if mine:
      worst, where = (min if bound.least else max)(mine)
      reached = not bound.broken(worst, bound.aim)
      lines.append(
        {
          "figure": bound.figure,
          "of": bound.rows.replace("|", "\\|"),
          "aim": f"{'≥' if bound.least else '≤'} {bound.aim}",
          "allowed": bound.limit,
          "worst": worst,
          "at": where,
          "reached": "yes" if reached else "no",
        }
      )
  return markdown(lines) if lines else ""


def _name(row: Row) -> str:
  return f"{row['target']} {row['case']} {row['kernel']}"
