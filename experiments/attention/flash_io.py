"""Does FlashAttention move what it is said to move, and what of its published table comes out?

  scripts/run flash_io                                                          (about 20 seconds)

Part one runs Algorithm 1 (arXiv 2205.14135) and standard attention on one head, over lengths N,
head widths d and fast memories of M elements, counts every element that goes to or from slow
memory, and fits exponents to the counts: theorem 2 says Θ(N²·d²/M) against Θ(N·d + N²), for
d ≤ M ≤ N·d.

Part two computes the table that the paper and lectures print for GPT-2 medium (1024 tokens, width
64, 16 heads, batch 64, 16 bits, forward and backward, A100). FLOPs are those of the matrix
products: 4·N²·d forward, twice that backward, and 2·N²·d more where scores are recomputed. Traffic
is that of algorithms 0 and 3 (standard) and 1 and 4 (flash), with the 192 KB of a multiprocessor as
M. The printed times are compared with the least that 1.555 TB/s and 312 TFLOP/s allow.

Measured: the counts are the formulas', to the element; flash traffic grows as N^1.99 d^1.96
M^-0.96, standard traffic as N^1.98. Flash moves less where M is above 3·d² + 4·d, and from 8·d² on
what it holds fits into M, of which it takes up to 1.3 below. Of the table, 4.4 GB come out as 4.06,
in three passes over the keys. The FLOPs are 825 and 962 G, not 66.6 and 75.2, and 1.167 apart, not
1.129. Algorithms 0 and 3 move 25.2 GB, not 40.3: that is seven more passes over the scores, of
2.147 GB each, such as masking and dropout in kernels of their own take. Both times are possible.
"""

import dataclasses
import functools
import math

import numpy as np

from effjax import cost
from effjax.kernels.flash_attention import algorithm1
from effjax.train import workdir as files
from experiments import harness
from experiments.lab.plots import LINEAR, LOG, Axis, Line, Panel, Series

KINDS = ("standard", "flash")
SWEPT = (  # what a sweep varies, in words, and the power of flash traffic in it by theorem 2
  ("N", "length N (tokens)", 2),
  ("d", "head width d (elements)", 2),
  ("M", "fast memory M (elements)", -1),
)
LENGTH, WIDTH, HEADS, ITEM = 1024, 64, 16 * 64, 2  # the published setting; bytes of an element
FLASH = (LENGTH, WIDTH, 192 * 1024 // ITEM)
A100_BANDWIDTH, A100_FLOPS = 1.555e12, 312e12
PUBLISHED = {
  "matmul GFLOPs, standard": 66.6,
  "matmul GFLOPs, flash": 75.2,
  "FLOPs, flash / standard": 75.2 / 66.6,
  "GB moved, standard": 40.3,
  "GB moved, flash": 4.4,
  "passes over N², standard": 40.3e9 / cost.score_bytes(LENGTH, HEADS, ITEM),
  "least ms, standard": 41.7,
  "least ms, flash": 7.3,
}


@dataclasses.dataclass
class Config:
  """Sweeps, each around the middle of the other two.

  Attributes:
    lengths, widths, memories: N, d and M, comma-separated.
    length, width, memory: what the other sweeps hold fixed.
    seed: of the queries, keys and values.
  """

  lengths: str = "512,1024,2048,4096,8192"
  widths: str = "16,32,64,128"
  memories: str = "2048,4096,8192,16384,32768,65536"
  length: int = 2048
  width: int = 32
  memory: int = 4096
  seed: int = 0


def run(config: Config, workdir: str) -> list[harness.Row]:
  """Rows of both parts; writes `metrics.jsonl`, `result.csv` and `plot.png` to `workdir`."""
  folder = files.claim(workdir, config)
  sizes = sweeps(config)
  tasks = {
    f"N={n} d={d} M={m}": functools.partial(counted, n, d, m, config.seed)
    for n, d, m in dict.fromkeys(size for sweep in sizes.values() for size in sweep)
  }
  tasks |= {name: functools.partial(published, name) for name in PUBLISHED}
  rows = harness.compute(folder, tasks, label="counts")
  runs, cells = [[row for row in rows if key in row] for key in ("flash", "printed")]
  found = exponents(runs, sizes)
  print("\n" + harness.table(cells, {"name": "", "printed": ".2f", "computed": ".2f"}))
  print("\nfitted exponents: " + ", ".join(f"{name} {x:.2f}" for name, x in found.items()))
  harness.plot(folder, functools.partial(panels, sizes=sizes))
  columns = {"name": "", "flash": ",.0f", "standard": ",.0f", "ratio": ".3f", "held / M": ".2f"}
  harness.finish(folder, runs, columns, claims(runs, found) | published_claims(cells))
  harness.write_csv(folder, rows)
  return rows


def sweeps(config: Config) -> dict[str, list[tuple[int, int, int]]]:
  """(N, d, M) of the three sweeps, by what varies.

  Raises:
    ValueError: for a list that is not of at least two different positive integers.
  """
  lists = {}
  for name in ("lengths", "widths", "memories"):
    lists[name] = harness.numbers(name, getattr(config, name), int, least=1, count=2)
  return {
    "N": [(n, config.width, config.memory) for n in lists["lengths"]],
    "d": [(config.length, d, config.memory) for d in lists["widths"]],
    "M": [(config.length, config.width, m) for m in lists["memories"]],
  }


def counted(length: int, width: int, memory: int, seed: int) -> harness.Row:
  """Elements that both algorithms move, their difference in value, and the formulas' figures."""
  x = np.random.default_rng(seed).normal(size=(3, length, width))
  flash = algorithm1.flash_attention(*x, memory=memory)
  standard = algorithm1.standard_attention(*x)
  return {
    "N": length,
    "d": width,
    "M": memory,
    "flash": flash.counts.moved,
    "standard": standard.counts.moved,
    "ratio": flash.counts.moved / standard.counts.moved,
    "transfers": flash.counts.transfers,
    "held / M": flash.counts.held / memory,
    "flash_formula": cost.flash_traffic(length, width, memory),
    "standard_formula": cost.standard_traffic(length, width),
    "error": float(abs(flash.out - standard.out).max()),
  }


def exponents(rows: list[harness.Row], sizes: dict) -> dict[str, float]:
  """Slopes of log(elements moved) over log(N), log(d) and log(M), by least squares."""
  found = {}
  for kind in KINDS:
    by_size = {(row["N"], row["d"], row["M"]): row[kind] for row in rows}
    for i, (name, sweep) in enumerate(sizes.items()):
      moved = [by_size[size] for size in sweep]
      slope = np.polyfit(np.log([size[i] for size in sweep]), np.log(moved), 1)[0]
      found[f"{kind} {name}"] = float(slope)
  return found


def published(name: str) -> harness.Row:
  """A cell of the published table and what it comes to."""
  return {"name": name, "printed": PUBLISHED[name], "computed": table()[name]}


def table() -> dict[str, float]:
  """The published table, computed (the module's docstring says how)."""
  forward = cost.standard_traffic(LENGTH, WIDTH), cost.flash_traffic(*FLASH)
  backward = cost.standard_backward_traffic(LENGTH, WIDTH), cost.flash_backward_traffic(*FLASH)
  moved = {k: (a + b) * HEADS * ITEM for k, a, b in zip(KINDS, forward, backward, strict=True)}
  flops = {k: n * LENGTH**2 * WIDTH * HEADS for k, n in zip(KINDS, (12, 14), strict=True)}
  cells = {f"matmul GFLOPs, {kind}": flops[kind] / 1e9 for kind in flops}
  cells["FLOPs, flash / standard"] = flops["flash"] / flops["standard"]
  cells |= {f"GB moved, {kind}": moved[kind] / 1e9 for kind in moved}
  cells["passes over N², standard"] = moved["standard"] / cost.score_bytes(LENGTH, HEADS, ITEM)
  least = {kind: max(moved[kind] / A100_BANDWIDTH, flops[kind] / A100_FLOPS) for kind in flops}
  return cells | {f"least ms, {kind}": 1e3 * least[kind] for kind in least}


def claims(rows: list[harness.Row], found: dict[str, float]) -> dict[str, bool]:
  """What theorem 2 and the algorithm's description say of the runs."""
  near = lambda name, expected: abs(found[name] - expected) < 0.1
  same = all(row[k] == row[f"{k}_formula"] for row in rows for k in KINDS)
  return {
    f"{len(rows)} runs moved what the formulas say, to the element": same,
    "both compute the same, to 1e-12": all(row["error"] < 1e-12 for row in rows),
    "flash traffic grows as N²·d²/M (each exponent to 0.1)": near("flash N", 2)
    and near("flash d", 2)
    and near("flash M", -1),
    "standard traffic grows as N² and not with M": near("standard N", 2) and near("standard M", 0),
    "flash moves less, whatever N, d and M": all(row["ratio"] < 1 for row in rows),
    "flash moves less exactly where M is above 3·d² + 4·d": all(
      (row["ratio"] < 1) == (row["M"] > 3 * row["d"] ** 2 + 4 * row["d"]) for row in rows
    ),
    "what Algorithm 1 holds fits into M": all(row["held / M"] <= 1 for row in rows),
  }


def published_claims(cells: list[harness.Row]) -> dict[str, bool]:
  """What of the published table comes out."""
  ratio = {cell["name"]: cell["computed"] / cell["printed"] for cell in cells}
  near = lambda name, tolerance: abs(ratio[name] - 1) < tolerance
  flops = [f"matmul GFLOPs, {kind}" for kind in KINDS]
  return {
    "the printed GFLOPs are those of the matrix products, to 10 %": all(
      near(name, 0.1) for name in flops
    ),
    "the printed GFLOPs are in the ratio of the products, 7/6, to 1 %": near(
      "FLOPs, flash / standard", 0.01
    ),
    "40.3 GB are what algorithms 0 and 3 move, to 10 %": near("GB moved, standard", 0.1),
    "4.4 GB are what algorithms 1 and 4 move, to 10 %": near("GB moved, flash", 0.1),
    "the printed times are possible: bandwidth and FLOP/s allow them": all(
      ratio[f"least ms, {kind}"] <= 1 for kind in KINDS
    ),
  }


def panels(rows: list[harness.Row], sizes: dict) -> list[Panel]:
  """Elements moved over N, d and M, with formulas and laws; the published table."""
  by_size = {(row["N"], row["d"], row["M"]): row for row in rows if "flash" in row}
  return [
    *(_sweep(i, [by_size[size] for size in sweep]) for i, sweep in enumerate(sizes.values())),
    _printed([row for row in rows if "printed" in row]),
  ]


def _sweep(i: int, rows: list[harness.Row]) -> Panel:
  """Counts of both algorithms over one size; formulas, the law of theorem 2, and the crossing."""
  name, words, power = SWEPT[i]
  x = [row[name] for row in rows]
  fixed = ", ".join(f"{key} = {rows[0][key]:,}" for key, *_ in SWEPT if key != name)
  series = [Series(kind, x, [row[kind] for row in rows], joined=False) for kind in KINDS]
  lines = [
    Line("the formula", x, [row[f"{kind}_formula"] for row in rows], of=kind) for kind in KINDS
  ]
  law = [rows[-1]["flash_formula"] * (place / x[-1]) ** power for place in x]
  lines.append(Line(f"flash as {name}^{power}, theorem 2", x, law))
  d, memory = rows[0]["d"], rows[0]["M"]
  crossing = {"d": (math.sqrt(4 + 3 * memory) - 2) / 3, "M": 3 * d**2 + 4 * d}
  if name in crossing:
    lines.append(Line("M = 3·d² + 4·d: equal traffic", x=float(crossing[name])))
  axis = Axis(words, LOG, {place: f"{place:,}" for place in x})
  return Panel(f"Traffic at {fixed}", axis, Axis("elements moved", LOG), series, lines)


def _printed(cells: list[harness.Row]) -> Panel:
  """What each cell of the published table comes to, over what is printed."""
  places = [float(i) for i in range(len(cells))]
  ratio = [cell["computed"] / cell["printed"] for cell in cells]
  bounds = [Line("to 10 %", y=bound) for bound in (0.9, 1.1)]
  return Panel(
    "The published table",
    Axis("cell of the table", LINEAR, dict(enumerate(cell["name"] for cell in cells))),
    Axis("computed, over printed", LOG),
    [Series("computed from the algorithms", places, ratio, joined=False)],
    [Line("as printed; times are possible up to here", y=1.0), *bounds],
  )


if __name__ == "__main__":
  harness.main(run, Config())
