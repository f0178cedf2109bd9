"""What the compilers' reports of kernels must say, in one table."""

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


# Masks with which the work can be in balance: no row or column of pairs is much longer than others.
_EVEN = r"\d+-(full|causal|window|documents|alibi)(-1)? "
# Those with lists so long that they are cut.
_CUT = r"bfloat16-128-(longformer|bigbird)(-1)?"
BOUNDS = (
  Bound("fails", "", 0),
  Bound("spill", "^h100 bfloat16-128.* keys$", 0, now=72),
  Bound("spill", "^h100 bfloat16-256.* queries$", 0, now=40),
  Bound("spill", "^h100 bfloat16-256.* keys$", 0, now=536),
  Bound("spill", "^a100 bfloat16-64.* (forward|queries|bias)$", 0, now=112),
  Bound("spill", "^a100 bfloat16-128.* keys$", 0, now=24),
  Bound("spill", "^(h100|a100) float32-128.* forward$", 0, now=120),
  Bound("spill", "^(h100|a100) float32", 0, now=96),
  Bound("spill", "^(h100|a100)", 0),
  Bound("spill", "^(v5e|v6e) .*-576-.*-256 outputs$", 0, now=1 << 16),
  Bound("spill", "^v6e .* inputs$", 0, now=8192),
  Bound("spill", "^(v5e|v6e) .* (outputs|inputs)$", 0),
  Bound("spill", "^(v5e|v6e) .* (products|turned|sums)$", 0, now=2 << 20),
  Bound("tensor", "^(h100|a100)", 1, least=True),
  Bound("wait", "^(h100|a100) bfloat16.* (products|turned|sums)$", 1, least=True),
  Bound("wait", "^(h100|a100) bfloat16.* (forward|queries|keys)$", 1, now=0, least=True),
  # What reads more than a few arrays has tiles of fewer keys.
  Bound("rest", "^h100 bfloat16-128-(bigbird|drawn).* forward$", 620, now=690),
  Bound("rest", "^h100 bfloat16-128-(?!alibi).* forward$", 620),
  Bound("useful", "^h100 bfloat16-(64|256).* keys$", 1, now=0.67, least=True),
  Bound("useful", "^h100 bfloat16", 1, least=True),
  # A launch of 128 programs cannot keep 132 multiprocessors busy, whatever their order.
  Bound("busy 4k", "^h100 bfloat16-.*-(causal|alibi) keys$", 0.95, now=0.5, least=True),
  Bound("busy 4k", "^h100 bfloat16-.*-window", 0.95, now=0.84, least=True),
  Bound("busy 8k", "^h100 bfloat16-.*-window", 0.95, now=0.9, least=True),
  Bound("busy 16k", "^h100 bfloat16-.*-window", 0.95, now=0.93, least=True),
  *(Bound(f"busy {n}k", f"^h100 bfloat16-{_EVEN}", 0.95, least=True) for n in (4, 8, 16)),
  # In pieces, what all see, or what sees all, leaves few programs of one length to a place.
  Bound("busy 4k", f"^h100 {_CUT} keys$", 0.95, now=0.6, least=True),
  Bound("busy 8k", f"^h100 {_CUT} keys$", 0.95, now=0.77, least=True),
  Bound("busy 16k", f"^h100 {_CUT} keys$", 0.95, now=0.92, least=True),
  Bound("busy 4k", f"^h100 {_CUT} ", 0.95, now=0.79, least=True),
  Bound("busy 8k", f"^h100 {_CUT} ", 0.95, now=0.91, least=True),
  Bound("busy 16k", f"^h100 {_CUT} ", 0.95, now=0.94, least=True),
  # Lists that the program makes are not cut: what all see, or what sees all, is one long program.
  *(Bound(f"busy {n}k", "^h100", 0.95, now=0.18, least=True) for n in (4, 8, 16)),
  Bound("launches", "decode$", 3),
  Bound("launches", "-drawn attend$", 3, now=38),
  Bound("launches", "-documents attend$", 3, now=13),
  Bound("launches", "attend$", 3),
  Bound("launches", "-drawn gradients$", 8, now=104),
  Bound("launches", "-documents gradients$", 8, now=41),
  Bound("launches", "gradients$", 8),
  Bound("matmul", "^v5e bfloat16-128-full.* forward$", 0.65, least=True),
  Bound("gradients", "^v5e bfloat16-128-full.* keys$", 3000),
)


def bound_of(row: Row, figure: str) -> Bound | None:
  """The first that binds a figure of a row."""
  found = (each for each in BOUNDS if each.figure == figure and re.search(each.rows, _name(row)))
  return next(found, None)


def figures(rows: Iterable[Row]) -> list[Row]:
  """Rows and whether each "fails"; of a TPU's keys also "gradients", their pair and the queries'.

  Example:
    >>> figures([{"case": "a", "kernel": "keys", "pair": 3}])[0]["gradients"]
    3
  """
  of = lambda row: (row.get("target"), row["case"])
  rows = list(rows)
  queries = {of(row): row.get("pair", 0) for row in rows if row["kernel"] == "queries"}
  more = lambda row: (
    {"gradients": row["pair"] + queries.get(of(row), 0)}
    if row["kernel"] == "keys" and "pair" in row
    else {}
  )
  return [row | {"fails": int("error" in row)} | more(row) for row in rows]


def broken(rows: Iterable[Row]) -> list[str]:
  """What is wrong with rows, a line each."""
  lines = []
  for row in figures(rows):
    for figure, x in row.items():
      bound = bound_of(row, figure)
      if bound and x is not None and bound.broken(x, bound.limit):
        word, why = "least" if bound.least else "most", row.get("error", "")[:2000]
        lines.append(f"{_name(row)}: {figure} {x}, allowed at {word} {bound.limit} {why}".strip())
  return lines


def table(rows: list[Row]) -> str:
  """Markdown: each bound with the worst figure and where that is, if any of the rows is bound."""
  lines = []
  every = figures(rows)
  for bound in BOUNDS:
    mine = [
      (row[bound.figure], _name(row))
      for row in every
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
