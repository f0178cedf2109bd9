"""Checks and times attention and grouped products on an NVIDIA GPU, in one command.

    python -m scripts.checks.gpu --lengths=1024,4096,16384

Values and all gradients of the fused kernels, of XLA and of cuDNN against float64. Then bfloat16
times: rates in TFLOP/s (4·T·S·N·H by the share of pairs seen, backward 2.5 times that), their share
of a large matrix product's in the same run, and how many times faster than cuDNN and torch's flash
attention; how much sparse patterns save beside how many tiles they leave out; the rate of each
kernel alone; and of one decoded token, the share of the memory's speed.

Values are checked by several processes at once, while another compiles what will be timed, alone.
Beside what is measured stands what `model.estimate` makes of the compilers' reports: between the
two times it gives, what was assumed of overlap is wrong, below the first, a rate, above the second,
that nothing waits.

It ends within `--minutes`: the values may take half of them, the quick ones come first, and what is
left out is said. Everything goes, as it comes, to results/gpu_DEVICE_DATE.json and .md: `--only`
does some of the jobs, and the others' rows stay. Fails if an error is out of its tolerance or a job
failed.

`--interpret` checks the values of small problems on any machine and writes nothing.
"""

import datetime
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator

import jax
from absl import app, flags

from scripts.checks import gpu_jobs, gpu_values
from scripts.checks.interpret import INTERPRET
from scripts.checks.markdown import cell, table
from scripts.checks.only import chosen
from scripts.checks.processes import LEFT_OUT, Row, Worker, spread

LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192", "16384"], "To time.")
MINUTES = flags.DEFINE_float("minutes", 8.0, "After which it has ended.")
_CORES = 2  # for each process that checks values
_LAST = 20.0  # seconds to start and to end in
_UNTUNED = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"}


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
  if row == LEFT_OUT:
    return f"{job} left out, time is up"
  if "error" in row:
    return f"{job} FAILED: {row['error']}"
  errors = "" if row.get("good", True) else f"  FAILED {row['errors']}"
  return "  ".join(f"{name} {cell(x)}" for name, x in row.items() if name != "errors") + errors


def answered(values: list[str], times: list[str], end: float) -> Iterator[tuple[str, list[Row]]]:
  """Each job and its rows: first the values, by many processes, then the times, by one alone.

  Args:
    end: on the clock of `time.monotonic`; the values may take half of the time until then.
  """
  left = list(times)
  timer = Worker(lambda: ["scripts.checks.gpu_times", ",".join(LENGTHS.value), *left], {})
  command = ["scripts.checks.gpu_values", f"--interpret={INTERPRET.value}"]
  number = 1 if INTERPRET.value else max(1, (os.cpu_count() or 1) // _CORES)
  checkers = [Worker(lambda: command, _UNTUNED) for _ in values[:number]]
  if times:
    timer.start()  # it compiles while values are checked
  half = (time.monotonic() + end) / 2 if times else end
  yield from spread(checkers, values, half)
  for job, rows in spread([timer], times, end):
    left.remove(job)
    yield job, rows


def main(_) -> None:
  end = time.monotonic() + 60 * MINUTES.value - _LAST
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share it
  if not INTERPRET.value and jax.default_backend() != "gpu":
    sys.exit(f"error: no NVIDIA GPU here, jax runs on {jax.default_backend()}; see --interpret")
  values = [f"values/{name}" for name in gpu_values.chosen()]
  values += [f"sums/{name}" for name in gpu_values.grouped_cases()]
  times = [] if INTERPRET.value else list(gpu_jobs.jobs([int(n) for n in LENGTHS.value]))
  about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
  about |= {"date": datetime.date.today().isoformat()}
  results = Results(about, [*values, *times], pathlib.Path("results"))
  good, left = True, []
  for job, rows in answered(chosen(values), chosen(times), end):
    print(*(shown(job, row) for row in rows), sep="\n", flush=True)
    good &= all(row.get("good", "error" not in row) for row in rows)
    if LEFT_OUT in rows:
      left.append(job)
    elif not INTERPRET.value:
      results.add(job, rows)
  if left:
    print(f"left out of {MINUTES.value:g} minutes: {', '.join(left)}")
  sys.exit(not good)


if __name__ == "__main__":
  app.run(main)
