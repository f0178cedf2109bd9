"""What the compilers' reports of attention must say, in one table."""

import dataclasses
import re
from collections.abc import Iterable

from scripts.checks.processes import Row


@dataclasses.dataclass(frozen=True)
class Bound:
  """A figure of some rows.

  Attributes:
    rows: expression in "TARGET CASE KERNEL".
    figure: by its name in a row.
    aim: what is wanted.
    now: what is allowed where that is not reached, so that it gets no worse.
    least: whether these are the least allowed, not the most.
  """

  figure: str
  rows: str
  aim: float
  now: float | None = None
  least: bool = False

  @property
  def limit(self) -> float:
    return self.aim if self.now is None else self.now

  def worst(self, rows: Iterable[Row]) -> tuple[float, str] | None:
    """The worst figure and its row, None where no row has it."""
    found = [(row[self.figure], name(row)) for row in rows if self.holds_for(row)]
    return (min if self.least else max)(found, default=None)

  def holds_for(self, row: Row) -> bool:
    return row.get(self.figure) is not None and re.search(self.rows, name(row)) is not None

  def broken_by(self, figure: float) -> bool:
    return figure < self.limit if self.least else figure > self.limit


def name(row: Row) -> str:
  return f"{row['target']} {row['case']} {row['kernel']}"


BOUNDS: tuple[Bound, ...] = (Bound("spill", "^(h100|a100)", 0),)


def broken(rows: list[Row]) -> list[str]:
  return []


def table(rows: list[Row]) -> str:
  return ""
