"""How many ranks does LoRA need, and what does its scale do to many?

  scripts/run lora_rank                                                           (4 minutes)

LoRA adds s·A B with s = α/r (arXiv 2106.09685, section 4.1) and found ranks of 1 to 8 to be enough
(section 7.2); with that scale, says rsLoRA (arXiv 2312.03732), factors of high rank learn too
little, and with s = α/√r they do not. The task is the encoder's of `peft_compare`; what is measured
is the cross-entropy of the text that is asked for among all that were held out. Both scales have
α = 16, and each a learning rate of its own, the best at one of the ranks on a seed that is not used
again, which then serves all ranks. Differences are paired by seed.

Measured (`results/lora_rank`: ranks 1, 8, 64, rates chosen at rank 8 from two, 8 steps, 3 seeds):
from 4.509 nats without training, α/r reaches 4.019, 3.494 and 3.510, α/√r 3.625, 3.558 and 3.487.
With α/r rank 64 is better than rank 1, for which the rate of rank 8 is too much; rank 8 does as
well as 64 with an eighth of its bytes, in the mean. That α/√r is better at rank 64 is undecided
(−0.022 ± 0.467): seeds differ by more than that, and both rates are the ends of what was tried.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.lab.plots import LOG, Axis, Line, Panel, Series, differences
from experiments.lab.verdicts import Verdict, alike, deviation, predicts_better
from experiments.peft.methods import METHODS, Method, low_rank
from experiments.peft.tasks import Asking
from experiments.peft.trials import BASELINE, SWEPT, Trials

METRIC = "nats"
LORA, RSLORA = "α/r", "α/√r"
SCALES = {LORA: False, RSLORA: True}
MARGIN = 0.05  # nats, by which ranks may differ that are alike
COLUMNS = {
  "scale": "",
  "rank": "d",
  "trained": ",d",
  "trained MB": ".3f",
  "rate": ".2g",
  METRIC: ".4f",
  "± seeds": ".4f",
  "mrr": ".3f",
}


@dataclasses.dataclass
class Config:
  """What is tried.

  Attributes:
    encoder: a name or path for `models.load`, or a preset such as "tiny".
    ranks: comma-separated.
    swept: the rank at which the learning rate of a scale is chosen.
    rates: what LoRA's own rate is multiplied by, comma-separated.
    domain, question: of the entries, and which part asks for which, see `data.pairs`.
    entries, queries, words, batch: entries that are trained on, and that are held out; tokens of a
      text; queries of a step.
    steps: of a run.
    seeds: how many.
  """

  encoder: str = "minilm"
  ranks: str = "1,4,16,64"
  swept: int = 4
  rates: str = "0.5,2,8"
  domain: str = "wordnet"
  question: str = "explain"
  entries: int = 200
  queries: int = 100
  words: int = 24
  batch: int = 16
  steps: int = 12
  seeds: int = 2


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A line a scale and rank; writes `metrics.jsonl`, `result.csv`, `plot.png` and the origin."""
  ranks = harness.numbers("ranks", config.ranks, int, least=1, count=2)
  multiples = harness.numbers("rates", config.rates, least=0)
  for name in ("swept", "steps", "seeds"):
    if (given := getattr(config, name)) < 1:
      raise ValueError(f"{name}={given}; allowed: from 1")
  sizes: Any = {"entries": config.entries, "queries": config.queries, "length": config.words}
  task = Asking(config.encoder, config.domain, config.question, batch=config.batch, **sizes)
  folder = files.claim(workdir, config, free=("ranks", "seeds"))
  provenance.write(folder, task.corpus)
  trials = Trials(task, config.steps)
  harness.compute(folder, planned(trials, config, ranks, multiples, folder), label="runs")
  harness.plot(folder, panels)
  measured = files.read_rows(folder / files.METRICS)
  rows = summary(measured)
  harness.finish(folder, rows, COLUMNS, claims(measured))
  harness.write_csv(folder, rows)
  return rows


def method(scale: str, rank: int) -> Method:
  """LoRA of a rank, with its product scaled in one of the two ways."""
  base = METHODS[BASELINE]
  change = low_rank(rank=rank, rs=SCALES[scale])
  return dataclasses.replace(base, name=f"{scale}, rank {rank}", change=change)


def planned(
  trials: Trials, config: Config, ranks: list[int], multiples: list[float], folder: Path
) -> dict[str, Callable[[], harness.Row]]:
  """Name → what measures a row: rates at one rank, then the seeds of all ranks in turn."""
  tasks: dict[str, Callable[[], harness.Row]] = {"as it is": trials.as_it_is}
  for scale in SCALES:
    for multiple in multiples:
      rate = multiple * METHODS[BASELINE].rate
      swept = functools.partial(_row, trials, scale, config.swept, rate, SWEPT)
      tasks[f"{scale}, rate × {multiple:g}"] = swept
  for seed in range(config.seeds):
    for rank in ranks:
      for scale in SCALES:
        call = functools.partial(_chosen, trials, folder, scale, rank, seed)
        tasks[f"{scale}, rank {rank}, seed={seed}"] = call
  return tasks


def _row(trials: Trials, scale: str, rank: int, rate: float, seed: int) -> harness.Row:
  chosen = method(scale, rank)
  return {"scale": scale, "rank": rank} | trials.keeps(chosen) | trials.run(chosen, rate, seed)


def _chosen(trials: Trials, folder: Path, scale: str, rank: int, seed: int) -> harness.Row:
  """A run at the rate that the sweep, which is on disk by now, found best."""
  rate = best(files.read_rows(folder / files.METRICS), scale)
  return _row(trials, scale, rank, rate, seed)


def best(measured: list[harness.Row], scale: str) -> float:
  """The rate of a scale with the lowest cross-entropy; one that diverged never is."""
  rows = [row for row in measured if row.get("scale") == scale and row["seed"] == SWEPT]
  return min(rows, key=lambda r: r[METRIC] if math.isfinite(r[METRIC]) else math.inf)["rate"]


def runs(measured: list[harness.Row], scale: str) -> dict[int, dict[int, harness.Row]]:
  """Rank → seed → row."""
  found: dict[int, dict[int, harness.Row]] = {}
  for row in measured:
    if row.get("scale") == scale and row["seed"] != SWEPT:
      found.setdefault(row["rank"], {})[row["seed"]] = row
  return dict(sorted(found.items()))


def summary(measured: list[harness.Row]) -> list[harness.Row]:
  """A line a scale and rank: means over seeds."""
  return [_line([*each.values()]) for scale in SCALES for each in runs(measured, scale).values()]


def _line(rows: list[harness.Row]) -> harness.Row:
  paid = [row[METRIC] for row in rows]
  return {
    **{name: rows[0][name] for name in ("scale", "rank", "trained", "rate")},
    "trained MB": rows[0]["trained_bytes"] / 1e6,
    METRIC: statistics.mean(paid),
    "± seeds": deviation(paid),
    "mrr": statistics.mean(row["mrr"] for row in rows),
  }


def claims(measured: list[harness.Row]) -> dict[str, Verdict]:
  """That few ranks suffice, and that many want rsLoRA's scale; of the extremes of what was run."""
  paid = {scale: _paid(measured, scale) for scale in SCALES}
  ranks = sorted(set.intersection(*(set(found) for found in paid.values())))
  if len(ranks) < 2:
    return {}
  low, high = ranks[0], ranks[-1]
  said = {}
  for scale in SCALES:
    few, many = _both(paid[scale][low], paid[scale][high])
    said[f"{scale}: rank {low} is within {MARGIN} nats of rank {high}"] = alike(few, many, MARGIN)
    said[f"{scale}: rank {high} is better than rank {low}"] = predicts_better(many, few)
  ours, theirs = _both(paid[RSLORA][high], paid[LORA][high])
  return said | {f"rank {high}: {RSLORA} is better than {LORA}": predicts_better(ours, theirs)}


def _paid(measured: list[harness.Row], scale: str) -> dict[int, dict[int, float]]:
  """Rank → seed → nats."""
  found = runs(measured, scale)
  return {rank: {seed: row[METRIC] for seed, row in of.items()} for rank, of in found.items()}


def _both(a: dict[int, float], b: dict[int, float]) -> tuple[list[float], list[float]]:
  """The values of the seeds that both have."""
  seeds = sorted(a.keys() & b.keys())
  return [a[seed] for seed in seeds], [b[seed] for seed in seeds]


def panels(measured: list[harness.Row]) -> list[Panel]:
  """Cross-entropy against rank, and against the bytes that train; the verdicts."""
  lines = summary(measured)
  start = [row[METRIC] for row in measured if "scale" not in row]
  paid = Axis("cross-entropy of held-out queries (nats)")

  def series(x: str) -> list[Series]:
    found = []
    for scale in SCALES:
      of = [line for line in lines if line["scale"] == scale]
      column = lambda name, of=of: [line[name] for line in of]
      spread = [line["± seeds"] or 0.0 for line in of]
      found.append(Series(scale, column(x), column(METRIC), spread))
    return found

  ticks = {float(line["rank"]): str(line["rank"]) for line in lines}
  bars = "standard deviation over seeds"
  before = [Line("no training", y=value) for value in start]
  return [
    Panel("What ranks reach", Axis("rank", LOG, ticks), paid, series("rank"), before, bars),
    Panel(
      "What bytes reach",
      Axis("MB of what trains", LOG),
      paid,
      series("trained MB"),
      before,
      bars,
    ),
    *differences("Verdicts", "nats, what the claim calls better less the other", claims(measured)),
  ]


if __name__ == "__main__":
  harness.main(run, Config())
