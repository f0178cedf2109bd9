"""Compiles programs for one target: a process that answers CASE/NAME with a row.

    python -m scripts.checks.compile_target TARGET DUMP PTXAS NVDISASM

NAME is that of a kernel, which is compiled alone, or of a whole program of `launches`. Its
environment is that of `targets.environment`; paths of NVIDIA's tools may be empty.
"""

import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from effjax.kernels.flash_attention.fused.jobs import Job
from scripts.checks import balance, grouped, launches, quantized, reports, sass
from scripts.checks.alone import Case, program
from scripts.checks.processes import Row, answer
from scripts.checks.targets import GPU, TARGETS, TPU, present


def kernel(
  device: GPU | TPU, case: Case, name: str, dump: pathlib.Path, tools: reports.Tools
) -> Row:
  """The row of one kernel; `error` in it says why it does not compile."""
  sizes = case.sizes(device.platform, device=device.name)
  size = getattr(sizes, name) or sizes.queries
  row: Row = {"tile": f"{size.queries}×{size.keys}"}
  jobs: list[Job] = []
  run = program(case, name, device.platform, sizes, watch=jobs.append)
  row |= _compiled(device, run, case.arguments(name), dump)
  if "error" in row:
    return row
  row |= device.report(dump, name, jobs[-1], size, tools)
  if isinstance(device, GPU) and name != "bias" and case.dtype == "bfloat16":
    weight = row["partial"] / row["rest"] if {"partial", "rest"} <= row.keys() else 1.0
    row |= balance.simulated(case, name, device.name, device.cores, weight)
  return row


def product(
  device: GPU | TPU,
  kind: ModuleType,
  job: tuple[str, str],
  dump: pathlib.Path,
  tools: reports.Tools,
) -> Row:
  """The row of a kernel of `quantized` or `grouped`.

  Of a GPU also "tensor", instructions for tensor cores in its loops; "wait", see `sass.figures`.
  """
  case, name = kind.Case.of(job[0]), job[1]
  with present(device):
    run = kind.program(case, name, device.platform)
    row = _compiled(device, run, case.arguments(name), dump)
  if "error" in row:
    return row
  if isinstance(device, TPU):
    return row | reports.tpu(dump, kind.kernel(name))
  figures, code = reports.gpu(dump, kind.kernel(name), tools, device.architecture)
  return row | figures | (sass.products(code) if code else {})


def whole(device: GPU | TPU, case: Case, name: str, dump: pathlib.Path) -> Row:
  """The row of a whole program."""
  with present(device):
    row = _compiled(device, launches.program(case, name), launches.arguments(case, name), dump)
  return row if "error" in row else row | {"launches": reports.launches(dump)}


def _compiled(
  device: GPU | TPU, function: Callable[..., Any], arguments: Any, dump: pathlib.Path
) -> Row:
  shutil.rmtree(dump, ignore_errors=True)
  dump.mkdir(parents=True)
  start = time.perf_counter()
  try:
    device.compile(function, arguments)
  except Exception as error:  # whatever a compiler raises is the finding
    return {"error": f"{type(error).__name__}: {error}"}
  return {"seconds": round(time.perf_counter() - start, 2)}


def main(target: str, dump: str, *tools: str) -> None:
  device, folder = TARGETS[target], pathlib.Path(dump)

  def rows(job: str) -> list[Row]:
    name, what = job.split("/")
    used = reports.Tools(*(path or None for path in tools))
    for kind in (quantized, grouped):
      if what in kind.PRODUCTS:
        return [product(device, kind, (name, what), folder, used)]
    case = Case.of(name)
    if what in launches.PROGRAMS:
      return [whole(device, case, what, folder)]
    return [kernel(device, case, what, folder, used)]

  answer(rows)


if __name__ == "__main__":
  main(*sys.argv[1:])
