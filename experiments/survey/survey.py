"""What does each technique cost and what is it worth, on one model and one text?

  scripts/run                                          (every technique; 6 minutes on 2 cores)
  scripts/run survey --config.techniques=int8,lora-r8  (some; finished rows are kept)

First SmolLM2-135M on held-out text of the Python library and its reference: each technique that
needs no training is applied to it as it is. Then a small model, trained from scratch with each
technique that needs it, at the FLOPs of one dense run, over several seeds. The registry of rows is
`experiments/techniques.py`.

Time is a ratio to the baseline's, measured in turns with it: prefill of one row of text, and greedy
decoding after a cache of 64 tokens. FLOPs are those of the forward pass a token.

Measured on 2 cores (6.1 minutes, 8.5 of CPU time; jax 0.10.2):
SmolLM2-135M at perplexity 12.87 keeps it with LoRA at its start, merged, and upcycled; int8 has
12.84 at a quarter of the bytes; an untrained window of 128 costs 36.4, in every second layer 22.7.
In the short runs of 30 thousand tokens (dense 147 ± 10) window 136 ± 8, mixture of experts 148 ± 8
and half the depth 94 ± 3: with so little training, more steps of less model win.
"""

import dataclasses
import functools
import itertools
import math
import statistics

import jax
import numpy as np

from effjax import data
from effjax.train import workdir as files
from experiments import harness
from experiments.lab.short_runs import Lab, Shape
from experiments.lab.subject import Runner, Subject, compare, costs, load
from experiments.survey import techniques
from experiments.survey.techniques import BASELINE, TRAINED_BASELINE, Technique

KINDS = dict.fromkeys(technique.kind for technique in techniques.TECHNIQUES)
COLOURS = dict(zip(KINDS, itertools.cycle(harness.COLOURS), strict=False))
COLUMNS = {
  "technique": "",
  "kind": "",
  "perplexity": ".2f",
  "±": ".2f",
  "change %": "+.2f",
  "params M": ",.2f",
  "active M": ",.2f",
  "trainable M": ",.2f",
  "MB": ",.1f",
  "MFLOP/token": ",.2f",
  "prefill ×": ".2f",
  "decode ×": ".2f",
}


@dataclasses.dataclass
class Config:
  """What is measured.

  Attributes:
    techniques: names of `experiments.survey.techniques`, comma-separated, or "all".
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    text: a source of `data.text`; its validation split measures, its training split trains.
    rows, length: rows of text, and tokens of each, that the pretrained model reads.
    decode: tokens decoded for their time.
    seeds: short runs of each technique.
    steps: of the dense baseline of the short runs; the others take as many FLOPs.
    width, layers, heads, vocab: shape of the small model.
    batch, short_length: rows and tokens of a training batch.
    short_rows: rows of held-out text that a short run is measured on.
  """

  techniques: str = "all"
  model: str = "smollm2-135m"
  text: str = "embedded"
  rows: int = 3
  length: int = 512
  decode: int = 8
  seeds: int = 3
  steps: int = 240
  width: int = 96
  layers: int = 4
  heads: int = 4
  vocab: int = 512
  batch: int = 2
  short_length: int = 64
  short_rows: int = 64


def run(config: Config, workdir: str) -> list[harness.Row]:
  """The rows of the table; writes `metrics.jsonl`, `result.csv` and `plot.png` to `workdir`."""
  names = [technique.name for technique in techniques.TECHNIQUES]
  chosen = harness.chosen(config.techniques, names, what="technique")
  folder = files.claim(workdir, config, free=("techniques",))
  pretrained, short = Pretrained(config), Short(config)
  tasks = {}
  for technique in techniques.TECHNIQUES:
    wanted = technique.name in (*chosen, BASELINE, TRAINED_BASELINE)
    if not wanted or not _needed(technique, chosen):
      continue
    if not technique.needs_training:
      tasks[technique.name] = functools.partial(pretrained.row, technique)
    for seed in range(config.seeds if technique.needs_training else 0):
      tasks[f"{technique.name} seed={seed}"] = functools.partial(short.row, technique, seed)
  measured = harness.compute(folder, tasks, label="survey")
  rows = summarize(measured)
  harness.plot(folder, draw, panels=3, size=(15.0, 5.2))
  harness.finish(folder, [_shown(row) for row in rows], COLUMNS, claims(rows))
  harness.write_csv(folder, rows)
  return rows


def _needed(technique: Technique, chosen: list[str]) -> bool:
  """A baseline is measured when a technique is that needs it."""
  by_name = {technique.name: technique for technique in techniques.TECHNIQUES}
  return any(by_name[name].needs_training == technique.needs_training for name in chosen)


class Pretrained:
  """The techniques that treat the pretrained model as it is."""

  def __init__(self, config: Config):
    self.config = config

  def row(self, technique: Technique) -> harness.Row:
    subject = technique.make(self.subject, jax.random.key(0))
    is_baseline = technique.name == BASELINE
    runner = self.baseline if is_baseline else Runner(subject, self.batches[0], **self._decode)
    length = self.config.length
    return {
      "technique": technique.name,
      "kind": technique.kind,
      "model": self.config.model,
      **costs(subject, length),
      **compare(runner, self.baseline, self.batches),
    }

  @functools.cached_property
  def _loaded(self):
    return load(self.config.model)

  @property
  def subject(self) -> Subject:
    return self._loaded[0]

  @functools.cached_property
  def batches(self) -> list[dict[str, np.ndarray]]:
    config = self.config
    rows = data.loader(
      config.text,
      self._loaded[1],
      batch_size=1,
      length=config.length,
      seed=0,
      split="validation",
    )
    return [next(rows) for _ in range(config.rows)]

  @functools.cached_property
  def baseline(self) -> Runner:
    return Runner(self.subject, self.batches[0], **self._decode)

  @property
  def _decode(self):
    return {"decode": self.config.decode}


class Short:
  """The techniques that need training."""

  def __init__(self, config: Config):
    self.config = config

  def row(self, technique: Technique, seed: int) -> harness.Row:
    run = technique.make(self.lab, seed)
    subject, curve = self.lab.train(run, seed, technique.name)
    is_baseline = technique.name == TRAINED_BASELINE
    if is_baseline:
      self.lab.keep(1.0, seed, subject)
    batches = self.lab.validation(self.config.short_rows)
    runner = Runner(subject, batches[0], decode=self.config.decode)
    return {
      "technique": technique.name,
      "kind": technique.kind,
      "model": "small",
      "seed": seed,
      "step": self.lab.steps(run),
      "loss": curve[-1][1],
      "curve": curve,
      **costs(subject, self.config.short_length),
      **compare(runner, runner if is_baseline else self.baseline, batches),
    }

  @functools.cached_property
  def lab(self) -> Lab:
    c = self.config
    shape = Shape(c.width, c.layers, c.heads, c.vocab, c.short_length, c.batch, c.steps, c.text)
    return Lab(shape)

  @functools.cached_property
  def baseline(self) -> Runner:
    batches = self.lab.validation(self.config.short_rows)
    return Runner(self.lab.fresh(self.lab.dense, 0), batches[0], decode=self.config.decode)


def summarize(measured: list[harness.Row]) -> list[harness.Row]:
  """One row a technique: means over seeds, the standard deviation, and the change to its baseline.

  `change` is that of the perplexity; `spread` the deviation of perplexities over seeds.
  """
  groups: dict[str, list[harness.Row]] = {}
  for row in measured:
    groups.setdefault(row["technique"], []).append(row)
  rows = [_mean(group) for group in groups.values()]
  base = {row["model"]: row["perplexity"] for row in rows if row["kind"] == "baseline"}
  base |= {row["model"]: row["perplexity"] for row in rows if row["technique"] in _BASELINES}
  return [{**row, "change": row["perplexity"] / base[row["model"]] - 1} for row in rows]


_BASELINES = (BASELINE, TRAINED_BASELINE)
_MEANS = ("nll", "prefill_ms", "decode_ms", "prefill_ratio", "decode_ratio")


def _mean(group: list[harness.Row]) -> harness.Row:
  first = group[0]
  perplexities = [math.exp(row["nll"]) for row in group]
  means = {name: statistics.mean(row[name] for row in group) for name in _MEANS}
  kept = {name: first[name] for name in first if name not in ("name", "curve", "seed", "loss")}
  spread = statistics.stdev(perplexities) if len(group) > 1 else None
  summary = {"perplexity": statistics.mean(perplexities), "spread": spread, "seeds": len(group)}
  return {**kept, **means, **summary}


def claims(rows: list[harness.Row]) -> dict[str, bool]:
  """What is expected of the rows that are there, and whether it came out."""
  by_name = {row["technique"]: row for row in rows}
  same = [by_name[t.name] for t in techniques.TECHNIQUES if t.same_function and t.name in by_name]
  found = {}
  if len(same) > 1:
    text = "LoRA at its start, merged LoRA and upcycling keep the perplexity to 0.1 %"
    found[text] = all(abs(row["change"]) < 1e-3 for row in same)
  if "int8" in by_name:
    row = by_name["int8"]
    share = row["bytes"] / by_name[BASELINE]["bytes"]
    text = "int8 raises the perplexity by less than 2 % at less than 0.3 of the bytes"
    found[text] = row["change"] < 0.02 and share < 0.3
  if "trained-moe-8x2" in by_name:
    text = "at equal FLOPs of training, a mixture of experts predicts better than the dense model"
    found[text] = by_name["trained-moe-8x2"]["change"] < 0
  if "trained-distilled" in by_name and "trained-half-depth" in by_name:
    text = "at equal FLOPs, a taught model of half the depth predicts better than an untaught one"
    taught, untaught = by_name["trained-distilled"], by_name["trained-half-depth"]
    found[text] = taught["perplexity"] < untaught["perplexity"]
  return found


def _shown(row: harness.Row) -> harness.Row:
  return {
    **row,
    "±": row["spread"],
    "change %": 100 * row["change"],
    "params M": row["parameters"] / 1e6,
    "active M": row["active"] / 1e6,
    "trainable M": row["trainable"] / 1e6,
    "MB": row["bytes"] / 1e6,
    "MFLOP/token": row["flops_token"] / 1e6,
    "prefill ×": row["prefill_ratio"],
    "decode ×": row["decode_ratio"],
  }


def draw(axes, measured: list[harness.Row]) -> None:
  """Perplexity against bytes and decoding time (pretrained), and against FLOPs (short runs)."""
  rows = summarize(measured)
  pretrained = [row for row in rows if row["model"] != "small"]
  short = [row for row in rows if row["model"] == "small"]
  panels = (
    (pretrained, "bytes", 1e-6, "MB of parameters", "Pretrained: quality against size"),
    (pretrained, "decode_ratio", 1, "decode time, ratio", "Pretrained: quality against time"),
    (short, "flops_token", 1e-6, "MFLOP a token, forward", "Short runs at equal training FLOPs"),
  )
  for ax, (chosen, name, unit, label, title) in zip(axes, panels, strict=True):
    ax.set(xlabel=label, ylabel="perplexity (lower is better)")
    ax.set_title(title)
    _scatter(ax, chosen, name, unit)
  marks = [axes[0].plot([], [], "o", color=COLOURS[kind], label=kind)[0] for kind in COLOURS]
  axes[0].figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))


def _scatter(ax, rows: list[harness.Row], name: str, unit: float) -> None:
  for row in rows:
    colour = COLOURS[row["kind"]]
    x, y = row[name] * unit, row["perplexity"]
    ax.errorbar(x, y, yerr=row["spread"], fmt="o", color=colour, capsize=3, markersize=7)
  if rows:
    ax.margins(x=0.25, y=0.15)
    points = [(row[name] * unit, row["perplexity"]) for row in rows]
    harness.label(ax, points, [row["technique"].removeprefix("trained-") for row in rows])


if __name__ == "__main__":
  harness.main(run, Config())
