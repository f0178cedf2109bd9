"""With which power of the length do time and memory of each attention grow?

  scripts/run attention_scaling                                                 (about 3 minutes)
  scripts/run attention_scaling --config.names=dense,flash,window --config.lengths=2048,4096,8192

Forward and backward of attention alone, one row, every token seeing both ways: all scores at once,
all scores in tiles, sparse patterns in the same tiles, Linformer, and linear attention. Times are
medians, all contenders at all lengths taking turns; memory is what the compiled program holds
beside its arguments and results, for which it need not run. Exponents are least-squares slopes over
the three greatest lengths of each, where constant costs no longer count for much.

Measured (jax 0.10.2, two CPU cores, 3 minutes): time grows with the power 2.01 of the length for
flash, 1.71 BigBird, and 1.0 to 1.1 for windows, dilated ones, Longformer and linear attention; at
8,192 tokens Linformer takes 51 ms, a window 172, linear attention 209, Longformer 265, dilated
windows 300, BigBird 1,057 and flash 1,494. Memory grows with the power 2.00 dense, which would hold
96 GiB at 32,768 tokens, 0.93 in tiles (167 MiB there), 0.89 to 0.99 for the sparse patterns, and
1.00 for Linformer and linear attention (675 MiB).
That dense attention's time is quadratic did NOT hold: the power is 2.47. At 4,096 tokens it takes
2.5 to 3.1 seconds on its own, nearly quadratic, and 4 in turns with others, which presumably leave
it none of its 1.5 GiB of memory in place.
That BigBird's time is linear did NOT hold: a tile of 512 queries holds eight rows of its blocks, so
that their random blocks visit 94 % of all tiles at 4,096 tokens and 66 % at 8,192. Its time becomes
linear only beyond.
That Linformer's is did NOT hold: at these lengths it has hardly begun to grow, with the power 0.47.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import cost
from effjax.attention import attend, linear_attention, masks
from effjax.attention.linformer import linformer_attention
from effjax.core.typing import Array
from effjax.cost.timing import interleaved, medians
from effjax.train import workdir as files
from experiments import harness
from experiments.lab.plots import LINEAR, LOG, Axis, Line, Panel, Series

PAUSE = 0.2  # seconds before each turn
NEAR = 0.25  # how far an exponent may be from the claimed one
LAST = 3  # lengths that exponents are found over
COLUMNS = (("time", "ms", 1e3), ("memory", "MiB", 2.0**-20))


@dataclasses.dataclass
class Config:
  """What is measured.

  Attributes:
    names: contenders of `KINDS`, comma-separated, or "all".
    lengths: N, comma-separated.
    timed: the greatest of them that is run.
    heads, width: of every contender.
    window: keys on each side of windows, dilated ones and Longformer's.
    dilation: of the dilated window.
    global_tokens: Longformer's.
    block, random_blocks: BigBird's.
    rank: Linformer's.
    rounds: turns that are timed; a contender that takes over `patience` seconds has one.
    memory: bytes; a contender that would hold more is not run, and has no time.
  """

  names: str = "all"
  lengths: str = "1024,2048,4096,8192,16384,32768"
  timed: int = 8192
  heads: int = 4
  width: int = 64
  window: int = 128
  dilation: int = 4
  global_tokens: int = 16
  block: int = 64
  random_blocks: int = 3
  rank: int = 128
  rounds: int = 3
  patience: float = 8.0
  memory: int = 2_000_000_000


@dataclasses.dataclass(frozen=True)
class Kind:
  """A contender.

  Attributes:
    make: (config, length) → a function of query, key and value.
    time, memory: the exponents that are claimed of it.
  """

  make: Callable[[Config, int], Callable[..., Array]]
  time: int = 1
  memory: int = 1


def through(make: Callable[[Config, int], masks.Mask], implementation: str = "xla") -> Callable:
  """Attention through the mask that `make` gives."""
  return lambda config, length: functools.partial(
    attend, mask=make(config, length), implementation=implementation
  )


def bigbird(config: Config, length: int) -> masks.Mask:
  """BigBird's blocks, the random ones drawn once and the same for all heads."""
  key = jax.random.key(0)
  return masks.bigbird(key, length, block=config.block, number=config.random_blocks)


def linformer(config: Config, length: int) -> Callable[..., Array]:
  """Linformer with one map for keys and values, part of the program; all scores at once."""
  key_map = jax.random.normal(jax.random.key(0), (length, config.rank)) * length**-0.5
  return lambda q, k, v: linformer_attention(q, k, v, key_map, key_map)


def linear(config: Config, length: int) -> Callable[..., Array]:
  """Linear attention, both ways."""
  return lambda q, k, v: linear_attention(q, k, v, causal=False)[0]


KINDS = {
  "dense": Kind(through(lambda c, n: masks.Full(), "reference"), time=2, memory=2),
  "flash": Kind(through(lambda c, n: masks.Full()), time=2),
  "window": Kind(through(lambda c, n: masks.SlidingWindow(c.window, c.window))),
  "dilated": Kind(through(lambda c, n: masks.Dilated(c.window, c.dilation))),
  "longformer": Kind(through(lambda c, n: masks.longformer(c.window, c.global_tokens))),
  "bigbird": Kind(through(bigbird)),
  "linformer": Kind(linformer),
  "linear": Kind(linear),
}


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row a contender; writes `metrics.jsonl`, `result.csv` and `plot.png` to `workdir`."""
  names = harness.chosen(config.names, KINDS, what="contender")
  lengths = harness.numbers("lengths", config.lengths, int, least=1)
  folder = files.claim(workdir, config)
  tasks = {f"N={n}": functools.partial(held, config, names, n) for n in lengths}
  points = harness.compute(folder, tasks, label="lengths")
  times = harness.compute(
    folder, {"times": functools.partial(timed, config, points)}, label="times"
  )
  rows = [summary(points + times, name) for name in names]
  harness.plot(folder, functools.partial(panels, names=names))
  columns = {"name": "", "time ^": ".2f", "memory ^": ".2f"}
  columns |= {f"ms {n}": ",.0f" for n in lengths if n <= config.timed}
  columns |= {f"MiB {n}": ",.0f" for n in lengths}
  harness.finish(folder, rows, columns, claims(rows))
  harness.write_csv(folder, rows)
  return rows


def held(config: Config, names: list[str], length: int) -> harness.Row:
  """Bytes of temporaries of each contender at one length."""
  arrays, programs = problem(config, names, length)
  sizes = {name: cost.compiled(program, *arrays).temporaries for name, program in programs.items()}
  return {"memory": [[name, length, size] for name, size in sizes.items()]}


def timed(config: Config, points: list[harness.Row]) -> harness.Row:
  """Seconds of each contender at each length that is run, all in turns."""
  calls, places = {}, {}
  for row in points:
    length = row["memory"][0][1]
    names = [name for name, _, size in row["memory"] if (size or 0) <= config.memory]
    if length <= config.timed:
      arrays, programs = problem(config, names, length)
      for name, program in programs.items():
        label = f"{name} {length}"
        calls[label], places[label] = waited(program, arrays), (name, length)
  times = medians(interleaved(calls, config.rounds, patience=config.patience, pause=PAUSE))
  return {"time": [[*places[label], seconds] for label, seconds in times.items()]}


def problem(config: Config, names: list[str], length: int) -> tuple[list[Array], dict]:
  """Query, key, value and cotangent, and the contenders' programs."""
  keys = jax.random.split(jax.random.key(1), 4)
  arrays = [jax.random.normal(key, (1, length, config.heads, config.width)) for key in keys]
  return arrays, {name: both_ways(KINDS[name].make(config, length)) for name in names}


def waited(program: Callable, arrays: list[Array]) -> Callable[[], Any]:
  """A call that waits for its results."""
  return lambda: jax.block_until_ready(program(*arrays))


def both_ways(attention: Callable[..., Array]) -> Callable:
  """⟨attention(q, k, v), c⟩ and its gradients in q, k and v, compiled: forward and backward."""
  product = lambda q, k, v, c: jnp.vdot(attention(q, k, v), c)
  return jax.jit(jax.value_and_grad(product, argnums=(0, 1, 2)))


def summary(points: list[harness.Row], name: str) -> harness.Row:
  """Times and temporaries of one contender at each length, and their exponents."""
  row: harness.Row = {"name": name}
  for column, unit, factor in COLUMNS:
    line = series(points, name, column, factor)
    row[f"{column} ^"] = exponent(line)
    row |= {f"{unit} {n}": y for n, y in line.items()}
  return row


def series(points: list[harness.Row], name: str, column: str, factor: float) -> dict[int, float]:
  """What was measured of one contender, by length."""
  found = [cell for row in points for cell in row.get(column, ()) if cell[0] == name]
  return {length: factor * y for _, length, y in found if y is not None}


def exponent(line: dict[int, float]) -> float | None:
  """a of y ∝ N^a over the three greatest N, by least squares on logarithms; None for one or none.

  Only what is finite and above 0 counts.

  Example:
    >>> round(exponent({512: 9.0, 1024: 3.0, 2048: 12.0, 4096: 48.0}), 3)
    2.0
  """
  lengths = [n for n in sorted(line) if 0 < line[n] < math.inf][-LAST:]
  if len(lengths) < 2:
    return None
  return float(np.polyfit(np.log(lengths), np.log([line[n] for n in lengths]), 1)[0])


def claims(rows: list[harness.Row]) -> dict[str, bool]:
  """Of each exponent that was found, whether it is the claimed one to a quarter."""
  found = {}
  for row in rows:
    for column, *_ in COLUMNS:
      claimed, slope = getattr(KINDS[row["name"]], column), row[f"{column} ^"]
      if slope is not None:
        found[f"{row['name']}: {column} grows as N^{claimed}"] = abs(slope - claimed) < NEAR
  return found


def panels(points: list[harness.Row], names: list[str]) -> list[Panel]:
  """Time and memory over the length, and their exponents beside those that are claimed."""
  found = []
  for column, unit, factor in COLUMNS:
    lines = {name: series(points, name, column, factor) for name in names}
    ticks = {float(n): f"{n:,}" for line in lines.values() for n in sorted(line)}
    curves = [Series(name, list(line), list(line.values())) for name, line in lines.items() if line]
    words = f"{column} of forward and backward ({unit})"
    found.append(Panel(column.capitalize(), Axis("tokens", LOG, ticks), Axis(words, LOG), curves))
  rows = [summary(points, name) for name in names]
  places = [float(i) for i in range(len(rows))]
  slopes = [
    Series(f"of {column}", places, [row[f"{column} ^"] for row in rows], joined=False)
    for column, *_ in COLUMNS
  ]
  claimed = {getattr(KINDS[name], column) for name in names for column, *_ in COLUMNS}
  bounds = [
    Line(f"N^{power}, to {NEAR:g}", y=power + side)
    for power in sorted(claimed)
    for side in (-NEAR, NEAR)
  ]
  contenders = Axis("contender", LINEAR, dict(enumerate(names)))
  powers = Axis(f"exponent over the {LAST} greatest lengths")
  return [*found, Panel("Exponents", contenders, powers, slopes, bounds)]


if __name__ == "__main__":
  harness.main(run, Config())
