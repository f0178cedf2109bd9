"""What every experiment shares: flags, a directory of its own, rows that resume, table and plot.

An experiment is a module with a `Config` dataclass, a pure `run(config, workdir) -> list[dict]` and

  if __name__ == "__main__":
    harness.main(run, Config())
"""

import csv
import dataclasses
import inspect
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from effjax.train import workdir as files
from effjax.train.lock import locked
from experiments.lab import plots
from experiments.lab.verdicts import HELD, NOT_HELD, Verdict

Row = dict[str, Any]


def main(run: Callable[[Any, str], list[Row]], config: Any) -> None:
  """Runs an experiment from the command line: `--config.field=value`, `--workdir=folder`.

  A refused argument, a missing file or a disk that cannot be written ends it with one line and
  status 2; `-v=1` shows where that came from. The folder is locked against a second process.
  """
  name = Path(inspect.getfile(run)).stem
  _refuse_unknown_fields(config, sys.argv[1:])
  configs = config_flags.DEFINE_config_dataclass("config", config)
  folder = flags.DEFINE_string("workdir", f"runs/{name}", "folder of the results; resumed if begun")

  def call(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unknown argument {argv[1]!r}; allowed: --config.FIELD=, --workdir=")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
    try:
      with locked(Path(folder.value) / "workdir.lock"):
        run(configs.value, folder.value)
    except KeyboardInterrupt:
      print(f"\nSIGINT: what is finished is in {folder.value}; run again to go on", file=sys.stderr)
      sys.exit(130)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
      if flags.FLAGS.verbosity > 0:
        raise
      print(f"error: {error}", file=sys.stderr)
      sys.exit(2)

  app.run(call)


def chosen(text: str, known: Iterable[str], *, what: str) -> list[str]:
  """The names in a comma-separated list, in the order of `known`; "all" gives all.

  Raises:
    ValueError: for a name that is not known, with those that are.

  Example:
    >>> chosen("b,a", ["a", "b", "c"], what="technique")
    ['a', 'b']
  """
  names, known = [part.strip() for part in text.split(",") if part.strip()], list(known)
  unknown = [name for name in names if name not in (*known, "all")]
  if unknown or not names:
    wrong = ", ".join(map(repr, unknown)) or "(none)"
    raise ValueError(f"unknown {what} {wrong}; allowed: all, {', '.join(known)}")
  return known if "all" in names else [name for name in known if name in names]


def numbers(
  name: str,
  text: str,
  kind: Callable[[str], Any] = float,
  *,
  least: float,
  most: float = math.inf,
  count: int = 1,
) -> list[Any]:
  """Those in the comma-separated list of a setting, each once, in order.

  Args:
    name: of the setting.
    kind: float or int.
    count: how many there are to be, or more.

  Raises:
    ValueError: for what is no such list of finite numbers from `least` to `most`.

  Example:
    >>> numbers("bits", "6, 2", int, least=1)
    [2, 6]
  """
  try:
    found = sorted({kind(part) for part in text.split(",")})
  except ValueError:
    found = []
  if len(found) < count or not all(least <= x <= most and math.isfinite(x) for x in found):
    many = {1: "", 2: "two or more ", 3: "three or more "}[count]
    words = "integers" if kind is int else "numbers"
    end = "" if most == math.inf else f" to {most}"
    raise ValueError(f"{name}={text!r}; allowed: {many}{words} from {least}{end}, comma-separated")
  return found


def compute(
  folder: Path, tasks: Mapping[str, Callable[[], Row]], *, label: str = "rows", key: str = "name"
) -> list[Row]:
  """The row of each task, under a progress bar; rows already in `metrics.jsonl` are not redone.

  Each row is on disk before the next task begins, with the task's name in its column `key`.
  """
  path = folder / files.METRICS
  done = {row[key]: row for row in files.read_rows(path) if key in row}
  left = [name for name in tasks if name not in done]
  if len(left) < len(tasks):
    print(f"{len(tasks) - len(left)} of {len(tasks)} {label} are in {path}")
  with progress(left, label) as bar:
    for name in bar:
      bar.set_postfix_str(name)
      done[name] = {key: name, **tasks[name]()}
      files.append_row(path, done[name])
  return [done[name] for name in tasks]


def progress(items: Iterable, label: str, **options) -> tqdm:
  """A progress bar on standard error over `items`, or by hand with `total=` and `update`."""
  return tqdm(items, desc=label, dynamic_ncols=True, mininterval=0.5, **options)


def finish(
  folder: Path,
  rows: Sequence[Row],
  columns: Mapping[str, str],
  claims: Mapping[str, bool | Verdict],
) -> None:
  """Prints the table, and of each claim whether it held.

  `columns` maps the columns of the table to their formats. A claim that is exact is true or false;
  one about what seeds would show has a verdict.
  """
  print("\n" + table(rows, columns))
  print("\n" + "\n".join(findings(claims)))
  print(f"results: {folder}")


def findings(claims: Mapping[str, bool | Verdict]) -> list[str]:
  """A line for each claim, the word of its verdict first.

  Example:
    >>> findings({"water is wet": True})
    ['held:         water is wet']
  """
  words = {claim: _verdict(found) for claim, found in claims.items()}
  width = len(NOT_HELD) + 2
  return [
    f"{verdict.word + ':':{width}}{claim}{verdict.reason and f' ({verdict.reason})'}"
    for claim, verdict in words.items()
  ]


def _verdict(found: bool | Verdict) -> Verdict:
  return found if isinstance(found, Verdict) else Verdict(HELD if found else NOT_HELD, "")


def write_csv(folder: Path, rows: Sequence[Row]) -> None:
  """`result.csv`: every column that occurs in a row, in order of appearance."""
  text = io.StringIO(newline="")
  names = list(dict.fromkeys(name for row in rows for name in row))
  writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  files.write_text(folder / "result.csv", text.getvalue())


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
  """A plain-text table; `columns` maps names to formats, a missing value shows as "–".

  Example:
    >>> print(table([{"name": "dense", "loss": 2.0}, {"name": "moe"}], {"name": "", "loss": ".2f"}))
    name   loss
    -----  ----
    dense  2.00
    moe       –
  """
  cells = [[_cell(row.get(name), form) for name, form in columns.items()] for row in rows]
  lines = [list(columns), *cells]
  widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
  lines.insert(1, ["-" * width for width in widths])
  left = [form == "" for form in columns.values()]

  def aligned(line: list[str]) -> str:
    parts = zip(line, widths, left, strict=True)
    return "  ".join(x.ljust(w) if to_left else x.rjust(w) for x, w, to_left in parts).rstrip()

  return "\n".join(aligned(line) for line in lines)


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
  """The same table for a Markdown file.

  Example:
    >>> print(markdown([{"name": "dense", "loss": 2.0}], {"name": "", "loss": ".2f"}))
    | name | loss |
    |---|--:|
    | dense | 2.00 |
  """
  marks = ["---" if form == "" else "--:" for form in columns.values()]
  cells = [[_cell(row.get(name), form) for name, form in columns.items()] for row in rows]
  ruled = "|" + "|".join(marks) + "|"
  lines = [f"| {' | '.join(line)} |" for line in (list(columns), *cells)]
  return "\n".join([lines[0], ruled, *lines[1:]])


def plot(folder: Path, panels: Callable[[list[Row]], Sequence[plots.Panel]]) -> Path:
  """`plot.png`: the panels of the rows of `metrics.jsonl`, and of nothing else.

  Raises:
    OSError: when it cannot be written, naming it.
  """
  rows = files.read_rows(folder / files.METRICS)
  image = plots.png(panels(rows) if rows else [])
  path = folder / "plot.png"
  try:
    path.write_bytes(image)
  except OSError as error:
    raise files.unwritable(path, error) from error
  return path


def _cell(value: Any, form: str) -> str:
  if value is None:
    return "–"
  return value if isinstance(value, str) else format(value, form)


def _refuse_unknown_fields(config: Any, arguments: Sequence[str]) -> None:
  names = [field.name for field in dataclasses.fields(config)]
  for argument in arguments:
    found = re.match(r"--?(?:no)?config\.(\w+)", argument)
    if found and found[1] not in names:
      allowed = ", ".join(f"--config.{name}" for name in names)
      print(f"error: unknown flag --config.{found[1]}; allowed: {allowed}", file=sys.stderr)
      sys.exit(2)
