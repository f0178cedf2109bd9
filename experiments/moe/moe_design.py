"""Do published mixtures of experts have the parameters that the lecture's table gives them?

  scripts/run moe_design                                                      (about half a minute)

Every row of the table (`designs`) becomes a model of real modules, whose parameters are counted by
their shapes: nothing is allocated. First as the table has it, read alike in all rows: #L is of each
stack, activated / all experts are of every sparse layer, and the pair in the name is what a token
uses and the whole, token tables included. Where that is more than a tenth from the name, the row is
flagged. What is known to be wrong in it is then corrected, and it is counted again; what is still
as far away is no count of that kind, and `designs.NAMED` says what it is.

FLOPs are those of training on one sequence of 4096 tokens, three forwards, with scores over all
keys. For DeepSeek 7B and DeepSeekMoE 16B the formula behind the published figures (arXiv
2401.06066, Tables 2 and 5) stands beside them: `cost.sequence_flops`.

Measured (`results/moe_design`): corrected, all 34 totals are as named, to a tenth. As printed, 4
rows of GShard count twice as much (#L is of both stacks together there, of each in Switch), Switch
395B half as much (64 experts), 4 of GLaM half as much again (experts are not gated), and two of
DeepSpeed-MoE use 30 % more (two experts a token). ST-MoE's 27 layers are too little a matter to
show in its total. Nine first figures are no count of what a token uses of the whole model, among
them GLaM's 64B, which uses 96.6 B. The formula gives the published FLOPs, 183.48 and 74.42 T;
counted are 184.25 and 75.82 T, and 0.09 T of routers.
"""

import dataclasses
import functools
import resource
import time

import jax

from effjax import cost
from effjax.train import workdir as files
from experiments import harness
from experiments.lab.plots import LOG, Axis, Line, Panel, Series
from experiments.moe.abstract import count
from experiments.moe.designs import DENSE_7B, NAMED, Design, printed, right

APART = 0.1  # of the figure in a name, which has one to four digits
TOKENS, BILLION, TERA = 4096, 1e9, 1e12
# What is published of a sequence of so many tokens in TFLOPs, and the formula's a.
PUBLISHED = {"DeepSeek 7B": (183.5, 12), "DeepSeekMoE 2.8B/16.4B": (74.4, 20)}
COLUMNS = {
  "name": "",
  "claimed_total_B": "g",
  "total_B": ".4g",
  "claimed_active_B": "g",
  "active_B": ".3f",
  "train_TFLOPs": ".1f",
  "flagged": "",
}
FLOPS = dict.fromkeys(("published", "formula", "counted", "without_routers"), ".2f")
ERRORS = {
  "name": "",
  "what": "",
  "claimed_B": "g",
  "printed_B": ".4g",
  "right_B": ".4g",
  "wrong": "",
  "found": "",
  "why": "",
}


@dataclasses.dataclass
class Config:
  """What is counted.

  Attributes:
    references: rows of the table by their first column, comma-separated; "all" for all.
  """

  references: str = "all"


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row a design; writes `metrics.jsonl`, `result.csv` and `plot.png` to `workdir`."""
  began, held = time.monotonic(), live_bytes()
  known = dict.fromkeys(design.reference for design in printed())
  chosen = harness.chosen(config.references, known, what="reference")
  designs = [design for design in printed() if design.reference in chosen]
  folder = files.claim(workdir, config)
  tasks = {design.name: functools.partial(model, design) for design in designs}
  tasks |= {f"FLOPs of {name}": functools.partial(sequence, name) for name in PUBLISHED}
  rows = harness.compute(folder, tasks, label="designs")
  harness.plot(folder, panels)
  models = [row for row in rows if "total_B" in row]
  sequences = [row for row in rows if "formula" in row]
  print("\n" + harness.table(errors(models), ERRORS))
  print("\n" + harness.table(sequences, {"name": ""} | FLOPS))
  found = claims(models, sequences) | spent(time.monotonic() - began, live_bytes() - held)
  harness.finish(folder, models, COLUMNS, found)
  harness.write_csv(folder, rows)
  return rows


def model(design: Design) -> harness.Row:
  """What is claimed of a design, what it is as it is printed, and what it is in truth."""
  truth, why = right(design)
  as_printed, counted = count(design, TOKENS), count(truth, TOKENS)
  figures: harness.Row = {}
  for what, claimed in zip(("active", "total"), design.claimed, strict=True):
    sizes = {"": counted, "printed_": as_printed}
    figures |= {f"{kind}{what}_B": getattr(x, what) / BILLION for kind, x in sizes.items()}
    figures[f"claimed_{what}_B"] = None if claimed is None else claimed / BILLION
  return figures | {
    "tables_B": counted.tables / BILLION,
    "experts_B": counted.experts / BILLION,
    "active_experts_B": counted.active_experts / BILLION,
    "train_TFLOPs": counted.flops / TERA,
    "router_TFLOPs": counted.router_flops / TERA,
    "flagged": ", ".join(what for what in ("total", "active") if apart(figures, "printed_", what)),
    "corrected": why,
    "named": NAMED.get(design.model, NAMED.get(design.reference, "")),
  }


def apart(figures: harness.Row, kind: str, what: str) -> bool:
  """Whether a count, as printed or in truth (kind ""), is far from what the name claims."""
  claimed = figures[f"claimed_{what}_B"]
  return claimed is not None and abs(figures[f"{kind}{what}_B"] / claimed - 1) > APART


def errors(models: list[harness.Row]) -> list[harness.Row]:
  """What cannot be so in the table, or is known not to be: a line a figure that it moves."""
  lines = []
  for model in models:
    for what in ("total", "active"):
      claimed, as_printed, counted = (
        model[f"{kind}{what}_B"] for kind in ("claimed_", "printed_", "")
      )
      flagged = what in model["flagged"]
      if flagged or (claimed is not None and abs(as_printed / counted - 1) > 0.01):
        named = apart(model, "", what)
        lines.append({
          "name": model["name"],
          "what": what,
          "claimed_B": claimed,
          "printed_B": as_printed,
          "right_B": counted,
          "wrong": "name" if named else "row",
          "found": "yes" if flagged else "too little",
          "why": model["named"] if named else model["corrected"],
        })  # fmt: skip
  return lines


def sequence(name: str) -> harness.Row:
  """TFLOPs of training on a sequence: published, by the published formula, and counted."""
  published, factor = PUBLISHED[name]
  designs = {f"{design.reference} {design.model}": design for design in (DENSE_7B, *printed())}
  design = designs[name]
  counted = count(design, TOKENS)
  sizes = (design.layers, design.width, design.vocab)
  return {
    "published": published,
    "formula": cost.sequence_flops(TOKENS, *sizes, factor=factor) / TERA,
    "counted": counted.flops / TERA,
    "without_routers": (counted.flops - counted.router_flops) / TERA,
  }


def claims(models: list[harness.Row], sequences: list[harness.Row]) -> dict[str, bool]:
  """What is said of the table, and whether it is so."""
  right = [model for model in models if not apart(model, "", "total")]
  lines = errors(models)
  found = [line for line in lines if line["found"] == "yes"]
  return {
    f"corrected, the total is as named ({len(right)} of {len(models)})": len(right) == len(models),
    f"what is flagged is a known error ({len(found)} figures)": all(line["why"] for line in found),
    "the published formula gives the published FLOPs": all(
      abs(row["formula"] - row["published"]) < 0.05 for row in sequences
    ),
    "counted, they are at most 2 % more": all(
      0 <= row["counted"] / row["formula"] - 1 <= 0.02 for row in sequences
    ),
  }


def spent(seconds: float, arrays: int) -> dict[str, bool]:
  """What the counting took, of this process."""
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / BILLION
  return {
    f"it takes less than a minute ({seconds:.0f} s)": seconds < 60,
    f"and less than 2 GB ({memory:.2f} GB)": memory < 2,
    f"and makes no parameters ({arrays / 1e3:.1f} kB of arrays)": arrays < 1e6,
  }


def live_bytes() -> int:
  """Bytes of all arrays there are."""
  return sum(
    x.nbytes for x in jax.live_arrays() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
  )


def panels(rows: list[harness.Row]) -> list[Panel]:
  """Counts over claims, of totals and of what a token uses; and what a sequence costs."""
  models = [row for row in rows if "total_B" in row]
  cost_of_token = [
    Series(reference, [x for x, _ in points], [y for _, y in points])
    for reference, points in _by_reference(models, "active_B", "train_TFLOPs").items()
  ]
  return [
    _against(models, "total", "Parameters in all"),
    _against(models, "active", "Parameters that a token uses"),
    Panel(
      "Training on one sequence",
      Axis("parameters that a token uses (B)", LOG),
      Axis("FLOPs (T)", LOG),
      cost_of_token,
    ),
  ]


def _against(models: list[harness.Row], what: str, title: str) -> Panel:
  """Counts over the figure in the name, as printed and corrected."""
  named = [model for model in models if model[f"claimed_{what}_B"] is not None]
  claimed = [model[f"claimed_{what}_B"] for model in named]
  ratio = lambda kind: [m[f"{kind}{what}_B"] / c for m, c in zip(named, claimed, strict=True)]
  series = [
    Series("as printed", claimed, ratio("printed_"), joined=False),
    Series("corrected", claimed, ratio(""), joined=False),
  ]
  lines = [Line("a tenth off", y=1 + sign * APART) for sign in (-1, 1)]
  return Panel(title, Axis("in the name (B)", LOG), Axis("counted / named", LOG), series, lines)


def _by_reference(models: list[harness.Row], x: str, y: str) -> dict[str, list[tuple]]:
  found: dict[str, list[tuple]] = {}
  for model in models:
    found.setdefault(model["name"].split()[0], []).append((model[x], model[y]))
  return {name: sorted(points) for name, points in found.items()}


if __name__ == "__main__":
  harness.main(run, Config())
