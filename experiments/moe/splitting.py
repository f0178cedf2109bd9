"""What does a pretrained model pay when a token visits a part of its hidden units, chosen how?

  scripts/run splitting                                                           (5 minutes)
  scripts/run splitting --config.ways=all --config.steps=100 --config.seeds=4 --config.rates=1,4

Every MLP of SmolLM2-135M is split into 8 experts (LLaMA-MoE, arXiv 2406.16554), in ways that
differ in which hidden unit goes where: "random"; "clusters" of gate rows that point alike; "graph",
units that are active for the same tokens; "gradient", units that matter to the loss of the same
texts; "residual", a random split of 7/8 beside the units that matter to most texts, which every
token visits; "inner", experts that share units. Texts are groups of training rows whose mean
embeddings are alike, one for each expert.

Perplexity on held-out text is that of k experts of all, the k of training and others; what is
shared counts as one of the k. Routers start at random, and gates sum to the number of experts.
Then all is trained, in equal steps over equal batches. Differences to the random split are paired
by seed; a seed draws routers, the order of the text, and the random splits.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from effjax.train import perplexity
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.lab.plots import LINEAR, LOG, Axis, Line, Panel, Series, differences
from experiments.lab.subject import Subject, costs
from experiments.lab.verdicts import Verdict
from experiments.moe import continued
from experiments.moe.continued import BEFORE, NATS
from experiments.moe.ways import (
  AS_IT_IS,
  INNER,
  RANDOM,
  WAYS,
  Statistics,
  all_on,
  variants,
  with_k,
)
from experiments.peft.methods import Method
from experiments.peft.tasks import Continuing
from experiments.peft.trials import Trials

SAME = 1e-5  # of the largest logit
DENSE = AS_IT_IS.name


@dataclasses.dataclass
class Config:
  """What is split, and how it is trained.

  Attributes:
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    text: a source of `data.text`.
    ways: of the six, comma-separated, or all; the random one is always there.
    experts, top_k: E, and the k of training.
    scale: what the gates of a token sum to; 0 is the number of experts that it chooses from.
    ks: other numbers of experts, comma-separated, with which perplexity is measured, besides all.
    calibration: rows of training text for statistics, a multiple of the experts.
    rows, length, batch: rows that are held out; tokens of a row; rows of a step.
    steps: of a run.
    rates: what the peak learning rate of 1e-4 is multiplied by, comma-separated.
    seeds: how many.
  """

  model: str = "smollm2-135m"
  text: str = "pydoc"
  ways: str = "random,clusters,graph,gradient"
  experts: int = 8
  top_k: int = 2
  scale: float = 0.0
  ks: str = "4"
  calibration: int = 16
  rows: int = 4
  length: int = 64
  batch: int = 2
  steps: int = 4
  rates: str = "1"
  seeds: int = 2


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A line a way; writes `metrics.jsonl`, `result.csv`, `plot.png` and the text's origin."""
  chosen = harness.chosen(config.ways, WAYS, what="way")
  multiples = harness.numbers("rates", config.rates, least=0)
  _check(config)
  given = f"{config.top_k},{config.ks},{config.experts}"
  ks = harness.numbers("ks", given, int, least=2, most=config.experts)
  folder = files.claim(workdir, config, free=("ways", "seeds"))
  sizes: Any = {"rows": config.rows, "length": config.length, "batch": config.batch}
  task = Split(config.model, config.text, ks=ks, top_k=config.top_k, **sizes)
  provenance.write(folder, task.corpus)
  statistics = Statistics(task, rows=config.calibration, groups=config.experts, batch=config.batch)
  sizes = {"experts": config.experts, "top_k": config.top_k}
  known = variants(statistics, **sizes, scale=config.scale or None)
  compared = [known[name] for name in dict.fromkeys([RANDOM, *chosen])]
  options: Any = {"multiples": multiples, "seeds": config.seeds, "folder": folder}
  before = functools.partial(_before, task, config.length)
  planned = continued.planned(Trials(task, config.steps), compared, before, **options)
  dense = {DENSE: functools.partial(_dense, task, config.length)}
  harness.compute(folder, dense | planned, label="runs")
  measured = files.read_rows(folder / files.METRICS)
  rows = summary(measured)
  harness.plot(folder, panels)
  harness.finish(folder, rows, columns(rows), claims(measured))
  harness.write_csv(folder, rows)
  return rows


def _check(config: Config) -> None:
  for name in ("seeds", "steps"):
    if (given := getattr(config, name)) < 1:
      raise ValueError(f"{name}={given}; allowed: from 1")
  if not 2 <= config.top_k <= config.experts:
    raise ValueError(f"top_k={config.top_k}; allowed: 2 … experts={config.experts}")
  if config.calibration < 1 or config.calibration % config.experts:
    given = f"calibration={config.calibration}"
    raise ValueError(f"{given}; allowed: multiples of experts={config.experts}")


class Split(Continuing):
  """Nats a token of the text that was held out, with several numbers of experts."""

  def __init__(self, model: str, text: str, *, ks: list[int], top_k: int, **sizes: Any):
    super().__init__(model, text, **sizes)
    self.ks, self._top_k = ks, top_k

  def score(self, method: Method, subject: Subject) -> harness.Row:
    paid = lambda k: Continuing.score(self, method, with_k(subject, k))[NATS]
    found = {f"k={k}": paid(k) for k in self.ks}
    return {NATS: found[f"k={self._top_k}"], **found}


def _dense(task: Split, length: int) -> harness.Row:
  found = Continuing.score(task, AS_IT_IS, task.subject)
  return {"variant": DENSE, "kind": BEFORE, **costs(task.subject, length), NATS: found[NATS]}


def _before(task: Split, length: int, variant: Method) -> harness.Row:
  """What it costs, how far all experts are from the dense model, and what it pays."""
  subject = variant(task.subject, jax.random.key(0))
  batch = task.held_out.batches[0]
  everyone = all_on(subject, max(task.ks))
  dense, own = (continued.logits(each, batch) for each in (task.subject, everyone))
  return {
    **costs(subject, length),
    "logits off": float(np.abs(own - dense).max() / np.abs(dense).max()),
    **task.score(variant, subject),
  }


def numbers_of(rows: list[harness.Row]) -> list[int]:
  """The numbers of experts with which perplexity was measured."""
  found = {int(name[2:]) for row in rows for name in row if name.startswith("k=")}
  return sorted(found)


def columns(rows: list[harness.Row]) -> dict[str, str]:
  """The columns of the table and their formats."""
  ks = sorted({int(name.split("=")[1]) for row in rows for name in row if "k=" in name})
  paid = {f"{when} k={k}": ",.1f" for when in ("before", "after") for k in ks}
  first = {"variant": "", "parameters": ",d", "active": ",d", "logits off": ".1e"}
  return first | paid | {"rate": ".1e", "over": "+.4f", "± 95 %": ".4f"}


def summary(measured: list[harness.Row]) -> list[harness.Row]:
  """A line a way, with perplexities; the dense model's stands in every column of its own."""
  ks = numbers_of(measured)
  (dense,) = continued.of(measured, DENSE, BEFORE)
  lines = [{**dense, **{f"before k={k}": perplexity(dense[NATS]) for k in ks[-1:]}}]
  for name in continued.names(measured):
    made = continued.line(measured, name, RANDOM)
    for k in ks:
      (after,) = continued.seeds_of(measured, name, column=f"k={k}")
      made[f"before k={k}"] = perplexity(made[f"k={k}"])
      made[f"after k={k}"] = perplexity(sum(after) / len(after))
    lines.append({key: value for key, value in made.items() if not key.startswith("k=")})
  return lines


def claims(measured: list[harness.Row]) -> dict[str, bool | Verdict]:
  """Of which ways all experts are the dense model, whether training helps, which way is best."""
  said: dict[str, bool | Verdict] = {}
  for name in continued.names(measured):
    (before,) = continued.of(measured, name, BEFORE)
    if name != INNER:
      said[
        f"{name}: all experts with gates of one are the dense model to 1e-5 of the largest logit"
      ] = before["logits off"] <= SAME
    said[f"{name} is better than before training"] = continued.learned(measured, name)
  for name in continued.names(measured):
    if name != RANDOM:
      said[f"{name} is better than random after training"] = continued.better(
        measured, name, RANDOM
      )
  return said


def panels(measured: list[harness.Row]) -> list[Panel]:
  """Perplexity by the number of experts, before and after; the verdicts."""
  ks, (dense,) = numbers_of(measured), continued.of(measured, DENSE, BEFORE)
  line = [Line("dense", y=perplexity(dense[NATS]))]
  rows, shown = summary(measured)[1:], []
  for when in ("before", "after"):
    series = [Series(row["variant"], ks, [row[f"{when} k={k}"] for k in ks]) for row in rows]
    experts = Axis("experts for each token", LINEAR, {k: str(k) for k in ks})
    shown.append(Panel(f"{when} training", experts, Axis("perplexity", LOG), series, line))
  against = {text: found for text, found in claims(measured).items() if "than random" in text}
  return shown + differences("Verdicts", "nats a token beyond the random split", against)


if __name__ == "__main__":
  harness.main(run, Config())
