"""How many layers until every token can know of every other, under each sparse pattern?

  scripts/run rapid_mixing                                                      (about 40 seconds)

BigBird's argument (arXiv 2007.14062, section 2) takes attention as a graph: an edge from a node to
each node that it sees. A node here is one of BigBird's blocks. What it can know of after n layers
lies n steps away, so the longest of all shortest paths is the number of layers that a model needs;
and a random walk that forgets fast where it began (a large gap 1 − λ₂ between its first and second
eigenvalue) is what lets a sparse graph stand for the full one.

Paths follow the edges from as many starts as `sources` says, evenly spaced and the ends among them,
by breadth-first search over lists of edges; those to what is not reached do not count. The walk is
that on the graph without directions, a node's edge to itself included.

Measured (5 draws of random blocks): a window of 1 needs N − 1 layers, 4 095 for 4 096 blocks, one
of 4 needs 1 024, a dilated one beside it 515; dilation alone falls apart into as many pieces as its
distance. Three random blocks make it 8.8 ± 0.4, the mean path 0.45 longer with each doubling of N;
with a global block, and in BigBird, it is 2. The gap is 3.1e-6 for the window at 1 024 blocks and
falls as 1/N²; it stays at 0.25 with a global block, 0.30 with random ones and 0.43 in BigBird.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable

import jax
import numpy as np

from effjax.attention import masks
from effjax.train import workdir as files
from experiments import harness
from experiments.attention.graphs import Graph
from experiments.lab.plots import LOG, Axis, Line, Panel, Series
from experiments.lab.verdicts import deviation

SIDE, GAP, RANDOM = 1, 8, 3  # blocks on each side, distance when dilated, random blocks


def with_random(length: int, seed: int) -> masks.Mask:
  """A window, and random blocks beside it."""
  drawn = masks.RandomBlocks.draw(jax.random.key(seed), length, block=1, number=RANDOM)
  return masks.SlidingWindow(SIDE, SIDE) | drawn


PATTERNS: dict[str, Callable[[int, int], masks.Mask]] = {
  "window": lambda length, seed: masks.SlidingWindow(SIDE, SIDE),
  "window, wide": lambda length, seed: masks.SlidingWindow(4 * SIDE, 4 * SIDE),
  "dilated": lambda length, seed: masks.Dilated(SIDE, GAP),
  "window + dilated": lambda length, seed: (
    masks.SlidingWindow(SIDE, SIDE) | masks.Dilated(SIDE, GAP)
  ),
  "window + global": lambda length, seed: masks.longformer(SIDE, 1),
  "window + random": with_random,
  "bigbird": lambda length, seed: masks.bigbird(
    jax.random.key(seed), length, block=1, number=RANDOM
  ),
}
DRAWN = ("window + random", "bigbird")
STEADY = ("window + global", *DRAWN)
SPREADS = {"longest": "±", "gap": "gap ±"}
COLUMNS = {
  "pattern": "",
  "blocks": ",d",
  "keys": ".1f",
  "mean path": ".2f",
  "longest": ".1f",
  "±": ".2f",
  "reached": ".3f",
  "gap": ".2e",
  "gap ±": ".1e",
}


@dataclasses.dataclass
class Config:
  """Graphs.

  Attributes:
    blocks: numbers of nodes N, comma-separated.
    sources: nodes that paths are followed from.
    spectrum: the most nodes for which eigenvalues are computed, from a matrix of that size.
    seeds: draws of the random blocks.
  """

  blocks: str = "64,128,256,512,1024,2048,4096"
  sources: int = 64
  spectrum: int = 1024
  seeds: int = 5


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row a pattern and size; writes `metrics.jsonl`, `result.csv` and `plot.png`."""
  sizes = harness.numbers("blocks", config.blocks, int, least=8, count=3)
  folder = files.claim(workdir, config)
  tasks = {
    f"{name} N={length} seed={seed}": functools.partial(measured, name, length, seed, config)
    for name, length in itertools.product(PATTERNS, sizes)
    for seed in range(config.seeds if name in DRAWN else 1)
  }
  rows = summarize(harness.compute(folder, tasks, label="graphs"))
  harness.plot(folder, panels)
  harness.finish(folder, rows, COLUMNS, claims(rows))
  harness.write_csv(folder, rows)
  return rows


def measured(name: str, length: int, seed: int, config: Config) -> harness.Row:
  """Paths and, where the graph is small enough, the spectral gap."""
  graph = Graph.of(PATTERNS[name](length, seed), length)
  starts = np.unique(np.linspace(0, length - 1, min(config.sources, length)).round().astype(int))
  steps = np.stack([graph.distances(start) for start in starts])
  paths = steps[steps > 0]
  return {
    "pattern": name,
    "blocks": length,
    "seed": seed,
    "keys": len(graph.heads) / length,
    "mean path": float(paths.mean()),
    "longest": int(paths.max()),
    "reached": float((steps >= 0).mean()),
    "gap": graph.spectral_gap() if length <= config.spectrum else None,
  }


def summarize(rows: list[harness.Row]) -> list[harness.Row]:
  """One row a pattern and size: means over seeds, deviations of the longest path and the gap."""
  groups: dict[tuple[str, int], list[harness.Row]] = {}
  for row in rows:
    groups.setdefault((row["pattern"], row["blocks"]), []).append(row)
  return [_mean(group) for group in groups.values()]


def _mean(group: list[harness.Row]) -> harness.Row:
  first = group[0]
  values = {name: [row[name] for row in group] for name in ("mean path", "longest", "reached")}
  gaps = [row["gap"] for row in group if row["gap"] is not None]
  return {
    "pattern": first["pattern"],
    "blocks": first["blocks"],
    "keys": first["keys"],
    **{name: statistics.mean(found) for name, found in values.items()},
    "±": deviation(values["longest"]),
    "gap": statistics.mean(gaps) if gaps else None,
    "gap ±": deviation(gaps),
    "seeds": len(group),
  }


def claims(rows: list[harness.Row]) -> dict[str, bool]:
  """What the paper's argument says, and whether the graphs do."""
  of = {name: [row for row in rows if row["pattern"] == name] for name in PATTERNS}
  paths = {name: [row["longest"] for row in of[name]] for name in PATTERNS}
  gaps = {name: [r["gap"] for r in of[name] if r["gap"] is not None] for name in PATTERNS}
  sizes = [row["blocks"] for row in of["window"]]
  exact = lambda name, side: all(
    longest == math.ceil((n - 1) / side) for n, longest in zip(sizes, paths[name], strict=True)
  )
  connected = lambda name: all(row["reached"] == 1 for row in of[name])
  steady = lambda name: max(gaps[name]) < 2 * min(gaps[name])
  others = [name for name in PATTERNS if name != "dilated"]
  return {
    "a window of w on each side needs (N − 1)/w layers, rounded up": exact("window", SIDE)
    and exact("window, wide", 4 * SIDE),
    "every pattern connects every pair": all(map(connected, PATTERNS)),
    "every pattern but the dilated window alone does": all(map(connected, others)),
    "dilation only divides the layers by a constant: still as N^1 (to 0.1)": abs(
      slope(sizes, paths["window + dilated"]) - 1
    )
    < 0.1,
    "with random blocks they grow as log N (mean path within 0.1 of a line over it)": off_a_line(
      np.log2(sizes), [row["mean path"] for row in of["window + random"]]
    )
    < 0.1,
    "with a global block 2 are enough, whatever N": max(paths["window + global"]) <= 2
    and max(paths["bigbird"]) <= 2,
    "the window's spectral gap vanishes as 1/N² (exponent to 0.1)": abs(
      slope(sizes[: len(gaps["window"])], gaps["window"]) + 2
    )
    < 0.1,
    "with random or global blocks the gap stays, within a factor of 2": all(map(steady, STEADY)),
  }


def slope(x: list[float], y: list[float]) -> float:
  """The exponent a of y ∝ x^a, by least squares on logarithms.

  Example:
    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
  """
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def off_a_line(x: np.ndarray, y: list[float]) -> float:
  """The largest distance of y from its least-squares line over x."""
  return float(np.max(abs(np.polyval(np.polyfit(x, y, 1), x) - y)))


def panels(measurements: list[harness.Row]) -> list[Panel]:
  """Paths, layers, reach and gap over the number of blocks, and the laws that are claimed."""
  rows = summarize(measurements)
  by = {name: [r for r in rows if r["pattern"] == name] for name in PATTERNS}
  sizes = sorted({row["blocks"] for row in rows})
  sides = {"window": SIDE, "window, wide": 4 * SIDE}
  needed = [
    *(Line("(N − 1) / w", sizes, [(n - 1) / w for n in sizes], of=k) for k, w in sides.items()),
    _law(by["window + dilated"], "longest", 1, "as N, with dilation"),
    Line("2 layers", y=2.0),
  ]
  gaps = {name: [r["gap"] for r in by[name] if r["gap"] is not None] for name in STEADY}
  forgets = [
    _law(by["window"], "gap", -2, "as 1 / N², of the window"),
    *(Line("twice its least", y=2 * min(gap), of=name) for name, gap in gaps.items() if gap),
  ]
  panel = functools.partial(_panel, by, sizes)
  return [
    panel("Paths", "mean path (layers)", "mean path", [_over_log(by["window + random"])]),
    panel("Layers until each block can know all", "longest path (layers)", "longest", needed),
    panel("Reach", "pairs of blocks with a path (share)", "reached", [Line("all", y=1.0)]),
    panel("Forgetting", "spectral gap of the walk, 1 − λ₂", "gap", forgets),
  ]


def _panel(by: dict, sizes: list[int], title: str, words: str, column: str, lines: list) -> Panel:
  """A column of every pattern."""
  series = []
  for name, rows in by.items():
    found = [row for row in rows if row[column] is not None]
    x, y, spread = ([row.get(c) for row in found] for c in ("blocks", column, SPREADS.get(column)))
    series.append(Series(name, x, y, spread))
  blocks = Axis("blocks of the sequence, N", LOG, {n: f"{n:,}" for n in sizes})
  height = Axis(words, None if column == "reached" else LOG)
  bars = "standard deviation over draws" if column in SPREADS else ""
  return Panel(title, blocks, height, series, lines, bars)


def _law(rows: list[harness.Row], column: str, power: int, words: str) -> Line:
  """a·N^power through the last measurement."""
  found = {row["blocks"]: row[column] for row in rows if row[column] is not None}
  last = max(found, default=1)
  return Line(words, list(found), [found[last] * (n / last) ** power for n in found])


def _over_log(rows: list[harness.Row]) -> Line:
  """The least-squares line of the mean path over log N."""
  rows = [row for row in rows if math.isfinite(row["mean path"])]
  x, y = ([float(row[c]) for row in rows] for c in ("blocks", "mean path"))
  fit = np.polyfit(np.log2(x), y, 1) if len(x) > 1 else [0.0, *y]
  words = "nearest line over log N, with random blocks"
  return Line(words, x, np.polyval(fit, np.log2(x)).tolist())


if __name__ == "__main__":
  harness.main(run, Config())
