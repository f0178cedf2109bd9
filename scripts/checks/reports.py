"""What compilers say of one kernel, read from the files that they leave."""

import json
import pathlib
import re
import subprocess
from typing import Any, NamedTuple

import numpy as np

Figures = dict[str, float]


class Tools(NamedTuple):
  """Paths of NVIDIA's tools, where there are such."""

  ptxas: str | None
  nvdisasm: str | None


_CONTAINERS = ("Sequential", "CommandBuffer", "Conditional", "While")
_SHARED = r"kCustomKernel .*\] {kernel}\S* grid: .*shared_memory: (\d+) bytes"


def gpu(dump: pathlib.Path, kernel: str, tools: Tools, architecture: str) -> tuple[Figures, str]:
  """Figures of a kernel, and its machine code, "" without the tools.

  Bytes of shared memory of a block, and with ptxas registers of a thread and bytes it spills.
  """
  (sequence,) = dump.glob("*.thunk_sequence.txt")
  shared = re.search(_SHARED.format(kernel=kernel), sequence.read_text())
  if shared is None:
    raise ValueError(f"dump: {sequence.name} does not launch {kernel!r}")
  figures: Figures = {"shared": int(shared[1])}
  if tools.ptxas is None:
    return figures, ""
  entry = re.compile(rf"\.entry {kernel}\w*\(")
  (source,) = (path for path in dump.glob("*.ptx") if entry.search(path.read_text()))
  binary = source.with_suffix(".cubin")
  said = _said(tools.ptxas, "-v", f"-arch={architecture}", source, "-o", binary).stderr
  figures |= {
    "registers": max(map(int, re.findall(r"Used (\d+) reg", said))),
    "spill": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
  }
  return figures, _said(tools.nvdisasm, "-c", binary).stdout if tools.nvdisasm else ""


def _said(*command: Any) -> subprocess.CompletedProcess[str]:
  return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)


def launches(dump: pathlib.Path) -> int:
  """What a program launches on a GPU: kernels, copies, calls of libraries; a loop's once."""
  (sequence,) = dump.glob("*.thunk_sequence.txt")
  kinds = re.findall(r"^\s*\d+: k(\w+)", sequence.read_text(), re.MULTILINE)
  return sum(kind not in _CONTAINERS for kind in kinds)


def tpu(dump: pathlib.Path, kernel: str) -> Figures:
  """Bundles of the schedule; shares with a product, with a spill; bytes of VMEM and of spills."""
  schedules = dump.glob("*-final_hlo-static-per-bundle-utilization.txt")
  (schedule,) = (path for path in schedules if _names(path.name.split("-")[1], kernel))
  names, _, *bundles = schedule.read_text().split("\n")[1:]
  (report,) = dump.glob("*vmem_report.html")
  table = dict(zip(names.split(", "), _table(bundles).T, strict=True))
  share = lambda *units: round(float(np.any([table[x] for x in units if x in table], 0).mean()), 3)
  figures = {"bundles": len(table[names.split(", ")[0]]), "matmul": share("MXU", "MATMUL")}
  return figures | {"spilling": share("VSTORE:SPILL")} | _memory(report.read_text(), kernel)


def _names(program: str, kernel: str) -> bool:
  """Whether a program is the kernel: "keys.1", "transpose_jvp_keys__.1", not "iota.keys"."""
  return re.fullmatch(rf"[a-z_]*{kernel}_*\.\d+", program) is not None


def _table(lines: list[str]) -> np.ndarray:
  """[bundles, units], how many of each a bundle uses."""
  return np.array([line.split() for line in lines if re.fullmatch(r"[\d\s]+\d\s*", line)], int)


def _memory(page: str, kernel: str) -> Figures:
  """Those of the kernel in the page's data."""
  data, _ = json.JSONDecoder().raw_decode(page, page.index("{", page.index("const DATA")))
  programs = data["hlo_breakdowns"].items()
  (blocks,) = (each["blocks"] for name, each in programs if _names(name, kernel))
  scoped = [block for block in blocks if block["block_type"] == "SCOPED"]
  pieces = [piece for block in scoped for piece in block["allocations"]]
  return {
    "vmem": sum(block["block_size"] for block in scoped),
    "spill": sum(piece["size"] for piece in pieces if piece["tag"] == "SPILL"),
  }
