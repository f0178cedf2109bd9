"""Checks and times attention on an NVIDIA GPU, in one command.

    python -m scripts.checks.gpu --lengths=1024,4096,16384

Values and all gradients of the fused kernels, of XLA and of cuDNN against float64. Then bfloat16
times: rates in TFLOP/s (4·T·S·N·H by the share of pairs seen, backward 2.5 times that), their share
of a large matrix product's in the same run, and how many times faster than cuDNN and torch's flash
attention; how much sparse patterns save beside how many tiles they leave out; the rate of each
kernel alone; and of one decoded token, the share of the memory's speed.

Values are checked by several processes at once, while another compiles what will be timed, alone.
Everything goes, as it comes, to results/gpu_DEVICE_DATE.json and .md: `--only` does some of the
jobs, and the others' rows stay. Fails if an error is out of its tolerance or a job failed.

`--interpret` checks the values of small problems on any machine and writes nothing.
"""

import datetime
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
from absl import app, flags

from scripts.checks import gpu_jobs, gpu_values
from scripts.checks.interpret import INTERPRET
from scripts.checks.processes import Row, Worker, spread

LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192", "16384"], "To time.")
ONLY = flags.DEFINE_string("only", "", "Expression in the names of jobs, as in dense/128|values.")
_CORES = 2  # for each process that checks values
_UNTUNED = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"}


def table(rows: list[Row]) -> str:
  """Markdown of rows that have the first one's columns."""
  lines = [
    list(rows[0]),
    ["---"] * len(rows[0]),
    *([_cell(row.get(name, "–")) for name in rows[0]] for row in rows),
  ]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(x: Any) -> str:
  return f"{x:.3g}" if isinstance(x, float) else str(x)


class Results:
  """Rows by the names of jobs, on disk as they come; rows that a file has already stay.

  Args:
    about: the device, jax's version and the date.
    jobs: names, in the order of the tables; "KIND/…" or "KIND".
    folder: for gpu_DEVICE_DATE.json and .md.
  """

  def __init__(self, about: dict[str, str], jobs: list[str], folder: pathlib.Path):
    device = re.sub(r"\W+", "-", about["device"]).lower()
    self.path = folder / f"gpu_{device}_{about['date']}.json"
    self._about, self._jobs = about, jobs
    self.rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else {}

  def add(self, job: str, rows: list[Row]) -> None:
    """Takes in a job's rows and writes both files."""
    self.rows[job] = rows
    names = [*self._jobs, *(self.rows.keys() - set(self._jobs))]
    self.rows = {name: self.rows[name] for name in names if name in self.rows}
    self.path.parent.mkdir(exist_ok=True)
    self.path.write_text(json.dumps({**self._about, "rows": self.rows}, indent=1))
    self.path.with_suffix(".md").write_text(self.text())

  def text(self) -> str:
    """Markdown: a table for each kind of job, then what failed."""
    tables: dict[str, list[Row]] = {}
    failed = []
    for job, rows in self.rows.items():
      kind = tables.setdefault(job.split("/")[0], [])
      for row in rows:
        if "error" in row:
          failed.append(f"{job} failed:\n\n```\n{row['error']}\n```")
        else:
          kind.append({name: x for name, x in row.items() if name != "errors"})
    title = ", ".join(f"{name} {x}" for name, x in self._about.items())
    return "\n\n".join([title, *map(table, filter(None, tables.values())), *failed]) + "\n"


def shown(job: str, row: Row) -> str:
  """A line of the log."""
  if "error" in row:
    return f"{job} FAILED: {row['error']}"
  errors = "" if row.get("good", True) else f"  FAILED {row['errors']}"
  return "  ".join(f"{name} {_cell(x)}" for name, x in row.items() if name != "errors") + errors


def answered(values: list[str], times: list[str]) -> Iterator[tuple[str, list[Row]]]:
  """Each job and its rows: first the values, by many processes, then the times, by one alone."""
  left = list(times)
  timer = Worker(lambda: ["scripts.checks.gpu_times", ",".join(LENGTHS.value), *left], {})
  command = ["scripts.checks.gpu_values", f"--interpret={INTERPRET.value}"]
  number = 1 if INTERPRET.value else max(1, (os.cpu_count() or 1) // _CORES)
  checkers = [Worker(lambda: command, _UNTUNED) for _ in values[:number]]
  if times:
    timer.start()  # it compiles while values are checked
  yield from spread(checkers, values)
  for job, rows in spread([timer], times):
    left.remove(job)
    yield job, rows


def main(_) -> None:
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share it
  if not INTERPRET.value and jax.default_backend() != "gpu":
    sys.exit(f"error: no NVIDIA GPU here, jax runs on {jax.default_backend()}; see --interpret")
  values = [f"values/{name}" for name in gpu_values.chosen()]
  times = [] if INTERPRET.value else list(gpu_jobs.jobs([int(n) for n in LENGTHS.value]))
  about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
  about |= {"date": datetime.date.today().isoformat()}
  results = Results(about, [*values, *times], pathlib.Path("results"))
  wanted = lambda jobs: [job for job in jobs if re.search(ONLY.value, job)]
  good = True
  for job, rows in answered(wanted(values), wanted(times)):
    print(*(shown(job, row) for row in rows), sep="\n", flush=True)
    good &= all(row.get("good", "error" not in row) for row in rows)
    if not INTERPRET.value:
      results.add(job, rows)
  sys.exit(not good)


if __name__ == "__main__":
  app.run(main)
