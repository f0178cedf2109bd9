"""What does each way of fine-tuning train, keep and take, and what does it reach in equal steps?

  scripts/run peft_compare                                                        (5 minutes)

Two tasks. "continue": a decoder (SmolLM2-135M, which has read English) goes on with a French book,
and pays nats a token on chapters that were held out. "ask": an encoder (all-MiniLM-L6-v2) is asked
with an example sentence of WordNet for the definition of the word in it, among all texts of all
entries that were held out; the word itself, which is the most alike, is the wrong answer. Queries
are encoded by what is trained, documents by the model as it is.

Each method takes equal steps over equal batches, by AdamW without decay. Its rate is the best of a
few multiples of its own in `peft.methods`, on a seed that is not used again. Seeds draw what starts
at random and the order of the text, and differences to LoRA are paired by seed. State is what
trains with both moments of the optimiser, all in float32. A step's time is the median of ratios to
LoRA's, the two in turns.

Measured (`results/peft_compare`, rates 0.5, 2 and 8 times a method's own, 3 seeds): "ask", 12 steps
of 16 queries, all methods. Mean reciprocal ranks rise from 0.290 to 0.404 (Pfeiffer's adapters, the
one method that is better than LoRA by more than its interval), 0.394 (Houlsby's), 0.368 (PiSSA),
0.359 (everything, with 68 times LoRA's state), 0.358 (LoRA), 0.357 (DoRA, a step of which takes 1.3
times LoRA's), 0.356 (BitFit, which trains 0.11 %), 0.349 (LoRA experts), 0.340 (prefix), 0.325
(soft prompt) and 0.323 (IA³, worse than LoRA by more than its interval). "continue", 6 steps of 128
tokens, all methods: nats fall from 4.566 to 4.218 (soft prompt, which trains 0.007 %), 4.302
(Pfeiffer's), 4.305 (Houlsby's), 4.325 (rsLoRA), 4.326 (PiSSA), 4.332 (LoRA experts), 4.344 (DoRA),
4.346 (LoRA), 4.351 (LoRA with dropout), 4.380 (everything, worse than LoRA by more than its
interval) and 4.420 (IA³), and rise to 5.100 with a prefix, whose keys and values start at random
and are in the way until they are trained. This is little training: adapters, prefixes,
experts and IA³ were best at the highest rate that was tried on "ask", BitFit at the lowest. Each
interval is of one comparison among many. Times were taken on a busy machine.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.lab.plots import LINEAR, LOG, Axis, Line, Panel, Series, differences
from experiments.lab.verdicts import UNDECIDED, Verdict, deviation, less, paired
from experiments.peft.methods import METHODS, Method, refusal
from experiments.peft.tasks import Asking, Continuing, Task
from experiments.peft.trials import BASELINE, SWEPT, Trials

AS_IT_IS, FULL = "as it is", "full"
COSTS, RATES, RUNS = "costs", "rates", "runs"
TASKS: Mapping[str, type[Task]] = {"continue": Continuing, "ask": Asking}
COLUMNS = {
  "task": "",
  "method": "",
  "trained": ",d",
  "share": ".3%",
  "state MB": ",.2f",
  "step ×": ".2f",
  "rate": ".2g",
  "score": ".4f",
  "± seeds": ".4f",
  "gain": "+.4f",
  "over LoRA": "+.4f",
  "± 95 %": ".4f",
}


@dataclasses.dataclass
class Config:
  """What is compared.

  Attributes:
    tasks: "continue", "ask", or both, comma-separated.
    methods: names of `peft.methods`, or all that suit a model; LoRA is always there.
    decoder, encoder: a name or path for `models.load`, or a preset such as "tiny".
    text: a source of `data.text`, which the decoder goes on with.
    rows, length, batch: rows that are held out of it; tokens of a row; rows of a step.
    domain, question: of the entries, and which part asks for which, see `data.pairs`.
    entries, queries, words, group: entries that are trained on, and that are held out; tokens of a
      text; queries of a step.
    steps, asked: steps of a run of the first task, and of the second.
    rates: what each method's own rate is multiplied by, comma-separated.
    seeds: how many.
    turns: steps that are timed, in turns with LoRA's.
  """

  tasks: str = "continue,ask"
  methods: str = "lora,ia3,pfeiffer"
  decoder: str = "smollm2-135m"
  encoder: str = "minilm"
  text: str = "debian-handbook/fr-FR"
  rows: int = 4
  length: int = 64
  batch: int = 2
  domain: str = "wordnet"
  question: str = "explain"
  entries: int = 200
  queries: int = 100
  words: int = 24
  group: int = 16
  steps: int = 6
  asked: int = 12
  rates: str = "2"
  seeds: int = 2
  turns: int = 2


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A line a task and method; writes `metrics.jsonl`, `result.csv`, `plot.png` and origins."""
  tasks = harness.chosen(config.tasks, TASKS, what="task")
  methods = harness.chosen(config.methods, METHODS, what="method")
  multiples = harness.numbers("rates", config.rates, least=0)
  for name in ("seeds", "turns", "steps", "asked"):
    if (given := getattr(config, name)) < 1:
      raise ValueError(f"{name}={given}; allowed: from 1")
  folder = files.claim(workdir, config, free=("tasks", "methods", "seeds"))
  for name in tasks:
    trials = trials_of(config, name)
    provenance.write(_folder(folder, name), trials.task.corpus)
    names = list(dict.fromkeys([BASELINE, *methods]))
    harness.compute(folder, planned(name, trials, names, multiples, config, folder), label=name)
  measured = files.read_rows(folder / files.METRICS)
  rows = summary(measured)
  harness.plot(folder, panels)
  harness.finish(folder, rows, COLUMNS, claims(measured))
  harness.write_csv(folder, rows)
  return rows


def _folder(folder: Path, task: str) -> Path:
  """Where the origin of a task's text is said."""
  files.make(folder / task)
  return folder / task


def trials_of(config: Config, name: str) -> Trials:
  """The runs of a task."""
  c = config
  if TASKS[name] is Continuing:
    sizes: Any = {"rows": c.rows, "length": c.length, "batch": c.batch}
    return Trials(Continuing(c.decoder, c.text, **sizes), c.steps)
  asked: Any = {"entries": c.entries, "queries": c.queries, "length": c.words, "batch": c.group}
  return Trials(Asking(c.encoder, c.domain, c.question, **asked), c.asked)


def planned(
  task: str,
  trials: Trials,
  methods: list[str],
  multiples: list[float],
  config: Config,
  folder: Path,
) -> dict[str, Callable[[], harness.Row]]:
  """Name → what measures a row: costs and rates of each method, then the seeds of all in turn."""
  every: dict[str, tuple[harness.Row, Callable[[], harness.Row]]] = {}

  def add(what: str, method: str, kind: str, call: Callable[[], harness.Row]) -> None:
    row = {"task": task, "method": method, "kind": kind, "metric": trials.task.metric}
    every[f"{task}: {method}{what and ', ' + what}"] = (row | {"sign": trials.task.sign}, call)

  add("", AS_IT_IS, RUNS, trials.as_it_is)
  suited = [name for name in methods if refusal(METHODS[name], trials.task.subject) is None]
  for name in suited:
    method = METHODS[name]
    add("costs", name, COSTS, functools.partial(_costs, trials, method, config.turns))
    for multiple in multiples:
      call = functools.partial(trials.run, method, multiple * method.rate, SWEPT)
      add(f"rate × {multiple:g}", name, RATES, call)
  for seed in range(config.seeds):
    for name in suited:
      add(f"seed={seed}", name, RUNS, functools.partial(_run, folder, trials, task, name, seed))
  return {key: functools.partial(_joined, *parts) for key, parts in every.items()}


def _joined(row: harness.Row, call: Callable[[], harness.Row]) -> harness.Row:
  return row | call()


def _costs(trials: Trials, method: Method, turns: int) -> harness.Row:
  return trials.keeps(method) | trials.takes(method, turns)


def _run(folder: Path, trials: Trials, task: str, method: str, seed: int) -> harness.Row:
  """A run at the rate that the sweep, which is on disk by now, found best."""
  rows = Found(files.read_rows(folder / files.METRICS))
  return trials.run(METHODS[method], rows.rate(task, method), seed)


class Found:
  """Rows, by task, method and kind."""

  def __init__(self, rows: list[harness.Row]):
    self._rows = rows

  def of(self, task: str, method: str, kind: str) -> list[harness.Row]:
    same = lambda row: (row["task"], row["method"], row["kind"]) == (task, method, kind)
    return [row for row in self._rows if same(row)]

  @property
  def tasks(self) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in self._rows))

  def methods(self, task: str) -> list[str]:
    """Those with a run, as they are listed."""
    known = {row["method"] for row in self._rows if (row["task"], row["kind"]) == (task, RUNS)}
    return [name for name in METHODS if name in known]

  def rate(self, task: str, method: str) -> float:
    """The rate with the best score of the sweep; one that diverged never is."""
    rows = self.of(task, method, RATES)
    paid = lambda row: row["sign"] * row[row["metric"]]
    return min(rows, key=lambda row: paid(row) if math.isfinite(paid(row)) else math.inf)["rate"]

  def scores(self, task: str, method: str) -> dict[int | None, float]:
    """Seed → score, that of the model as it is under None."""
    return {row.get("seed"): row[row["metric"]] for row in self.of(task, method, RUNS)}

  def paired(self, task: str, *methods: str) -> list[list[float]]:
    """What each method pays, of the seeds that all have; scores that rise are negated."""
    found = [self.scores(task, method) for method in methods]
    seeds = [seed for seed in found[0] if all(seed in scores for scores in found)]
    return [[self.sign(task) * scores[seed] for seed in seeds] for scores in found]

  def sign(self, task: str) -> int:
    return next(row["sign"] for row in self._rows if row["task"] == task)

  def start(self, task: str) -> float:
    """The score of the model as it is."""
    return self.scores(task, AS_IT_IS)[None]


def summary(measured: list[harness.Row]) -> list[harness.Row]:
  """A line a task and method."""
  found, lines = Found(measured), []
  for task in found.tasks:
    lines.append({"task": task, "method": AS_IT_IS, "score": found.start(task)})
    lines += [_line(found, task, method) for method in found.methods(task)]
  return lines


def _line(found: Found, task: str, method: str) -> harness.Row:
  scores = list(found.scores(task, method).values())
  mean = statistics.mean(scores)
  line = {
    "task": task,
    "method": method,
    "kind": METHODS[method].kind,
    "rate": found.rate(task, method),
    "score": mean,
    "± seeds": deviation(scores),
    "gain": found.sign(task) * (found.start(task) - mean),
  }
  for costs in found.of(task, method, COSTS):
    line |= {name: costs[name] for name in ("trained", "share")}
    line |= {"state MB": costs["state_bytes"] / 1e6, "step ×": costs["step_ratio"]}
  own, base = found.paired(task, method, BASELINE)
  if method != BASELINE and own and all(map(math.isfinite, own + base)):
    over = paired(base, own)
    line |= {"over LoRA": over.mean, "± 95 %": None if over.spread is None else over.reach}
  return line


def claims(measured: list[harness.Row]) -> dict[str, bool | Verdict]:
  """Of every method that it is better than no training, and how it stands to LoRA."""
  found, said = Found(measured), dict[str, bool | Verdict]()
  for task in found.tasks:
    methods = found.methods(task)
    for method in methods:
      (own,) = found.paired(task, method)
      before = [found.sign(task) * found.start(task)] * len(own)
      said[f"{task}: {method} is better than no training"] = _less(own, before)
    for method in methods:
      own, base = found.paired(task, method, BASELINE)
      if method != BASELINE and own:
        said[f"{task}: {method} is better than LoRA"] = _less(own, base)
  return said


def _less(a: list[float], b: list[float]) -> Verdict:
  gone = sum(not math.isfinite(x) for x in a + b)
  return Verdict(UNDECIDED, f"{gone} runs diverged") if gone else less(a, b)


def panels(measured: list[harness.Row]) -> list[Panel]:
  """Of each task what is gained against what trains, and against the rate; the verdicts."""
  found, shown = Found(measured), []
  for task in found.tasks:
    lines = [line for line in summary(measured) if line["task"] == task and "share" in line]
    words = f"{task}: gain in {next(r['metric'] for r in measured if r['task'] == task)}"
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    shown.append(
      Panel(
        f"{task}: what is reached",
        Axis("parameters that train", LOG),
        Axis(words),
        [_points(kind, [line for line in lines if line["kind"] == kind]) for kind in kinds],
        [Line("no training", y=0.0)],
        bars="standard deviation over seeds",
      )
    )
    shown.append(
      Panel(
        f"{task}: which rate",
        Axis("multiple of a method's own rate", LOG),
        Axis(words, LINEAR),
        [_swept(found, task, line["method"]) for line in lines],
        [Line("no training", y=0.0)],
      )
    )
  against = {claim: verdict for claim, verdict in claims(measured).items() if "LoRA" in claim}
  return shown + differences("Verdicts", "what is paid beyond LoRA", against)


def _points(kind: str, lines: list[harness.Row]) -> Series:
  column = lambda name: [line[name] for line in lines]
  spread = [line["± seeds"] or 0.0 for line in lines]
  options: Any = {"joined": False, "names": column("method")}
  return Series(kind, column("trained"), column("gain"), spread, **options)


def _swept(found: Found, task: str, method: str) -> Series:
  rows = sorted(found.of(task, method, RATES), key=lambda row: row["rate"])
  multiples = [row["rate"] / METHODS[method].rate for row in rows]
  gains = [row["sign"] * (found.start(task) - row[row["metric"]]) for row in rows]
  return Series(method, multiples, gains)


if __name__ == "__main__":
  harness.main(run, Config())
