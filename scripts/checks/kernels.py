"""Compiles kernels for TPUs and NVIDIA GPUs on a machine that has neither.

    python -m scripts.checks.kernels --targets=h100,v5e --only=bfloat16-128-causal/

Every mask with heads of 64, 128 and 256, with as many key heads as query heads and with half as
many, in bfloat16 and float32: each kernel alone, in the tiles of
`effjax.kernels.flash_attention.fused.sizes`, and what whole programs launch; and products with
packed matrices, as in bfloat16-576-nf4-1536-16/outputs; and with one matrix for each of several
groups of rows, as in bfloat16-2048-array-4096-8-8192/sums. A row for each:

  * GPUs: registers of a thread and bytes it spills; shared memory of a block; of the loops over
    tiles what `sass.figures` says, or how many products of other kernels are for tensor cores;
    `balance.simulated`; launches of a whole program.
  * TPUs: bundles of the static schedule, also for 512 × 512 pairs; the share of them with a matrix
    operation and with a spill; VMEM and the part of it that is spilled registers.

The last lines are the table of `bounds` and what breaks it, which fails the check; `--save=NAME`
writes the rows to results/check_kernels/NAME, where other rows stay, and all runs' to table.md
beside it.
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator

from absl import app, flags

from scripts.checks import bounds, grouped, kernel_table, launches, plugins, quantized
from scripts.checks.alone import Case
from scripts.checks.only import chosen
from scripts.checks.processes import Row, Worker, spread
from scripts.checks.targets import TARGETS, environment

MASKS = ("full", "causal", "window", "longformer", "bigbird", "documents", "alibi")
CASES = (
  *(
    f"{dtype}-{width}-{mask}{group}"
    for dtype, width, mask, group in itertools.product(
      ("bfloat16", "float32"), (64, 128, 256), MASKS, ("", "-1")
    )
  ),
  "bfloat16-128-drawn",
)
_TARGETS = flags.DEFINE_list("targets", list(TARGETS), "Devices to compile for.")
_SAVE = flags.DEFINE_string("save", None, f"Name of a folder in {kernel_table.FOLDER}.")
_COLUMNS = {
  "gpu": (
    *("seconds", "registers", "spill", "shared", "wait", "rest", "partial", "useful", "tensor"),
    *("busy 4k", "busy 8k", "busy 16k", "launches"),
  ),
  "tpu": ("seconds", "bundles", "pair", "matmul", "spilling", "vmem", "spill"),
}


def jobs(target: str) -> list[str]:
  """CASE/NAME of kernels and whole programs."""
  platform, names = TARGETS[target].platform, []
  for case in map(Case.of, CASES):
    wholes = launches.programs(case) if platform == "gpu" else ()
    names += [f"{case}/{name}" for name in (*case.kernels(platform), *wholes)]
  names += [f"{x}/{y}" for x, y in itertools.product(quantized.CASES, quantized.PRODUCTS)]
  return names + [f"{x}/{y}" for x in grouped.CASES for y in grouped.Case.of(x).products]


def rows(target: str, names: list[str]) -> Iterator[Row]:
  """Those of a target as they come, by processes, since jax reads its environment once."""
  tools = [plugins.tool(name) or "" for name in ("ptxas", "nvdisasm")]
  with tempfile.TemporaryDirectory() as folder:

    def worker(dump: str) -> Worker:
      command = ["scripts.checks.compile_target", target, dump, *tools]
      return Worker(lambda: command, environment(target, dump, plugins.folder()))

    workers = [worker(f"{folder}/{n}") for n in range(len(os.sched_getaffinity(0)))]
    for job, found in spread(workers, names):
      case, kernel = job.split("/")
      for row in found:
        yield {"target": target, "case": case, "kernel": kernel} | row


def printed(row: Row) -> str:
  """A line of the table."""
  names = f"{row['target']:6s}{row['case']:25s}{row['kernel']:10s}{row.get('tile', '–'):>9s}"
  if "error" in row:
    return f"{names}  {row['error'][:2000]}"
  shown = (row.get(name) for name in _COLUMNS[TARGETS[row["target"]].platform])
  return names + "".join(("–" if x is None else str(x)).rjust(10) for x in shown)


def check(wanted: dict[str, list[str]]) -> list[Row]:
  """The rows of targets, printed as they come."""
  found = []
  for target, names in wanted.items():
    columns = _COLUMNS[TARGETS[target].platform]
    print(f"{'':41s}{'tile':>9s}" + "".join(name.rjust(10) for name in columns))
    for row in rows(target, names):
      print(printed(row), flush=True)
      found.append(row)
  return found


def main(_) -> None:
  unknown = set(_TARGETS.value) - set(TARGETS)
  if unknown:
    raise app.UsageError(f"--targets: {', '.join(unknown)}; allowed: {', '.join(TARGETS)}")
  try:
    plugins.install()
  except RuntimeError as error:
    raise SystemExit(f"error: {error}") from None
  for tool in ("ptxas", "nvdisasm"):
    if plugins.tool(tool) is None:
      print(f"{tool} is on no path here: figures of GPU kernels are left out")
  wanted = {target: chosen(jobs(target)) for target in _TARGETS.value}
  if not any(wanted.values()):
    raise app.UsageError("--only: in the name of no job, such as bfloat16-128-causal/keys")
  found = check(wanted)
  if _SAVE.value:
    for target in (target for target, names in wanted.items() if names):
      new = [row for row in found if row["target"] == target]
      kernel_table.save(_SAVE.value, target, new)
    kernel_table.write(TARGETS)
  print(bounds.table(found))
  faults = bounds.broken(found)
  print(*faults, sep="\n", end="\n" * bool(faults), file=sys.stderr)
  sys.exit(bool(faults))


if __name__ == "__main__":
  app.run(main)
