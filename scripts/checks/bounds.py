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


BOUNDS = (
  Bound("fails", "", 0),
  Bound("spill", "^(h100|a100)", 0),
  Bound("wait", "^(h100|a100) bfloat16.*(forward|queries|keys)$", 1, least=True),
  Bound("rest", "^h100 bfloat16-128-(?!alibi).*forward$", 620),
  Bound("useful", "^h100 bfloat16", 1, least=True),
  *(
    Bound(f"busy {length}k", f"^h100 .*-{masks}.*", 0.95, least=True)
    for length in (4, 8, 16)
    for masks in ("(full|causal|window|documents|alibi)", "longformer", "(bigbird|drawn)")
  ),
  Bound("launches", "decode$", 3),
  Bound("launches", "attend$", 3),
  Bound("launches", "gradients$", 8),
  Bound("matmul", "^v5e bfloat16-128-full forward$", 0.65, least=True),
  Bound("pair", "^v5e bfloat16-128-full keys$", 3000),
)


def bound_of(row: Row, figure: str) -> Bound | None:
  """The first that binds a figure of a row."""
  found = (each for each in BOUNDS if each.figure == figure and re.search(each.rows, _name(row)))
  return next(found, None)


def figures(row: Row) -> Row:
  """Those of a row, and whether it "fails" to compile."""
  return row | {"fails": int("error" in row)}


def broken(rows: Iterable[Row]) -> list[str]:
  """What is wrong with rows, a line each."""
  lines = []
  for row in rows:
    for figure, x in figures(row).items():
      bound = bound_of(row, figure)
      if bound and x is not None and bound.broken(x, bound.limit):
        word, why = "least" if bound.least else "most", row.get("error", "")[:2000]
        lines.append(f"{_name(row)}: {figure} {x}, allowed at {word} {bound.limit} {why}".strip())
  return lines


def table(rows: list[Row]) -> str:
  """Markdown: each bound with the worst figure and where that is, if any of the rows is bound."""
  lines = []
  for bound in BOUNDS:
    mine = [
      (x, _name(row))
      for row in rows
      if (x := figures(row).get(bound.figure)) is not None and bound_of(row, bound.figure) is bound
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
