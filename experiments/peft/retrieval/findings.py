"""What the rows of `modular_retrieval` say: means over combinations, verdicts, panels."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from effjax.data import pairs
from experiments.harness import Row
from experiments.lab.plots import LINEAR, Axis, Line, Panel, Series, differences
from experiments.lab.verdicts import Verdict, interval, less
from experiments.peft.retrieval.study import (
  BASE,
  FIRST,
  GENERAL,
  MIXED,
  MODULES,
  NO_DOMAIN,
  NO_TASK,
  OTHER_DOMAIN,
  OWN,
)
from experiments.peft.retrieval.task import Cell, word

OTHER_TASK = "another task's"
KINDS = (BASE, FIRST, GENERAL, MODULES, MIXED, OWN, NO_DOMAIN, OTHER_DOMAIN, NO_TASK, OTHER_TASK)
HELD_OUT, SEEN = "held out", "seen"
METRICS = ("mrr", "recall@1", "recall@10", "prefers")


class Findings:
  """The measured values by kind, seed and combination.

  Attributes:
    rows: as measured.
    held_out: seed → the combinations that it did not train together.
    tasks: those of the grid.
  """

  def __init__(self, rows: Sequence[Row], held_out: Mapping[int, Sequence[Cell]]):
    self.rows = [row for row in rows if "cells" in row and row["seed"] in (None, *held_out)]
    self.held_out = {seed: {*map(word, cells)} for seed, cells in held_out.items()}
    self.tasks = sorted({name.rsplit("/", 1)[1] for row in self.rows for name in row["cells"]})

  def values(self, kind: str, group: str | None, metric: str) -> dict[tuple[int, str], float]:
    """Seed and combination → value, of those that are held out, seen, or both."""
    found = {}
    for seed, cell, measured in self._measured(kind):
      held = cell in self.held_out[seed]
      if metric in measured and group in (None, HELD_OUT if held else SEEN):
        found[seed, cell] = measured[metric]
    return found

  def means(
    self, kind: str, group: str | None, metric: str, beside: str | None = None
  ) -> list[float]:
    """The mean of each seed over its combinations, those alone that `beside` has too."""
    values = self.values(kind, group, metric)
    also = values if beside is None else self.values(beside, group, metric)
    each: dict[int, list[float]] = {}
    for (seed, cell), value in values.items():
      if (seed, cell) in also:
        each.setdefault(seed, []).append(value)
    return [float(np.mean(each[seed])) for seed in sorted(each)]

  def better(self, first: str, second: str, group: str | None) -> Verdict | None:
    """The verdict on "`first` finds better than `second`", of what both have; None of nothing."""
    ours = self.means(first, group, "mrr", beside=second)
    theirs = self.means(second, group, "mrr", beside=first)
    return less(theirs, ours) if ours and len(ours) == len(theirs) else None

  def _measured(self, kind: str) -> Iterator[tuple[int, str, dict[str, float]]]:
    for row in self.rows:
      if row["kind"] == (MODULES if kind == OTHER_TASK else kind):
        for seed in self.held_out if row["seed"] is None else [row["seed"]]:
          for cell, measured in row["cells"].items():
            if kind != OTHER_TASK:
              yield seed, cell, measured
            elif (other := sibling(cell, self.tasks)) in row["cells"]:
              found = row["cells"][other]
              yield seed, cell, {"mrr": found["mrr of other"], "prefers": 1 - found["prefers"]}


def sibling(cell: str, tasks: Sequence[str]) -> str | None:
  """The combination that asks with the same part for the other one; None where there is none."""
  domain, task = cell.rsplit("/", 1)
  asks = pairs.parts(task)[0]
  others = [x for x in tasks if x != task and pairs.parts(x)[0] == asks]
  return f"{domain}/{others[0]}" if others else None


def summary(found: Findings) -> list[Row]:
  """A row a kind: means over seeds of what held-out and seen combinations find, ± 95 %."""
  rows = []
  for kind in KINDS:
    row: Row = {"kind": kind}
    for group in (HELD_OUT, SEEN):
      for metric in METRICS:
        if values := found.means(kind, group, metric):
          row[f"{group} {metric}"] = interval(values).mean
          if metric == "mrr" and len(values) > 1:
            row[f"{group} ±"] = interval(values).reach
    rows.append(row)
  return [row for row in rows if len(row) > 1]


def claims(found: Findings) -> dict[str, Verdict]:
  """The paper's two, generalisation and interpretation, each in several."""
  wanted = {
    "held out: modules find better than the general prefix": (MODULES, GENERAL, HELD_OUT),
    "held out: modules find better than the model as it is": (MODULES, BASE, HELD_OUT),
    "held out: training on it finds better than modules": (OWN, MODULES, HELD_OUT),
    "held out: weights learned on it find better than modules": (MIXED, MODULES, HELD_OUT),
    "seen: modules find better than the general prefix": (MODULES, GENERAL, SEEN),
    "seen: training on it finds better than modules": (OWN, MODULES, SEEN),
    "without the domain's module it is worse": (MODULES, NO_DOMAIN, None),
    "with another domain's module it is worse": (MODULES, OTHER_DOMAIN, None),
    "without the task's module it is worse": (MODULES, NO_TASK, None),
    "with another task's module it is worse": (MODULES, OTHER_TASK, None),
  }
  judged = {text: found.better(*names) for text, names in wanted.items()}
  said = {text: verdict for text, verdict in judged.items() if verdict is not None}
  for group in (HELD_OUT, SEEN):
    if prefers := found.means(MODULES, group, "prefers", beside=OTHER_TASK):
      text = f"{group}: a task's module prefers the part that the task asks for"
      said[text] = less([0.5] * len(prefers), prefers)
  if alike := [row for row in map(likeness, found.rows) if row is not None]:
    same, different = zip(*alike, strict=True)
    said["modules of tasks with one answer are more alike than others"] = less(different, same)
  return said


def likeness(row: Row) -> tuple[float, float] | None:
  """Mean cosines of the modules of tasks with the same answer, and of other tasks."""
  if "cosines" not in row:
    return None
  tasks = row["tasks"]
  cosines = np.array(row["cosines"])[-len(tasks) :, -len(tasks) :]
  answers = [pairs.parts(task)[1] for task in tasks]
  same, different = [], []
  for i in range(len(tasks)):
    for j in range(i):
      (same if answers[i] == answers[j] else different).append(cosines[i, j])
  return (float(np.mean(same)), float(np.mean(different))) if same and different else None


def panels(rows: Sequence[Row], held_out: Mapping[int, Sequence[Cell]]) -> list[Panel]:
  """How well each kind finds, which part of an entry it prefers, losses, and the verdicts."""
  found = Findings(rows, held_out)
  places = {-float(number): row["kind"] for number, row in enumerate(summary(found))}
  kinds = Axis("prefix", LINEAR, places)
  chance = Line("no preference", x=0.5)
  return [
    Panel(
      "What is found",
      Axis("mean reciprocal rank"),
      kinds,
      _series(found, places, "mrr"),
      bars="95 % interval of the mean over seeds",
    ),
    Panel(
      "Which part of an entry",
      Axis("share of queries that prefer the right part"),
      kinds,
      _series(found, places, "prefers"),
      [chance],
      bars="95 % interval of the mean over seeds",
    ),
    Panel("Training", Axis("step of a stage"), Axis("loss (nats)"), _losses(rows)),
    *differences("Verdicts", "what the claim calls less, less the other", claims(found)),
  ]


def _series(found: Findings, places: Mapping[float, str], metric: str) -> list[Series]:
  series = []
  for group in (HELD_OUT, SEEN):
    values = {place: found.means(kind, group, metric) for place, kind in places.items()}
    known = {place: interval(x) for place, x in values.items() if x}
    reach = [x.reach if x.spread is not None else None for x in known.values()]
    means = [x.mean for x in known.values()]
    series.append(Series(group, means, list(known), reach, along="x", joined=False))
  return series


def _losses(rows: Sequence[Row]) -> list[Series]:
  """Mean losses of the stages of all seeds, by step."""
  each: dict[str, dict[int, dict[str, float]]] = {}
  for row in rows:
    if "loss" in row:
      kind = row["of"].split(": ", 1)[1].split(", ")
      name = next(k for k in KINDS if ", ".join(kind).startswith(k))
      each.setdefault(name, {}).setdefault(row["step"], {})[row["of"]] = row["loss"]
  return [
    Series(name, list(steps), [float(np.mean([*x.values()])) for x in steps.values()])
    for name, steps in each.items()
  ]
