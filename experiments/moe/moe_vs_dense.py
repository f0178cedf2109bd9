"""What is a mixture of experts worth beside a dense model: of equal FLOPs, of equal parameters?

  scripts/run moe_vs_dense                                    (six of the ten; about 4 minutes)
  scripts/run moe_vs_dense --config.models=all --config.tokens_per_parameter=20 --config.minutes=25

A small language model is trained with its MLPs as they are, or with a mixture for each of them.
"8x2" has eight experts of which each token visits two, "+1" an expert that every token visits
besides. The experts that a token visits are together as wide as the MLP, so that a token costs what
it does in the dense model, and the router: such a mixture trains for as many FLOPs. One that is
"thin" has all its experts together as wide as the MLP, so as many parameters, to 1 %, and reads as
many tokens. Between some mixtures a single thing differs: the number of experts, their grain (as
many parameters in more experts, of which a token visits as many more), or whether one is shared.

Balance is `TopK`'s, by its losses: the load-balance loss of 0.01 and the z-loss of 0.001.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

from effjax import data
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import budget, provenance, training
from experiments.lab.budget import Spending
from experiments.lab.held_out import HeldOut, nats
from experiments.lab.plots import LOG, Axis, Line, Panel, Series, differences
from experiments.lab.study import Run, Study
from experiments.lab.subject import costs
from experiments.lab.verdicts import Verdict, deviation, predicts_better
from experiments.moe.mixtures import Design, largest

DENSE, THIN = "dense", "thin-4x2"
MIXTURES = {
  "4x1": Design(4, 1, parts=1),
  "8x1": Design(8, 1, parts=1),
  "16x1": Design(16, 1, parts=1),
  "4x2": Design(4, 2, parts=2),
  "8x2": Design(8, 2, parts=2),
  "16x2": Design(16, 2, parts=2),
  "32x4": Design(32, 4, parts=4),
  "31x3+1": Design(31, 3, parts=4, shared=1),
  THIN: Design(4, 2, parts=4),
}
NAMES = (DENSE, *MIXTURES)
MORE, FINER = "more experts are better", "finer experts are better"
BETTER = (
  ("8x1", "4x1", MORE),
  ("16x1", "8x1", MORE),
  ("8x2", "4x2", MORE),
  ("16x2", "8x2", MORE),
  ("8x2", "4x1", FINER),
  ("16x2", "8x1", FINER),
  ("32x4", "16x2", FINER),
  ("31x3+1", "32x4", "a shared expert is better"),
)
NUMBERS = {"top-1": ("4x1", "8x1", "16x1"), "top-2": ("4x2", "8x2", "16x2")}
GRAINS = {
  "parameters of four MLPs": ("4x1", "8x2"),
  "parameters of eight MLPs": ("8x1", "16x2", "32x4"),
  "one of them shared": ("31x3+1",),
}
COLUMNS = {
  "model": "",
  "nats/token": ".4f",
  "± seeds": ".4f",
  "over dense": "+.4f",
  "± 95 %": ".4f",
  "bits/byte": ".4f",
  "params M": ".3f",
  "active M": ".3f",
  "MFLOP/token": ".3f",
  "Mtokens": ".2f",
}


@dataclasses.dataclass
class Config:
  """What is trained.

  Attributes:
    models: names in `NAMES`, comma-separated, or "all".
    text: a source of `data.text`; its training split trains, its validation split measures.
    seeds: of each model.
    tokens_per_parameter: of the dense model; 20 for a verdict.
    minutes: in which all runs are to end on two cores; it decides their size.
    rows: rows of held-out text.
  """

  models: str = "dense,8x1,16x2,32x4,31x3+1,thin-4x2"
  text: str = "libraries"
  seeds: int = 4
  tokens_per_parameter: float = 0.5
  minutes: float = 1.0
  rows: int = 256


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A line a model; writes `metrics.jsonl`, `result.csv`, `plot.png` and the origin."""
  chosen = harness.chosen(config.models, NAMES, what="model")
  given, count = config.tokens_per_parameter, len(NAMES) * config.seeds
  rung = largest(count, tokens_per_parameter=given, minutes=config.minutes)
  training.use_every_core()
  folder = files.claim(workdir, config, free=("models",))
  corpus, seeds = data.text(config.text), range(config.seeds)
  provenance.write(folder, corpus)
  study = Study(rung, corpus, tokens_per_parameter=given, seeds=seeds, folder=folder)
  text = study.held_out(config.rows)
  tasks: dict[str, Callable[[], harness.Row]] = {}
  for name in chosen:
    tasks |= study.tasks(name, functools.partial(trained, study, text, name))
  measured = harness.compute(folder, tasks, label="runs")
  harness.plot(folder, panels)
  rows = summarize(measured)
  harness.write_csv(folder, rows)
  print(f"\n{budget.title(rung, given, config.seeds)}")
  harness.finish(folder, rows, COLUMNS, claims(measured))
  return rows


def trained(study: Study, text: HeldOut, name: str) -> list[harness.Row]:
  """Trains a model with all seeds: what it costs, and what each pays for the held-out text."""
  design = MIXTURES.get(name)
  config = study.dense if design is None else design.of(study.dense)
  spending = Spending(equal="parameters" if name == THIN else "flops")
  run = Run(study.fresh(config), spending=spending)
  subject = study.trained(name, run)
  common = {
    "model": name,
    "experts": design.experts if design else 1,
    "top_k": design.top_k if design else 1,
    "parts": design.parts if design else 1,
    "tokens": study.steps(run) * study.rung.batch * study.rung.length,
    **costs(subject.at(0), study.rung.length),
  }
  return [{**common, **text.paid(each)} for each in nats(subject, text).tolist()]


def paid(measured: list[harness.Row], *names: str) -> list[list[float]]:
  """Nats a token of each model, of the seeds that all have."""
  found = [{r["seed"]: r["nll"] for r in measured if r["model"] == name} for name in names]
  seeds = sorted(set.intersection(*map(set, found)))
  return [[each[seed] for seed in seeds] for each in found]


def summarize(measured: list[harness.Row]) -> list[harness.Row]:
  """A line a model: means over seeds, and the difference to the dense one where that is finite."""
  names = list(dict.fromkeys(row["model"] for row in measured))
  return [_line(name, measured, against=DENSE in names and name != DENSE) for name in names]


def _line(name: str, measured: list[harness.Row], *, against: bool) -> harness.Row:
  rows = [row for row in measured if row["model"] == name]
  first, values = rows[0], [row["nll"] for row in rows]
  judged = predicts_better(*paid(measured, name, DENSE)).difference if against else None
  apart = {}
  if judged is not None:
    reach = None if judged.spread is None else judged.reach
    apart = {"over dense": judged.mean, "± 95 %": reach}
  return {
    **{column: first[column] for column in ("model", "experts", "top_k", "parts")},
    "nats/token": statistics.mean(values),
    "± seeds": deviation(values),
    **apart,
    "bits/byte": statistics.mean(row["bits_byte"] for row in rows),
    "params M": first["parameters"] / 1e6,
    "active M": first["active"] / 1e6,
    "MFLOP/token": first["flops_token"] / 1e6,
    "Mtokens": first["tokens"] / 1e6,
  }


def claims(measured: list[harness.Row]) -> dict[str, Verdict]:
  """What is expected of the models that were measured, judged over seeds."""
  there = list(dict.fromkeys(row["model"] for row in measured))
  judge = lambda better, worse: predicts_better(*paid(measured, better, worse))
  found = {}
  if DENSE in there:
    for name in (name for name in there if name not in (DENSE, THIN)):
      found[f"at equal FLOPs, {name} predicts better than {DENSE}"] = judge(name, DENSE)
    if THIN in there:
      text = f"at equal parameters and tokens, {DENSE} predicts better than {THIN}"
      found[text] = judge(DENSE, THIN)
  for better, worse, words in BETTER:
    if better in there and worse in there:
      found[f"at equal FLOPs, {words}: {better} than {worse}"] = judge(better, worse)
  return found


def panels(measured: list[harness.Row]) -> list[Panel]:
  """Nats against the number of experts, their grain, and all parameters; what verdicts judge."""
  lines = {line["model"]: line for line in summarize(measured)}
  quality = Axis("held-out text, nats a token (lower is better)")
  dense = [Line(DENSE, y=lines[DENSE]["nats/token"])] if DENSE in lines else []
  bars = "standard deviation over seeds"

  def panel(title: str, words: str, column: str, groups: dict, form: str = "{:g}") -> Panel:
    series = [_series(name, lines, models, column) for name, models in groups.items()]
    ticks = {x: form.format(x) for each in series for x in each.x if x is not None}
    found = [each for each in series if each.x]
    return Panel(title, Axis(words, LOG, ticks), quality, found, dense, bars)

  each = _series("models", lines, NAMES, "params M")
  each = dataclasses.replace(each, joined=False, names=[n for n in NAMES if n in lines])
  judged = {claim.removeprefix("at equal FLOPs, "): v for claim, v in claims(measured).items()}
  return [
    panel("Number of experts", "experts in a layer", "experts", NUMBERS),
    panel("Grain", "width of the MLP over an expert's", "parts", GRAINS),
    Panel("Parameters", Axis("parameters (millions)", LOG), quality, [each], dense, bars),
    *differences("What the verdicts are about", "nats a token, first − second", judged),
  ]


def _series(name: str, lines: dict, models: Sequence[str], x: str) -> Series:
  """A column of the models that there are, and what they pay."""
  found = [lines[model] for model in models if model in lines]
  column = lambda name: [line[name] for line in found]
  return Series(name, column(x), column("nats/token"), column("± seeds"))


if __name__ == "__main__":
  harness.main(run, Config())
