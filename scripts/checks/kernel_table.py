"""Rows of `kernels.py` on disk, and one table of the figures of the first run beside the last's."""

import datetime
import json
import pathlib
import re
from collections.abc import Callable, Iterable

import jax

from scripts.checks import bounds, plugins
from scripts.checks.bounds import figures
from scripts.checks.markdown import cell, table
from scripts.checks.processes import Row

FOLDER = pathlib.Path("results/check_kernels")
# Columns: which of several is the worst, of which figure, in which cases.
_GPU = {
  "fails": (max, "fails", ""),
  "registers": (max, "registers", ""),
  "spill": (max, "spill", ""),
  "wait": (min, "wait", ""),
  "rest": (max, "rest", "full"),
  "partial": (max, "partial", "^(?!.*alibi)"),
  "scored": (max, "partial", "alibi"),
  "useful": (min, "useful", ""),
  "tensor": (min, "tensor", ""),
}
_TPU = {
  "fails": (max, "fails", ""),
  "pair": (max, "pair", "full"),
  "gradients": (max, "gradients", "full"),
  "matmul": (min, "matmul", "full|array"),
  "spilling": (max, "spilling", "full|array"),
  "spill": (max, "spill", "nf4|int|array"),
}
_Columns = dict[str, tuple[Callable, str, str]]


def runs(target: str) -> list[str]:
  """Names of the runs that are kept for a target, the first one first."""
  paths = FOLDER.glob(f"*/{target}.json")
  dated = sorted((json.loads(path.read_text())["date"], path.parent.name) for path in paths)
  return [name for _, name in dated]


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
  """Writes table.md of the first and the last run of targets."""
  parts, rows = [_TEXT], []
  for target in filter(runs, targets):
    names = runs(target)[0], runs(target)[-1]
    first, last = (figures(saved(name, target)) for name in names)
    rows += [{"target": target} | row for row in last]
    gpu = any("registers" in row for row in last)
    parts += [f"## {target}: {' → '.join(dict.fromkeys(names))}", _made(target, names)]
    parts += [_worst(first, last, _GPU if gpu else _TPU)]
    if gpu:
      parts += [_busy(first, last), _launches(first, last)]
  parts += ["## Bounds", bounds.table(rows)]
  (FOLDER / "table.md").write_text("\n\n".join(parts) + "\n")


def _made(target: str, names: Iterable[str]) -> str:
  """By what, and when."""
  lines = []
  for name in dict.fromkeys(names):
    about = json.loads((FOLDER / name / f"{target}.json").read_text())
    compilers = ", ".join(f"{each} {version}" for each, version in about["compilers"].items())
    lines.append(f"{name}: {about['date']}, jax {about['jax']}, {compilers}.")
  return "  \n".join(lines)


_TEXT = """# What the compilers say of kernels

`scripts/check_kernels --save=NAME` makes this table of the first run that is kept and the last:
where a figure is not the same in both, that of the first comes before the arrow. Each is the worst
of all masks, with fewer key heads than query heads and with as many; for products with packed
matrices, `outputs` and `inputs`, and of groups of rows, `products`, `turned` and `sums`, of all
formats and rows, and a head is a width. A dash is none.

* fails: a case does not compile; spill: bytes;
* wait: groups of loads on their way where a loop over tiles waits for the most;
* rest: instructions of eight warps that are no product for a tile of 128 × 128 without a mask;
  partial: the same with a predicate; scored: with ALiBi too;
* useful: what a tile must multiply, of what is multiplied; tensor: instructions for tensor cores;
* busy: the share of the time that an H100's or A100's multiprocessors work, simulated, for one
  batch row of 8 heads; launches: of whole programs;
* pair: bundles for 512 × 512 scores without a mask; gradients: those of both gradients' kernels;
  matmul, spilling: the share of bundles with a product, with a spill, without a mask, or of
  matrices that are not packed."""


def _worst(before: list[Row], after: list[Row], columns: _Columns) -> str:
  """A line for each kernel, type and width."""
  names = {_kind(row) for row in [*before, *after] if "launches" not in row}
  lines = []
  for name in sorted(names, key=lambda name: (name[1], int(name[2]), name[0])):
    parts = [[row for row in rows if _kind(row) == name] for rows in (before, after)]
    parts = [part for part in parts if part]
    line: Row = dict(zip(("kernel", "type", "head"), name, strict=True))
    line["tile"] = _arrow(*[_only(x.get("tile") for x in part) for part in parts])
    for label, column in columns.items():
      line[label] = _arrow(*[_picked(part, *column) for part in parts])
    lines.append(line)
  return table(lines)


def _picked(rows: list[Row], pick: Callable, figure: str, cases: str) -> float | None:
  found = [row.get(figure) for row in rows if re.search(cases, row["case"])]
  return pick((x for x in found if x is not None), default=None)


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


def _beside(before: list[Row], after: list[Row], cases: str, shown: str) -> str:
  """A line for each row of the cases that has one of the figures."""
  old, new = ({(row["kernel"], row["case"]): row for row in rows} for rows in (before, after))
  lines = []
  for kernel, case in sorted(old | new):
    pair = [rows[kernel, case] for rows in (old, new) if (kernel, case) in rows]
    found = [each for each in pair[-1] if re.search(shown, each)]
    if found and re.search(cases, case):
      cells = {each: _arrow(*[row.get(each) for row in pair]) for each in found}
      lines.append({"kernel": kernel, "case": case} | cells)
  return table(lines) if lines else ""


def _arrow(*runs: object) -> str:
  return " → ".join(dict.fromkeys(map(cell, runs)))
