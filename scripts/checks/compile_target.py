"""Compiles kernels for one target: a process that answers CASE/KERNEL; `kernels.py` starts it.

    python -m scripts.checks.compile_target TARGET DUMP PTXAS

Its environment is that of `targets.environment`; PTXAS may be empty.
"""

import pathlib
import shutil
import sys
import time

from scripts.checks.alone import Case, program
from scripts.checks.processes import Row, answer
from scripts.checks.targets import TARGETS


def compiled(target: str, case: Case, kernel: str, dump: pathlib.Path, ptxas: str | None) -> Row:
  """The row of one kernel; `error` in it says why it does not compile."""
  device = TARGETS[target]
  sizes = case.sizes(device.platform, device=device.name)
  size = getattr(sizes, kernel) or sizes.queries
  row: Row = {"tile": f"{size.queries}×{size.keys}"}
  shutil.rmtree(dump, ignore_errors=True)
  dump.mkdir(parents=True)
  start = time.perf_counter()
  try:
    device.compile(program(case, kernel, device.platform, sizes), case.arguments(kernel))
  except Exception as error:  # whatever a compiler raises is the finding
    return row | {"error": f"{type(error).__name__}: {error}"}
  row["seconds"] = round(time.perf_counter() - start, 2)
  return row | device.report(dump, kernel, ptxas)


def main(target: str, dump: str, ptxas: str) -> None:
  def rows(job: str) -> list[Row]:
    case, kernel = job.split("/")
    return [compiled(target, Case.of(case), kernel, pathlib.Path(dump), ptxas or None)]

  answer(rows)


if __name__ == "__main__":
  main(*sys.argv[1:])
