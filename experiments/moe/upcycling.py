"""Does a pretrained model that is upcycled compute what it did, and learn more from as many tokens?

  scripts/run upcycling                                                           (4 minutes)
  scripts/run upcycling --config.variants=all --config.steps=100 --config.seeds=4 \
    --config.rates=0.5,1,2

SmolLM2-135M, in which the MLPs of some layers become mixtures: "upcycled", four copies, two for
each token (arXiv 2212.05055); "drop", the same with half of each drawn anew; "qwen", twice as many
experts of half the width, slices of shuffled copies, half of each drawn anew (arXiv 2407.10671,
section 2.2.2), four for each token. Each is trained on, all its parameters, and so is the dense
model as it is, in as many steps over the same batches.

Before that, logits are compared with the dense model's, and nats a token on held-out text.
Afterwards differences to the dense model are paired by seed; a seed draws routers, what else is
drawn, and the order of the text.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from effjax import moe
from effjax.core.typing import Key, Params
from effjax.models import TransformerConfig
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.lab.plots import LOG, Axis, Line, Panel, Series, differences
from experiments.lab.subject import costs
from experiments.lab.verdicts import Verdict
from experiments.moe import continued
from experiments.moe.continued import BEFORE, NATS
from experiments.peft.methods import Method, full
from experiments.peft.tasks import Continuing
from experiments.peft.trials import Trials

DENSE, UPCYCLED = "dense", "upcycled"
SAME = 1e-5  # of the largest logit
RATE = 2e-5
COLUMNS = {
  "variant": "",
  "parameters": ",d",
  "active": ",d",
  "logits off": ".1e",
  "before": ".4f",
  "rate": ".1e",
  "after": ".4f",
  "± seeds": ".4f",
  "over": "+.4f",
  "± 95 %": ".4f",
}


@dataclasses.dataclass
class Config:
  """What is compared.

  Attributes:
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    text: a source of `data.text`.
    variants: "upcycled", "drop" and "qwen", comma-separated, or all; the dense model is always
      there.
    every: which layers are changed, the first and every so-manieth after it.
    rows, length, batch: rows that are held out; tokens of a row; rows of a step.
    steps: of a run.
    rates: what the peak learning rate of 2e-5 is multiplied by, comma-separated.
    seeds: how many.
  """

  model: str = "smollm2-135m"
  text: str = "pydoc"
  variants: str = "upcycled"
  every: int = 3
  rows: int = 4
  length: int = 64
  batch: int = 2
  steps: int = 6
  rates: str = "1"
  seeds: int = 2


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A line a variant; writes `metrics.jsonl`, `result.csv`, `plot.png` and the text's origin."""
  known = variants(config.every)
  chosen = harness.chosen(config.variants, known, what="variant")
  multiples = harness.numbers("rates", config.rates, least=0)
  for name in ("seeds", "steps", "every"):
    if (given := getattr(config, name)) < 1:
      raise ValueError(f"{name}={given}; allowed: from 1")
  folder = files.claim(workdir, config, free=("variants", "seeds"))
  sizes: Any = {"rows": config.rows, "length": config.length, "batch": config.batch}
  task = Continuing(config.model, config.text, **sizes)
  provenance.write(folder, task.corpus)
  compared = [known[name] for name in dict.fromkeys([DENSE, *chosen])]
  before = functools.partial(_before, task, config.length)
  options: Any = {"multiples": multiples, "seeds": config.seeds, "folder": folder}
  planned = continued.planned(Trials(task, config.steps), compared, before, **options)
  harness.compute(folder, planned, label="runs")
  measured = files.read_rows(folder / files.METRICS)
  rows = summary(measured)
  harness.plot(folder, panels)
  harness.finish(folder, rows, COLUMNS, claims(measured))
  harness.write_csv(folder, rows)
  return rows


def variants(every: int) -> dict[str, Method]:
  """Name → what is trained."""

  def upcycled(**options: Any):
    def change(config: TransformerConfig, params: Params, key: Key):
      layers = range(0, len(config.layers), every)
      return moe.upcycle(config, params, key, layers=layers, **options)

    return change

  def qwen(config: TransformerConfig, params: Params, key: Key):
    mlp: Any = config.layers[0].ffn
    change = upcycled(experts=8, top_k=4, width=mlp.width // 2, redrawn=0.5)
    return change(config, params, key)

  found = {
    DENSE: full,
    UPCYCLED: upcycled(experts=4, top_k=2),
    "drop": upcycled(experts=4, top_k=2, redrawn=0.5),
    "qwen": qwen,
  }
  return {name: Method(name, "full", RATE, change) for name, change in found.items()}


def _before(task: Continuing, length: int, variant: Method) -> harness.Row:
  """What it costs, how far its logits are from the dense model's, and what it pays."""
  subject = variant(task.subject, jax.random.key(0))
  batch = task.held_out.batches[0]
  dense, own = (continued.logits(each, batch) for each in (task.subject, subject))
  return {
    **costs(subject, length),
    "logits off": float(np.abs(own - dense).max() / np.abs(dense).max()),
    **task.score(variant, subject),
  }


def summary(measured: list[harness.Row]) -> list[harness.Row]:
  """A line a variant."""
  return [continued.line(measured, name, DENSE) for name in continued.names(measured)]


def claims(measured: list[harness.Row]) -> dict[str, bool | Verdict]:
  """Whether upcycling is the identity at first, and how each variant stands to the dense model."""
  said: dict[str, bool | Verdict] = {}
  for name in continued.names(measured):
    (before,) = continued.of(measured, name, BEFORE)
    if name == UPCYCLED:
      said["upcycled: at step 0 the logits are the dense model's to 1e-5 of the largest"] = (
        before["logits off"] <= SAME
      )
    said[f"{name} is better than before training"] = continued.learned(measured, name)
    if name != DENSE:
      said[f"{name} is better than the dense model after as many tokens"] = continued.better(
        measured, name, DENSE
      )
  return said


def panels(measured: list[harness.Row]) -> list[Panel]:
  """What variants pay before and after training, and how they stand to the dense model."""
  rows = summary(measured)
  shown = [
    Series(
      name,
      [row["parameters"] for row in rows],
      [row[column] for row in rows],
      spread,
      joined=False,
      names=[row["variant"] for row in rows],
    )
    for name, column, spread in (
      ("before", "before", ()),
      ("after", "after", [row["± seeds"] or 0.0 for row in rows]),
    )
  ]
  dense = next((row["before"] for row in rows if row["variant"] == DENSE), None)
  lines = [] if dense is None else [Line("dense, before", y=dense)]
  words = f"{NATS}, held out"
  panel = Panel("Before and after", Axis("parameters", LOG), Axis(words), shown, lines)
  against = {text: found for text, found in claims(measured).items() if "as many" in text}
  return [panel, *differences("Verdicts", "nats a token beyond the dense model", against)]


if __name__ == "__main__":
  harness.main(run, Config())
