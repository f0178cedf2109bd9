"""Rows of `kernels.py` on disk, and one table of the figures of the first run beside the last's."""

import datetime
import json
import pathlib
import re
from collections.abc import Callable, Iterable

import jax

from scripts.checks import bounds, plugins
from scripts.checks.markdown import cell, table
from scripts.checks.processes import Row

FOLDER = pathlib.Path("results/check_kernels")
_KERNELS = {  # figures of the worst case and what makes it so, by the platform's tools
  "registers": max,
  "spill": max,
  "wait": min,
  "rest": max,
  "partial": max,
  "useful": min,
}
_BUNDLES = {"pair": max, "matmul": min, "spilling": max}


def runs() -> list[str]:
  """Names of the runs that are kept, the first one first."""
  paths = sorted(FOLDER.glob("*/*.json"), key=lambda path: json.loads(path.read_text())["date"])
  return list(dict.fromkeys(path.parent.name for path in paths))


def saved(name: str, target: str) -> list[Row]:
  """Rows of a run, none where there was none."""
  path = FOLDER / name / f"{target}.json"
  return json.loads(path.read_text())["rows"] if path.exists() else []


def save(name: str, target: str, rows: list[Row]) -> None:
  """Writes rows of a run; those of the same case and kernel that were there give way."""
  kept = {(row["case"], row["kernel"]): row for row in saved(name, target)}
  for row in rows:
    figures = {key: x for key, x in row.items() if key not in ("seconds", "target")}
    kept[row["case"], row["kernel"]] = figures
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
  about = {"date": now, "jax": jax.__version__, "compilers": plugins.versions()}
  lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in kept.values())
  path = FOLDER / name / f"{target}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')


def write(targets: Iterable[str]) -> None:
  """Writes table.md of the first and the last run."""
  first, last = runs()[0], runs()[-1]
  parts = [_TEXT.format(first=first, last=last)]
  rows = []
  for target in targets:
    both = saved(first, target), saved(last, target)
    rows += [{"target": target} | row for row in both[1]]
    gpu = any("registers" in row for row in both[1])
    parts += [f"## {target}", _worst(*both, _KERNELS if gpu else _BUNDLES)]
    if gpu:
      parts += [_busy(*both), _launches(*both)]
  parts += ["## Bounds", bounds.table(rows)]
  (FOLDER / "table.md").write_text("\n\n".join(parts) + "\n")


_TEXT = """# What the compilers say of attention's kernels

`scripts/check_kernels --save=NAME` makes this table: where a figure is not the same in both runs,
that of "{first}" comes before the arrow, and of "{last}" behind it. Each is the worst of all masks,
with fewer key heads than query heads and without; "fails" counts the cases that do not compile.

* wait: groups of loads on their way where a loop over tiles waits for the most;
* rest, partial: instructions of eight warps that are no product for a tile of 128 × 128, without a
  predicate and with one; useful: what a tile must multiply, of what is multiplied;
* pair: bundles for 512 × 512 scores without a mask; matmul, spilling: the share of these with a
  product, with a spill."""


def _worst(before: list[Row], after: list[Row], figures: dict[str, Callable]) -> str:
  """A line for each kernel, type and width."""
  lines: dict[str, Row] = {}
  names = {_kind(row): None for row in after if "launches" not in row}
  for name in sorted(names, key=lambda name: (name[1], int(name[2]), name[0])):
    parts = [[row for row in rows if _kind(row) == name] for rows in (before, after)]
    line: Row = dict(zip(("kernel", "type", "head"), name, strict=True))
    line["tile"] = _arrow(*[_only(x.get("tile") for x in part) for part in parts])
    line["fails"] = _arrow(*[sum("error" in x for x in part) if part else None for part in parts])
    for figure, pick in figures.items():
      plain = figure in _BUNDLES
      chosen = [[x for x in part if not plain or "-full" in x["case"]] for part in parts]
      line[figure] = _arrow(
        *[pick((x[figure] for x in c if x.get(figure) is not None), default=None) for c in chosen]
      )
    lines[" ".join(name)] = line
  return table(list(lines.values()))


def _kind(row: Row) -> tuple[str, str, str]:
  dtype, width, _ = row["case"].split("-", 2)
  return row["kernel"], dtype, width


def _only(names: Iterable[str | None]) -> str | None:
  return ", ".join(sorted({name for name in names if name})) or None


def _busy(before: list[Row], after: list[Row]) -> str:
  """Of bfloat16, heads of 128: a line for each kernel and mask."""
  return _beside(before, after, r"bfloat16-128-[a-z]+$", r"busy")


def _launches(before: list[Row], after: list[Row]) -> str:
  return _beside(before, after, r"", r"launches")


def _beside(before: list[Row], after: list[Row], cases: str, figures: str) -> str:
  """A line for each row of the cases that has one of the figures."""
  old = {(row["case"], row["kernel"]): row for row in before}
  lines = []
  for row in after:
    found = [figure for figure in row if re.search(figures, figure)]
    if found and re.search(cases, row["case"]):
      then = old.get((row["case"], row["kernel"]), {})
      names = {"kernel": row["kernel"], "case": row["case"]}
      lines.append(names | {each: _arrow(then.get(each), row[each]) for each in found})
  return table(sorted(lines, key=lambda line: line["kernel"])) if lines else ""


def _arrow(before: object, after: object) -> str:
  cells = cell(before), cell(after)
  return cells[1] if before is None or cells[0] == cells[1] else " → ".join(cells)
