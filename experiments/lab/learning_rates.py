"""Which peak learning rate does each size of small model want?

  scripts/run learning_rates                         (the two smallest sizes)
  scripts/run learning_rates --config.rungs=all --config.tokens_per_parameter=5

The dense model of each rung of the ladder is trained with each rate and seed, all of a rung in one
program. The rate that held-out text likes best is the rung's, for every technique: it is written
into `experiments/lab/sizes.py`, and a test compares the two. Rows say with how many tokens and on
which processor they were computed; sizes of one folder may differ in both.
"""

import dataclasses
import functools
import math
import statistics
from pathlib import Path

from effjax import data
from effjax.data import Corpus
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance, training
from experiments.lab.held_out import nats
from experiments.lab.plots import LOG, Axis, Line, Panel, Series
from experiments.lab.sizes import LADDER, Rung
from experiments.lab.study import Run, Study
from experiments.lab.verdicts import deviation

COLUMNS = {
  "rung": "",
  "learning_rate": "g",
  "nats/token": ".4f",
  "± seeds": ".4f",
  "bits/byte": ".4f",
  "tokens_per_parameter": "g",
  "processor": "",
}
MEASURED = ("nats/token", "± seeds")


@dataclasses.dataclass
class Config:
  """What is tried.

  Attributes:
    rungs: names of the ladder, comma-separated, or "all".
    rates: peak learning rates, comma-separated.
    seeds: of each rate.
    tokens_per_parameter: of every run.
    text: a source of `data.text`.
    rows: rows of held-out text that a run is measured on.
  """

  rungs: str = "0.1M,0.2M"
  rates: str = "2e-3,4e-3,8e-3,16e-3,32e-3"
  seeds: int = 2
  tokens_per_parameter: float = 5.0
  text: str = "libraries"
  rows: int = 512


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row for each rung, rate and seed; writes `metrics.jsonl`, `result.csv`, `plot.png`."""
  chosen = harness.chosen(config.rungs, [rung.name for rung in LADDER], what="rung")
  rates = _rates(config.rates)
  training.use_every_core()
  folder = files.claim(workdir, config, free=("rungs", "rates", "seeds", "tokens_per_parameter"))
  corpus = data.text(config.text)
  provenance.write(folder, corpus)
  tasks = {}
  for rung in (rung for rung in LADDER if rung.name in chosen):
    pairs = [(rate, seed) for rate in rates for seed in range(config.seeds)]
    swept = functools.cache(functools.partial(_sweep, config, rung, corpus, pairs, folder))
    for index, (rate, seed) in enumerate(pairs):
      row = lambda swept=swept, index=index: swept()[index]
      tasks[f"{rung.name} rate={rate:g} seed={seed}"] = row
  rows = harness.compute(folder, tasks, label="rates")
  harness.plot(folder, panels)
  every = summarize(files.read_rows(folder / files.METRICS))
  harness.write_csv(folder, every)
  harness.finish(folder, every, COLUMNS, claims(every))
  return rows


def _sweep(
  config: Config, rung: Rung, corpus: Corpus, pairs: list, folder: Path
) -> list[harness.Row]:
  """The rows of a rung."""
  rates, seeds = zip(*pairs, strict=True)
  given = config.tokens_per_parameter
  study = Study(rung, corpus, tokens_per_parameter=given, seeds=seeds, rates=rates, folder=folder)
  trained = study.trained(f"{rung.name}-{given:g}", Run(study.fresh(study.dense)))
  text = study.held_out(config.rows)
  return [
    {
      "rung": rung.name,
      "learning_rate": rate,
      "seed": seed,
      "tokens_per_parameter": given,
      "processor": provenance.processor(),
      **text.paid(each),
    }
    for (rate, seed), each in zip(pairs, nats(trained, text).tolist(), strict=True)
  ]


def summarize(rows: list[harness.Row]) -> list[harness.Row]:
  """A line a rung and rate: means over seeds."""
  groups: dict[tuple, list[harness.Row]] = {}
  for row in rows:
    groups.setdefault((row["rung"], row["learning_rate"]), []).append(row)
  return [_mean(groups[key]) for key in sorted(groups)]


def _mean(group: list[harness.Row]) -> harness.Row:
  values = [row["nll"] for row in group]
  kept = ("rung", "learning_rate", "tokens_per_parameter", "processor")
  return {
    **{name: group[0][name] for name in kept},
    "nats/token": statistics.mean(values),
    "± seeds": deviation(values),
    "bits/byte": statistics.mean(row["bits_byte"] for row in group),
  }


def best(lines: list[harness.Row]) -> dict[str, float]:
  """The rate of each rung that paid the fewest nats; one that diverged never does."""
  paid = lambda line: line["nats/token"] if math.isfinite(line["nats/token"]) else math.inf
  found = {}
  for name in dict.fromkeys(line["rung"] for line in lines):
    of_rung = [line for line in lines if line["rung"] == name]
    found[name] = min(of_rung, key=paid)["learning_rate"]
  return found


def claims(lines: list[harness.Row]) -> dict[str, bool]:
  """That the ladder has the best rates, and that these lie inside of what was tried."""
  ladder = {rung.name: rung.learning_rate for rung in LADDER}
  found = {}
  for name, rate in best(lines).items():
    tried = [line["learning_rate"] for line in lines if line["rung"] == name]
    found[f"{name}: {rate:g} is best, as the ladder has it"] = ladder[name] == rate
    found[f"{name}: {rate:g} lies between others"] = min(tried) < rate < max(tried)
  return found


def panels(rows: list[harness.Row]) -> list[Panel]:
  """Nats a token against the learning rate, a curve a rung; the rates that the ladder has."""
  lines = summarize(rows)
  series = []
  for name in best(lines):
    of_rung = [line for line in lines if line["rung"] == name]
    x, y, spread = ([line[c] for line in of_rung] for c in ("learning_rate", *MEASURED))
    tokens = of_rung[0]["tokens_per_parameter"]
    series.append(Series(f"{name} parameters, {tokens:g} tokens a parameter", x, y, spread))
  used: dict[float, list[str]] = {}
  for rung in LADDER:
    if rung.name in best(lines):
      used.setdefault(rung.learning_rate, []).append(rung.name)
  return [
    Panel(
      "Dense models: which rate each size wants",
      Axis("peak learning rate", LOG, {rate: f"{rate:g}" for s in series for rate in s.x if rate}),
      Axis("held-out text, nats a token"),
      series,
      [Line(f"the ladder's rate for {', '.join(names)}", x=rate) for rate, names in used.items()],
      bars="standard deviation over seeds",
    )
  ]


def _rates(text: str) -> list[float]:
  rates = harness.numbers("rates", text, least=0)
  if not rates[0]:
    raise ValueError(f"rates={text!r}; allowed: above 0")
  return rates


if __name__ == "__main__":
  harness.main(run, Config())
