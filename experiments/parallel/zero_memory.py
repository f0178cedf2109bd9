"""Does ZeRO's memory come out as published, and do arrays on devices take what the formula says?

  scripts/run zero_memory                                                       (about 10 seconds)

Part one computes the table of the ZeRO paper (arXiv 1910.02054, Table 1): gigabytes of model state
per device for 7.5 B, 128 B and 1 T parameters. The published 7.5 B figures are rounded and the
others cut off (2218.75 is printed as 2218), so a cell agrees when it is within one unit of the last
digit printed. Part two lays out the training state of a small model on simulated devices, stage by
stage, and adds up the bytes that the first of them holds.

Measured (8 simulated devices, 918 656 parameters in float32): all 54 cells agree; ZeRO-0, 1, 2, 3
hold 14.70, 8.27, 5.05 and 1.84 MB a device, 1.0000 times the formula each.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax

from effjax import cost
from effjax.attention import Attention, masks
from effjax.core import trees
from effjax.layers import MLP
from effjax.models import LayerSpec, Transformer, TransformerConfig
from effjax.parallel import Zero, make_mesh, place, simulate_devices
from effjax.train import init_state
from effjax.train import workdir as files
from experiments import harness
from experiments.lab.plots import LINEAR, LOG, Axis, Line, Panel, Series

STAGES = {"os": 1, "os+g": 2, "os+g+p": 3}
SIZES = {"7.5B": 7.5e9, "128B": 128e9, "1T": 1e12}
PUBLISHED = {
  1: "120 120 120   2048 2048 2048   16000 16000 16000",
  4: "52.5 41.3 30   896 704 512   7000 5500 4000",
  16: "35.6 21.6 7.5   608 368 128   4750 2875 1000",
  64: "31.4 16.6 1.88   536 284 32   4187 2218 250",
  256: "30.4 15.4 0.47   518 263 8   4046 2054 62.5",
  1024: "30.1 15.1 0.12   513 257 2   4011 2013 15.6",
}


@dataclasses.dataclass
class Config:
  """What is laid out in part two.

  Attributes:
    devices: simulated devices.
    width, layers, vocab: the shape of the small model.
  """

  devices: int = 8
  width: int = 128
  layers: int = 4
  vocab: int = 1024


def run(config: Config, workdir: str) -> list[harness.Row]:
  """Rows of both parts; writes `metrics.jsonl`, `result.csv` and `plot.png` to `workdir`."""
  folder = files.claim(workdir, config)
  devices = simulate_devices(config.devices)
  cells = {
    f"{size} {part} dp={dp}": functools.partial(cell, size, part, dp)
    for dp in PUBLISHED
    for size in SIZES
    for part in STAGES
  }
  stages = {
    f"placed zero={stage}": functools.partial(placed, config, devices, stage) for stage in range(4)
  }
  rows = harness.compute(folder, cells | stages, label="cells")
  harness.plot(folder, panels)
  print("\n" + published_table(rows))
  columns = {"name": "", "device_bytes": ",.0f", "formula_bytes": ",.0f", "ratio": ".4f"}
  agree = sum(row.get("agrees", False) for row in rows)
  near = all(abs(row["ratio"] - 1) < 0.01 for row in rows if "ratio" in row)
  claims = {
    f"all {len(cells)} published cells come out ({agree} do)": agree == len(cells),
    "placed arrays take what the formula says, to 1 %": near,
  }
  harness.finish(folder, [row for row in rows if "ratio" in row], columns, claims)
  harness.write_csv(folder, rows)
  return rows


def cell(size: str, part: str, dp: int) -> harness.Row:
  """One cell of the published table against `cost.zero_memory`, in units of 10⁹ bytes."""
  figure = printed(size, part, dp)
  computed = cost.zero_memory(SIZES[size], dp, STAGES[part]) / 1e9
  return {
    "size": size,
    "part": part,
    "dp": dp,
    "gigabytes": computed,
    "published": float(figure),
    "agrees": bool(abs(computed - float(figure)) < unit(figure)),
  }


def printed(size: str, part: str, dp: int) -> str:
  """What the paper prints in a cell."""
  column = list(SIZES).index(size) * len(STAGES) + list(STAGES).index(part)
  return PUBLISHED[dp].split()[column]


def unit(figure: str) -> float:
  """One of the last digit of a printed figure.

  Example:
    >>> unit("7.25"), unit("120")
    (0.01, 1.0)
  """
  return 10.0 ** -len(figure.partition(".")[2])


def placed(config: Config, devices: list[jax.Device], stage: int) -> harness.Row:
  """Bytes of parameters, gradients and Adam's moments on the first device, float32 throughout.

  The formula is 4Φ/n_p + 4Φ/n_g + 8Φ/n_m, with n the number of devices a part is split over.
  """
  layer = LayerSpec(
    mixer=Attention(heads=4, kv_heads=4, mask=masks.Causal()), ffn=MLP(4 * config.width)
  )
  shape = TransformerConfig(config.vocab, config.width, (layer,) * config.layers)
  tokens = np.zeros((1, 8), np.int32)
  params = jax.jit(Transformer(shape).init)(jax.random.key(0), tokens)["params"]
  mesh = make_mesh(devices=devices, data=len(devices))
  state = place(init_state(params, optax.adam(1e-3)), mesh, zero=stage)
  gradients = jax.device_put(params, Zero(mesh, stage).gradients(params))
  held = on_first_device((state.params, state.opt_state, gradients))
  ways = [len(devices) if stage >= least else 1 for least in (3, 2, 1)]
  formula = trees.count(params) * sum(b / n for b, n in zip((4, 4, 8), ways, strict=True))
  return {
    "stage": stage,
    "parameters": trees.count(params),
    "device_bytes": held,
    "formula_bytes": formula,
    "ratio": held / formula,
  }


def on_first_device(tree) -> int:
  """Bytes of the shards of all arrays that lie on the device where the first array begins."""
  arrays = jax.tree.leaves(tree)
  first = arrays[0].addressable_shards[0].device
  return sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == first)


def published_table(rows: list[harness.Row]) -> str:
  """The paper's table, computed; `*` marks a cell that does not agree with the print."""
  lines = []
  for dp in PUBLISHED:
    cells = [row for row in rows if row.get("dp") == dp]
    values = {
      f"{row['size']} {row['part']}": f"{row['gigabytes']:.2f}" + ("" if row["agrees"] else "*")
      for row in cells
    }
    lines.append({"dp": dp, **values})
  return harness.table(lines, dict.fromkeys(lines[0], "g"))


def panels(rows: list[harness.Row]) -> list[Panel]:
  """The 7.5 B columns over devices, how far all cells are from the print, and placed arrays."""
  cells = [row for row in rows if "published" in row]
  devices = Axis("data-parallel devices", LOG, {dp: f"{dp:,}" for dp in PUBLISHED})
  columns, formulas, apart = [], [], []
  for part, stage in STAGES.items():
    column = [row for row in cells if (row["size"], row["part"]) == ("7.5B", part)]
    name, dp = f"ZeRO-{stage} ({part})", [row["dp"] for row in column]
    columns.append(Series(name, dp, [row["published"] for row in column], joined=False))
    formulas.append(Line("formula", dp, [row["gigabytes"] for row in column], of=name))
  for size in SIZES:
    of_size = [row for row in cells if row["size"] == size]
    units = [(row["gigabytes"] - row["published"]) / _unit(row) for row in of_size]
    apart.append(Series(f"{size} parameters", [r["dp"] for r in of_size], units, joined=False))
  agree = [Line("agrees: less than one unit off", y=bound) for bound in (-1.0, 1.0)]
  memory, digits = Axis("model state a device (GB)", LOG), Axis("formula − paper (last digits)")
  return [
    Panel("7.5 B parameters, as the paper prints it", devices, memory, columns, formulas),
    Panel("All cells, in units of the last digit printed", devices, digits, apart, agree),
    _placed([row for row in rows if "ratio" in row]),
  ]


def _unit(row: harness.Row) -> float:
  return unit(printed(row["size"], row["part"], row["dp"]))


def _placed(rows: list[harness.Row]) -> Panel:
  """Bytes on the first device, and those of the formula, a per cent more and less."""
  places = [float(i) for i in range(len(rows))]
  formula = [row["formula_bytes"] / 1e6 for row in rows]
  return Panel(
    "The state of a small model, placed",
    Axis("stage", LINEAR, {i: f"ZeRO-{row['stage']}" for i, row in enumerate(rows)}),
    Axis("on the first device (MB)", LOG),
    [Series("placed", places, [row["device_bytes"] / 1e6 for row in rows], joined=False)],
    [Line("formula ± 1 %", places, [part * x for x in formula]) for part in (0.99, 1.01)],
  )


if __name__ == "__main__":
  harness.main(run, Config())
