"""Rows of `kernels.py` on disk, and one table of the figures of one run beside another's."""

import datetime
import json
import pathlib

import jax

from scripts.checks import plugins
from scripts.checks.processes import Row

FOLDER = pathlib.Path("results/check_kernels")


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
  about = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
  about |= {"compilers": plugins.versions()}
  lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in kept.values())
  path = FOLDER / name / f"{target}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')


def write() -> None:
  pass
