"""What does each sparse pattern of attention cost in perplexity, and how far past its length?

  scripts/run sparse_attention_lm                                       (about 3½ minutes)
  scripts/run sparse_attention_lm --config.patterns=full,window         (some; finished rows stay)

A small language model is trained with each pattern on as many tokens of the same text, over several
seeds, by default for a fraction of the tokens that a verdict wants. It then reads held-out text in
contexts of 1, 2 and 4 times the length of training: the very same tokens each time, so that a model
that uses more context does better with it. Positions are rotary, except for linear attention, which
has none. Linformer is left out: its projected keys hold all positions, so it cannot be causal.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from effjax import cost, data
from effjax.attention import (
  LSRA,
  Attention,
  BigBird,
  LinearAttention,
  Longformer,
  ShiftedSparseAttention,
  masks,
)
from effjax.layers import Rope
from effjax.models import TransformerConfig
from effjax.train import perplexity
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import budget, provenance, training
from experiments.lab.budget import Spending
from experiments.lab.plots import LOG, Axis, Line, Panel, Series, differences
from experiments.lab.study import Run, Study
from experiments.lab.subject import Subject, token_nll
from experiments.lab.verdicts import Verdict, deviation, predicts_better

TIMES = (1, 2, 4)  # contexts, in lengths of training
FULL = "full"


@dataclasses.dataclass
class Config:
  """What is trained and measured.

  Attributes:
    patterns: names in `mixers`, comma-separated, or "all".
    text: a source of `data.text`; its training split trains, its validation split measures.
    seeds: of each pattern.
    tokens_per_parameter: of every run; 20 for a verdict.
    minutes: in which all runs are to end on two cores; it decides their size.
    window: keys that a token sees in the local patterns, itself included.
    rows: rows of four times the length of training of held-out tokens.
  """

  patterns: str = "all"
  text: str = "libraries"
  seeds: int = 4
  tokens_per_parameter: float = 0.5
  minutes: float = 1.5
  window: int = 16
  rows: int = 64


def mixers(heads: int, window: int) -> dict[str, Any]:
  """The attention of each pattern. The local ones let a token see about as many keys."""
  rope, back = Rope(1e4), window - 1
  gaps = (1,) * (heads - heads // 2) + (4,) * (heads // 2)
  attention = functools.partial(Attention, heads, rope=rope)
  local = masks.SlidingWindow(back, back)
  return {
    FULL: attention(mask=masks.Causal()),
    "window": attention(mask=masks.longformer(back, causal=True)),
    "dilated": attention(mask=masks.longformer(back, dilation=gaps, causal=True)),
    "longformer": Longformer(heads, rope=rope, mask=local, positions=1, causal=True),
    "bigbird": BigBird(heads, rope=rope, block=max(window // 2, 1), number=1),
    "longlora": ShiftedSparseAttention(heads, rope=rope, group=2 * window),
    "lsra": LSRA(heads // 2, kernel=window - 1, rope=rope),
    "linear": LinearAttention(heads),
  }


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row for each pattern and seed; writes `metrics.jsonl`, `result.csv`, `plot.png`."""
  names = list(mixers(1, 1))
  chosen = harness.chosen(config.patterns, names, what="pattern")
  given = config.tokens_per_parameter
  runs = len(names) * config.seeds
  rung = budget.largest(runs, tokens_per_parameter=given, minutes=config.minutes)
  training.use_every_core()
  folder = files.claim(workdir, config, free=("patterns",))
  corpus, seeds = data.text(config.text), range(config.seeds)
  provenance.write(folder, corpus)
  study = Study(rung, corpus, tokens_per_parameter=given, seeds=seeds, folder=folder)
  held_out = study.held_out(config.rows, length=max(TIMES) * rung.length).batches
  tasks: dict[str, Callable[[], harness.Row]] = {}
  for name in chosen:
    tasks |= study.tasks(name, functools.partial(trained, config, study, held_out, name))
  rows = harness.compute(folder, tasks, label="runs")
  harness.plot(folder, panels)
  harness.write_csv(folder, rows)
  columns = {"pattern": "", "MFLOP/token": ",.3f"}
  columns |= {f"{sign}{t}×": ".2f" for t in TIMES for sign in ("", "± ")}
  print(f"\n{budget.title(rung, given, config.seeds)}")
  harness.finish(folder, summarize(rows), columns, claims(rows))
  return rows


def trained(config: Config, study: Study, held_out: list, name: str) -> list[harness.Row]:
  """Trains one pattern, and reads the held-out text in every context with each seed."""
  length, context = study.rung.length, max(TIMES) * study.rung.length
  mixer = mixers(study.rung.heads, config.window)[name]
  start = study.fresh(with_mixer(study.dense, mixer, context))
  subject = study.trained(name, Run(start, spending=Spending(equal="tokens")))
  common = {"pattern": name, "flops_token": cost.flops(subject.config, length)}
  models = map(subject.at, range(len(study.seeds)))
  return [{**common, **measured(model, held_out, length)} for model in models]


def measured(model: Subject, held_out: list, length: int) -> harness.Row:
  """Nats a token in every context, and in the longest by the number of tokens before."""
  row: harness.Row = {"edges": [0, *(length * 2**i // 8 for i in range(5)), max(TIMES) * length]}
  for times in TIMES:
    nll, weight, before = read(model, held_out, times * length)
    row[f"nll {times}"] = float((nll * weight).sum() / weight.sum())
  which = np.digitize(before, row["edges"][1:-1])
  sums = [np.bincount(which, x, len(row["edges"]) - 1) for x in (nll * weight, weight)]
  row["nll by position"] = [float(a / b) if b else None for a, b in zip(*sums, strict=True)]
  return row


def with_mixer(config: TransformerConfig, mixer: Any, context: int) -> TransformerConfig:
  """`config` with another attention in every layer, for sequences of up to `context` tokens."""
  layers = tuple(dataclasses.replace(layer, mixer=mixer) for layer in config.layers)
  return dataclasses.replace(config, layers=layers, context=context, family=None)


def read(subject: Subject, batches: list, context: int) -> list[np.ndarray]:
  """Loss, weight and number of visible earlier tokens of each held-out token.

  The rows of the batches are cut into rows of `context` tokens.
  """
  parts = []
  for batch in batches:
    cut = {name: x.reshape(-1, context) for name, x in batch.items()}
    before = np.minimum(cut["positions"], np.arange(context)[None])
    parts.append((token_nll(subject.module, subject.params, cut), cut["weights"], before))
  return [np.concatenate(list(map(np.ravel, x))) for x in zip(*parts, strict=True)]


def summarize(rows: list[harness.Row]) -> list[harness.Row]:
  """A row for each pattern: mean and standard deviation of the perplexities of its seeds."""
  table = []
  for name in dict.fromkeys(row["pattern"] for row in rows):
    seeds = [row for row in rows if row["pattern"] == name]
    line = {"pattern": name, "MFLOP/token": seeds[0]["flops_token"] / 1e6}
    for times in TIMES:
      values = [perplexity(row[f"nll {times}"]) for row in seeds]
      line[f"{times}×"] = statistics.mean(values)
      line[f"± {times}×"] = deviation(values)
    table.append(line)
  return table


def claims(rows: list[harness.Row]) -> dict[str, Verdict]:
  """What is said of the patterns that were measured, judged over seeds."""
  nll: dict[str, dict[int, list[float]]] = {}
  for row in rows:
    values = nll.setdefault(row["pattern"], {times: [] for times in TIMES})
    for times in TIMES:
      values[times].append(row[f"nll {times}"])
  most, found = max(TIMES), {}
  if FULL in nll:
    for name in [name for name in nll if name != FULL]:
      text = f"full attention predicts better than {name} at the length of training"
      found[text] = predicts_better(nll[FULL][1], nll[name][1])
    text = f"full attention gets worse at {most} times its length"
    found[text] = predicts_better(nll[FULL][1], nll[FULL][most])
  if "window" in nll:
    text = f"a window gets no worse than by 1 % at {most} times its length"
    allowed = [x + math.log(1.01) for x in nll["window"][1]]
    found[text] = predicts_better(nll["window"][most], allowed)
    for name, what in (("longformer", "a global token"), ("bigbird", "drawing random blocks")):
      if name in nll:
        found[f"{what} helps beside a window"] = predicts_better(nll[name][1], nll["window"][1])
  return found


def panels(rows: list[harness.Row]) -> list[Panel]:
  """Perplexity in each context, and by tokens before in the longest one; what verdicts judge."""
  lines = {line["pattern"]: line for line in summarize(rows)}
  contexts = [
    Series(name, TIMES, [line[f"{t}×"] for t in TIMES], [line[f"± {t}×"] for t in TIMES])
    for name, line in lines.items()
  ]
  trained = {name: line["1×"] for name, line in lines.items()}
  bounds = []
  if FULL in lines:
    bounds.append(Line(f"{FULL} at the length of training", y=trained[FULL]))
  if "window" in lines:
    bounds.append(
      Line("1 % above the window at the length of training", y=1.01 * trained["window"])
    )
  edges = rows[0]["edges"] if rows else [0, 1]
  middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
  positions = []
  for name in lines:
    curves = np.array([row["nll by position"] for row in rows if row["pattern"] == name], float)
    positions.append(Series(name, middles, [perplexity(nll) for nll in curves.mean(axis=0)]))
  length = edges[-1] / max(TIMES)
  return [
    Panel(
      "The same text in longer contexts",
      Axis("context, in lengths of training", LOG, {t: f"{t}×" for t in TIMES}),
      Axis("perplexity of held-out text"),
      contexts,
      bounds,
      bars="standard deviation over seeds",
    ),
    Panel(
      f"By position, in the context of {max(TIMES)}×",
      Axis("tokens before, middle of a bin", LOG, {x: f"{x:g}" for x in middles}),
      Axis("perplexity of held-out text"),
      positions,
      [Line("length of training", x=length)],
    ),
    *differences("What the verdicts are about", "difference, nats a token", claims(rows)),
  ]


if __name__ == "__main__":
  harness.main(run, Config())
