"""Variants of a pretrained decoder that are trained on with equal tokens, and what they pay.

A variant is a `peft.methods.Method` all of whose parameters train. It is measured before, and after
training at the best of its rates, which a seed finds that is not used again.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from effjax.core.typing import Array, Params
from effjax.layers.forward import forward
from effjax.models import Transformer
from effjax.train import workdir as files
from experiments.harness import Row
from experiments.lab.subject import Subject
from experiments.lab.verdicts import UNDECIDED, Verdict, deviation, less, paired
from experiments.peft.methods import Method
from experiments.peft.trials import SWEPT, Trials

BEFORE, RATES, RUNS = "before", "rates", "runs"
NATS = "nats/token"


def planned(
  trials: Trials,
  variants: Sequence[Method],
  before: Callable[[Method], Row],
  *,
  multiples: Sequence[float],
  seeds: int,
  folder: Path,
) -> dict[str, Callable[[], Row]]:
  """Name → what measures a row: each variant before, at its rates, and the seeds of all in turn.

  Args:
    trials: of the task.
    variants: what is compared.
    before: what is measured of a variant that was not trained.
    multiples: what each variant's own rate is multiplied by; a single one is not tried before.
    seeds: how many.
    folder: that of the rows, from which the best rate is read.
  """
  tasks: dict[str, Callable[[], Row]] = {}

  def add(name: str, kind: str, variant: Method, call: Callable[[], Row]) -> None:
    same = {"variant": variant.name, "kind": kind}
    tasks[f"{variant.name}: {name}"] = lambda: same | call()

  for variant in variants:
    add("before", BEFORE, variant, functools.partial(before, variant))
    for multiple in multiples if len(multiples) > 1 else []:
      rate = multiple * variant.rate
      call = functools.partial(trials.run, variant, rate, SWEPT)
      add(f"rate × {multiple:g}", RATES, variant, call)
  for seed in range(seeds):
    for variant in variants:
      call = functools.partial(_run, trials, variant, multiples[0], seed, folder)
      add(f"seed={seed}", RUNS, variant, call)
  return tasks


def _run(trials: Trials, variant: Method, multiple: float, seed: int, folder: Path) -> Row:
  swept = of(files.read_rows(folder / files.METRICS), variant.name, RATES)
  finite = lambda row: row[NATS] if math.isfinite(row[NATS]) else math.inf
  rate = min(swept, key=finite)["rate"] if swept else multiple * variant.rate
  return trials.run(variant, rate, seed)


def of(rows: Sequence[Row], variant: str, kind: str) -> list[Row]:
  """The rows of a kind of a variant."""
  return [row for row in rows if (row.get("variant"), row.get("kind")) == (variant, kind)]


def names(rows: Sequence[Row]) -> list[str]:
  """The variants that there are runs of, as they were planned."""
  return list(dict.fromkeys(row["variant"] for row in rows if row["kind"] == RUNS))


def seeds_of(rows: Sequence[Row], *variants: str, column: str = NATS) -> list[list[float]]:
  """What each variant pays, of the seeds that all have."""
  found = [{row["seed"]: row[column] for row in of(rows, name, RUNS)} for name in variants]
  seeds = [seed for seed in found[0] if all(seed in paid for paid in found)]
  return [[paid[seed] for seed in seeds] for paid in found]


def line(rows: Sequence[Row], variant: str, baseline: str) -> Row:
  """A variant's line of the table: before, after, and beside the baseline, paired by seed."""
  (before,), (paid, base) = of(rows, variant, BEFORE), seeds_of(rows, variant, baseline)
  made = {
    **before,
    "before": before[NATS],
    "rate": of(rows, variant, RUNS)[0]["rate"],
    "after": statistics.mean(paid),
    "± seeds": deviation(paid),
  }
  if variant != baseline and all(map(math.isfinite, paid + base)):
    over = paired(paid, base)
    made |= {"over": over.mean, "± 95 %": None if over.spread is None else over.reach}
  return made


def better(rows: Sequence[Row], a: str, b: str) -> Verdict:
  """The verdict on "a pays less than b after training"."""
  own, base = seeds_of(rows, a, b)
  gone = sum(not math.isfinite(x) for x in own + base)
  return Verdict(UNDECIDED, f"{gone} runs diverged") if gone else less(own, base)


def learned(rows: Sequence[Row], variant: str) -> Verdict:
  """The verdict on "training helped"."""
  (own,) = seeds_of(rows, variant)
  start = of(rows, variant, BEFORE)[0][NATS]
  gone = sum(not math.isfinite(x) for x in own)
  return Verdict(UNDECIDED, f"{gone} runs diverged") if gone else less(own, [start] * len(own))


def logits(subject: Subject, batch: dict) -> np.ndarray:
  """What a model makes of a batch, in float64."""
  return np.asarray(_forward(subject.module, subject.params, batch), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _forward(module: Transformer, params: Params, batch: dict) -> Array:
  return forward(module, params, batch)[0]
