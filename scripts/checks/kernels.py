"""Compiles the fused attention kernels for TPUs and NVIDIA GPUs on a machine that has neither.

    python -m scripts.checks.kernels --targets=h100,v5e --kinds=bfloat16-128-causal

One row for each kernel: seconds to compile (with tracing and the reports); on GPUs registers of a
thread, bytes it spills, shared memory of a block; on TPUs bundles of the static schedule, the share
of them with a matrix operation ("MATMUL"), VMEM and the part of it that is spilled registers. The
tiles are those of `effjax.kernels.flash_attention.fused.sizes`. The last line is one JSON object.

Fails if a kernel does not compile; if one spills on an H100; and if fewer than 55 % of the forward
kernel's bundles on a v5e hold a matrix operation at heads of 128 without a mask.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from absl import app, flags

from scripts.checks import alone, plugins
from scripts.checks.alone import Case
from scripts.checks.processes import Row, Worker, spread
from scripts.checks.targets import TARGETS, environment

CASES = (
  *(
    f"{dtype}-{width}-{mask}"
    for dtype in ("bfloat16", "float32")
    for width in (64, 128)
    for mask in ("causal", "documents")
  ),
  *("bfloat16-128-full", "bfloat16-256-causal", "float32-256-causal"),
)
_TARGETS = flags.DEFINE_list("targets", list(TARGETS), "Devices to compile for.")
_KINDS = flags.DEFINE_list(
  "kinds", list(CASES), "Type, head width and mask, as in bfloat16-64-causal."
)
LEAST_MATMUL = 0.55
_COLUMNS = ("seconds", "registers", "spill", "shared", "bundles", "matmul", "vmem")


def fault(row: Row) -> str | None:
  """What is wrong with a kernel, or None."""
  if "error" in row:
    return f"does not compile: {row['error'][:2000]}"
  if row["target"] == "h100" and row.get("spill"):
    return f"spills {row['spill']} bytes of registers"
  busiest = (row["target"], row["kernel"], row["case"]) == ("v5e", "forward", "bfloat16-128-full")
  if busiest and row["matmul"] < LEAST_MATMUL:
    return f"{row['matmul']:.0%} of the bundles hold a matrix operation, under {LEAST_MATMUL:.0%}"
  return None


def rows(target: str, cases: list[str], ptxas: str | None) -> Iterator[Row]:
  """Those of a target as they come, by a process, since jax reads its environment once."""
  with tempfile.TemporaryDirectory() as folder:
    command = ["scripts.checks.compile_target", target, folder, ptxas or ""]
    worker = Worker(lambda: command, environment(target, folder, plugins.folder()))
    there = alone.on(TARGETS[target].platform)
    for job, found in spread(
      [worker],
      [f"{case}/{kernel}" for case in cases for kernel in Case.of(case).kernels if kernel in there],
    ):
      case, kernel = job.split("/")
      for row in found:
        yield {"target": target, "case": case, "kernel": kernel} | row


def printed(row: Row) -> str:
  """A line of the table."""
  cells = (str(row.get(name, "–")).rjust(10) for name in _COLUMNS)
  names = f"{row['target']:6s}{row['case']:24s}{row['kernel']:9s}{row.get('tile', '–'):>9s}"
  return names + "".join(cells)


def check(targets: list[str], cases: list[str]) -> dict[str, Any]:
  """Prints the table; the rows and what is wrong in them."""
  ptxas = plugins.ptxas()
  if ptxas is None:
    print("ptxas is on no path here: no registers and spills of GPU kernels")
  print(f"{'':39s}{'tile':>9s}" + "".join(name.rjust(10) for name in _COLUMNS))
  found, faults = [], []
  for target in targets:
    for row in rows(target, cases, ptxas):
      print(printed(row), flush=True)
      found.append(row)
      wrong = fault(row)
      if wrong:
        faults.append(f"{row['target']} {row['case']} {row['kernel']} {wrong}")
  return {"jax": jax.__version__, "faults": faults, "kernels": found}


def main(_) -> None:
  unknown = set(_TARGETS.value) - set(TARGETS)
  if unknown:
    raise app.UsageError(f"--targets: {', '.join(unknown)}; allowed: {', '.join(TARGETS)}")
  try:
    plugins.install()
  except RuntimeError as error:
    raise SystemExit(f"error: {error}") from None
  result = check(_TARGETS.value, [str(Case.of(name)) for name in _KINDS.value])
  print(*result["faults"], sep="\n", end="\n" * bool(result["faults"]), file=sys.stderr)
  print(json.dumps(result, ensure_ascii=False))
  sys.exit(bool(result["faults"]))


if __name__ == "__main__":
  app.run(main)
