"""Checks and times attention on an NVIDIA GPU, in one command.

    python -m scripts.checks.gpu --lengths=1024,4096,16384

Values and all gradients of the fused kernels, of XLA and of cuDNN against float64; then bfloat16
times: rates in TFLOP/s (4·T·S·N·H by the share of pairs seen, backward 2.5 times that), their share
of a large matrix product's in the same run, and how many times faster than cuDNN and torch's flash
attention; then how much sparse patterns save beside how many tiles they leave out. Everything goes
to results/gpu_DEVICE_DATE.json and .md. Fails if an error is out of its tolerance.

`--interpret` checks the values of small problems on any machine and writes nothing.
"""

import datetime
import json
import pathlib
import re
import sys
from typing import Any

import jax
from absl import app, flags

from scripts.checks import gpu_times, gpu_values
from scripts.checks.interpret import INTERPRET

LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192", "16384"], "To time.")
WIDTHS = (64, 128)

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
  """Markdown of rows that have the first one's columns."""
  lines = [
    list(rows[0]),
    ["---"] * len(rows[0]),
    *([_cell(x) for x in row.values()] for row in rows),
  ]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(x: Any) -> str:
  return f"{x:.3g}" if isinstance(x, float) else str(x)


def values(length: int, widths: tuple[int, ...], interpret: bool) -> list[Row]:
  """The rows of `gpu_values`, printed as they come, the largest error of each."""
  found = []
  for row in gpu_values.rows(gpu_values.problems(length, widths), interpret):
    found.append({**row, "largest": max(row["errors"].values())})
    mark = "" if row["good"] else f"  FAILED {row['errors']}"
    print(f"{row['problem']:16s}{row['by']:7s}{found[-1]['largest']:.2e}{mark}", flush=True)
  return found


def times(lengths: list[int]) -> dict[str, Any]:
  """Those of `gpu_times`, printed as they come."""
  peak = gpu_times.matmul_peak(8192)
  print(f"matrix product {peak / 1e12:.0f} TFLOP/s")
  kinds = {
    "dense": gpu_times.dense(lengths, WIDTHS, peak),
    "sparse": gpu_times.sparse([n for n in lengths if n >= 4096], WIDTHS[0]),
  }
  found: dict[str, Any] = {"matmul TFLOP/s": peak / 1e12}
  for name, rows in kinds.items():
    found[name] = []
    for row in rows:
      print("  ".join(f"{key} {_cell(x)}" for key, x in row.items()), flush=True)
      found[name].append(row)
  return found


def write(result: dict[str, Any]) -> pathlib.Path:
  """Writes results/gpu_DEVICE_DATE.json and .md; the former's path."""
  device = re.sub(r"\W+", "-", result["device"]).lower()
  path = pathlib.Path("results") / f"gpu_{device}_{result['date']}.json"
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(result, indent=1))
  checks = [{name: x for name, x in row.items() if name != "errors"} for row in result["values"]]
  parts = [checks, *(result[name] for name in ("dense", "sparse") if result[name])]
  title = f"{result['device']}, jax {result['jax']}, {result['date']}"
  peak = f"A matrix product of 8192 runs at {result['matmul TFLOP/s']:.0f} TFLOP/s."
  path.with_suffix(".md").write_text("\n\n".join([title, peak, *map(table, parts)]) + "\n")
  return path


def main(_) -> None:
  if not INTERPRET.value and jax.default_backend() != "gpu":
    sys.exit(f"error: no NVIDIA GPU here, jax runs on {jax.default_backend()}; see --interpret")
  length, widths = (45, (32,)) if INTERPRET.value else (1000, (32, 64, 80, 128, 256))
  found = values(length, widths, INTERPRET.value)
  if not INTERPRET.value:
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    about |= {"date": datetime.date.today().isoformat()}
    print(write({**about, "values": found, **times([int(n) for n in LENGTHS.value])}))
  sys.exit(not all(row["good"] for row in found))


if __name__ == "__main__":
  app.run(main)
